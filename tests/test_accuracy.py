"""The accuracy command: every kind of row on toy scans, finished rows kept, masks from elsewhere in their place."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from aftersam.data.phantom import LABELS
from benchmarks import figure
from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.systems import SYSTEMS
from benchmarks.accuracy.table import waterfall_of
from benchmarks.machine import ROOT
from toy_scans import STEPS, write_scans


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("accuracy") / "scans")


class Inline:
    """An executor that runs its work in this process: a new one would import everything again."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        threads = torch.get_num_threads()
        try:
            value = work(*args)
        finally:
            torch.set_num_threads(threads)
        return type("Done", (), {"result": lambda self: value})()


def asked(scans, output, *more):
    small = ["--preset", "tiny", "--patch", "16", "32", "32", "--max-steps", "1", "--device", "cpu"]
    return ["--data", str(scans), "-o", str(output), *small, *more]


def table_in(output):
    return json.loads((output / "accuracy.json").read_text())


@pytest.fixture(scope="module")
def rows(scans, tmp_path_factory):
    """One row of each kind after one step, the first in a process of its own."""
    output = tmp_path_factory.mktemp("table")
    assert main(asked(scans, output, "--systems", "unet")) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "ProcessPoolExecutor", Inline)
        patch.setenv("OMP_NUM_THREADS", "1")
        names = ["transunet", "after_unet", "msa", "aftersam_2d", "aftersam"]
        assert main(asked(scans, output, "--systems", *names)) == 0
    return output


