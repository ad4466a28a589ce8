"""What the lines of a first contact say: a page for the terminal, and a result with its figures and tables."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figure, harness, journal
from benchmarks.targets import line as target_line
from benchmarks.targets import targets

OPS_OF = {"axial": "axial_attention", "slice": "slice_attention", "rel_pos": "rel_pos_attention",
          "window": "window_attention", "lora": "lora_linear", "axial half": "row_norm"}  # fmt: skip
HOST_BINDS = 1.2  # times the GPU's time, above which a call waits for Python
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
        "tiles": [entry for entry in entries if "ms" in entry and "refused" in entry],
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
            f"{ceiling['copy_bytes_per_s'] / 1e9:.0f} GB/s, matmul {ceiling['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s, "
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
        f"{e['op']}, N {e['slices']}, D {e['head_dim']}, tile {e['tile']}: "
        + (e["refused"] or f"{1e3 * e['ms']:.1f} us")
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
    text += f", {share:.0%}" if share is not None else ""
    call = record["ms"].get("forward_call")
    if call and call["median"] > HOST_BINDS * forward:
        text += f"; the host binds: {call['median']:.4g} ms a call"
    return text


def collect(lines: Path, root: Path) -> int:
    """Write the result, tiles and backends, then figures and tables of all results, below `root`; name the files."""
    try:
        result = result_of(lines)
    except ValueError as error:
        print(f"benchmarks.first_contact: {error}", file=sys.stderr)
        return 2
    print(harness.write(result, root / "benchmarks" / "results"))
    if result["environment"]["kind"] == "gpu":
        from axial_fusion import tuned  # which a measuring process alone needs on its path

        place = root / "kernels" / "axial_fusion" / "measured"
        print(tuned.write(*measurement(result), place))
    return figure.main(root)


def measurement(result: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What axial_fusion ships of a result: its facts; the fastest tiles and backends, and the ops that are right."""
    from axial_fusion.dispatch import BACKENDS

    where, records = result["environment"], [r for r in result["records"] if "ms" in r]
    triton, dtype = str(where["triton"]), result["dtype"]
    facts = {"device": where["device"], "arch": where["arch"], "by": "first contact of AFTer-SAM's benchmarks",
             "date": where["date"][:10], "commit": where["commit"], "triton": triton}  # fmt: skip
    tiles: dict[str, dict[str, Any]] = {}
    for entry in result["tiles"]:
        key = json.dumps({k: v for k, v in entry.items() if k not in ("tile", "ms", "refused")})
        if entry["ms"] is not None and entry["ms"] < tiles.get(key, {"ms": math.inf})["ms"]:
            tiles[key] = entry
    backends: dict[int, tuple[float, str]] = {}  # at the case that takes longest
    for record in records:
        if record["subject"] == "slice" and record["provider"] in BACKENDS["slice_attention"]:
            longest = max(r["positions"] for r in records if r["subject"] == "slice")
            found = (
                record["ms"].get("forward_backward", record["ms"]["forward"])["median"],
                record["provider"],
            )
            if record["positions"] == longest:
                dim = record["head_dim"]
                backends[dim] = min(found, backends.get(dim, found))
    ours = {OPS_OF[r["subject"]] for r in records if r["role"] == "ours" and r["subject"] in OPS_OF}
    failed = " ".join(test["test"] for test in result["failed_tests"])
    return facts, {
        "tiles": [{k: v for k, v in e.items() if k not in ("ms", "refused")} for e in tiles.values()],
        "backends": [{"op": "slice_attention", "dtype": dtype, "head_dim": dim, "backend": name}
                     for dim, (_, name) in sorted(backends.items())],
        "right": [{"op": op, "dtype": dtype, "triton": ".".join(triton.split(".")[:2])}
                  for op in sorted(ours) if f"test_{op}.py" not in failed],
    }  # fmt: skip
