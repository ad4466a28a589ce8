"""Prediction of a folder: one bad scan costs one line, a killed run is finished, processes share the work."""

import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.progress import Progress

from aftersam.inference.processes import Part
from aftersam.inference.segmenter import Segmenter
from aftersam.predict import main
from toy_scans import scan


def test_a_folder_with_a_bad_scan_gives_the_other_masks(run, tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a_0000", "c_0000"):
        scan(scans / f"{name}.nii.gz")
    whole = scan(scans / "b_0000.nii.gz").read_bytes()
    (scans / "b_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    command = [
        "-i",
        str(scans),
        "-o",
        str(tmp_path / "masks"),
        "-m",
        str(run),
        "--device",
        "cpu",
        "--no-preview",
    ]
    assert main(command) == 1
    masks = tmp_path / "masks"
    assert sorted(p.name for p in masks.glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aftersam.predict: ")]
    assert len(errors) == 1
    assert "b_0000.nii.gz" in errors[0]
    assert not [p for p in masks.iterdir() if p.name.startswith(".")]
    before = (masks / "a.nii.gz").stat().st_mtime_ns
    scan(scans / "b_0000.nii.gz")
    assert main(command) == 0  # finished masks are kept, the mended scan is done
    assert (masks / "a.nii.gz").stat().st_mtime_ns == before
    assert (masks / "b.nii.gz").exists()


def test_one_truncated_scan_of_five_costs_one_line(run, tmp_path, capsys):
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    for name in "abcde":
        whole = scan(scans / f"{name}.nii.gz").read_bytes()
    (scans / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    command = ["-i", str(scans), "-o", str(masks), "-m", str(run), "--device", "cpu", "--no-preview"]
    assert main(command) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [p.name for p in sorted(masks.glob("*.nii.gz"))] == [f"{n}.nii.gz" for n in "acde"]
    errors = [line for line in lines if line.startswith("aftersam.predict: ")]
    assert len(errors) == 1
    assert "b.nii.gz is truncated" in errors[0]
    alone = tmp_path / "alone.nii.gz"  # a scan computed beside others gets the mask that it gets alone
    single = ["-i", str(scans / "d.nii.gz"), "-o", str(alone), "-m", str(run), "--device", "cpu"]
    assert main([*single, "--no-preview"]) == 0
    assert np.array_equal(
        np.asarray(nib.load(alone).dataobj), np.asarray(nib.load(masks / "d.nii.gz").dataobj)
    )


@pytest.mark.parametrize("again", [False, True])
def test_a_scan_whose_mask_would_have_too_long_a_name_costs_itself_alone(run, tmp_path, capsys, again):
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    if again:  # the name is too long once its folder is there
        masks.mkdir()
    for name in ("a.nii.gz", "m" * 251 + ".nii", "z.nii.gz"):
        scan(scans / name)
    assert main(["-i", str(scans), "-o", str(masks), "-m", str(run), "--device", "cpu", "--no-preview"]) == 1
    assert {p.name for p in masks.iterdir()} == {"a.json", "a.nii.gz", "z.json", "z.nii.gz"}
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aftersam.predict: ")]
    assert len(errors) == 1
    assert "m.nii" in errors[0]
    assert errors[0].endswith("File name too long")


def test_a_killed_run_is_finished_by_the_next(run, tmp_path):
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    for name in "abc":
        scan(scans / f"{name}.nii.gz")
    command = ["-i", str(scans), "-o", str(masks), "-m", str(run), "--device", "cpu", "--no-preview"]
    killed = f"""
import os, signal
import nibabel as nib
from aftersam.predict import main
whole = nib.Nifti1Image.to_filename
def half(image, name, **options):
    if "b.nii.gz" not in str(name):
        return whole(image, name, **options)
    open(name, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
nib.Nifti1Image.to_filename = half
main({command!r})
"""
    died = subprocess.run([sys.executable, "-c", killed], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert [p.name for p in masks.glob("*.nii.gz") if not p.name.startswith(".")] == ["a.nii.gz"]
    assert [p for p in masks.iterdir() if p.name.startswith(".")]
    before = (masks / "a.nii.gz").stat().st_mtime_ns
    assert main(command) == 0
    assert (masks / "a.nii.gz").stat().st_mtime_ns == before
    names = {p.name for p in masks.iterdir()}
    assert names == {f"{n}{ending}" for n in "abc" for ending in (".nii.gz", ".json")}


def test_processes_share_a_folder(run, tmp_path, monkeypatch):
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    for name in "abcd":
        scan(scans / f"{name}.nii.gz")
    command = ["-i", str(scans), "-o", str(masks), "-m", str(run), "--device", "cpu", "--no-preview"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = [name for name in "abcd" if Part(1, 2).has(name)]
    assert 0 < len(second) < 4
    for rank, expected in (("1", second), ("0", [*"abcd"])):
        monkeypatch.setenv("RANK", rank)
        assert main(command) == 0
        assert sorted(p.name for p in masks.glob("*.nii.gz")) == [f"{n}.nii.gz" for n in expected]


def test_a_scan_too_large_for_the_memory_is_reported_and_the_rest_done(run, tmp_path, capsys, monkeypatch):
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    for name, shape in (("a", (40, 36, 6)), ("b", (40, 36, 7)), ("c", (40, 36, 6))):
        scan(scans / f"{name}.nii.gz", shape)
    segment, bars, removed = Segmenter.segment, [], Progress.remove_task

    def refuse(self, prepared, **options):
        if len(prepared.volume.array) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
        return segment(self, prepared, **options)

    monkeypatch.setattr(Segmenter, "segment", refuse)
    monkeypatch.setattr(Progress, "remove_task", lambda self, task: bars.append(task) or removed(self, task))
    command = ["-i", str(scans), "-o", str(masks), "-m", str(run), "--device", "cpu", "--no-preview"]
    assert main(command) == 1
    assert [p.name for p in sorted(masks.glob("*.nii.gz"))] == ["a.nii.gz", "c.nii.gz"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aftersam.predict: ")]
    assert len(errors) == 1
    assert "b.nii.gz: memory ran out; a --batch-size below 8" in errors[0]
    assert len(bars) == 3  # the failed scan's bar went away too
    assert main([*command[:1], str(scans / "b.nii.gz"), "-o", str(tmp_path / "b.nii.gz"), *command[4:]]) == 2
