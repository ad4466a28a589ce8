"""The model that comes along: its files, its scores, its card, and the command that makes it."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import aftersam
from aftersam.data.phantom import write_dataset
from aftersam.demo import main as demo
from aftersam.evaluation.scoring import score_folder
from aftersam.files import write_json
from aftersam.model import run_folder
from aftersam.model.run_folder import find_run, read_run
from aftersam.predict import main as predict
from benchmarks import headneck

ROOT = Path(__file__).resolve().parents[1]
OPENKBP = ROOT.parent / "shared" / "data" / "OpenKBP7"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCORES = json.loads((headneck.HELD_OUT / "metrics.json").read_text())


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """What README's `aftersam demo --real` leaves."""
    assert "\naftersam demo --real\n" in README
    out = tmp_path_factory.mktemp("demo")
    assert demo(["--real", "-o", str(out), "--device", "cpu"]) == 0
    return out


def test_the_demo_segments_a_real_scan_that_no_training_saw(shipped):
    home = find_run("headneck")
    (mask,) = (shipped / "real").glob("*.nii.gz")
    scan = nib.load(next((home / "imagesTr").glob("*.nii.gz")))
    assert nib.load(mask).shape == scan.shape
    assert np.array_equal(nib.load(mask).affine, scan.affine)
    metrics = score_folder(shipped / "real", home / "labelsTr", quiet=True)
    assert metrics["mean_dsc"] > 0.75
    assert set(metrics["organs"]) == set(read_run(home)[1].names.values())
    assert (shipped / "real.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_is_told_again(shipped):
    assert demo(["--real", "-o", str(shipped), "--device", "cpu"]) == 0


def test_its_card_and_readme_have_the_scores_of_the_held_out_scans():
    card = (find_run("headneck") / "README.md").read_text()
    mean = 100 * SCORES["mean_dsc"]
    assert f"| **mean** | {mean:.1f} |" in card
    for name, organ in SCORES["organs"].items():
        assert f"| {name} | {100 * organ['dsc']:.1f} |" in card
    assert f"mean DSC {mean:.1f} %" in README


def test_air_has_no_organs_and_another_size_is_no_error():
    model = aftersam.load("headneck", device="cpu")
    air = np.full((40, 50, 9), -1000, np.int16)
    mask = model.predict(air, np.diag([3.0, 3.0, 5.0, 1.0]))
    assert mask.shape == air.shape
    assert not np.asarray(mask.dataobj).any()


def test_without_a_model_the_command_says_which_there_are(tmp_path, capsys):
    assert predict(["-i", str(tmp_path), "-o", str(tmp_path / "masks")]) == 2
    said = capsys.readouterr().err
    assert "headneck" in said
    assert "Mandible" in said


@pytest.mark.long
@pytest.mark.skipif(not OPENKBP.is_dir(), reason="OpenKBP is not here")
def test_the_held_out_scores_can_be_had_again(tmp_path):
    from aftersam.data.dataset import find_dataset, link_cases, split

    dataset = find_dataset(OPENKBP)
    link_cases(dataset, split(dataset, 0, 0)[1], tmp_path)
    masks = tmp_path / "masks"
    assert predict(["-i", str(tmp_path / "images"), "-o", str(masks), "-m", str(headneck.HELD_OUT)]) == 0
    assert score_folder(masks, tmp_path / "labels")["mean_dsc"] == pytest.approx(SCORES["mean_dsc"], abs=1e-3)


def test_one_command_trains_scores_and_ships_it(tmp_path, monkeypatch):
    write_dataset(tmp_path / "scans", cases=4, seed=0)
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (tmp_path / "scans" / "labelsTr").glob("*.nii.gz"))
    write_json(tmp_path / "scans" / "splits_final.json", [{"train": cases[:2], "val": cases[2:]}])
    for module in (headneck, run_folder):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(headneck, "HELD_OUT", tmp_path / "results" / "headneck")
    monkeypatch.setattr(headneck, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(headneck, "preset", lambda _: aftersam.config.preset("tiny"))
    flags = [
        "--data",
        str(tmp_path / "scans"),
        "-o",
        str(tmp_path / "out"),
        "--max-steps",
        "2",
        "--device",
        "cpu",
    ]
    assert headneck.main([*flags, "--demo-scan", cases[0]]) == 2  # which would be trained on
    assert headneck.main([*flags, "--demo-scan", cases[2]]) == 0
    splits = json.loads((tmp_path / "out" / "shipped" / "splits_final.json").read_text())
    assert splits[1] == {"train": [cases[0], cases[1], cases[3]], "val": [cases[2]]}
    home = tmp_path / "weights" / "headneck"
    assert (home / "imagesTr" / f"{cases[2]}_0000.nii.gz").is_file()
    scores = json.loads((tmp_path / "results" / "headneck" / "metrics.json").read_text())
    assert f"{100 * scores['mean_dsc']:.1f}" in (home / "README.md").read_text()
    assert (tmp_path / "docs" / "headneck.png").is_file()
    before = (home / "best.safetensors").read_bytes()
    assert headneck.main([*flags, "--demo-scan", cases[2]]) == 0  # nothing is trained again
    assert (home / "best.safetensors").read_bytes() == before
