"""The first minutes on new hardware.    python -m benchmarks.first_contact

Five stages, each with a time limit and a log file: compute-sanitizer on small shapes, the GPU tests, a sweep of tile
configurations that are checked before they are timed, the backends of slice attention, the quick benchmark. A stage
that fails or runs out of time does not stop the next; one that cannot run here says why. Under ten minutes in all."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.machine import RESULTS, ROOT


class Stage(NamedTuple):
    name: str
    command: list[str]
    limit_s: float
    missing: str = ""
    """Why the stage cannot run here; empty where it can."""


class Outcome(NamedTuple):
    name: str
    status: str
    """ok, failed, out of time or skipped"""
    seconds: float
    note: str


def stages() -> list[Stage]:
    """What to run on this machine."""
    gpu = torch.cuda.is_available()
    no_gpu = "" if gpu else "torch sees no GPU"
    sanitizer = shutil.which("compute-sanitizer")
    no_sanitizer = no_gpu or ("" if sanitizer else "compute-sanitizer is not installed")
    python = sys.executable
    tune, sizes = [python, "-m", "axial_fusion.tune"], ["--slices", "9", "--head-dim", "32"]
    return [
        Stage("sanitizer",
              [sanitizer or "compute-sanitizer", "--error-exitcode", "1", python, "-c", SMALL], 90, no_sanitizer),
        Stage("gpu-tests", [python, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=20"], 150, no_gpu),
        Stage("sweep", [*tune, "axial_attention", *sizes], 90, no_gpu),
        Stage("backends", [*tune, "slice_attention", *sizes], 35, no_gpu),
        Stage("bench", [python, "-m", "benchmarks", "quick", "--budget", "190", "--case", "1"], 235),
    ]  # fmt: skip


SMALL = """
import torch
from axial_fusion import axial_attention
for n, p, d in ((1, 1, 16), (3, 7, 24), (9, 65, 32), (16, 33, 96)):
    q, k, v = (torch.randn(2, n, p, 2, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    axial_attention(q, k, v, backend="triton").sum().backward()
torch.cuda.synchronize()
"""


def run(stage: Stage, folder: Path) -> Outcome:
    """Run one stage, its output in <folder>/<name>.log from the first line on."""
    if stage.missing:
        return Outcome(stage.name, "skipped", 0.0, stage.missing)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{stage.name}.log"
    began = time.perf_counter()
    with log.open("w") as out:
        # In a session of its own, so that processes which the stage started end with it.
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=_environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        try:
            code = process.wait(timeout=stage.limit_s)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "out of time"
    lines = log.read_text(errors="replace").strip().splitlines()
    return Outcome(stage.name, status, time.perf_counter() - began, lines[-1] if lines else "no output")


def _environment() -> dict[str, str]:
    known = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), str(ROOT / "kernels"), *([known] if known else [])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages in order. The exit code is 1 where one failed or ran out of time."""
    parser = argparse.ArgumentParser(prog="benchmarks.first_contact", description=__doc__)
    parser.add_argument(
        "-o", "--output", type=Path, default=RESULTS / "first-contact", help="folder of the logs"
    )
    args = parser.parse_args(argv)
    outcomes = []
    for stage in stages():
        print(f"{stage.name} (at most {stage.limit_s:.0f} s) ...", flush=True)
        outcomes.append(run(stage, args.output))
        print("  {1}, {2:.0f} s: {3}".format(*outcomes[-1]), flush=True)
    print(f"logs: {args.output}")
    return int(any(o.status in ("failed", "out of time") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
