"""Two results, record by record.    python -m benchmarks.compare A.json B.json

Prints B's time over A's for each record that both have. A change exceeds the spread where the two ranges from 20 % to
80 % quantile do not meet."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# What was found of a case, or how; all other keys say which case it is.
RESULTS = ("role", "status", "flops", "error", "ms", "peak_bytes", "reason", "bytes", "bytes_backward", "clock",
           "commit", "items", "unit", "flop_ratio", "same_as")  # fmt: skip


class Change(NamedTuple):
    """One time of one record: the ratio B over A and its verdict."""

    what: str
    ratio: float
    verdict: str
    """slower, faster, or within the spread"""


def verdict(a: Mapping[str, float], b: Mapping[str, float]) -> str:
    """slower or faster where the ranges from q20 to q80 of two summaries do not meet, else within the spread."""
    if b["q20"] > a["q80"]:
        return "slower"
    return "faster" if b["q80"] < a["q20"] else "within the spread"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """Every time that both results hold."""
    before = {_key(r): r for r in a["records"] if "ms" in r}
    changes = []
    for record in b["records"]:
        old = before.get(_key(record))
        if old is None or "ms" not in record:
            continue
        for kind in (k for k in record["ms"] if k in old["ms"]):
            times = old["ms"][kind], record["ms"][kind]
            what = f"{record['subject']}, {record['name'] or _sizes(record)}, {record['provider']}, {kind}"
            changes.append(Change(what, times[1]["median"] / times[0]["median"], verdict(*times)))
    return changes


def _key(record: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((k, str(v)) for k, v in record.items() if k not in RESULTS))


def _sizes(record: Mapping[str, Any]) -> str:
    return " ".join(f"{k} {v}" for k, v in _key(record) if k not in ("subject", "name", "provider"))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the changes. The exit code is 1 where ours is slower beyond the spread, 2 without anything to compare."""
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=__doc__)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    args = parser.parse_args(argv)
    try:
        a, b = (json.loads(path.read_text()) for path in (args.a, args.b))
    except (OSError, json.JSONDecodeError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    devices = [r["environment"]["device"] for r in (a, b)]
    if devices[0] != devices[1]:
        print(f"two devices: {devices[0]} and {devices[1]}; the ratio is not of the code")
    changes = compare(a, b)
    if not changes:
        print(f"benchmarks.compare: {args.a} and {args.b} have no timed case in common", file=sys.stderr)
        return 2
    for change in changes:
        print(f"{change.ratio:7.2f}×  {change.verdict:<18} {change.what}")
    ours = {r["provider"] for r in b["records"] if r.get("role") == "ours"}
    slower = [c for c in changes if c.verdict == "slower" and any(f", {name}, " in c.what for name in ours)]
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
