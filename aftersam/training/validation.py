"""Validation: whole scans predicted at the model's spacing and scored by Dice, and calibration of probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftersam.config import ModelConfig
from aftersam.evaluation.figures import overlay_png
from aftersam.evaluation.metrics import dice
from aftersam.inference.inputs import Scan
from aftersam.inference.sliding import DEFAULT, output_planes, predict_volume

if TYPE_CHECKING:
    from aftersam.data.cache import CachedCase
    from aftersam.data.stored_features import StoredScan
    from aftersam.model.aftersam import AfterSAM
    from aftersam.training.setup import Scans

TEMPERATURES = 2.0 ** (torch.arange(-16, 33) / 8)  # tried: 1/4 to 16, 9 % apart
PLAINLY_BACKGROUND = 0.99  # probability of background above which a voxel is left out of the calibration
BINS = 15  # of the confidence, in the expected calibration error


class Calibration(NamedTuple):
    """The temperature of a run and its calibration errors, as run.json holds them."""

    temperature: float
    """Logits are divided by it before they become probabilities."""
    ece: tuple[float, float] | None
    """Expected calibration error before and after; None where no voxel was compared."""


def validate_scans(
    model: AfterSAM,
    scans: Scans,
    config: ModelConfig,
    *,
    precision: torch.dtype,
    stored: Mapping[str, StoredScan],
    overlay: Path,
    title: str,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float | None]:
    """{organ: mean Dice over the validation cases, None where no case has the organ}.

    Draws the first case to the PNG `overlay`. `stored` holds the encoder's features of some cases by id. `progress`
    is called as by `predict_volume`."""
    scores: dict[str, list[float]] = {name: [] for name in scans.labels.values()}
    for i, case in enumerate(scans.validation):
        hu, truth = case.hu, case.labels
        scan = Scan(hu, case.box, truth, stored.get(case.id))
        mask = predict_volume(
            model, scan, config, output_shape=hu.shape, precision=precision, progress=progress
        ).labels
        for value, name in scans.labels.items():
            scores[name].append(dice(mask == value, truth == value))
        if i == 0:
            overlay_png(
                overlay, hu, mask, case.spacing_mm, scans.labels,
                reference=np.asarray(truth), title=f"{case.id}, {title}",
            )  # fmt: skip
    return {name: mean(values) for name, values in scores.items()}


def mean(values: Sequence[float]) -> float | None:
    """Mean of the numbers among the values; None without any, because JSON has no NaN."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else None


def calibrate(
    model: AfterSAM,
    cases: Iterable[CachedCase],
    config: ModelConfig,
    *,
    precision: torch.dtype,
    stored: Mapping[str, StoredScan],
    progress: Callable[[int], None],
) -> Calibration:
    """The temperature with the lowest cross-entropy on the scans `cases`, on every second voxel of rows and columns.

    It is 1 where the calibration error would grow. Voxels of almost certain background are left out. `progress` is
    called after each slice.
    Source: Guo et al., arXiv 1706.04599. The calibration error compares the largest probability with how often it is
    right."""
    entropies = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    # voxels, sum of confidences, right ones
    bins = torch.zeros(len(TEMPERATURES), BINS, 3, dtype=torch.float64)
    for case in cases:
        scan = Scan(case.hu, case.box, case.labels, stored.get(case.id))
        shape = case.hu.shape
        planes = output_planes(model, scan, config, DEFAULT, output_shape=shape, precision=precision)
        for plane, labels in zip(planes, case.labels, strict=True):
            logits = plane.logits[:, ::2, ::2].flatten(1).T.double().cpu()  # (voxels, K+1)
            truth = torch.from_numpy(np.asarray(labels)[::2, ::2].astype(np.int64)).flatten()
            unclear = logits.softmax(1)[:, 0] < PLAINLY_BACKGROUND
            _count(logits[unclear], truth[unclear], entropies, bins)
            progress(1)
    if not bins.any():
        return Calibration(1.0, None)
    chosen, plain = int(entropies.argmin()), int((TEMPERATURES - 1).abs().argmin())
    errors = (bins[..., 1] - bins[..., 2]).abs().sum(1) / bins[..., 0].sum(1)
    if errors[chosen] > errors[plain]:
        chosen = plain
    return Calibration(float(TEMPERATURES[chosen]), (float(errors[plain]), float(errors[chosen])))


def _count(logits: Tensor, truth: Tensor, entropies: Tensor, bins: Tensor) -> None:
    """Add voxels (n, K+1), whose labels are `truth` (n,), to the sums at each temperature, in place."""
    right = (logits.argmax(1) == truth).double()
    for i, temperature in enumerate(TEMPERATURES.tolist()):
        log = (logits / temperature).log_softmax(1)
        entropies[i] -= log.gather(1, truth[:, None]).sum()
        confidence = log.amax(1).exp()
        place = (confidence * BINS).long().clamp(max=BINS - 1)
        sums = torch.stack([torch.ones_like(confidence), confidence, right], 1)
        bins[i].index_add_(0, place, sums)
