"""Every subject that this machine can measure, into one JSON.    python -m benchmarks [quick|full|machine|<subject>]

quick takes at most ten minutes on two cores, full measures every shape, and one subject by its name is measured in
full. The subjects share the seconds of --budget; cases that do not fit are listed in the result as skipped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, journal, machine
from benchmarks.harness import GROUPS, Case, Cases
from benchmarks.targets import line, targets

MODULES = {
    "axial": "axial_attention",
    "axial_half": "axial_half",
    "lora": "lora_linear",
    "slice": "slice_attention",
    "rel_pos": "rel_pos",
    "window": "window",
    "encoder": "image_encoder",
    "hosts": "hosts",
    "predict": "predict",
    "train_step": "train_step",
    "transformer": "transformer",
    "fusion": "fusion",
    "waterfall": "waterfall",
}


def _cases(module: str, device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    """The cases of benchmarks.speed.`module`; a package that it needs and that is absent stops no other subject."""
    yield from import_module(f"benchmarks.speed.{module}").cases(device, dtype, full=full)


SUBJECTS: dict[str, Cases] = {name: partial(_cases, module) for name, module in MODULES.items()}
MACHINE = "machine"
TOTAL_S = {"quick": 480.0, "full": 3600.0}


def run(
    what: str = "quick",
    *,
    subjects: Sequence[str] = (),
    total_s: float | None = None,
    case_s: float | None = None,
    lines: Path | None = None,
    groups: Collection[str] = GROUPS,
) -> dict[str, Any]:
    """The result of `what` (quick, full, machine or a subject) within `total_s` seconds, `case_s` of timing a case.

    A quick or full run measures the given `subjects`, or all of them without any; machine measures ceilings alone.
    Of the providers, `groups` are measured. Each record is appended to the file `lines` once it is measured; what the
    file holds is not measured again."""
    device = machine.default_device()
    dtype = machine.default_dtype(device)
    names = list(subjects or SUBJECTS) if what in TOTAL_S else [what] if what != MACHINE else []
    chosen = {name: SUBJECTS[name](device, dtype, full=what != "quick") for name in names}
    torch.manual_seed(0)
    result = harness.run(
        chosen,
        dtype=dtype,
        budget_s=case_s if case_s is not None else 2.0 if what == "quick" else 4.0,
        total_s=total_s if total_s is not None else TOTAL_S.get(what, TOTAL_S["full"]),
        lines=lines,
        groups=groups,
    )
    return {"scope": what, **result, "targets": targets(result)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the JSON; the exit code is 1 where a result of ours was wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", default="quick", choices=[*TOTAL_S, MACHINE, *SUBJECTS])
    parser.add_argument(
        "--subjects",
        nargs="*",
        default=(),
        choices=SUBJECTS,
        help="subjects of a quick or full run; all by default",
    )
    parser.add_argument(
        "--groups", nargs="*", default=GROUPS, choices=GROUPS, help="which providers; all by default"
    )
    parser.add_argument(
        "--budget", type=float, help="seconds in all, imports included; 480 for quick, 3600 otherwise"
    )
    parser.add_argument("--case", type=float, help="seconds of timing a case; 2 for quick, 4 otherwise")
    parser.add_argument(
        "--lines",
        type=Path,
        help="file that keeps each record when it is known, and --collect reads; what it holds is not measured again",
    )
    parser.add_argument(
        "--collect", type=Path, help="measure nothing; write the result of a run's --lines file"
    )
    args = parser.parse_args(argv)
    if args.collect is not None:
        head, records = harness.read(args.collect)
        result = {"scope": args.what, **head, "records": records, "skipped": []}
        print(harness.write({**result, "targets": targets(result)}))
        return harness.failed(result)
    total_s = args.budget
    if total_s is not None and argv is None:
        total_s -= journal.process_seconds()
    if args.lines is not None:
        journal.watch_compilations(args.lines)
    result = run(
        args.what,
        subjects=args.subjects,
        total_s=total_s,
        case_s=args.case,
        lines=args.lines,
        groups=args.groups,
    )
    for target in result["targets"]:
        if target["value"] is not None:
            print(line(target))
    if args.lines is not None:
        return 0  # what is wrong is in the lines
    print(harness.write(result))
    return harness.failed(result)


if __name__ == "__main__":
    sys.exit(main())
