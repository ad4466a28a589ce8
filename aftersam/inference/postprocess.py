"""Drops small disconnected parts of organs that are one connected piece in the training labels.

Source: nnU-Net's postprocessing, arXiv 1809.10486. nnU-Net chooses the organs by validation masks; here only the
training labels decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

WHOLE = 0.95  # an organ is one piece if its largest part has this share of its voxels; the rest is stray
SMALL = 0.2  # parts below this share of the largest are dropped; both halves of a broken spinal cord stay
TOUCHING = np.ones((3, 3, 3), bool)  # voxels that share a corner are connected
AT_ONCE = 2**23  # voxels that are labelled at once, in 100 MiB


def one_piece(labels: Iterable[np.ndarray], values: Iterable[int]) -> list[int]:
    """The organs among `values` that are one connected piece in every label volume (D, H, W) that contains them.

    Organs that no volume contains are left out."""
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
            # the plane that it shares with the next slab is changed there
            ours = slice(None if slab.stop == len(organ.region) else -1)
            organ.region[slab][ours][gone[ours]] = 0


class _Organ(NamedTuple):
    value: int
    region: np.ndarray  # view of the labels: the organ's bounding box
    slabs: list[slice]  # of the region's planes; neighbouring slabs share one plane
    # for each slab: parts[i] is the organ's part (from 0) that `_numbered` numbers i + 1 in the slab
    parts: list[np.ndarray]
    voxels: np.ndarray  # number of voxels of each part


def _organs(labels: np.ndarray, values: frozenset[int]) -> Iterator[_Organ]:
    """Yield the organs among `values` that labels (D, H, W) contain, one at a time."""
    from scipy import ndimage

    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if value in values and box is not None:
            yield _organ(value, labels[box])


def _organ(value: int, region: np.ndarray) -> _Organ:
    """The connected parts of `value` in region (D, H, W), found slab by slab and joined in the shared planes."""
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
