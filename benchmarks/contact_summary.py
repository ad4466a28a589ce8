"""What the lines of a first contact say: a page for the terminal, and a result with its figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figure, harness, journal
from benchmarks.targets import line as target_line
from benchmarks.targets import targets

MOST = 9500  # characters of a summary
Entries = Sequence[Mapping[str, Any]]


def result_of(lines: Path) -> dict[str, Any]:
    """The result of a run, as `python -m benchmarks` writes it, with tests, stages and tiles.

    Raises ValueError where the machine was not measured."""
    head, records = harness.read(lines)
    if not head:
        raise ValueError(f"{lines} names no machine: the run was stopped before its first stage had ended")
    entries = journal.read(lines)
    tests = {entry["test"]: entry for entry in entries if "test" in entry}
    stages = {entry["stage"]: entry for entry in entries if "stage" in entry}
    result = {
        "scope": "first contact", **head, "records": records,
        "skipped": [entry["skipped"] for entry in entries if "skipped" in entry],
        "stages": list(stages.values()),
        "tests": {outcome: sum(t["outcome"] == outcome for t in tests.values())
                  for outcome in ("passed", "failed", "skipped")},
        "failed_tests": [t for t in tests.values() if t["outcome"] == "failed"],
        "tiles": [entry for entry in entries if "tile" in entry],
    }  # fmt: skip
    return {**result, "targets": targets(result)}


def wrong(entries: Entries) -> int:
    """1 where a test failed or a record of ours is not right, else 0."""
    return int(bool(_wrong(entries)))


def _wrong(entries: Entries) -> list[str]:
    """A line for each test that failed and each provider that is wrong or failed, ours first."""
    tests = {e["test"]: e for e in entries if "test" in e and e["outcome"] == "failed"}
    records = {harness.place(e): e for e in entries if "provider" in e and "status" in e}
    bad = [r for r in records.values() if r["role"] == "ours" and r["status"] not in ("ok", "missing")]
    bad += [r for r in records.values() if r["provider"] == harness.TIMING]
    return [f"{r['subject']}, {r['name']}, {r['provider']}: {_why(r)}" for r in bad] + [
        f"{name.partition('::')[2]}: {test['error'][:220]}" for name, test in tests.items()
    ]


def _why(record: Mapping[str, Any]) -> str:
    return str(record.get("reason") or f"{record['status']}, relative error {record.get('error')}")


def summary(entries: Entries) -> str:
    """A page of under 10,000 characters: what is wrong, targets, stages, then times, ours first."""
    head = next((entry["head"] for entry in entries if "head" in entry), None)
    records = list({harness.place(e): e for e in entries if "provider" in e and "status" in e}.values())
    bad, parts = _wrong(entries), []
    if head is not None:
        where, ceiling = head["environment"], head["ceilings"]
        parts.append(
            f"{where['device']}, torch {where['torch']}, Triton {where['triton']}, commit {where['commit']}: copy "
            f"{ceiling['copy_bytes_per_s'] / 1e9:.0f} GB/s, matmul {ceiling['matmul_flops_per_s'] / 1e12:.1f} TFLOP/s, "
            f"{1e6 * ceiling['launch_s']:.1f} us a call"
        )
    parts += [f"WRONG ({len(bad)}):" if bad else "nothing of ours is wrong", *bad[:20]]
    outcomes = {entry["test"]: entry["outcome"] for entry in entries if "test" in entry}
    parts.append("tests: " + ", ".join(
        f"{list(outcomes.values()).count(o)} {o}" for o in ("passed", "failed", "skipped")))  # fmt: skip
    if head is not None:
        parts += [target_line(t) for t in targets({**head, "records": records}) if t["value"] is not None]
    stages = {entry["stage"]: entry for entry in entries if "stage" in entry}
    parts += [
        f"stage {name}: {s['status']}, {s['seconds']:.0f} s{s['why'] and ': ' + s['why']}"
        for name, s in stages.items()
    ]
    parts += [
        f"{e['tile']}: {e['why'] or '{:.1f} us'.format(1e3 * e['ms'])} ({e['key']})"
        for e in entries
        if "tile" in e
    ]
    parts += [
        _timed(r, head["ceilings"])
        for r in sorted(records, key=lambda r: r["role"] != "ours")
        if head and "ms" in r
    ]
    text = ""
    for part in parts:
        if len(text) + len(part) > MOST:
            return text + "... the rest is in the lines\n"
        text += part[:400] + "\n"
    return text


def _timed(record: Mapping[str, Any], ceiling: Mapping[str, float]) -> str:
    forward, step = record["ms"]["forward"]["median"], record["ms"].get("forward_backward")
    share = harness.share(record, ceiling)
    text = f"{record['subject']}, {record['name']}, {record['provider']}: {forward:.4g} ms"
    text += f", with backward {step['median']:.4g} ms" if step else ""
    return text + (f", {share:.0%}" if share is not None else "")


def collect(lines: Path, root: Path) -> int:
    """Write the result, then figures and tables of all results, below `root`, and name what was written."""
    result = result_of(lines)
    print(harness.write(result, root / "benchmarks" / "results"))
    return figure.main(root)
