"""The examples of docs/how-to/cohorts.md, run as they are: schedulers' variables, a local Ray, a mapped function."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aftersam.inference.manifest import ManifestArgs, manifest
from aftersam.predict import main
from toy_scans import scan

TEXT = (Path(__file__).parents[1] / "docs" / "how-to" / "cohorts.md").read_text(encoding="utf-8")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
CASES = ("a", "x/b", "x/c", "d")


def example(title, language):
    section = TEXT.partition(f"\n## {title}\n")[2]
    return re.search(rf"```{language}\n(.*?)```", section, re.S)[1]


@pytest.fixture
def shared(tmp_path):
    """A folder with four scans and a list of them."""
    for name in CASES:
        (tmp_path / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        scan(tmp_path / "scans" / f"{name}.nii.gz", (24, 20, 3))
    lines = [f"{tmp_path}/scans/{name}.nii.gz,{name}\n" for name in CASES]
    (tmp_path / "scans.csv").write_text("image,case_id\n" + "".join(lines))
    return tmp_path


def assert_done(masks):
    assert sorted(str(p.relative_to(masks)) for p in masks.rglob("*.nii.gz")) == sorted(
        f"{c}.nii.gz" for c in CASES
    )
    assert manifest(ManifestArgs(masks)).counts == {"done": 4}


def test_the_slurm_array(shared):
    """srun and scontrol are stand-ins, which a machine without SLURM does not have; the rest is the example."""
    tools = shared / "bin"
    tools.mkdir()
    python = f"exec {sys.executable} -m aftersam"
    for name, text in {
        "aftersam": f'{python} "$@"',
        "srun": 'exec "$@"',
        "scontrol": f'echo "$@" > {shared}/asked',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    (shared / "job.sh").write_text(example("SLURM array", "bash"))
    env = {
        **ENV,
        "PATH": f"{tools}:{ENV['PATH']}",
        "SCANS": f"{shared}/scans.csv",
        "MASKS": f"{shared}/masks",
    }
    env |= {
        "MODEL": "headneck",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_COUNT": "2",
    }
    for task in "01":
        done = subprocess.run(
            ["bash", str(shared / "job.sh")],
            env={**env, "SLURM_ARRAY_TASK_ID": task},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert f"part {task} of 2 (SLURM_ARRAY_TASK_ID)" in done.stderr
    assert_done(shared / "masks")
    assert not (shared / "asked").exists()
    (tools / "aftersam").write_text("#!/bin/bash\nexit 143\n")
    done = subprocess.run(
        ["bash", str(shared / "job.sh")], env={**env, "SLURM_ARRAY_TASK_ID": "1"}, check=False
    )
    assert done.returncode == 143
    assert (shared / "asked").read_text() == "requeue 7_1\n"


def run_tasks(command, shared, monkeypatch, count, name, **more):
    """Every task of an array, with the folders of this test in place of the buckets and a part for each."""
    assert command[:2] == ["aftersam", "predict"]
    places = {"s3://bucket/scans": str(shared / "scans"), "s3://bucket/masks": str(shared / "masks")}
    for index in range(count):
        with monkeypatch.context() as patch:
            for key, value in {name: str(index), **more}.items():
                patch.setenv(key, value)
            assert main([*(places.get(word, word) for word in command[2:]), "--device", "cpu"]) == 0
    assert_done(shared / "masks")


def test_the_kubernetes_job(shared, monkeypatch):
    job = yaml.safe_load(example("Kubernetes indexed job", "yaml"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = container["command"]
    assert command[command.index("--num-parts") + 1] == str(job["spec"]["completions"])
    command[command.index("--num-parts") + 1] = "3"  # fewer pods
    run_tasks(command, shared, monkeypatch, 3, "JOB_COMPLETION_INDEX")


def test_the_batch_array(shared, monkeypatch):
    command = json.loads(example("AWS Batch", "json"))["containerProperties"]["command"]
    run_tasks(command, shared, monkeypatch, 2, "AWS_BATCH_JOB_ARRAY_INDEX", AWS_BATCH_JOB_ARRAY_SIZE="2")


def test_the_ray_pipeline(shared):
    code = "import ray\nray.init(num_cpus=4, include_dashboard=False)\n"  # reading and writing need some beside actors
    code += example("Ray", "python").replace("/shared", str(shared))
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_done(shared / "masks")
    from pyarrow import parquet

    rows = parquet.read_table(shared / "rows").to_pylist()
    assert sorted((row["case_id"], row["status"]) for row in rows) == sorted((case, "done") for case in CASES)


def test_the_function_that_dask_maps(shared):
    found = {}
    exec(example("Dask, or anything that maps a function", "python").replace("/shared", str(shared)), found)
    assert {found["segment"](part) for part in range(8)} == {0}
    assert_done(shared / "masks")
