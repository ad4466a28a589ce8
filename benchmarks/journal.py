"""A file of JSON lines that outlives the processes that write it.

A line is one write to the end of the file, so that several processes may share the file and a killed one loses nothing
that it wrote. A process names a unit of work before it begins it: a unit that hangs or crashes is then known."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def append(path: Path, *entries: Mapping[str, Any]) -> None:
    """Add `entries` to the end of the file in one write."""
    text = "".join(json.dumps(entry, default=str) + "\n" for entry in entries)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def read(path: Path) -> list[Entry]:
    """Every whole line of the file, none where there is no file; a line that was cut off is left out."""
    return parsed(path.read_bytes()) if path.exists() else []


def parsed(data: bytes) -> list[Entry]:
    """The entries of whole lines."""
    entries = []
    for line in data.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def mend(path: Path) -> None:
    """End a line that was cut off, so that the next one is whole."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def begin(path: Path | None, unit: Mapping[str, Any]) -> None:
    """Name the unit of work that this process does next."""
    if path is not None:
        append(path, {"begin": unit, "pid": os.getpid()})


def end(path: Path | None, *results: Mapping[str, Any]) -> None:
    """Keep the results of the unit that this process began last."""
    if path is not None:
        append(path, *results, {"begin": None, "pid": os.getpid()})


def watch_compilations(path: Path) -> None:
    """Add a line for each kernel that Triton compiles in this process, or takes from its cache."""
    try:
        from triton import knobs
    except ImportError:  # no Triton, or one without listeners
        return

    def listener(*, metadata: Mapping[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        seconds = 1e-6 * sum(t for _, t in times.lowering_stages)
        append(path, {"compile": metadata.get("name"), "seconds": round(seconds, 2), "cached": cache_hit})

    knobs.compilation.listener = listener


def process_seconds() -> float:
    """Seconds since this process started, imports included; 0 where the system does not say."""
    try:
        started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
