"""Train AFTer-SAM on a CT data set.    python -m aftersam.train --data DATASET --output RUN

Writes to RUN: config.json (--config repeats the run with it), run.json (labels, preprocessing, versions),
best.safetensors and last.safetensors, history.jsonl, curves and overlays as PNG, TensorBoard logs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aftersam.errors import run_command
from aftersam.training.arguments import TrainArgs, parse, preset_name

if TYPE_CHECKING:
    from aftersam.training.run import TrainResult


def train(args: TrainArgs) -> TrainResult:
    """Run or resume the training that `args` describe; see `train` and `train_folds` in aftersam.training."""
    from aftersam.training import folds, run

    return folds.train_folds(args) if args.fold == "all" else run.train(args)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("train", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = parse(argv, TrainArgs, __doc__)
    if not args.resume:
        name = preset_name(args.preset, args.sam_checkpoint)
        of = f"configuration {args.config_file}" if args.config_file else f"preset {name}"
        chosen = bool(args.config_file or args.preset)
        print(f"model and data of {args.init}" if args.init and not chosen else of)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
