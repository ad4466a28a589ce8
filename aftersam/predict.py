"""Segment CT volumes.    python -m aftersam.predict -i scan.nii.gz -o mask.nii.gz -m RUN

Any NIfTI grid in, the mask on the very same grid and affine out; a folder in, a folder of masks out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from aftersam.errors import run_command
from aftersam.inference.pipeline import PredictArgs, predict_files


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        return 1 if predict_files(tyro.cli(PredictArgs, args=argv, description=__doc__)).problems else 0

    return run_command("predict", command)


if __name__ == "__main__":
    sys.exit(main())
