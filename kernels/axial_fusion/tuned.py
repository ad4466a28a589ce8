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
ENTRIES: dict[str, dict[str, type]] = {  # what an entry of each kind holds
    "tiles": {"op": str, "dtype": str, "slices": int, "head_dim": int, "tile": list},
    "backends": {"op": str, "dtype": str, "head_dim": int, "backend": str},
    "right": {"op": str, "dtype": str, "triton": str},
}


def folder() -> Path:
    """Where this library keeps what it measures and checks on this machine."""
    # not Path.home(), which raises for a user without a home
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get(CACHE) or Path(home) / "axial_fusion")


@cache
def measurements() -> list[Measurement]:
    """The content of every usable file, those that ship first: a later one is preferred."""
    found = []
    for place in (SHIPPED, folder() / "measured"):
        for path in sorted(place.glob("*.json")):
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if _usable(known):
                found.append(known)
    return found


def _usable(known: Any) -> bool:
    """Whether a file has the form that is read here: another version of this library may have written it."""
    if not isinstance(known, dict) or not known.keys() >= set(FACTS) or not isinstance(known["arch"], int):
        return False
    if not all(isinstance(known.get(kind, []), list) for kind in ENTRIES):
        return False
    return all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), of) for name, of in form.items())
        and entry["dtype"] in ("float32", "float16", "bfloat16")
        and (kind != "tiles" or len(entry["tile"]) == 4)  # rows, warps, stages, heads
        for kind, form in ENTRIES.items()
        for entry in known.get(kind, ())
    )


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
