"""What was measured on which GPU: JSON files that ship in measured/, and a user's own, which are preferred.

A file is one device's: architecture, who measured, when, on what commit and with which Triton, then `tiles` of axial
attention, `backends` of slice attention, and `right`, the ops whose kernels were compared with fp64 there.
`python -m axial_fusion.tune` writes the user's."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "measured"
CACHE = "AXIAL_FUSION_CACHE"  # names the folder for what this library keeps, ~/.cache/axial_fusion without it
FACTS = ("device", "arch", "by", "date", "commit", "triton")
Measurement = dict[str, Any]


def folder() -> Path:
    """Where this library keeps what it measures and checks on this machine."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(home) / "axial_fusion")


@cache
def measurements() -> list[Measurement]:
    """Every file, those that ship first: a later one is preferred. One that cannot be read is left out."""
    found = []
    for place in (SHIPPED, folder() / "measured"):
        for path in sorted(place.glob("*.json")):
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(known, dict) and known.keys() >= set(FACTS):
                found.append(known)
    return found


def source(known: Measurement) -> str:
    """Who measured, when, and on what commit."""
    return f"{known['device']}, {known['by']}, {known['date']}, commit {known['commit']}"


def path_of(device: str, place: Path) -> Path:
    return place / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def write(facts: Measurement, entries: Measurement, place: Path) -> Path:
    """Add `entries` (tiles, backends, right) to the device's file in `place`, in the place of those with their keys."""
    path = path_of(facts["device"], place)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for kind, fresh in entries.items():
        chosen = {"tiles": "tile", "backends": "backend"}.get(kind, "")
        keys = [{k: v for k, v in entry.items() if k != chosen} for entry in fresh]
        kept = [e for e in known.get(kind, []) if {k: v for k, v in e.items() if k != chosen} not in keys]
        known[kind] = kept + fresh
    place.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(facts | {k: v for k, v in known.items() if k not in facts}, indent=1) + "\n")
    measurements.cache_clear()
    return path


def replace(path: Path, text: str) -> None:
    """Write a file in one step, so that another process never reads a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
