"""Organs that are one connected piece: known from the training labels, kept to in prediction.

Source: nnU-Net's postprocessing, arXiv 1809.10486, which tries it on validation masks; here the labels alone decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

WHOLE = 0.95  # share of the voxels in the largest part of an organ that is one piece but for stray voxels
SMALL = 0.2  # share of the largest part below which another is dropped: halves of a broken spinal cord stay
TOUCHING = np.ones((3, 3, 3), bool)  # voxels that share a corner are connected
AT_ONCE = 2**23  # voxels whose parts are numbered at once, in 100 MiB


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
    """Set small disconnected parts of the organs `values` to background in labels (D, H, W), in place.

    A part is small if it has fewer than SMALL times the voxels of the organ's largest part."""
    for organ in _organs(labels, frozenset(values)):
        small = organ.voxels < SMALL * organ.voxels.max()
        if not small.any():
            continue
        for slab, of_slab in zip(organ.slabs, organ.parts, strict=True):
            gone = np.append(False, small[of_slab])[_numbered(organ.region[slab], organ.value)]
            # the next slab needs the plane they share
            ours = slice(None if slab.stop == len(organ.region) else -1)
            organ.region[slab][ours][gone[ours]] = 0


class _Organ(NamedTuple):
    value: int
    region: np.ndarray  # its bounding box in the labels
    slabs: list[slice]  # of the region's planes, each sharing one plane with the next
    # of each slab: the organ's part, from 0, that a number of `_numbered`, from 1, belongs to
    parts: list[np.ndarray]
    voxels: np.ndarray  # of each part


def _organs(labels: np.ndarray, values: frozenset[int]) -> Iterator[_Organ]:
    """Those of `values` that labels (D, H, W) has, one at a time."""
    from scipy import ndimage

    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if value in values and box is not None:
            yield _organ(value, labels[box])


def _organ(value: int, region: np.ndarray) -> _Organ:
    """The connected parts of `value` in region (D, H, W), found slab by slab and joined where slabs share a plane."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    step = max(1, AT_ONCE // region[0].size)
    slabs = [slice(first, first + step + 1) for first in range(0, max(len(region) - 1, 1), step)]
    slabs[-1] = slice(slabs[-1].start, len(region))
    counts, links, before, shared = [], [np.empty((2, 0), int)], 0, np.empty(0)
    for slab in slabs:
        numbered = _numbered(region[slab], value)
        if slab.start:
            both = np.stack([shared, numbered[0].astype(int) + before - 1])[:, shared >= 0]
            links.append(np.unique(both, axis=1))
        number = int(numbered.max())
        counts.append(np.bincount(numbered[slab.start > 0 :].ravel(), minlength=number + 1)[1:])
        shared = np.where(numbered[-1] > 0, numbered[-1].astype(int) + before - 1, -1)
        before += number
    pairs = np.concatenate(links, axis=1)
    graph = coo_array((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(before, before))
    number, part = connected_components(graph, directed=False)
    voxels = np.bincount(part, weights=np.concatenate(counts), minlength=number)
    return _Organ(value, region, slabs, np.split(part, np.cumsum([len(c) for c in counts])[:-1]), voxels)


def _numbered(region: np.ndarray, value: int) -> np.ndarray:
    """Connected parts of `value` in region (D, H, W), numbered from 1; 0 elsewhere."""
    from scipy import ndimage

    numbered: np.ndarray = ndimage.label(region == value, TOUCHING)[0]
    return numbered
