"""Check a CT data set before training on it.    python -m aftersam.check DATASET

Prints the layout, the grid, HU range and labels of each scan, every problem, and the memory and time of a training."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from aftersam.config import ENCODERS, Config, Index, checked, preset
from aftersam.errors import SAID, counted, one_line, plain_console, run_command, sentence, tell

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from aftersam.data.dataset import Case, Dataset


@dataclass(frozen=True)
class CheckArgs:
    data: tyro.conf.Positional[Path]
    """Data set: nnU-Net raw, MSD, SegTHOR, or images/ beside labels/."""
    preset: Annotated[Literal["paper", "best", "small", "tiny"], tyro.conf.arg(aliases=["-p"])] = "small"
    """Preset for which memory and time are estimated."""
    num_workers: Index | None = None
    """Worker processes for the measurement of the loading speed. By default those of the preset."""
    trust_intensities: bool = False
    """Do not check whether the scans' values are Hounsfield units."""


@dataclass(frozen=True)
class CaseReport:
    """Grid, HU range and labels of one case. `problem` is None for a case that can be trained on."""

    id: str
    shape: tuple[int, int, int] | None = None  # (D, H, W)
    spacing_mm: tuple[float, float, float] | None = None  # (d, h, w)
    hu_range: tuple[float, float] | None = None
    labels: tuple[int, ...] = ()
    problem: str | None = None


class Needs(NamedTuple):
    """Estimated cache, memory and computation of a training."""

    cache_gb: float
    memory_gb: float
    step_tflop: float
    steps: float


@dataclass(frozen=True)
class CheckResult:
    """Result of `check`."""

    reports: tuple[CaseReport, ...]
    needs: Needs
    step_seconds: float | None
    """Time of one optimiser step on this machine. None where a step takes too long to be timed."""
    slices_per_second: float | None
    """Speed of the training's data loader. None where no scan is usable."""


def check_case(case: Case, names: dict[int, str], *, trusted: bool = False) -> CaseReport:
    """Read a whole case and report its contents and problems. With `trusted` intensities are not checked."""
    from aftersam.data.cache import check_labels
    from aftersam.data.intensities import check_intensities
    from aftersam.data.volume import read_image, read_labels

    report = CaseReport(case.id)
    try:
        image = read_image(case.image)
        low, high = float(image.array.min()), float(image.array.max())
        report = dataclasses.replace(
            report, shape=image.array.shape, spacing_mm=image.spacing_mm, hu_range=(low, high)
        )
        check_intensities(image, trusted=trusted)
        if case.label is None:
            return dataclasses.replace(report, problem=f"{case.image} has no label")
        labels = read_labels(case.label, like=image)
        return dataclasses.replace(report, labels=tuple(check_labels(labels, names)))
    except SAID as error:
        return dataclasses.replace(report, problem=sentence(error))


