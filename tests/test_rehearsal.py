"""The rehearsal of first contact on a CPU, without the packages that its machine lacks: minutes each."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from axial_fusion.cpu import compiled
from benchmarks import first_contact, journal
from benchmarks.first_contact import LINES

ROOT = Path(first_contact.ROOT)


def outcomes(folder):
    return {e["test"]: e for e in journal.read(folder / LINES) if "test" in e}


def whole(folder, option, run, *, budget):
    """What a rehearsal says that runs or skips every stage within its budget."""
    began = time.time()
    said, _ = rehearse(folder, option, run, "--budget", str(budget)).communicate()
    assert time.time() - began < budget + 5
    ended = [e for e in journal.read(Path(run) / LINES) if "stage" in e]
    assert {e["stage"] for e in ended} == {s.name for s in first_contact.stages(Path(run) / LINES)}
    assert all(e["why"] or e["status"] == "ok" for e in ended)
    return said


BREAKS = {
    "wrong": "y = launch(q, *rest); y.view(-1)[:1] += 1; return y",
    "raises": "raise RuntimeError('no kernel image is available')",
    "hangs": "time.sleep(30); return launch(q, *rest)",
}
SITE = """
import importlib.machinery, sys, time
ABSENT = {"monai", "nibabel", "segment_anything", "tyro", "accelerate"}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name != "axial_fusion.ops.axial_attention" or not BROKEN:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            for backend in ("triton", "cpu"):
                def broken(q, *rest, launch=module._FORWARD[backend]):
                    BROKEN_BODY
                module._FORWARD[backend] = broken
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


def rehearse(folder, *options, broken=""):
    """First contact on this CPU without the packages that its machine lacks, axial attention `broken`."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    body = SITE.replace("BROKEN_BODY", BREAKS.get(broken, "pass")).replace("BROKEN", repr(broken))
    (site / "sitecustomize.py").write_text(body)
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "benchmarks.first_contact", *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.long
@pytest.mark.skipif(
    compiled.missing() is not None, reason="a CPU takes a broken kernel only where one was built"
)
@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_kernel_is_named_skipped_and_stops_nothing(tmp_path, broken):
    folder = tmp_path / "run"
    process = rehearse(
        tmp_path, "--out", str(folder), "--budget", "180", "--only", "tests", "ours", broken=broken
    )
    said, _ = process.communicate()
    assert process.returncode == 1
    entries = journal.read(folder / LINES)
    failed = [t for t in outcomes(folder).values() if t["outcome"] == "failed"]
    records = {(r["subject"], r["name"]): r for r in entries if r.get("provider") == "axial_attention"}
    message = {"wrong": "", "raises": "no kernel image", "hangs": "gave no result in 25 s"}[broken]
    assert any("test_axial_attention" in t["test"] and message in t["error"] for t in failed)
    assert all(r["status"] != "ok" and "ms" not in r for r in records.values())
    assert any(message in r.get("reason", "") for r in records.values())
    assert any(
        r["status"] == "ok" for r in entries if r.get("role") == "ours" and r.get("subject") != "axial"
    )
    assert any(t["outcome"] == "passed" for t in outcomes(folder).values())
    assert said.index("WRONG") < said.index("stage tests")


@pytest.mark.long
@pytest.mark.parametrize("budget", [60, 420])
def test_a_short_and_a_long_budget_hold(tmp_path, budget):
    assert len(whole(tmp_path, "--out", str(tmp_path / "run"), budget=budget)) < 12_000


@pytest.mark.long
def test_the_rehearsal_runs_or_skips_every_stage_within_its_budget_and_survives_kills(tmp_path):
    folder, draw, seen = tmp_path / "run", random.Random(1), 0
    for i in range(10):
        process = rehearse(tmp_path, "--resume" if i else "--out", str(folder), "--budget", "240")
        time.sleep(draw.uniform(20, 40))
        process.kill()
        process.communicate()
        now = sum("status" in e or "test" in e for e in journal.read(folder / LINES))
        assert now >= seen
        seen = now
    said = whole(tmp_path, "--resume", str(folder), budget=240)
    entries = journal.read(folder / LINES)
    tests = Counter(e["test"] for e in entries if "test" in e)
    ours = Counter(
        json.dumps([e["subject"], e["name"]]) for e in entries if e.get("provider") == "slice_attention"
    )
    assert set(tests.values()) == {1}
    assert set(ours.values()) <= {1, 2}  # again beside rivals
    assert len(said) < 12_000
