"""What attention across slices gains, and where: AFTer-SAM against its 2D row at the ends of organs and between.

A slice alone does not show where an organ begins or ends, its neighbours do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aftersam.data.volume import read_labels
from aftersam.evaluation.scoring import label_names_near, masks_in
from aftersam.evaluation.statistics import (
    bootstrap_over_seeds,
    mean_of,
    mean_over_organs,
    number,
    score_matrix,
)
from aftersam.evaluation.tables import markdown_table

NEAR = 2  # slices of an organ that count as its first, and as its last
PLACES = {
    "ends": f"first and last {NEAR} slices, and all beyond",
    "between": "slices between",
}
ACROSS, ALONE = "aftersam", "aftersam_2d"  # systems with attention across slices, and without
Scores = dict[str, dict[str, dict[str, float | None]]]  # case -> organ -> {"dsc": ...}


def place_scores(masks: Path, labels: Path) -> dict[str, Scores]:
    """DSC of every case and organ in each of PLACES; None where neither mask nor reference has a voxel there."""
    names = label_names_near(None, labels, masks)
    found: dict[str, Scores] = {place: {} for place in PLACES}
    made = masks_in(masks)
    for case, path in masks_in(labels).items():
        truth = read_labels(path)
        mask = read_labels(made[case], like=truth)
        organs = {
            name: _organ_scores(mask.array == value, truth.array == value)
            for value, name in names.items()
            if value
        }
        for place, scores in found.items():
            scores[case] = {name: {"dsc": of[place]} for name, of in organs.items()}
    return found


def _organ_scores(mask: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """DSC in each of PLACES of one organ, bool (D, H, W)."""
    slices = np.flatnonzero(truth.any((1, 2)))
    if not len(slices):
        return dict.fromkeys(PLACES)
    d = np.arange(len(truth))
    between = (d >= slices[0] + NEAR) & (d <= slices[-1] - NEAR)
    shared, voxels = (mask & truth).sum((1, 2)), mask.sum((1, 2)) + truth.sum((1, 2))
    return {
        place: number(2 * shared[inside].sum() / voxels[inside].sum()) if voxels[inside].any() else None
        for place, inside in (("ends", ~between), ("between", between))
    }


def gains(
    seeds_of: Mapping[str, Sequence[Mapping[str, Any]]], cases: Sequence[str], organs: Sequence[str]
) -> list[dict[str, Any]]:
    """For each place and organ, and for all organs: DSC of both systems, their difference and its interval.

    `seeds_of` has the place scores of each seed by system. Empty unless both systems are there."""
    if not all(seeds_of.get(system) for system in (ACROSS, ALONE)):
        return []
    found = []
    for place in PLACES:
        ours, theirs = (
            np.array([score_matrix(seed[place], cases, organs) for seed in seeds_of[system]])
            for system in (ACROSS, ALONE)
        )
        for organ in ("all", *organs):
            some = [i for i, name in enumerate(organs) if organ in ("all", name)]
            means = [
                mean_over_organs(np.apply_along_axis(mean_of, 0, of[..., some])) for of in (ours, theirs)
            ]
            found.append(
                {
                    "place": place,
                    "organ": organ,
                    "across": number(means[0]),
                    "alone": number(means[1]),
                    "difference": number(means[0] - means[1]),
                    "interval": bootstrap_over_seeds(ours[..., some], theirs[..., some]),
                }
            )
    return found


def section(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section of a page, empty without `gains`."""
    if not found:
        return []
    lines = [["organ", *(head for text in PLACES.values() for head in (f"{text}: 2D", "with", "difference"))]]
    by_organ: dict[str, list[str]] = {}
    for row in found:
        by_organ.setdefault(row["organ"], []).extend(_cells(row))
    lines += [[f"**{organ}**" if organ == "all" else organ, *cells] for organ, cells in by_organ.items()]
    return [
        "### What attention across slices gains, and where",
        "DSC in % of AFTer-SAM 2D and of AFTer-SAM, which attends across slices, at the ends of organs and between, "
        "and the paired difference with its 95 % interval.",
        markdown_table(lines),
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    alone, across, difference = (
        "–" if row[key] is None else f"{100 * row[key]:{form}}"
        for key, form in (("alone", ".1f"), ("across", ".1f"), ("difference", "+.1f"))
    )
    if row["interval"] is not None and math.isfinite(row["interval"][0]):
        low, high = row["interval"]
        difference += f" ({100 * low:+.1f} … {100 * high:+.1f})"
    return [alone, across, difference]
