"""The model that comes along: its files, its scores, its card, and the command that makes it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import aftersam
from aftersam.data.phantom import write_dataset
from aftersam.demo import main as demo
from aftersam.evaluation.scoring import score_folder
from aftersam.export import main as export
from aftersam.files import read_json, write_json
from aftersam.model import run_folder
from aftersam.model.run_folder import find_run, read_run
from aftersam.predict import main as predict
from aftersam.train import main as train
from benchmarks import headneck

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
OPENKBP = DATA / "OpenKBP7"
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


def test_the_demo_is_told_again_in_a_folder_of_the_models_name(shipped, monkeypatch):
    """A folder that holds a run, too."""
    (shipped / "headneck").mkdir()
    shutil.copy(find_run("headneck") / "config.json", shipped / "headneck")
    monkeypatch.chdir(shipped)
    assert demo(["--real", "-o", "headneck", "--device", "cpu"]) == 0
    assert (shipped / "headneck" / "real.png").is_file()


def test_the_scan_that_comes_along_has_its_licence_beside_it():
    licence = (find_run("headneck") / headneck.DATA_LICENCE).read_text()
    assert licence == headneck.MIT
    assert "Permission is hereby granted, free of charge" in licence


def test_it_is_exported_by_its_name(tmp_path):
    assert export(["-m", "headneck", "-o", str(tmp_path / "run"), "--format", "weights"]) == 0
    assert read_run(tmp_path / "run") == read_run(find_run("headneck"))


def test_a_training_from_it_validates_and_calibrates(tmp_path):
    """Its own training had no validations, and limits of another machine."""
    home, data = find_run("headneck"), tmp_path / "data"
    (scan,), (label,) = (home / "imagesTr").iterdir(), (home / "labelsTr").iterdir()
    for case in ("a", "b"):
        for folder, file in (("images", scan), ("labels", label)):
            (data / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, data / folder / f"{case}.nii.gz")
    write_json(data / "splits_final.json", [{"train": ["a"], "val": ["b"]}])
    names = {name: value for value, name in read_run(home)[1].names.items()}
    write_json(data / "dataset.json", {"labels": names})
    command = ["--data", str(data), "-o", str(tmp_path / "run"), "--init", "headneck", "--device", "cpu"]
    assert train([*command, "--max-steps", "1", "--learning-rate", "1e-9"]) == 0
    ours, theirs = (read_run(run)[0] for run in (tmp_path / "run", home))
    assert (ours.model, ours.data) == (theirs.model, theirs.data)
    small = aftersam.config.preset("small").train
    assert (ours.train.validations, ours.train.batch_size) == (small.validations, small.batch_size)
    log = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert log[-1]["val_mean_dsc"] > 0.7
    facts = read_json(tmp_path / "run" / "run.json")
    assert facts["ece"][1] <= facts["ece"][0]
    assert facts["temperature"] == read_run(tmp_path / "run")[1].temperature


OFFLINE = """import socket, sys
def refuse(*_, **__):
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from aftersam.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["the scan that comes along", "air", "a chest"])
def test_the_command_segments_any_ct_offline(tmp_path, kind):
    source = tmp_path / "scan.nii.gz"
    known = {"the scan that comes along": find_run("headneck"), "a chest": DATA / "TSThoraxCTA"}
    if kind == "a chest" and not known[kind].is_dir():
        pytest.skip("the chest CT is not here")
    if kind == "air":
        air = np.full((60, 50, 20), -1000, np.int16)
        nib.save(nib.Nifti1Image(air, np.diag([4.0, 4.0, 3.0, 1.0])), source)
    else:
        shutil.copy(min((known[kind] / "imagesTr").iterdir()), source)
    command = ["predict", "-i", source, "-o", tmp_path / "mask.nii.gz", "-m", "headneck", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    scan, mask = nib.load(source), nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == scan.shape
    np.testing.assert_allclose(mask.affine, scan.affine)
    found = set(np.unique(mask.dataobj).tolist())
    assert found == {"air": {0}, "the scan that comes along": set(range(8))}.get(kind, found)


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
    facts = [read_json(run / "run.json") for run in (home, tmp_path / "results" / "headneck")]
    assert facts[0]["temperature"] == facts[1]["temperature"]
    assert facts[0]["ece"] == facts[1]["ece"]
    card = (home / "README.md").read_text()
    assert (
        f"temperature {facts[0]['temperature']:.3g}, fitted on the 2 held-out scans of the 2-scan run" in card
    )
    assert "A scan of air alone gives an empty mask." in card
    assert (home / "LICENSE-OpenKBP.txt").read_text() == headneck.MIT
    before = (home / "best.safetensors").read_bytes()
    for mask in (tmp_path / "out" / "masks").glob("*.nii.gz"):  # as an older training might have left it
        image = nib.load(mask)
        nib.save(nib.Nifti1Image(np.ones(image.shape, np.uint8), image.affine), mask)
    assert headneck.main([*flags, "--demo-scan", cases[2]]) == 0  # nothing is trained again
    assert (home / "best.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "results" / "headneck" / "metrics.json").read_text()) == scores
