"""Every user-facing error is one sentence: what was done, and all that is said of it. New errors get a row here."""

import errno
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest

from toy_files import AFFINE, organs, save_mask, scored_folders
from toy_scans import scan


class Row(NamedTuple):
    """A command that is refused, or that a scan is lost in, and the line that it says."""

    id: str
    command: str
    argv: str
    """Split at spaces; HOME is the test's folder, RUN a trained run."""
    says: str
    """After the command's name; HOME as in `argv`, * for what differs between machines and versions."""
    make: Callable[[Path], object] = lambda home: None
    """Writes what the command finds."""
    code: int = 2
    patch: Callable[[pytest.MonkeyPatch], object] = lambda patch: None


def a_scan(home):
    scan(home / "scan.nii.gz", (24, 20, 3))


def two_scans(home):
    (home / "scans").mkdir()
    for name in ("a", "b"):
        scan(home / "scans" / f"{name}.nii.gz", (24, 20, 3))


def a_bad_scan_of_two(home):
    two_scans(home)
    whole = (home / "scans" / "b.nii.gz").read_bytes()
    (home / "scans" / "b.nii.gz").write_bytes(whole[: len(whole) // 2])


def a_scan_and_its_mask(home):
    a_scan(home)
    (home / "mask.nii.gz").touch()


def a_scan_and_a_file(home):
    a_scan(home)
    (home / "file").touch()


def masks(home):
    scored_folders(home)


def masks_and_an_empty_folder(home):
    scored_folders(home)
    (home / "empty").mkdir()


def masks_of_a_label_without_a_name(home):
    scored_folders(home)
    save_mask(home / "masks" / "a.nii.gz", organs() * 7)


def masks_on_another_grid(home):
    scored_folders(home)
    for path in (home / "masks").iterdir():
        nib.save(nib.Nifti1Image(organs()[:9], AFFINE), path)


def metrics_and_masks(home):
    scored_folders(home)
    (home / "metrics.json").touch()


def text(name, content):
    return lambda home: (home / name).write_text(content)


def a_folder(name):
    return lambda home: (home / name).mkdir()


def full_disk(call):
    """`call` finds the disk full."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda patch: patch.setattr(call, refuse)


def no_memory(patch):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    patch.setattr("aftersam.inference.sliding.encode", refuse)


ONE = "-i HOME/scan.nii.gz -o HOME/mask.nii.gz -m RUN --device cpu --no-preview"
ALL = "-i HOME/scans -o HOME/masks -m RUN --device cpu --no-preview"
SCORE = "-p HOME/masks -l HOME/set/labelsTr -o HOME/metrics.json"
PAGE = "-m HOME/metrics.json -o HOME/report.html"
FULL = "could not be written: No space left on device"

TABLE = [
    Row("no input", "predict", ONE, "HOME/scan.nii.gz does not exist"),
    Row("mask exists", "predict", ONE, "HOME/mask.nii.gz exists; --overwrite replaces it", a_scan_and_its_mask),
    Row("mask into a file", "predict", ONE.replace("mask.nii.gz", "scan.nii.gz/mask.nii.gz"),
        "HOME/scan.nii.gz/mask.nii.gz cannot be written, since HOME/scan.nii.gz is not a folder", a_scan),
    Row("folder into a file", "predict", ALL.replace("masks", "masks.nii.gz"),
        "HOME/scans is a folder of 2 scans, so --output must be a folder", two_scans),
    Row("output is input", "predict", ONE.replace("mask.nii.gz", "scan.nii.gz") + " --overwrite",
        "the output HOME/scan.nii.gz is the input HOME/scan.nii.gz; choose another name for the output", a_scan),
    Row("no run", "predict", ONE.replace("RUN", "HOME"), "HOME is not a training run: it has no config.json", a_scan),
    Row("unknown organ", "predict", ONE + " --labels hart",
        "the model has no label 'hart'; did you mean 'heart'? It has *", a_scan),
    Row("keep", "predict", ONE + " --keep 99", "--keep is 99, but * 1 to 3 *", a_scan),
    Row("truncated", "predict", ALL, "HOME/scans/b.nii.gz is truncated or damaged: *", a_bad_scan_of_two, 1),
    Row("no place", "predict", ONE.replace("HOME/mask", "HOME/file/mask"), "*HOME/file*", a_scan_and_a_file),
    Row("disk full, mask", "predict", ONE, f"HOME/mask.nii.gz {FULL}", a_scan, 2,
        full_disk("nibabel.Nifti1Image.to_filename")),
    Row("disk full, probabilities", "predict", ONE + " --save-probabilities", f"HOME/mask.probabilities.npy {FULL}",
        a_scan, 2, full_disk("os.posix_fallocate")),
    Row("disk full, embeddings", "predict", ONE + " --embeddings HOME/e", f"HOME/e/* {FULL}", a_scan, 2,
        full_disk("numpy.lib.format.write_array_header_1_0")),
    Row("disk full, preview", "predict", ONE.replace("--no-preview", "--preview"), f"HOME/mask.png {FULL}", a_scan, 2,
        full_disk("pathlib.Path.write_bytes")),
    Row("disk full, rename", "predict", ONE, f"HOME/mask.json {FULL}", a_scan, 2, full_disk("os.replace")),
    Row("no memory", "predict", ONE,
        "HOME/scan.nii.gz: memory ran out; a --batch-size below 8 needs less (DefaultCPUAllocator: *)", a_scan, 2,
        no_memory),
    Row("no encoder", "encode", "--data HOME --output HOME/e",
        "give a run (-m) or SAM weights (--sam-checkpoint), one of the two"),
    Row("truncated, encode", "encode", "--data HOME/scans --output HOME/e -m RUN --device cpu",
        "HOME/scans/b.nii.gz is truncated or damaged: *", a_bad_scan_of_two, 1),
    Row("disk full, encode", "encode", "--data HOME/scan.nii.gz --output HOME/e -m RUN --device cpu",
        f"HOME/scan.nii.gz could not be encoded: HOME/e/* {FULL}", a_scan, 1,
        full_disk("numpy.lib.format.write_array_header_1_0")),
    Row("no masks folder", "evaluate", SCORE, "HOME/masks is not a folder"),
    Row("no mask in the folder", "evaluate", SCORE.replace("/set/labelsTr", "/empty"),
        "HOME/empty holds no mask that ends in .nii.gz or .nii", masks_and_an_empty_folder),
    Row("tolerance", "evaluate", SCORE + " --nsd-tolerance-mm 0",
        "nsd_tolerance_mm is 0.0, but must be above 0 and at most 1000", masks),
    Row("label names", "evaluate", SCORE + " --label-names HOME/names.json",
        "HOME/names.json does not exist", masks),
    Row("scores into a folder", "evaluate", SCORE.replace("metrics.json", "masks"),
        "the output HOME/masks exists, but is not a file; choose another name", masks),
    Row("foreign label", "evaluate", SCORE,
        "HOME/masks/a.nii.gz has the label 7, but the label names are 1 liver, 2 spleen",
        masks_of_a_label_without_a_name, 1),
    Row("nothing scored", "evaluate", SCORE,
        "no case of HOME/set/labelsTr could be scored with the masks in HOME/masks", masks_on_another_grid),
    Row("disk full, metrics", "evaluate", SCORE, f"HOME/metrics.json {FULL}", masks, 2, full_disk("os.fsync")),
    Row("page over a mask", "report", PAGE.replace("report.html", "masks/a.nii.gz --predictions HOME/masks"),
        "the output HOME/masks/a.nii.gz is the input HOME/masks/a.nii.gz; choose another name for the output",
        metrics_and_masks),
    Row("page into a file", "report", PAGE.replace("report.html", "metrics.json/report.html"),
        "HOME/metrics.json/report.html cannot be written, since HOME/metrics.json is not a folder",
        metrics_and_masks),
    Row("no run", "report", PAGE + " --run HOME/run", "--run HOME/run is not a folder"),
    Row("labels without scans", "report", PAGE + " --labels HOME/set/labelsTr --predictions HOME/masks",
        "cases are drawn from --images, --predictions and --labels; give all three", masks),
    Row("no metrics", "report", PAGE, "HOME/metrics.json does not exist"),
    Row("no JSON", "report", PAGE, "HOME/metrics.json is not valid JSON: *", text("metrics.json", "{")),
    Row("other JSON", "report", PAGE, "HOME/metrics.json was not written by aftersam.evaluate: it has no mean_dsc",
        text("metrics.json", json.dumps([]))),
    Row("metrics cut short", "report", PAGE, "HOME/metrics.json lacks 'mean_dsc_interval'",
        text("metrics.json", json.dumps({"mean_dsc": 1, "organs": {}, "cases": {}}))),
    Row("metrics of another type", "report", PAGE, "HOME/metrics.json.mean_dsc is '<b>', but must be *",
        text("metrics.json", json.dumps(
            {"mean_dsc": "<b>", "mean_dsc_interval": None, "interval_reliable": True, "num_cases": 1, "problems": {},
             "convention": "nnunet", "nsd_tolerance_mm": 3, "organs": {}, "cases": {}}))),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.command}: {row.id}" for row in TABLE])
def test_an_error_is_its_sentence(run, tmp_path, capsys, monkeypatch, row):
    row.make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    row.patch(monkeypatch)

    def real(text):
        return text.replace("HOME", str(tmp_path)).replace("RUN", str(run))

    assert import_module(f"aftersam.{row.command}").main(list(map(real, row.argv.split()))) == row.code
    said = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith(f"aftersam.{row.command}: ")
    ]
    assert said
    assert matches(said[-1].removeprefix(f"aftersam.{row.command}: "), real(row.says)), said
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in before} == before
    assert not [path for path in tmp_path.rglob(".*")]


def matches(line, pattern):
    """Whether the pieces of `pattern` between stars stand in `line` in this order, the first and last at its ends."""
    first, *others = pattern.split("*")
    at = len(first)
    if not line.startswith(first) or not (line.endswith(others[-1]) if others else line == first):
        return False
    for piece in others:
        at = line.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def test_stars_stand_for_what_differs():
    assert matches("a is 3 b", "a is * b")
    assert not matches("a is 3 b!", "a is * b")
    assert not matches("a is b", "a is b*c")
    assert matches("a", "a")
    assert not matches("ab", "a")


def test_a_scan_of_many_that_finds_the_disk_full_costs_itself_alone(run, tmp_path, capsys, monkeypatch):
    two_scans(tmp_path)
    write = nib.Nifti1Image.to_filename

    def full_for_a(image, name, **options):
        if Path(name).name == "a.nii.gz":
            Path(name).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(image, name, **options)

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", full_for_a)
    predict = import_module("aftersam.predict").main
    argv = [part.replace("HOME", str(tmp_path)).replace("RUN", str(run)) for part in ALL.split()]
    assert predict(argv) == 1
    assert f"aftersam.predict: {tmp_path}/masks/a.nii.gz {FULL}" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "masks").iterdir()} == {"b.json", "b.nii.gz"}
    monkeypatch.undo()
    assert predict(argv) == 0
    said = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/masks: 1 of 2 masks exist and are kept; --overwrite replaces them" in said
    assert predict(argv) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/masks: 2 of 2 masks exist and are kept; --overwrite replaces them"
    ]
    assert np.asarray(nib.load(tmp_path / "masks" / "a.nii.gz").dataobj).shape == (24, 20, 3)
