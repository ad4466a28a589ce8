"""Which Triton kernels `auto` trusts on this GPU: those that a shipped measurement covers or that passed their check.

An op is checked (self_check.py) the first time that it meets a GPU, dtype and Triton version, in a process of its own,
so that a kernel that crashes or hangs ends no other process. The check takes as long as the op's kernels compile; its
outcome is kept on disk until kernels, Triton or torch change. A kernel that fails is not used: the library path is
slower, and right. AXIAL_FUSION_SELF_CHECK=0 turns the check off."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock

import torch

from . import tuned
from .checks import constant_when_traced, dtype_name

SWITCH = "AXIAL_FUSION_SELF_CHECK"
NO_PROCESS = "no process could be started to check it"
LIMIT_S = 120.0  # for one op, its compilation included
OPS = ("axial_attention", "slice_attention", "rel_pos_attention", "window_attention", "rel_terms", "row_norm",
       "lora_linear", "lora_qkv")  # fmt: skip

_KNOWN: dict[tuple[torch.device, torch.dtype], dict[str, str | None]] = {}
_LOCK = Lock()


@constant_when_traced
def failure(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `auto` does not use the kernels of `op` on this GPU; None if they are right or were not checked."""
    known = _KNOWN.setdefault((device, dtype), {})
    if op not in known:
        with _LOCK:
            if op not in known:
                known[op] = _found(op, device, dtype)
    return known[op]


def _found(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The outcome of the check of `op`, from disk or made now; None where the check is off or a measurement ships."""
    if os.environ.get(SWITCH, "1") == "0" or device.type != "cuda" or not torch.cuda.is_available():
        return None
    if covered(op, device, dtype):
        return None
    where = f"{torch.cuda.get_device_name(device)}, Triton {triton_version()}, torch {torch.__version__}"
    path = tuned.folder() / "self-check" / f"{_digest(where, dtype)}.json"
    stored = _stored(path)
    why = stored[op] if op in stored else run(device, dtype, [op])[op]
    if op not in stored and why != NO_PROCESS:
        outcome = {"where": where, "dtype": dtype_name(dtype), "ops": {**_stored(path), op: why}}
        with contextlib.suppress(OSError):  # else the next process checks it again
            path.parent.mkdir(parents=True, exist_ok=True)
            tuned.replace(path, json.dumps(outcome, indent=1))
    if why:
        warnings.warn(
            f"axial_fusion: on {where}, the kernels of {op} in {dtype_name(dtype)} failed their check, and library "
            f"calls compute instead, slower: {why}. Please open an issue with this message and the output of "
            f"`python -m {__package__}.self_check --dtype {dtype_name(dtype)}`. {SWITCH}=0 turns the check off.",
            stacklevel=2,
        )
    return why


def _stored(path: Path) -> dict[str, str | None]:
    """The outcomes that the file `path` holds, by op; none if it cannot be read."""
    try:
        found: dict[str, str | None] = json.loads(path.read_text(encoding="utf-8"))["ops"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def covered(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a shipped measurement found the kernels of `op` right on this architecture with this Triton."""
    major, minor = torch.cuda.get_device_capability(device)
    entry = {"op": op, "dtype": dtype_name(dtype), "triton": ".".join(triton_version().split(".")[:2])}
    return any(m["arch"] == 10 * major + minor and entry in m.get("right", ()) for m in tuned.measurements())


def triton_version() -> str:
    import triton

    return str(triton.__version__)


@cache
def _digest(where: str, dtype: torch.dtype) -> str:
    """A key of the device, the versions and the kernels' source."""
    digest = hashlib.sha256(f"{where}, {dtype_name(dtype)}".encode())
    for path in sorted((Path(__file__).parent / "gpu").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def run(device: torch.device, dtype: torch.dtype, ops: Sequence[str] = OPS) -> dict[str, str | None]:
    """Check `ops` in a process of its own: why each fails, or None. After a crash or a hang a new process goes on.

    All of them fail where no process can be started."""
    found: dict[str, str | None] = {}
    while left := [op for op in ops if op not in found]:
        lost = _some(device, dtype, left, found)
        if lost is None:
            return dict.fromkeys(ops, NO_PROCESS) | found
        found.update([lost])
    return found


def _some(
    device: torch.device, dtype: torch.dtype, ops: Sequence[str], found: dict[str, str | None]
) -> tuple[str, str] | None:
    """Check `ops` in one process, into `found`; the op that it did not survive and why, or None."""
    command = [*_command(), "--dtype", dtype_name(dtype), "--device", str(device), "--ops", *ops]
    environment = os.environ | {SWITCH: "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile("w+") as said:
        try:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL, env=environment)
        except OSError:  # Python is embedded in another program
            return None
        began, at, why = time.monotonic(), 0, None
        while process.poll() is None and why is None:
            time.sleep(0.02)
            size = os.fstat(said.fileno()).st_size
            if size > at:
                began, at = time.monotonic(), size
            elif time.monotonic() - began > LIMIT_S:
                process.kill()
                why = f"gave no result in {LIMIT_S:.0f} s"
        code = process.wait()
        said.seek(0)
        begun = None
        for line in said.read().splitlines():
            name, _, result = line.partition(": ")
            if name == "begin":
                begun = result
            elif name in OPS:
                found[name], begun = None if result == "right" else result, None
    if begun is None:  # it came to its end, or did not begin
        return None
    return begun, why or f"its process ended with code {code}"


def _command() -> list[str]:
    return [sys.executable, "-m", f"{__package__}.self_check"]
