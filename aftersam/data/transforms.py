"""Volumes to what the model takes: resampling, and the bounding box of the body."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aftersam.data.volume import Volume

SAME_SPACING_MM = 1e-3
MOST_VOXELS = (
    2**30
)  # of a resampled scan: 2 m × 0.5 m × 0.5 m at 0.8 mm; more needs a scan of an eighth as many
BODY_HU = -400  # between air and fat; lungs are inside the body's outline anyway

Box = tuple[int, int, int, int]  # top, bottom, left, right in pixels, ends excluded
Spacing = tuple[float, float, float]


class Preprocessed(NamedTuple):
    """A volume as the model's encoder takes it, before HU windows."""

    array: np.ndarray  # (D, H, W) int16 HU at the model's spacing, over the scan's own extent
    spacing_mm: Spacing  # as asked for: sizes are rounded, extents kept, so the true one differs by < 1/(2n)
    box: Box  # of the body in the plane


def preprocess(volume: Volume, spacing_mm: Spacing | None) -> Preprocessed:
    """Resample a scan to `spacing_mm` (None: the scan's own spacing) as int16 HU, and find the body.

    Raises ValueError on a scan that would become too large, before memory is taken."""
    target = volume.spacing_mm if spacing_mm is None else spacing_mm
    shape = resampled_shape(volume.array.shape, volume.spacing_mm, target)
    if math.prod(shape) > max(MOST_VOXELS, 8 * volume.array.size):
        spacing, sizes = (" × ".join(f"{n:.4g}" for n in each) for each in (volume.spacing_mm, shape))
        raise ValueError(
            f"{volume.name} has voxels of {spacing} mm and would have {sizes} at the model's spacing; "
            "its spacing must be the true one in mm"
        )
    array = resample(volume.array, volume.spacing_mm, target)
    if array.dtype != np.int16:
        limits = np.iinfo(np.int16)
        array = np.clip(np.rint(array), limits.min, limits.max).astype(np.int16)
    return Preprocessed(array, target, body_box(array))


def body_box(array: np.ndarray, *, margin: int = 2) -> Box:
    """Bounding box of the body in the plane, for array (D, H, W) HU: the union of each slice's largest object.

    A morphological opening separates the patient from the table. The whole plane where nothing is denser than air."""
    from scipy import ndimage

    depth, height, width = array.shape
    step = _step(array)
    rows, columns = np.zeros(height, bool), np.zeros(width, bool)
    for d in range(0, depth, max(1, depth // 64)):
        parts, count = ndimage.label(_solid(array[d], step))
        if not count:
            continue
        largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
        rows[::step] |= largest.any(1)
        columns[::step] |= largest.any(0)
    spans = []
    for seen, length in ((rows, height), (columns, width)):
        found = np.flatnonzero(seen)
        if not len(found):
            return 0, height, 0, width
        spans += [max(int(found[0]) - margin, 0), min(int(found[-1]) + step + margin, length)]
    return spans[0], spans[1], spans[2], spans[3]


def body_slices(array: np.ndarray) -> tuple[int, int]:
    """(first, end) of the slices of array (D, H, W) HU that show a body, with one more slice at each end.

    The end is excluded. (0, 0) where no slice shows a body."""
    step = _step(array)
    found = [d for d, plane in enumerate(array) if _solid(plane, step).any()]
    return (max(found[0] - 1, 0), min(found[-1] + 2, len(array))) if found else (0, 0)


def _step(array: np.ndarray) -> int:
    """Distance in pixels between samples of a plane that still finds the outline of a body."""
    step: int = max(1, min(array.shape[1:]) // 128)
    return step


def _solid(plane: np.ndarray, step: int) -> np.ndarray:
    """Mask of what is denser than air in every `step`-th pixel of plane (H, W), with thin structures removed."""
    from scipy import ndimage

    cross = ndimage.generate_binary_structure(2, 1)
    opened: np.ndarray = ndimage.binary_opening(np.asarray(plane[::step, ::step]) > BODY_HU, cross)
    return opened


def resampled_shape(
    shape: Sequence[int], spacing_mm: Spacing, new_spacing_mm: Spacing
) -> tuple[int, int, int]:
    """Size (D, H, W) of the grid that covers the same extent at about `new_spacing_mm`; 1 voxel at least."""
    d, h, w = (
        n if abs(old - new) <= SAME_SPACING_MM else max(1, round(n * old / new))
        for n, old, new in zip(shape, spacing_mm, new_spacing_mm, strict=True)
    )
    return d, h, w


def resample(
    array: np.ndarray, spacing_mm: Spacing, new_spacing_mm: Spacing, *, labels: bool = False
) -> np.ndarray:
    """array (D, H, W) -> the grid of `resampled_shape` over the same extent, in the same dtype.

    Linear in each axis with half-voxel centres (F.interpolate's align_corners=False); an axis that shrinks is
    averaged with a triangle as wide as the new voxel, so that noise and thin organs do not alias. Labels: each
    class is resampled as a probability and the largest wins. One slice at a time: no float copy of the scan."""
    shape = resampled_shape(array.shape, spacing_mm, new_spacing_mm)
    if shape == array.shape:
        return array
    out = np.empty(shape, dtype=array.dtype)
    for z, taps in enumerate(_triangle(array.shape[0], shape[0])):
        if labels:
            out[z] = _label_plane(array, taps, shape[1:])
        else:
            plane = sum((w * _image_plane(array[d]) for d, w in taps), start=torch.zeros((), device="cpu"))
            plane = _resize(plane[None, None], shape[1:])[0, 0]
            out[z] = plane.round().numpy() if array.dtype.kind in "iu" else plane.numpy()
    return out


def _triangle(size: int, new_size: int) -> Iterator[list[tuple[int, float]]]:
    """For each index of an axis of `new_size`: the (index, weight) pairs of the old axis that are averaged."""
    ratio = size / new_size
    support = max(ratio, 1.0)
    for i in range(new_size):
        centre = (i + 0.5) * ratio - 0.5
        first, last = math.ceil(centre - support), math.floor(centre + support)
        weights: dict[int, float] = {}
        for d in range(first, last + 1):
            weight = 1 - abs(d - centre) / support
            if weight > 1e-6:
                inside = min(max(d, 0), size - 1)
                weights[inside] = weights.get(inside, 0.0) + weight
        total = sum(weights.values())
        yield [(d, weight / total) for d, weight in weights.items()]


def _image_plane(plane: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(plane, dtype=np.float32))


def _label_plane(array: np.ndarray, taps: list[tuple[int, float]], shape: tuple[int, int]) -> np.ndarray:
    """The class with the largest interpolated share at each pixel; the lower value on a tie."""
    planes = [(np.ascontiguousarray(array[d]), weight) for d, weight in taps]
    classes = np.unique(np.concatenate([np.unique(plane) for plane, _ in planes]))
    if len(classes) == 1:
        return np.full(shape, classes[0], dtype=array.dtype)
    best = torch.full(shape, -1.0, device="cpu")
    winner = np.empty(shape, dtype=array.dtype)
    for value in classes:
        share = sum(
            (w * torch.from_numpy((p == value).astype(np.float32)) for p, w in planes),
            torch.zeros((), device="cpu"),
        )
        share = _resize(share[None, None], shape)[0, 0]
        better = share > best
        best = torch.where(better, share, best)
        winner[better.numpy()] = value
    return winner


def _resize(planes: Tensor, shape: Sequence[int]) -> Tensor:
    if tuple(planes.shape[-2:]) == tuple(shape):
        return planes
    return F.interpolate(planes, size=tuple(shape), mode="bilinear", align_corners=False, antialias=True)
