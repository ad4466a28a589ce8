"""The machine that a number was measured on: device, versions, commit, and what memory is free."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from aftersam.errors import counted

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "BENCH_COMMIT"  # names the commit where the sources lie without their .git
RESULTS = Path(__file__).resolve().parent / "results"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def absent(package: str) -> str:
    """Why `package` cannot be used, empty where it is installed."""
    return "" if find_spec(package) is not None else f"{package.replace('_', '-')} is not installed"


def free_bytes() -> int:
    """Memory that a case may take on the default device."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    return int(found.group(1)) * 1024 if found else 4 * 2**30


def environment() -> dict[str, Any]:
    """The machine, the versions, the commit and the date, to be stored with every number."""
    try:
        import triton

        triton_version: str | None = triton.__version__
    except ImportError:
        triton_version = None
    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if gpu else (0, 0)
    return {
        "device": torch.cuda.get_device_name()
        if gpu
        else f"{cpu_model()}, {counted(torch.get_num_threads(), 'thread')}",
        "kind": "gpu" if gpu else "cpu",
        "arch": 10 * capability[0] + capability[1],
        "cpu": cpu_model(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": os.environ.get(COMMIT) or _output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": _dirty(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _dirty() -> bool:
    """Whether tracked files differ from the commit, without those that a benchmark and `make figure` write.

    Untracked files do not count: wheels and caches are copied to a machine without a network."""
    written = (":!benchmarks/results", ":!docs", ":!README.md")
    return bool(_output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", *written))


def cpu_model() -> str:
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def slug(text: str) -> str:
    """`text` as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((?:r|tm)\)", "", text.lower())).strip("-")


def _read(path: str) -> str:
    """Text of a file, empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    """First line that a command prints, empty where it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""
