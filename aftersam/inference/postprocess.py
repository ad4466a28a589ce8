"""Organs that are one connected piece: known from the training labels, kept to in prediction.

Source: nnU-Net's postprocessing, arXiv 1809.10486, which tries it on validation masks; here the labels alone decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

WHOLE = 0.95  # share of the voxels in the largest part of an organ that is one piece but for stray voxels
SMALL = 0.2  # share of the largest part below which another is dropped: halves of a broken spinal cord stay
TOUCHING = np.ones((3, 3, 3), bool)  # voxels that share a corner are connected


def one_piece(labels: Iterable[np.ndarray], values: Iterable[int]) -> list[int]:
    """Those of `values` that are one connected piece in each of the labels (D, H, W) that has them."""
    left = set(values)
    seen = set()
    for array in labels:
        for organ in _organs(array, frozenset(left)):
            seen.add(organ.value)
            if organ.voxels.max() < WHOLE * organ.voxels.sum():
                left.discard(organ.value)
    return sorted(left & seen)


def drop_small_parts(labels: np.ndarray, values: Iterable[int]) -> None:
    """Make background, in place, of each organ's parts in labels (D, H, W) that are small beside its largest."""
    for organ in _organs(labels, frozenset(values)):
        small = organ.voxels < SMALL * organ.voxels.max()
        if small.any():
            labels[organ.box][np.append(False, small)[organ.parts]] = 0


class _Organ(NamedTuple):
    value: int
    box: tuple[slice, ...]
    parts: np.ndarray  # numbered from 1 inside the box
    voxels: np.ndarray  # of each part


def _organs(labels: np.ndarray, values: frozenset[int]) -> Iterator[_Organ]:
    """Those of `values` that labels (D, H, W) has, one at a time."""
    from scipy import ndimage

    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if value in values and box is not None:
            parts, _ = ndimage.label(labels[box] == value, TOUCHING)
            yield _Organ(value, box, parts, np.bincount(parts.ravel())[1:])