def needs(reports: Sequence[CaseReport], config: Config, num_classes: int) -> Needs:
    """Estimate the cache, memory and computation of a training.

    Floating-point operations of a step, forward and backward, are counted on the model on the meta device. Activations
    are those of pre-norm blocks: each keeps about 18 times its width for each token, in half precision."""
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
    slices = model.num_slices * config.train.batch_size
    tokens = (model.image_size // size.patch) ** 2 * slices
    activations = tokens * 18 * 2 * (size.depth * size.dim + model.num_blocks * size.out_channels * 1.5)
    flop, parameters = step_flop(config, num_classes)
    steps = config.train.max_steps or config.train.epochs * len(reports) / config.train.batch_size
    return Needs(
        cache_gb=voxels * 3 / 1e9,
        memory_gb=(parameters * 4 + activations + model.image_size**2 * slices * 200) / 1e9,
        step_tflop=flop / 1e12,
        steps=float(steps),
    )


def step_flop(config: Config, num_classes: int) -> tuple[float, float]:
    """(floating-point operations of one optimiser step, numbers stored: weights, gradients, Adam's moments)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = _one_step(config, num_classes)
    stored = sum(p.numel() * (4 if p.requires_grad else 1) for p in network.parameters())
    return float(counter.get_total_flops()), float(stored)


def step_seconds(config: Config, num_classes: int, device: str) -> float:
    """Seconds of one optimiser step on this machine: the faster of two measurements."""
    import torch

    from aftersam.device import autocast, dtype_for

    where = torch.device(device)
    with where, autocast(where, dtype_for("auto", device)):
        times: list[float] = []
        _one_step(config, num_classes, times)
        return min(times)


def _one_step(config: Config, num_classes: int, times: list[float] | None = None) -> torch.nn.Module:
    """Run a forward and a backward of `config`'s network on zeros, on the current device. Returns the network.

    With `times` it is run twice, and the seconds of each run are appended to the list."""
    import torch

    from aftersam.model.build import build_aftersam, resolve_encoder

    pretrained = not ENCODERS[
        config.model.image_encoder
    ].stem  # encoders without a stem start from SAM's weights
    model = resolve_encoder(config, pretrained=pretrained).model
    network = build_aftersam(model, num_classes)
    groups, plane = (config.train.batch_size, model.num_slices), (model.image_size, model.image_size)
    near = () if model.stem_slices == 1 else (model.stem_slices,)
    hu, labels = torch.zeros(*groups, *near, *plane), torch.zeros(*groups, *plane, dtype=torch.int64)
    for _ in range(1 if times is None else 2):
        began = time.perf_counter()
        total = network(hu, labels=labels).sum()
        total.backward()
        if times is not None:
            float(total.detach())  # waits for the device
            times.append(time.perf_counter() - began)
    return network


def slices_per_second(
    dataset: Dataset,
    ids: Sequence[str],
    config: Config,
    *,
    device: str = "cpu",
    seconds: float = 1.0,
    trusted: bool = False,
) -> float:
    """Slices per second of the training's data loader, if training takes no time and scans come from the cache."""
    from itertools import islice

    from aftersam.data.cache import cache_cases
    from aftersam.data.dataset import mirror_pairs
    from aftersam.data.slice_group import SliceGroups
    from aftersam.training.schedule import group_batches, workers

    with tempfile.TemporaryDirectory() as folder:
        cached = cache_cases(dataset, ids, config.data, Path(folder), training=ids, trusted=trusted)
        pairs = mirror_pairs(dataset.labels) if "mirror" in config.data.augmentation else {}
        groups = SliceGroups(
            list(cached.values()), model=config.model, data=config.data, seed=0, label_swap=pairs
        )
        loader = group_batches(groups, config.train, rank=0, world=1, start=0, device=device)
        with contextlib.closing(loader):
            for _ in islice(
                loader, 1 + 2 * workers(config.train, device)
            ):  # what workers have made ready by now
                pass
            began, count = time.perf_counter(), 0
            while (spent := time.perf_counter() - began) < seconds or not count:
                count += next(loader)["hu"].shape[:2].numel()
    return count / spent


def check(args: CheckArgs) -> CheckResult:
    """Read the whole data set and print its contents, its problems, and the memory and time of a training.

    Raises ValueError where there is no data set."""
    from rich.progress import track

    from aftersam.data.dataset import find_dataset
    from aftersam.device import find_device
    from aftersam.training.schedule import workers

    dataset, console = find_dataset(checked(args).data), plain_console()
    tell(console, f"{dataset.name}: {dataset.layout}, {counted(len(dataset.cases), 'scan')}")
    tell(console, "labels: " + ", ".join(f"{v} {n}" for v, n in dataset.labels.items()))
    progress = plain_console(stderr=True)
    hidden = not progress.is_terminal
    reports = [
        check_case(case, dataset.labels, trusted=args.trust_intensities)
        for case in track(dataset.cases, "reading", console=progress, transient=True, disable=hidden)
    ]
    _print_cases(console, reports, dataset.labels)
    config, classes, device = _config(args), len(dataset.labels) + 1, find_device("auto").type
    need = needs(reports, config, classes)
    fits = need.step_tflop < (1 if device == "cpu" else 100)  # else a step takes too long to be an estimate
    seconds = step_seconds(config, classes, device) if fits else None
    usable = [report.id for report in reports if report.problem is None]
    time_needed = f"too long on this {device}" if seconds is None else _duration(seconds * need.steps)
    console.print(
        f"{len(usable)} of {counted(len(reports), 'scan')} usable; preset {args.preset} needs about "
        f"{need.cache_gb:.2g} GB of cache and {need.memory_gb:.2g} GB of memory; time for "
        f"{counted(round(need.steps), 'step')} of {need.step_tflop:.2g} TFLOP: {time_needed} "
        "(train --max-minutes sets a limit)",
        soft_wrap=True,
    )
    rate = None
    if usable:
        trusted = args.trust_intensities
        rate = slices_per_second(dataset, usable[:4], config, device=device, trusted=trusted)
        wanted = ""
        if seconds is not None:
            wanted = f"; training takes {config.model.num_slices * config.train.batch_size / seconds:.3g}"
        count = workers(config.train, device)
        processes = counted(count, "worker process", "worker processes")
        text = f"loading gives {rate:.3g} slices/s with {processes}{wanted}"
        console.print(text, soft_wrap=True)
    return CheckResult(tuple(reports), need, seconds, rate)


def _config(args: CheckArgs) -> Config:
    """The preset in `args`, with `num_workers` of `args`."""
    config = preset(args.preset)
    if args.num_workers is None:
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, num_workers=args.num_workers))


def _print_cases(console: Console, reports: Sequence[CaseReport], labels: dict[int, str]) -> None:
    """Print a table of all cases, then the problems."""
    from rich.table import Table
    from rich.text import Text

    grid = Table("case", "slices × rows × columns", "spacing mm", "HU", "missing labels", "", box=None)
    for report in reports:
        missing = one_line(", ".join(n for v, n in labels.items() if v not in report.labels) or "none")
        grid.add_row(
            one_line(report.id),
            "" if report.shape is None else " × ".join(map(str, report.shape)),
            "" if report.spacing_mm is None else " × ".join(f"{s:.2f}" for s in report.spacing_mm),
            "" if report.hu_range is None else f"{report.hu_range[0]:g} … {report.hu_range[1]:g}",
            "" if report.problem else missing,
            "ok" if report.problem is None else Text("bad", style="red"),
        )
    console.print(grid)
    for report in reports:
        if report.problem is not None:
            tell(console, f"{report.id}: {report.problem}")


def _duration(seconds: float) -> str:
    return f"about {seconds / 60:.2g} min" if seconds < 7200 else f"about {seconds / 3600:.3g} h"


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        args = tyro.cli(CheckArgs, args=argv, description=__doc__)
        return 1 if any(report.problem for report in check(args).reports) else 0

    return run_command("check", command)


if __name__ == "__main__":
    sys.exit(main())
