"""The paper's table on your data.    python -m benchmarks.accuracy --data DATASET --systems unet aftersam -o DIR

Trains each system on the same split within the same limit, segments the held-out scans, scores all masks by
aftersam.evaluate on the scans' own grids, and leaves accuracy.json, accuracy.md and accuracy.png in DIR. A row is a
process and a folder of its own, DIR/rows/SYSTEM-seed-S: several commands may train rows of one table side by side,
a row that another command works on is left out, a finished row is never trained again, a half-trained one starts
afresh. Without --systems the table is put together from the rows that are there."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from aftersam.data.dataset import find_dataset, link_cases, split
from aftersam.files import read_json, write_json
from benchmarks.accuracy.rows import row_home, run_row, score_elsewhere
from benchmarks.accuracy.systems import SYSTEMS, Limits
from benchmarks.accuracy.table import write_table


@dataclass(frozen=True)
class AccuracyArgs:
    data: Path
    """Data set: nnU-Net raw, MSD, SegTHOR, or images/ beside labels/."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of rows, masks and table; rows that it holds already are kept."""
    systems: tuple[str, ...] = ()
    """Names in SYSTEMS (benchmarks/accuracy/systems.py) to train, such as unet dynunet aftersam; or all: every system
    whose packages are installed, best and paper only with --sam-checkpoint."""
    predictions: tuple[str, ...] = ()
    """Masks made elsewhere, NAME=FOLDER: scored and placed in the table."""
    max_minutes: float | None = None
    """Wall minutes of training a row. Without a limit every system follows its own recipe."""
    max_steps: int | None = None
    """Stop a row after this many steps instead, to try the command out."""
    threads: int = 1
    """Processor threads of a row."""
    seeds: tuple[int, ...] = (0,)
    """One row a system and seed."""
    preset: Literal["small", "tiny", "best", "paper"] = "small"
    """Of our systems, and the size of the rivals that are made of our parts."""
    spacing_mm: tuple[float, float, float] | Literal["median"] = "median"
    """Voxel size (d, h, w) that the patch-based networks work at. median: of the training scans."""
    patch: tuple[int, int, int] = (64, 64, 80)
    """Voxels (d, h, w) of their patches, rounded down to what a network divides."""
    sam_checkpoint: str | None = None
    """SAM's weights for our systems and MSA, as in aftersam train; they learn from scratch without."""
    imagenet: tuple[str, ...] = ()
    """NAME=FILE: ImageNet weights that transunet (R50+ViT-B_16.npz) or swin_unet (swin_tiny_patch4_window7_224.pth)
    starts from, at its published size."""
    fold: int = 0
    """Fold whose validation scans are held out and scored."""
    waterfall: Path | None = None
    """tables.json of `aftersam ablate --table small`, drawn beside the table: what the preset's choices gained."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""


def accuracy(args: AccuracyArgs) -> dict[str, str]:
    """Train and score the rows that `args` ask for and are not there, and write the table of all rows.

    Returns the rows that could not be trained, and why. Raises ValueError on bad input."""
    systems = wanted(args)
    limits_of(args)  # refuses a bad --imagenet before any row
    dataset = find_dataset(args.data)
    _, held_out = split(dataset, args.fold, 0)
    if not held_out:
        raise ValueError(f"fold {args.fold} of {args.data} holds out no scan to score")
    scans = args.output / "held-out"
    link_cases(dataset, held_out, scans)
    write_json(scans / "dataset.json", {"labels": {name: value for value, name in dataset.labels.items()}})
    # The process of a row can import rows.py, but not this file, which is __main__.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    failed: dict[str, str] = {}
    for name in systems:
        reason = SYSTEMS[name].missing()
        found = {SYSTEMS[name].title: reason} if reason else _train(args, name)
        for row, reason in found.items():
            print(f"{row} was not trained: {reason}", file=sys.stderr)
        failed |= found
    for given in args.predictions:
        score_elsewhere(args.output, *_named_folder(given))
    waterfall = None if args.waterfall is None else read_json(args.waterfall)
    write_table(args.output, data=dataset.name, failed=failed, waterfall=waterfall)
    return failed


def _train(args: AccuracyArgs, name: str) -> dict[str, str]:
    """Train the system `name` with every seed. Returns the rows that failed, which keep the reason in failed.json."""
    failed = {}
    for seed in args.seeds:
        try:
            # A process a row: its peak memory and its threads are its own, and it may be killed alone.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                process.submit(run_row, name, seed, limits_of(args), args.data, args.output).result()
        except Exception as error:  # of any of the packages: the other rows are worth having
            row = f"{SYSTEMS[name].title}, seed {seed}"
            failed[row] = f"{type(error).__name__}: {error}".splitlines()[0]
            home = row_home(args.output, name, seed)
            home.mkdir(parents=True, exist_ok=True)
            write_json(home / "failed.json", {"row": row, "reason": failed[row]})
    return failed


def wanted(args: AccuracyArgs) -> Sequence[str]:
    """Names of the systems to train. Raises ValueError on an unknown one."""
    if args.systems == ("all",):
        return [
            name for name, system in SYSTEMS.items()
            if not system.missing() and (args.sam_checkpoint or system.preset is None)
        ]  # fmt: skip
    if "all" in args.systems:
        raise ValueError("--systems all takes no other names")
    unknown = [name for name in args.systems if name not in SYSTEMS]
    if unknown:
        raise ValueError(f"there is no system {unknown[0]!r}; there are {', '.join(SYSTEMS)}, and all")
    return args.systems


def limits_of(args: AccuracyArgs) -> Limits:
    files = dict(map(_named_weights, args.imagenet))
    return Limits(**{key: getattr(args, key) for key in Limits._fields} | {"imagenet": files})


def _named_folder(given: str) -> tuple[str, Path]:
    name, equals, folder = given.partition("=")
    if not (name and equals and Path(folder).is_dir()):
        raise ValueError(f"--predictions {given!r} must be NAME=FOLDER of masks that exists")
    return name, Path(folder)


def _named_weights(given: str) -> tuple[str, str]:
    name, equals, file = given.partition("=")
    able = [known for known, system in SYSTEMS.items() if system.imagenet]
    if name not in able or not equals or not Path(file).is_file():
        raise ValueError(
            f"--imagenet {given!r} must be NAME=FILE with NAME {' or '.join(able)} and a FILE that exists"
        )
    return name, str(Path(file).resolve())


def main(argv: Sequence[str] | None = None) -> int:
    args = tyro.cli(AccuracyArgs, args=argv, prog="benchmarks.accuracy", description=__doc__)
    try:
        failed = accuracy(args)
    except (ValueError, OSError) as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        return 2
    print(args.output / "accuracy.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
