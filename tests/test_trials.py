"""Prediction where things go wrong: killed anywhere, beside another process, in torchrun's hands, on a full disk."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from torch.distributed import HashStore

from aftersam.inference.processes import Processes
from toy_scans import scan

TESTS = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.fixture
def scans(tmp_path):
    """Two scans whose names start alike."""
    home = tmp_path / "scans"
    home.mkdir()
    for name in ("1.2.840.1", "1.2.840.1.7"):
        scan(home / f"{name}.nii.gz", (24, 20, 3))
    return home


def trials(mode, count, scans, run):
    """What tests/trials.py found."""
    home = scans.parent / "trials"
    home.mkdir()
    command = [sys.executable, str(TESTS / "trials.py"), mode, str(count), str(scans), str(home), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENV)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("mode", "count"), [("renames", 2), ("random", 2), ("pairs", 1)], ids=lambda value: str(value)
)
def test_a_disturbed_prediction_of_a_folder_ends_well(run, scans, mode, count):
    assert trials(mode, count, scans, run)["trials"]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("mode", "count"), [("renames", 0), ("random", 50), ("pairs", 20)], ids=str)
def test_many_disturbed_predictions_of_a_folder_end_well(run, scans, mode, count):
    found = trials(mode, count, scans, run)
    assert found["trials"] >= count
    print(found)


def test_no_process_ends_before_all_are_done():
    store, gone, said = HashStore(), [], []
    processes = [Processes(rank, 3, store) for rank in range(3)]

    def work(one, failed):
        one.wait_for_the_others(failed, said.append)
        gone.append(one.rank)

    early = [threading.Thread(target=work, args=(one, 1)) for one in processes[:2]]
    for thread in early:
        thread.start()
    early[0].join(1.2)
    assert gone == []
    work(processes[2], 0)
    for thread in early:
        thread.join(30)
    assert sorted(gone) == [0, 1, 2]
    assert said == ["2 scans have no mask, for the reasons above; torchrun therefore ends with an error"]


def test_a_process_alone_waits_for_nobody(monkeypatch):
    Processes(0, 1, None).wait_for_the_others(1, pytest.fail)


@pytest.mark.long
def test_torchrun_gives_all_masks_but_that_of_a_bad_scan_and_an_error(run, tmp_path):
    home, masks = tmp_path / "scans", tmp_path / "masks"
    home.mkdir()
    for name in "abcdefgh":
        scan(home / f"{name}.nii.gz", (24, 20, 3))
    (home / "b.nii.gz").write_bytes(b"no scan")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "aftersam.predict",
        "-i",
        str(home),
        "-o",
        str(masks),
        "-m",
        str(run),
        "--device",
        "cpu",
    ]
    for _ in range(2):  # and again, with the finished masks kept
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENV)
        assert done.returncode == 1, done.stderr
        assert sorted(p.name for p in masks.glob("*.nii.gz")) == [f"{name}.nii.gz" for name in "acdefgh"]
        assert "1 scan has no mask" in done.stderr
    scan(home / "b.nii.gz", (24, 20, 3))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENV)
    assert done.returncode == 0, done.stderr
    assert len(list(masks.glob("*.nii.gz"))) == 8


FULL = """
mount -t tmpfs -o size=64m tmpfs {disk} || exit 77
head -c {taken} /dev/zero > {disk}/taken
{command} 2> {log}
code=$?
rm {disk}/taken
find {disk} -mindepth 1 -name '.*' > {left}
{command} 2>> {again} || exit 78
cp -r {disk}/. {copy}
exit $code
"""
DISK = 2**26  # bytes of the small disk
PAGE = 4096  # bytes that a tmpfs gives at once


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("unshare") is None, reason="mounts a small disk by itself, with unshare")
@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("mask.nii.gz", []), ("mask.json", []), ("mask.png", ["--preview"]),
        ("mask.confidence.nii.gz", ["--confidence"]), ("mask.probabilities.npy", ["--save-probabilities"]),
        ("embeddings", ["--embeddings", "{disk}/embeddings"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_full_disk_is_one_sentence_and_leaves_nothing(run, tmp_path, what, options):
    """With no room, one page, two pages ..., until `what` is the file that does not fit."""
    disk = tmp_path / "disk"
    scan(tmp_path / "scan.nii.gz", (60, 60, 12))
    preview = [] if "--preview" in options else ["--no-preview"]
    command = [sys.executable, "-m", "aftersam.predict", "-i", str(tmp_path / "scan.nii.gz"), "-m", str(run)]
    command += ["-o", str(disk / "mask.nii.gz"), "--device", "cpu", *preview]
    command += [option.format(disk=disk) for option in options]
    for room in range(32):
        home = tmp_path / str(room)
        files = {name: home / name for name in ("log", "left", "again", "copy")}
        for folder in (disk, files["copy"]):
            folder.mkdir(parents=True, exist_ok=True)
        script = FULL.format(disk=disk, command=shlex.join(command), taken=DISK - room * PAGE, **files)
        done = subprocess.run(
            ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, env=ENV
        )
        if done.returncode in (1, 77) and not files["log"].exists():
            pytest.skip("this machine mounts no disk for a test")
        said = files["log"].read_text()
        assert done.returncode == 2, (room, said, done.stderr)
        assert len(said.splitlines()) == 1, said
        assert "could not be written: No space left on device" in said
        assert files["left"].read_text() == ""
        assert (files["copy"] / what).exists()
        assert np.asarray(nib.load(files["copy"] / "mask.nii.gz").dataobj).shape == (60, 60, 12)
        if str(disk / what) in said:
            return
    pytest.fail(f"{what} always fitted")


MANY = """
import json, os, sys
from pathlib import Path
from aftersam.inference import pipeline

seen, write = [], pipeline.write_outputs

def noted(*args):
    said = write(*args)
    rss = next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]
    seen.append((int(rss) / 1024, len(os.listdir("/proc/self/fd"))))
    return said

pipeline.write_outputs = noted
scans, masks, run = map(Path, sys.argv[1:])
pipeline.predict_files(pipeline.PredictArgs(input=scans, output=masks, model=(run,), device="cpu"))
print(json.dumps(seen))
"""


@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's account of memory and handles"
)
@pytest.mark.parametrize("count", [16, pytest.param(300, marks=pytest.mark.long)])
def test_many_scans_take_the_memory_and_the_handles_of_few(run, tmp_path, count):
    home = tmp_path / "scans"
    home.mkdir()
    scan(home / "0.nii.gz", (24, 20, 3))
    for i in range(1, count):
        shutil.copyfile(home / "0.nii.gz", home / f"{i}.nii.gz")
    command = [sys.executable, "-c", MANY, str(home), str(tmp_path / "masks"), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENV)
    assert done.returncode == 0, done.stderr
    memory, handles = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    assert len(memory) == count
    print(
        f"{memory[count // 2]:.0f} MiB after a half, {memory[-1]:.0f} MiB at the end, {handles[-1]} handles"
    )
    assert memory[-1] - memory[count // 2] < 16
    assert max(handles[count // 4 :]) <= max(handles[: count // 4]) + 1