def test_every_kind_of_row_is_trained_and_scored(rows):
    table = table_in(rows)
    assert [row["title"] for row in table["rows"]] == [
        "U-Net", "TransUNet", "AFTer-UNet", "MSA", "AFTer-SAM 2D tiny", "AFTer-SAM tiny",
    ]  # fmt: skip
    assert table["organs"] == list(LABELS.values())
    assert table["cases"] == ["case2"]
    for row in table["rows"]:
        assert (row["protocol"], row["steps"], row["seeds"]) == ("equal budget", 1, 1)
        assert row["parameters"] > 1e5
        assert row["cpu_minutes"] > 0
        assert row["ice"] > 0
    assert [row["prompted"] for row in table["rows"]] == [None, None, None, "point", None, None]
    text = (rows / "accuracy.md").read_text()
    assert "| MSA † |" in text
    assert "Equal budget: 1 step of training a row on 1 processor thread" in text
    assert "**nnU-Net 3D**: not run: nnunetv2 is not installed" in text
    assert "Own recipe:" not in text
    assert (rows / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    mask = nib.load(rows / "rows" / "unet-seed-0" / "masks" / "case2.nii.gz")
    np.testing.assert_allclose(mask.affine, np.diag([-4.0, -4.0, 5.0, 1.0]))


def test_a_finished_row_is_kept_and_a_half_trained_one_starts_afresh(scans, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ProcessPoolExecutor", Inline)
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    home = tmp_path / "table" / "rows" / "unet-seed-0"
    weights = home / "weights.safetensors"
    stamp = weights.stat().st_mtime_ns
    (home / "row.json").unlink()  # killed while it was scored
    assert main(asked(scans, tmp_path / "table", "--systems", "unet")) == 0
    assert weights.stat().st_mtime_ns == stamp
    kept = ("mean", "organs", "ice", "parameters", "steps", "to_best")
    for old, new in zip(table_in(rows)["rows"], table_in(tmp_path / "table")["rows"], strict=True):
        assert [old[key] for key in kept] == [new[key] for key in kept]
    (home / "row.json").unlink()
    (home / "spent.json").unlink()  # killed while it was trained
    (home / "half").touch()
    assert main(asked(scans, tmp_path / "table", "--systems", "unet")) == 0
    assert weights.stat().st_mtime_ns > stamp
    assert not (home / "half").exists()
    assert (home / "row.json").exists()


def test_other_settings_are_refused_for_a_row_that_is_there(scans, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "ProcessPoolExecutor", Inline)
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    assert main(asked(scans, tmp_path / "table", "--systems", "unet", "--threads", "2")) == 1
    assert "was made with other settings" in capsys.readouterr().err
    assert "other settings" in table_in(tmp_path / "table")["failed"]["U-Net"]


def test_masks_from_elsewhere_are_scored_and_placed(scans, rows, tmp_path, capsys):
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    masks = tmp_path / "masks"
    masks.mkdir()
    shutil.copy(scans / "labelsTr" / "case2.nii.gz", masks)
    given = ["--data", str(scans), "-o", str(tmp_path / "table"), "--predictions", f"nnU-Net 3D={masks}"]
    assert main(given) == 0
    table = table_in(tmp_path / "table")
    found = table["rows"][-1]
    assert (found["title"], found["protocol"], found["mean"], found["to_best"]) == (
        "nnU-Net 3D", "own recipe", 1.0, None,
    )  # fmt: skip
    scores = table["rows"][0]["organs"]
    both = [score - 1 for organ, score in scores.items() if found["organs"][organ] is not None]
    assert len(both) >= 4  # an organ that the scan lacks is no score of a mask that lacks it, too
    assert table["rows"][0]["to_best"]["mean"] == pytest.approx(np.mean(both), abs=1e-6)
    assert table["rows"][0]["to_best"]["lost"] == 1
    assert list(table["not_run"]) == ["nnU-Net 2D"]
    text = (tmp_path / "table" / "accuracy.md").read_text()
    assert text.index("## Equal budget") < text.index("| AFTer-SAM tiny |") < text.index("## Own recipe")
    assert text.index("## Own recipe") < text.index("| nnU-Net 3D | 100.0 |")
    (masks / "case2.nii.gz").rename(masks / "case7.nii.gz")
    assert main(given) == 2
    assert "no mask for the case case2" in capsys.readouterr().err
    assert main([*given[:-1], "nnU-Net"]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err


def test_the_page_has_the_table_and_says_what_it_does_not_tell_apart(rows, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    assert figure.accuracy_page(results, tmp_path) == []
    (results / "phantoms.json").write_text(
        json.dumps({**table_in(rows), "waterfall": waterfall_of(STEPS, "phantoms")})
    )
    page = "\n".join(figure.accuracy_page(results, tmp_path))
    assert "1 held-out scan, " in page
    assert "has the highest mean DSC" in page
    for name in ("accuracy-phantoms.png", "accuracy-phantoms-waterfall.png"):
        assert f"]({name})" in page
        assert (tmp_path / name).exists()


def test_all_systems_are_those_that_can_be_trained_here():
    args = command.AccuracyArgs(Path("scans"), Path("table"), systems=("all",))
    there = {name for name, system in SYSTEMS.items() if not system.missing()}
    assert there >= {"unet", "transunet", "cotr", "msa", "aftersam"}
    assert set(command.wanted(args)) == there - {"aftersam_best", "aftersam_paper"}
    assert set(command.wanted(dataclasses.replace(args, sam_checkpoint="sam.pth"))) == there
    with pytest.raises(ValueError, match="no system 'unnet'"):
        command.wanted(dataclasses.replace(args, systems=("unnet",)))
    with pytest.raises(ValueError, match="all takes no other names"):
        command.wanted(dataclasses.replace(args, systems=("all", "unet")))


@pytest.mark.slow
def test_nnunet_is_planned_for_the_limit_and_stopped_at_it(scans, tmp_path):
    python = ROOT / ".venv-nnunet" / "bin" / "python"
    if not python.exists():
        pytest.skip("nnU-Net has an environment of its own: make nnunet")
    words = [str(python), "-m", "benchmarks.accuracy", *asked(scans, tmp_path, "--systems", "nnunet_3d")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (row,) = table_in(tmp_path)["rows"]
    assert (row["title"], row["steps"]) == ("nnU-Net 3D, planned for the budget", 1)
    assert row["spacing_mm"] == pytest.approx([5.0, 4.0, 4.0])
    assert row["parameters"] < 7e6
    assert row["mean"] is not None
