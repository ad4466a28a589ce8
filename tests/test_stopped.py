"""SIGTERM, as a scheduler sends it before it takes the machine: out within ten seconds, and the next run goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from aftersam.inference.manifest import ManifestArgs, manifest
from aftersam.predict import main
from toy_scans import scan, write_scans
from training_children import assert_same, finish, hidden, start

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
SLOW = """
import sys, time
from aftersam.data import volume
from aftersam.inference import pipeline
from aftersam.inference.work import Work
from aftersam.predict import main

where, read, write = sys.argv[1], volume.read_image, pipeline.write_outputs

def slow_read(path, **options):
    if "b.nii.gz" in str(path) and where == "reading":
        print("there", flush=True)
        time.sleep(60)
    return read(path, **options)

def slow_write(*args):
    said = write(*args)
    if where == "writing" and "b.nii.gz" in said:
        print("there", flush=True)
        time.sleep(2)
    return said

volume.read_image, pipeline.write_outputs = slow_read, slow_write
if where == "computing":
    compute = Work.compute

    def slow_compute(self, job, progress):
        while job.entry.case == "b":
            print("there", flush=True)
            time.sleep(0.5)
        return compute(self, job, progress)

    Work.compute = slow_compute
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def scans(tmp_path):
    home = tmp_path / "scans"
    home.mkdir()
    for name in "abcd":
        scan(home / f"{name}.nii.gz", (24, 20, 3))
    return home


@pytest.mark.parametrize(
    ("where", "masks"),
    [
        pytest.param("reading", "a", marks=pytest.mark.long),
        ("computing", "a"),
        pytest.param("writing", "ab", marks=pytest.mark.long),
    ],
)
def test_predict_ends_at_sigterm_whole_and_goes_on(run, scans, tmp_path, where, masks):
    output = tmp_path / "masks"
    command = ["-i", str(scans), "-o", str(output), "-m", str(run), "--device", "cpu", "--no-preview"]
    command += ["--manifest", "on"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, where, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    ) as process:
        assert process.stdout.readline() == "there\n"
        time.sleep(1)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - began < 10
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert sorted(p.name for p in output.glob("*.nii.gz")) == [f"{name}.nii.gz" for name in masks]
    assert [p for p in output.rglob(".*")] == []  # neither a lease nor half a file
    (rows,) = (output / "manifest").iterdir()
    assert [json.loads(line)["case_id"] for line in rows.read_text().splitlines()] == [*masks]
    before = {p.name: p.stat().st_mtime_ns for p in output.glob("*.nii.gz")}
    assert main(command) == 0
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    whole = tmp_path / "whole"
    command[3] = str(whole)
    assert main(command) == 0
    for name in "abcd":
        assert (output / f"{name}.nii.gz").read_bytes() == (whole / f"{name}.nii.gz").read_bytes()
    assert manifest(ManifestArgs(output)).counts == {"done": 4}


@pytest.mark.parametrize(
    "trials", [pytest.param(1, id="some"), pytest.param(10, id="all", marks=pytest.mark.long)]
)
def test_training_ends_at_sigterm_whole_and_goes_on_to_the_bit(tmp_path, trials):
    data = write_scans(tmp_path / "data")
    assert finish(data, tmp_path / "whole")[0] == 0
    began = time.monotonic()
    assert finish(data, tmp_path / "timed")[0] == 0
    seconds, draw, stopped = time.monotonic() - began, np.random.default_rng(0), 0
    for trial in range(trials):
        run = tmp_path / f"{trial}"
        child = start(data, run)
        child.join(draw.uniform(0.2, 0.6) * seconds)
        began = time.monotonic()
        child.terminate()
        child.join(60)
        assert time.monotonic() - began < 10
        child.said.close()
        assert child.exitcode in (143, 0, -signal.SIGTERM)  # the last before Python had set a handler
        stopped += child.exitcode == 143
        assert hidden(run) == []
        assert finish(data, run)[0] == 0
        assert_same(run, tmp_path / "whole")
    assert stopped
