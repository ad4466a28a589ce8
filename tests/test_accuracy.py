"""The accuracy command: every kind of row on toy scans, finished rows kept, masks from elsewhere in their place."""

import dataclasses
import fcntl
import json
import re
import shutil
import subprocess
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from aftersam.data.phantom import LABELS
from benchmarks import figure
from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import rows as rows_module
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.plots import waterfall_of
from benchmarks.accuracy.rivals.patch_training import Spent
from benchmarks.accuracy.rivals.swin_unet import SwinUnet
from benchmarks.accuracy.systems import SYSTEMS
from benchmarks.accuracy.table import FROM_SCRATCH, LEGEND
from benchmarks.machine import RESULTS, ROOT
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
    assert ": 1 step of training a row on 1 processor thread" in text
    assert "**nnU-Net 3D**: not run: nnunetv2 is not installed" in text
    assert "**DynUNet**: not run: no finished row in this folder" in text
    assert "Own recipe:" not in text
    assert {row["place"] for row in table["neighbours"]} == {"ends", "between", "sparse"}
    assert "### What neighbouring slices gain, and where" in text
    assert (rows / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    mask = nib.load(rows / "rows" / "unet-seed-0" / "masks" / "case2.nii.gz")
    np.testing.assert_allclose(mask.affine, np.diag([-4.0, -4.0, 5.0, 1.0]))


def test_a_row_from_imagenets_weights_has_the_published_size_and_says_so(scans, tmp_path, monkeypatch):
    pytest.importorskip("einops")
    monkeypatch.setattr(command, "ProcessPoolExecutor", Inline)
    theirs = {
        "embed.": "patch_embed.",
        "encoder.": "layers.",
        "bottleneck.0.": "layers.3.",
        "bottleneck.1.": "norm.",
    }
    state = {}
    for key, value in SwinUnet(4).state_dict().items():
        if start := next((start for start in theirs if key.startswith(start)), None):
            state[theirs[start] + key.removeprefix(start).replace("mlp.linear", "mlp.fc")] = value
    torch.save({"model": state}, tmp_path / "swin.pth")
    more = ["--systems", "swin_unet", "--imagenet", f"swin_unet={tmp_path / 'swin.pth'}"]
    assert main(asked(scans, tmp_path / "table", *more)) == 0
    (row,) = table_in(tmp_path / "table")["rows"]
    assert row["parameters"] == pytest.approx(27.17e6, rel=0.01)
    assert row["note"] == "from MONAI's parts at the published size; from ImageNet's weights"
    assert FROM_SCRATCH not in (tmp_path / "table" / "accuracy.md").read_text()


def test_weights_of_one_row_are_no_setting_of_another(scans, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "ProcessPoolExecutor", Inline)
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    (tmp_path / "weights.pth").touch()
    given = f"swin_unet={tmp_path / 'weights.pth'}"
    assert main(asked(scans, tmp_path / "table", "--systems", "unet", "--imagenet", given)) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", ["unet=FILE", "swin_unet", "transunet=missing.npz"])
def test_weights_of_no_such_system_or_file_are_refused_before_any_row(scans, tmp_path, capsys, given):
    (tmp_path / "weights").touch()
    given = given.replace("FILE", str(tmp_path / "weights"))
    assert main(asked(scans, tmp_path / "table", "--systems", "unet", "--imagenet", given)) == 2
    assert (
        "must be NAME=FILE with NAME transunet or swin_unet and a FILE that exists" in capsys.readouterr().err
    )
    assert not (tmp_path / "table" / "rows").exists()


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
    home = tmp_path / "table" / "rows" / "aftersam-seed-0"
    assert main(asked(scans, tmp_path / "table", "--systems", "unet", "--threads", "2")) == 1
    assert "was made with other settings (threads 1, not 2)" in capsys.readouterr().err
    assert "other settings" in table_in(tmp_path / "table")["failed"]["U-Net, seed 0"]
    settings = json.loads((home / "settings.json").read_text())
    settings["config"]["model"]["stem"] = "wide"  # as the preset was when the row was trained
    (home / "settings.json").write_text(json.dumps(settings))
    assert main(asked(scans, tmp_path / "table", "--systems", "aftersam")) == 1
    assert "was made with other settings (config.model.stem wide, not slim)" in capsys.readouterr().err
    row = json.loads((home / "row.json").read_text())
    assert row["training"] == settings["training"] == ["case0", "case1"]
    assert row["config"]["model"]["stem"] == "slim"


def test_a_row_that_another_process_works_on_is_left_alone(scans, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "ProcessPoolExecutor", Inline)
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    home = tmp_path / "table" / "rows" / "unet-seed-0"
    for name in ("row.json", "spent.json"):  # as while it is trained
        (home / name).unlink()
    weights = (home / "weights.safetensors").stat().st_mtime_ns
    with (home.parent / "unet-seed-0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(asked(scans, tmp_path / "table", "--systems", "unet")) == 0
    assert capsys.readouterr().out.startswith("U-Net, seed 0: left out, since another process works on it\n")
    assert (home / "weights.safetensors").stat().st_mtime_ns == weights
    assert not (home / "row.json").exists()


def test_a_killed_row_breaks_no_other_and_stays_named(scans, rows, tmp_path, monkeypatch, capsys):
    class Pool(Inline):
        """Whose process is killed by the training of a U-Net, and takes no more work then."""

        broken = False

        def submit(self, work, name, *args):
            self.broken |= name == "unet"
            if self.broken:
                raise BrokenProcessPool("A process was terminated abruptly")
            return super().submit(work, name, *args)

    monkeypatch.setattr(command, "ProcessPoolExecutor", Pool)
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    home = tmp_path / "table" / "rows" / "unet-seed-0"
    (home / "row.json").unlink()
    assert main(asked(scans, tmp_path / "table", "--systems", "unet", "aftersam")) == 1
    assert capsys.readouterr().err == (
        "U-Net, seed 0 was not trained: BrokenProcessPool: A process was terminated abruptly\n"
    )
    for _ in range(2):
        table = table_in(tmp_path / "table")
        assert list(table["failed"]) == ["U-Net, seed 0"]
        assert "U-Net" not in table["not_run"]
        assert (
            main(asked(scans, tmp_path / "table")) == 0
        )  # the table again: the failure was another command's
    monkeypatch.setattr(command, "ProcessPoolExecutor", Inline)
    assert main(asked(scans, tmp_path / "table", "--systems", "unet")) == 0
    assert table_in(tmp_path / "table")["failed"] == {}
    assert not (home / "failed.json").exists()


def test_a_named_system_without_its_package_fails_and_the_others_are_trained(
    scans, rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "ProcessPoolExecutor", Inline)
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    (tmp_path / "table" / "rows" / "unet-seed-0" / "row.json").unlink()
    missing = dataclasses.replace(SYSTEMS["nnunet_3d"], needs="no_such_package")
    monkeypatch.setitem(SYSTEMS, "nnunet_3d", missing)
    assert main(asked(scans, tmp_path / "table", "--systems", "nnunet_3d", "unet")) == 1
    assert "nnU-Net 3D was not trained: no-such-package is not installed\n" in capsys.readouterr().err
    assert (tmp_path / "table" / "rows" / "unet-seed-0" / "row.json").exists()
    assert "nnU-Net 3D" in table_in(tmp_path / "table")["failed"]


def test_a_row_has_the_commit_that_its_training_began_at(scans, tmp_path, monkeypatch):
    commits = iter(["before", "after"])
    monkeypatch.setattr(rows_module, "environment", lambda: {"commit": next(commits)})
    monkeypatch.setattr(rows_module, "train_row", lambda job: next(commits) and Spent(1.0, 1.0, 1, 1.0))
    monkeypatch.setattr(rows_module, "predict_row", lambda job: {})
    monkeypatch.setattr(rows_module, "_score", lambda masks, labels, home, row: found.update(row))
    found = {}
    args = command.AccuracyArgs(scans, tmp_path, max_steps=1, threads=torch.get_num_threads())
    rows_module.run_row("unet", 0, command.limits_of(args), scans, tmp_path)
    assert found["environment"]["commit"] == "before"


def test_masks_from_elsewhere_are_scored_and_placed(scans, rows, tmp_path, capsys):
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    masks = tmp_path / "masks"
    masks.mkdir()
    shutil.copy(scans / "labelsTr" / "case2.nii.gz", masks)
    given = ["--data", str(scans), "-o", str(tmp_path / "table"), "--predictions", f"nnU-Net 3D={masks}"]
    assert main(given) == 0
    table = table_in(tmp_path / "table")
    found = table["rows"][-1]
    assert (found["title"], found["protocol"], found["mean"]) == ("nnU-Net 3D", "own recipe", 1.0)
    scores = table["rows"][-2]["organs"]  # of AFTer-SAM
    both = [1 - score for organ, score in scores.items() if found["organs"][organ] is not None]
    assert len(both) >= 4  # an organ that the scan lacks is no score of a mask that lacks it, too
    assert found["to_ours"]["mean"] == pytest.approx(np.mean(both), abs=1e-6)
    assert found["to_ours"]["won"] == 1
    assert [row["title"] for row in table["rows"] if row["to_best"] is None] != ["nnU-Net 3D"]
    assert "nnU-Net 2D" in table["not_run"]
    assert "nnU-Net 3D" not in table["not_run"]
    text = (tmp_path / "table" / "accuracy.md").read_text()
    assert text.index("## Equal budget") < text.index("| AFTer-SAM tiny |") < text.index("## Own recipe")
    assert text.index("## Own recipe") < text.index("| nnU-Net 3D | 1 | 100.0 |")
    (masks / "case2.nii.gz").rename(masks / "case7.nii.gz")
    assert main(given) == 2
    assert "no mask for the case case2" in capsys.readouterr().err
    assert main([*given[:-1], "nnU-Net"]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err


def test_the_page_has_the_tables_by_budget_and_says_what_they_do_not_tell_apart(rows, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    assert figure.accuracy_page(results, tmp_path) == []
    table = {**table_in(rows), "waterfall": waterfall_of(STEPS, "phantoms")}
    (results / "phantoms.json").write_text(json.dumps(table))
    page = "\n\n".join(figure.accuracy_page(results, tmp_path))
    assert "1 held-out scan; " in page
    assert "has the highest mean DSC" in page
    for name in ("accuracy-phantoms.png", "accuracy-phantoms-waterfall.png"):
        assert f"]({name})" in page
        assert (tmp_path / name).exists()
    longer = {**table_in(rows), "budget": {**table["budget"], "max_steps": 20}}
    (results / "a.json").write_text(json.dumps(longer))
    page = "\n\n".join(figure.accuracy_page(results, tmp_path))
    headings = re.findall(r"^#{1,2} .*", page, re.M)
    assert [heading.partition(" of training")[0] for heading in headings] == [
        f"# Accuracy on {table['data']}", f"## DSC at each budget, {table['data']}",
        f"## Equal budget, {table['data']}: 1 step", f"## Equal budget, {table['data']}: 20 steps", "## Notes",
    ]  # fmt: skip
    assert page.count(LEGEND) == page.count(FROM_SCRATCH) == page.count("- **U-Net**") == 1


def test_the_tables_of_this_repository_are_drawn(tmp_path):
    page = "\n\n".join(figure.accuracy_page(RESULTS / "accuracy", tmp_path))
    assert page.startswith("# Accuracy on ")
    assert "\n# " not in page
    assert "| U-Net | " in page
    assert "## Published" in page


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
