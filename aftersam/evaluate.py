"""Score masks against reference masks.    python -m aftersam.evaluate -p masks/ -l labels/ -o metrics.json

Masks may come from any tool, as NIfTI on the grid of the reference. Scores for each organ and case: DSC, HD95 in mm,
NSD at --nsd-tolerance-mm, inter-slice consistency error, gaps. Means over cases have bootstrap intervals."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from aftersam.config import Millimetres
from aftersam.errors import plain_console, run_command
from aftersam.evaluation.metrics import Convention
from aftersam.files import case_name, check_place, refuse_input, write_json

if TYPE_CHECKING:
    from aftersam.evaluation.scoring import Metrics


@dataclass(frozen=True)
class EvaluateArgs:
    predictions: Annotated[Path, tyro.conf.arg(aliases=["-p"])]
    """Folder of masks."""
    labels: Annotated[Path, tyro.conf.arg(aliases=["-l"])]
    """Folder of reference masks; cases are matched by name."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("metrics.json")
    """JSON file of all scores."""
    against: Path | None = None
    """Folder of another system's masks. Adds paired differences: --predictions minus --against."""
    nsd_tolerance_mm: Millimetres = 3.0
    """Tolerance of the normalised surface Dice."""
    convention: Convention = "nnunet"
    """How empty masks and means are scored. nnunet: DSC 0 where one mask is empty; both empty are left out; the mean
    over organs is taken last. monai, transunet: as those codes do it (docs/explanation/conventions.md)."""
    label_names: Path | None = None
    """dataset.json with the label names. By default the one beside the references or the masks."""


def evaluate(args: EvaluateArgs) -> Metrics:
    """Score the masks that `args` name, write the scores as JSON and print them as a table.

    Raises ValueError where nothing can be scored, OSError where the scores cannot be written."""
    from aftersam.evaluation.scoring import ScoringOptions, score_folder, table

    check_place(args.output)
    refuse_input(args.output, _read(args))
    options = ScoringOptions(args.nsd_tolerance_mm, args.convention, args.label_names)
    metrics = score_folder(args.predictions, args.labels, options, against=args.against)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, metrics)
    plain_console().print(table(metrics))
    return metrics


def _read(args: EvaluateArgs) -> Iterator[Path]:
    """The files that scoring reads."""
    from aftersam.evaluation.scoring import masks_in

    if args.label_names is not None:
        yield args.label_names
    for folder in (args.predictions, args.labels, args.against):
        if folder is not None:
            yield from (folder / "dataset.json", folder.parent / "dataset.json")
            for mask in masks_in(folder).values():
                yield from (mask, mask.with_name(f"{case_name(mask)}.json"))


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        return 1 if evaluate(tyro.cli(EvaluateArgs, args=argv, description=__doc__))["problems"] else 0

    return run_command("evaluate", command)


if __name__ == "__main__":
    sys.exit(main())
