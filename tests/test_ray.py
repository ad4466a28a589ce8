"""A cohort on a Ray of this machine: an actor that is killed costs nothing, a scan that fails costs one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toy_scans import scan

TESTS = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def call(*command):
    """A process of its own, since Ray warns and leaves threads."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, env=ENV
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def scans(tmp_path):
    home = tmp_path / "scans"
    home.mkdir()
    scan(home / "0.nii.gz", (24, 20, 3))
    for i in range(1, 8):
        shutil.copyfile(home / "0.nii.gz", home / f"{i}.nii.gz")
    return home


def test_a_killed_actor_costs_nothing(run, scans, tmp_path):
    code, said, errors = call(TESTS / "cohort_trials.py", "ray", 1, scans, tmp_path, run)
    assert code == 0, errors
    assert json.loads(said.splitlines()[-1]) == {"trials": 1, "kills": 1, "scans": 8, "rows": 8}


OWN = """
import json, sys
import ray
from aftersam.inference.ray import SegmentScans

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
images = [{"image": path, "age": age} for age, path in enumerate(sys.argv[3:])]
rows = ray.data.from_items(images).map_batches(
    SegmentScans, fn_constructor_kwargs={"output": sys.argv[1], "model": sys.argv[2], "device": "cpu"},
    batch_size=4, compute=ray.data.ActorPoolStrategy(size=1),
).take_all()
print(json.dumps(sorted(rows, key=lambda row: row["age"])))
"""


@pytest.mark.long
def test_a_pipeline_of_the_users_own_gets_rows(run, scans, tmp_path):
    (scans / "1.nii.gz").write_bytes(b"no scan")
    masks = tmp_path / "masks"
    code, said, errors = call("-c", OWN, masks, run, scans / "0.nii.gz", scans / "1.nii.gz")
    assert code == 0, errors
    good, bad = json.loads(said.splitlines()[-1])
    assert (good["status"], good["reason"], good["age"]) == ("done", "", 0)
    assert (masks / good["mask"]).exists()
    assert (bad["status"], bad["age"]) == ("failed", 1)
    assert bad["reason"].startswith(f"{scans}/1.nii.gz")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["processes", "ray"])
def test_ten_cohorts_with_kills(run, tmp_path, mode):
    """60 phantoms of six slices."""
    import nibabel as nib
    import numpy as np

    from aftersam.data.phantom import make_phantom

    home = tmp_path / "scans"
    home.mkdir()
    for seed in range(60):
        hu = make_phantom(seed).hu[14:20].transpose(2, 1, 0)
        nib.save(nib.Nifti1Image(hu, np.diag([-4.0, -4.0, 5.0, 1.0])), home / f"{seed}.nii.gz")
    code, said, errors = call(TESTS / "cohort_trials.py", mode, 10, home, tmp_path, run)
    assert code == 0, errors
    found = json.loads(said.splitlines()[-1])
    assert (found["trials"], found["scans"], found["rows"]) == (10, 60, 60)
    print(found)


def test_processes_that_are_killed_cost_nothing(run, scans, tmp_path):
    code, said, errors = call(TESTS / "cohort_trials.py", "processes", 1, scans, tmp_path, run)
    assert code == 0, errors
    found = json.loads(said.splitlines()[-1])
    assert (found["scans"], found["rows"]) == (8, 8)
    assert found["kills"] >= 1  # a quick machine may be done before the second
