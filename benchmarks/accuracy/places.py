"""What neighbouring slices gain: AFTer-SAM against its 2D row at organs' ends, between, and on every third slice.

A slice does not show where an organ begins or ends; its neighbours do."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from aftersam.data.volume import read_labels
from aftersam.errors import counted
from aftersam.evaluation.scoring import label_names_near, masks_in
from aftersam.evaluation.statistics import (
    bootstrap_over_seeds,
    mean_of,
    mean_over_organs,
    number,
    score_matrix,
)
from aftersam.evaluation.tables import markdown_table
from aftersam.files import scans_in

NEAR = 2  # slices of an organ that count as its first, and as its last
EVERY = 3  # of so many slices one is kept, as on scans whose slices lie far apart
PLACES = {
    "ends": f"first and last {counted(NEAR, 'slice')}, and all beyond",
    "between": "slices between",
    "sparse": "every third slice alone",
}
WITH, ALONE = "aftersam", "aftersam_2d"  # systems that see neighbouring slices, and one slice
Scores = dict[str, dict[str, dict[str, float | None]]]  # case -> organ -> {"dsc": ...}


def place_scores(masks: Path, labels: Path) -> dict[str, Scores]:
    """DSC of every case and organ at the ends of organs and between; None where neither has a voxel there.

    Every slice is an end of an organ that the reference lacks."""
    names = label_names_near(None, labels, masks)
    found: dict[str, Scores] = {"ends": {}, "between": {}}
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
    """DSC of one organ, bool (D, H, W), at its ends and between."""
    slices = np.flatnonzero(truth.any((1, 2)))
    if not len(slices):
        return {"ends": 0.0 if mask.any() else None, "between": None}
    d = np.arange(len(truth))
    between = (d >= slices[0] + NEAR) & (d <= slices[-1] - NEAR)
    shared, voxels = (mask & truth).sum((1, 2)), mask.sum((1, 2)) + truth.sum((1, 2))
    return {
        place: number(2 * shared[inside].sum() / voxels[inside].sum()) if voxels[inside].any() else None
        for place, inside in (("ends", ~between), ("between", between))
    }


def write_sparse(scans: Path, home: Path) -> None:
    """Write the images/ and labels/ of `scans` to `home` with one of EVERY slices, the middle ones."""
    for folder in ("images", "labels"):
        (home / folder).mkdir(parents=True, exist_ok=True)
        for path in scans_in(scans / folder):
            image: Any = nib.load(path)
            axis = next(i for i, code in enumerate(nib.aff2axcodes(image.affine)) if code in "SI")
            cut = [slice(None)] * 3
            cut[axis] = slice(min(EVERY // 2, image.shape[axis] - 1), None, EVERY)
            nib.save(image.slicer[tuple(cut)], home / folder / path.name)
    shutil.copyfile(scans / "dataset.json", home / "dataset.json")


def gains(
    seeds_of: Mapping[str, Sequence[Mapping[str, Any]]], cases: Sequence[str], organs: Sequence[str]
) -> list[dict[str, Any]]:
    """For each place and organ, and for all organs: DSC of both systems, their paired difference and its interval.

    `seeds_of` has the place scores of each seed by system. Empty unless both systems are there."""
    if not all(seeds_of.get(system) for system in (WITH, ALONE)):
        return []
    found = []
    seeds = [seed for system in (WITH, ALONE) for seed in seeds_of[system]]
    for place in (place for place in PLACES if all(place in seed for seed in seeds)):
        ours, theirs = (
            np.array([score_matrix(seed[place], cases, organs) for seed in seeds_of[system]])
            for system in (WITH, ALONE)
        )
        for organ in ("all", *organs):
            some = [i for i, name in enumerate(organs) if organ in ("all", name)]
            one, other = (np.apply_along_axis(mean_of, 0, of[..., some]) for of in (ours, theirs))
            found.append(
                {
                    "place": place,
                    "organ": organ,
                    "with": number(mean_over_organs(one)),
                    "alone": number(mean_over_organs(other)),
                    "difference": number(mean_over_organs(one - other)),
                    "interval": bootstrap_over_seeds(ours[..., some], theirs[..., some]),
                }
            )
    return found


def section(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section of a page, empty without `gains`."""
    if not found:
        return []
    heads = [text for place, text in PLACES.items() if any(row["place"] == place for row in found)]
    lines = [["organ", *(head for text in heads for head in (f"{text}: 2D", "AFTer-SAM", "difference"))]]
    by_organ: dict[str, list[str]] = {}
    for row in found:
        by_organ.setdefault(row["organ"], []).extend(_cells(row))
    lines += [[f"**{organ}**" if organ == "all" else organ, *cells] for organ, cells in by_organ.items()]
    return [
        "### What neighbouring slices gain, and where",
        "DSC in % of AFTer-SAM 2D, which sees one slice, and of AFTer-SAM, whose stem sees adjacent slices and whose "
        "fusion attends to distant ones. The scores are of organs' ends, of the slices between, and of the same scans "
        "with every third slice alone. The difference is paired, with its 95 % interval.",
        markdown_table(lines),
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    alone, across, difference = (
        "–" if row[key] is None else f"{100 * row[key]:{form}}"
        for key, form in (("alone", ".1f"), ("with", ".1f"), ("difference", "+.1f"))
    )
    if row["interval"] is not None and math.isfinite(row["interval"][0]):
        low, high = row["interval"]
        difference += f" ({100 * low:+.1f} … {100 * high:+.1f})"
    return [alone, across, difference]
