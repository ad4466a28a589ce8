"""Train AFTer-SAM on a CT data set.    python -m aftersam.train --data DATASET --output RUN

Leaves in RUN: config.json (repeat the run with --config), run.json (labels, preprocessing, versions), best.safetensors
and last.safetensors, history.jsonl, curves and overlays as PNG, TensorBoard logs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aftersam.training.arguments import TrainArgs, parse
from aftersam.training.run import train


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv, TrainArgs, __doc__)
        if not args.resume:
            name = args.config_file or args.preset or ("paper" if args.sam_checkpoint else "small")
            print(f"preset {name}" if args.config_file is None else f"configuration {name}")
        train(args)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"aftersam.train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
