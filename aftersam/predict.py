"""Segment CT volumes.    python -m aftersam.predict -i scan.nii.gz -o mask.nii.gz -m RUN

Any NIfTI grid in, the mask on the very same grid and affine out; a folder in, a folder of masks out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from aftersam.inference.pipeline import PredictArgs, predict_files


def main(argv: Sequence[str] | None = None) -> int:
    args = tyro.cli(PredictArgs, args=argv, description=__doc__)
    try:
        predicted = predict_files(args)
    except (ValueError, OSError) as error:
        print(f"aftersam.predict: {error}", file=sys.stderr)
        return 2
    return 1 if predicted.problems else 0


if __name__ == "__main__":
    sys.exit(main())
