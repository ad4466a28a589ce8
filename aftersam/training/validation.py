"""Validation while training: whole scans predicted at the model's spacing, and scored by Dice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from aftersam.config import ModelConfig
from aftersam.evaluation.figures import overlay_png
from aftersam.evaluation.metrics import dice
from aftersam.inference.inputs import Scan
from aftersam.inference.sliding import predict_volume

if TYPE_CHECKING:
    from aftersam.data.stored_features import StoredScan
    from aftersam.model.aftersam import AfterSAM
    from aftersam.training.setup import Scans


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
    """{organ: mean Dice over the validation cases, None where none has it}; draws the first case to the PNG `overlay`.

    `stored` holds the encoder's features of some cases by their ids; `progress` is called as by `predict_volume`."""
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
    """Mean of the values that are numbers, None without any: JSON has no NaN."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else None
