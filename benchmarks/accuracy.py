"""The paper's table on your data.    python -m benchmarks.accuracy --data DATASET --systems unet aftersam -o DIR

Trains each system on the same split within the same limit, segments the held-out scans, scores all masks by
aftersam.evaluate on the scans' own grids, and leaves accuracy.json, accuracy.md and accuracy.png in DIR. A row is a
process and a folder of its own, DIR/rows/SYSTEM-seed-S: several commands may train rows of one table side by side,
a finished row is never trained again, a half-trained one starts afresh. Without --systems the table is put together
from the rows that are there."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from aftersam.data.dataset import find_dataset, link_cases, split
from aftersam.evaluation.scoring import score_folder
from aftersam.files import read_json, write_json
from benchmarks.accuracy_rows import predict_row, train_row
from benchmarks.accuracy_systems import SYSTEMS, Job, Limits
from benchmarks.accuracy_table import write_table
from benchmarks.machine import environment, slug


@dataclass(frozen=True)
class AccuracyArgs:
    data: Path
    """Data set: nnU-Net raw, MSD, SegTHOR, or images/ beside labels/."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of rows, masks and table; rows that it holds already are kept."""
    systems: tuple[str, ...] = ()
    """Rows to train: names of SYSTEMS in benchmarks/accuracy_systems.py, such as unet dynunet aftersam."""
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
    """Official SAM weights for our systems and MSA, as in aftersam train; they learn from scratch without."""
    fold: int = 0
    """Fold whose validation scans are held out and scored."""
    waterfall: Path | None = None
    """tables.json of `aftersam ablate --table small`, drawn beside the table: what the preset's choices gained."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""


def accuracy(args: AccuracyArgs) -> dict[str, Any]:
    """Train and score the rows that `args` ask for and are not there; the table of all rows as JSON values.

    A system that cannot run is named in the table with its reason. Raises ValueError on bad input."""
    unknown = [name for name in args.systems if name not in SYSTEMS]
    if unknown:
        raise ValueError(f"there is no system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    dataset = find_dataset(args.data)
    _, held_out = split(dataset, args.fold, 0)
    if not held_out:
        raise ValueError(f"fold {args.fold} of {args.data} holds out no scan to score")
    scans = args.output / "held-out"
    link_cases(dataset, held_out, scans)
    write_json(scans / "dataset.json", {"labels": {name: value for value, name in dataset.labels.items()}})
    # one process a row: its peak memory and its number of threads are its own
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    spawn = multiprocessing.get_context("spawn")
    failed = {}
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as rows:
        for name in args.systems:
            if SYSTEMS[name].missing():
                continue
            for seed in args.seeds:
                try:
                    rows.submit(run_row, args, name, seed).result()
                except Exception as error:  # of any of the packages: the other rows are worth having
                    failed[SYSTEMS[name].title] = f"{type(error).__name__}: {error}".splitlines()[0]
                    print(f"{SYSTEMS[name].title} failed: {error}", file=sys.stderr)
    for given in args.predictions:
        score_elsewhere(args.output, *_named_folder(given))
    waterfall = None if args.waterfall is None else read_json(args.waterfall)
    return write_table(args.output, data=dataset.name, failed=failed, waterfall=waterfall)


def run_row(args: AccuracyArgs, name: str, seed: int) -> None:
    """Train, predict and score one row, whichever of it is not done. Raises ValueError where it has other settings."""
    torch.set_num_threads(args.threads)
    limits, system = limits_of(args), SYSTEMS[name]
    home, scans = args.output / "rows" / f"{name}-seed-{seed}", args.output / "held-out"
    settings = _plain({"data": args.data.resolve(), **limits._asdict()})
    if (home / "spent.json").exists() and read_json(home / "settings.json") != settings:
        raise ValueError(f"{home} was made with other settings; delete it or choose another --output")
    if (home / "row.json").exists():
        return
    dataset = find_dataset(args.data)
    training, held_out = split(dataset, args.fold, 0)
    job = Job(system, seed, home, limits, dataset, training, held_out, args.output / "cache", scans)
    print(f"{system.title}, seed {seed}", flush=True)
    if not (home / "spent.json").exists():
        shutil.rmtree(home, ignore_errors=True)  # of an interrupted training
        home.mkdir(parents=True)
        write_json(home / "settings.json", settings)
        spent = train_row(job)
        write_json(home / "spent.json", {**spent._asdict(), "environment": environment()})
    facts = predict_row(job)
    limited = args.max_minutes is not None or args.max_steps is not None
    row = {
        "system": name,
        "title": system.title + (f" {args.preset}" if name in ("aftersam", "aftersam_2d") else ""),
        "seed": seed,
        "protocol": "equal budget" if limited else "own recipe",
        "note": f"{system.note}; {_start(args, name)}",
        **facts,
        **read_json(home / "spent.json"),
        "limits": limits._asdict(),
    }
    _score(home / "masks", scans / "labels", home, row)


def score_elsewhere(output: Path, name: str, masks: Path) -> None:
    """Score the masks of another tool as the row `name` of the table in `output`."""
    home = output / "rows" / f"elsewhere-{slug(name)}"
    home.mkdir(parents=True, exist_ok=True)
    row = {
        "system": slug(name),
        "title": name,
        "seed": 0,
        "protocol": "own recipe",
        "note": "masks made elsewhere",
    }
    _score(masks, output / "held-out" / "labels", home, row)


def _score(masks: Path, labels: Path, home: Path, row: dict[str, Any]) -> None:
    """Leave metrics.json, then row.json, which says that the row is done. Raises ValueError on a missing mask."""
    metrics = score_folder(masks, labels, quiet=True)
    write_json(home / "metrics.json", metrics)
    if metrics["problems"]:
        raise ValueError(f"every row needs all cases: {next(iter(metrics['problems'].values()))}")
    write_json(home / "row.json", _plain({**row, "prompted": metrics["prompted"]}))


def limits_of(args: AccuracyArgs) -> Limits:
    return Limits(**{key: getattr(args, key) for key in Limits._fields})


def _start(args: AccuracyArgs, name: str) -> str:
    pretrained = args.sam_checkpoint and (name == "msa" or name.startswith("aftersam"))
    return "from SAM's weights" if pretrained else "from scratch"


def _named_folder(given: str) -> tuple[str, Path]:
    name, equals, folder = given.partition("=")
    if not (name and equals and Path(folder).is_dir()):
        raise ValueError(f"--predictions {given!r} must be NAME=FOLDER of masks that exists")
    return name, Path(folder)


def _plain(value: Any) -> Any:
    """As JSON gives it back: paths are strings, tuples lists."""
    return json.loads(json.dumps(value, default=str))


def main(argv: Sequence[str] | None = None) -> int:
    args = tyro.cli(AccuracyArgs, args=argv, description=__doc__)
    try:
        table = accuracy(args)
    except (ValueError, OSError) as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        return 2
    print(args.output / "accuracy.md")
    return 1 if table["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
