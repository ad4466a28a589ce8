"""Write synthetic thorax CTs with six labelled organs.    python -m aftersam.phantom -o scans --cases 12

Anatomy differs from seed to seed. Grey values of the organs overlap, so that no threshold separates them. The esophagus
is a tube among lymph nodes of the same grey value and size, each visible in one or two slices: only neighbouring slices
distinguish them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from aftersam.config import Count, Seed, checked
from aftersam.errors import counted, run_command


@dataclass(frozen=True)
class PhantomArgs:
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the data set, created if needed: imagesTr, labelsTr, dataset.json (nnU-Net raw)."""
    cases: Count = 12
    """Number of scans to write."""
    seed: Seed = 0
    """Case i is the phantom of seed + i."""


def phantom(args: PhantomArgs) -> Path:
    """Write the scans and return their folder. Raises ValueError where the folder already holds a data set."""
    from aftersam.data.phantom import write_dataset

    checked(args)
    return write_dataset(args.output, cases=args.cases, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        args = tyro.cli(PhantomArgs, args=argv, description=__doc__)
        print(f"{phantom(args)}: {counted(args.cases, 'scan')}")
        return 0

    return run_command("phantom", command)


if __name__ == "__main__":
    sys.exit(main())
