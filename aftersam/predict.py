"""Segment CT volumes.    python -m aftersam.predict -i scan.nii.gz -o mask.nii.gz -m RUN

A mask has the grid and the affine of its scan. The input may also be a folder, a list or a URL of scans.
Exit codes: 0 done, 1 done with failures, 2 refused, 3 nothing done, 143 stopped by SIGTERM (docs/how-to/cohorts.md)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from aftersam.errors import run_command
from aftersam.inference.pipeline import PredictArgs, predict_files


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        args = tyro.cli(PredictArgs, args=argv, description=__doc__)
        if args.engine == "ray":
            from aftersam.inference.ray import predict_on_ray

            return predict_on_ray(args).code
        return predict_files(args).code

    return run_command("predict", command)


if __name__ == "__main__":
    sys.exit(main())
