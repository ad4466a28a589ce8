"""Look through a CT data set before training on it.    python -m aftersam.check DATASET

What was found, each scan's grid, HU range and labels, what is wrong, and what a run will need."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from aftersam.config import ENCODERS, Config, preset


@dataclass(frozen=True)
class CheckArgs:
    data: tyro.conf.Positional[Path]
    """Data set: nnU-Net raw, MSD, SegTHOR, or images/ beside labels/."""
    preset: Annotated[Literal["paper", "best", "small", "tiny"], tyro.conf.arg(aliases=["-p"])] = "small"
    """Preset whose needs are estimated."""


@dataclass(frozen=True)
class CaseReport:
    """What one case holds; `problem` says what is wrong with it, and None that it can be trained on."""

    id: str
    shape: tuple[int, int, int] | None = None  # (D, H, W)
    spacing_mm: tuple[float, float, float] | None = None  # (d, h, w)
    hu_range: tuple[float, float] | None = None
    labels: tuple[int, ...] = ()
    problem: str | None = None


def check_case(case: Any, names: dict[int, str]) -> CaseReport:
    """Read a dataset.Case whole and say what it holds."""
    from aftersam.data.cache import check_labels
    from aftersam.data.volume import read_image, read_labels

    report = CaseReport(case.id)
    try:
        image = read_image(case.image)
        low, high = float(image.array.min()), float(image.array.max())
        report = dataclasses.replace(
            report, shape=image.array.shape, spacing_mm=image.spacing_mm, hu_range=(low, high)
        )
        if low >= 0:
            return dataclasses.replace(
                report,
                problem=f"{case.image} has no value below 0 ({low:g} to {high:g}): not Hounsfield units?",
            )
        if case.label is None:
            return dataclasses.replace(report, problem=f"{case.image} has no label")
        labels = read_labels(case.label, like=image)
        return dataclasses.replace(report, labels=tuple(check_labels(labels, names)))
    except (ValueError, OSError) as error:
        return dataclasses.replace(report, problem=str(error))


def needs(reports: Sequence[CaseReport], config: Config) -> dict[str, float]:
    """Estimated gigabytes of cache, of weights with Adam's moments, and of the activations of a step, counted.

    `tokens` is their number in a step, which the time of a step follows."""
    spacings = [r.spacing_mm for r in reports if r.spacing_mm]
    target = config.data.spacing_mm
    median = (
        tuple(sorted(s[i] for s in spacings)[len(spacings) // 2] for i in range(3))
        if spacings
        else (1.0, 1.0, 1.0)
    )
    voxels = 0.0
    for report in reports:
        if report.shape is None or report.spacing_mm is None:
            continue
        new = report.spacing_mm if target == "native" else median if target == "median" else target
        count = 1.0
        for n, old, wanted in zip(report.shape, report.spacing_mm, new, strict=True):
            count *= n * old / float(wanted)
        voxels += count
    size, model = ENCODERS[config.model.image_encoder], config.model
    tokens = (model.image_size // size.patch) ** 2 * model.num_slices * config.train.batch_size
    trained_encoder = size.depth * 12 * size.dim**2
    fusion = 0 if model.attention == "none" else model.num_blocks * 16 * size.out_channels**2
    # A pre-norm block keeps about 18 activations of its width a token for the backward, half precision.
    activations = tokens * 18 * 2 * (size.depth * size.dim + model.num_blocks * size.out_channels * 1.5)
    pixels = model.image_size**2 * model.num_slices * config.train.batch_size
    return {
        "cache_gb": voxels * 3 / 1e9,
        "weights_gb": (trained_encoder + fusion) * 16 / 1e9,
        "activations_gb": (activations + pixels * 200) / 1e9,
        "tokens": float(tokens),
    }


def check(data: Path, *, preset_name: str = "small") -> int:
    """Print the table for the data set in `data`. Returns 0, or 1 where a case is bad.

    Raises ValueError where there is no data set."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from aftersam.data.dataset import find_dataset

    dataset = find_dataset(data)
    console = Console()
    console.print(f"{dataset.name}: {dataset.layout}, {len(dataset.cases)} scans", highlight=False)
    console.print("labels: " + ", ".join(f"{v} {n}" for v, n in dataset.labels.items()), highlight=False)
    progress = Console(stderr=True)
    reports = [
        check_case(case, dataset.labels)
        for case in track(
            dataset.cases, "reading", console=progress, transient=True, disable=not progress.is_terminal
        )
    ]
    grid = Table("case", "slices × rows × columns", "spacing mm", "HU", "missing labels", "", box=None)
    for report in reports:
        grid.add_row(
            report.id,
            "" if report.shape is None else " × ".join(map(str, report.shape)),
            "" if report.spacing_mm is None else " × ".join(f"{s:.2f}" for s in report.spacing_mm),
            "" if report.hu_range is None else f"{report.hu_range[0]:g} … {report.hu_range[1]:g}",
            ""
            if report.problem
            else ", ".join(n for v, n in dataset.labels.items() if v not in report.labels) or "none",
            "ok" if report.problem is None else "[red]bad[/red]",
        )
    console.print(grid)
    bad = [report for report in reports if report.problem is not None]
    for report in bad:
        console.print(f"{report.id}: {report.problem}", soft_wrap=True, markup=False, highlight=False)
    config = preset(preset_name)
    need = needs(reports, config)
    console.print(
        f"preset {preset_name}: about {need['cache_gb']:.2g} GB of cache; "
        f"{need['weights_gb'] + need['activations_gb']:.2g} GB of memory to train, {need['tokens']:.0f} tokens a step; "
        f"{len(dataset.cases) - len(bad)} of {len(dataset.cases)} scans usable",
        highlight=False,
    )
    return 1 if bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = tyro.cli(CheckArgs, args=argv, description=__doc__)
    try:
        return check(args.data, preset_name=args.preset)
    except (ValueError, OSError) as error:
        print(f"aftersam.check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
