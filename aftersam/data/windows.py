"""Where a model looks in a scan: the slices of a group, the windows of a plane, and their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from aftersam.data.transforms import Box

JITTER = 16  # a training window lies up to 1/16 of its side off the place it has in prediction


def slice_group(centre: int, depth: int, num_slices: int, stride: int = 1) -> np.ndarray:
    """Indices (num_slices,) of the slices about `centre`, `stride` apart; `centre` is at num_slices // 2.

    Beyond the ends of the `depth` slices the nearest slice is repeated: feet are not next to the head.
    Raises ValueError on a centre outside the volume or on sizes below 1."""
    if min(depth, num_slices, stride) < 1:
        raise ValueError(f"depth {depth}, num_slices {num_slices} and stride {stride} must be 1 or more")
    if not 0 <= centre < depth:
        raise ValueError(f"centre is {centre}, but the volume has the slices 0 to {depth - 1}")
    offsets = (np.arange(num_slices) - num_slices // 2) * stride
    return np.clip(centre + offsets, 0, depth - 1).astype(np.int64)


def adjacent(slices: Sequence[int] | np.ndarray, depth: int, count: int) -> np.ndarray:
    """Indices (n,) of `slices`; with `count` above 1 (n, count), each slice with its adjacent slices."""
    near = np.stack([slice_group(int(d), depth, count) for d in slices])
    return near[:, 0] if count == 1 else near


def nearest_window(windows: Sequence[tuple[int, int]], size: int, target: Sequence[int]) -> int:
    """Index of the window whose middle is nearest to that of `target` (top, bottom, left, right)."""
    middle = (target[0] + target[1] - size) / 2, (target[2] + target[3] - size) / 2
    distances = [math.dist(window, middle) for window in windows]
    return distances.index(min(distances))


def window_start(
    length: int, start: int, stop: int, size: int, generator: np.random.Generator, target: Sequence[int] = ()
) -> int:
    """First pixel of a training window of `size` on an axis of `length` pixels whose body fills [start, stop).

    A body that fits gets prediction's window, about its centre and inside the image where possible, shifted by a
    random few pixels. A larger body gets a random part, or a part that contains the middle of `target`, the (start,
    stop) of an organ."""
    if stop - start <= size:
        first = (start + stop - size) // 2
        first = min(max(first, 0), length - size) if length >= size else (length - size) // 2
        reach = size // JITTER
        return first + int(generator.integers(-reach, reach + 1))
    low, high = start, stop - size
    if target:
        # the organ whole where the window holds it, else the window inside the organ; never off the body
        ends = sorted((target[1] - size, target[0]))
        low, high = max(low, min(ends[0], high)), min(high, max(ends[1], low))
    return int(generator.integers(low, high + 1))


def plane_windows(shape: Sequence[int], box: Box, size: int) -> list[tuple[int, int]]:
    """First pixels (top, left) of prediction's windows of `size` on a plane (H, W) whose body fills `box`."""
    rows, columns = (
        window_starts(length, start, stop, size)
        for length, start, stop in zip(shape, box[::2], box[1::2], strict=True)
    )
    return [(top, left) for top in rows for left in columns]


def window_starts(length: int, start: int, stop: int, size: int) -> list[int]:
    """First pixels of the windows of `size` that cover [start, stop) of an axis of `length` pixels.

    One window about the extent's centre where it fits, kept inside the image where that is possible and
    padded where it is not; else evenly spaced windows that overlap by a quarter or more."""
    extent = stop - start
    if extent <= size:
        first = (start + stop - size) // 2
        return [min(max(first, 0), length - size) if length >= size else (length - size) // 2]
    count = -(-(extent - size) * 4 // (3 * size)) + 1
    return [start + round(i * (extent - size) / (count - 1)) for i in range(count)]


def window_crops(
    array: np.ndarray,
    slices: Sequence[int],
    windows: Sequence[tuple[int, int]],
    size: int,
    fill: int,
    *,
    stem_slices: int = 1,
) -> torch.Tensor:
    """array (D, H, W) -> (slices · windows, size, size), the windows of a slice side by side.

    With `stem_slices` s above 1: (slices · windows, s, size, size), each slice with its adjacent slices."""
    near = adjacent(slices, len(array), stem_slices)
    crops = [
        crop(array, near.flatten(), window, size, fill).reshape(*near.shape, size, size) for window in windows
    ]
    return torch.from_numpy(np.stack(crops, axis=1)).flatten(0, 1)


def crop(
    array: np.ndarray, slices: Sequence[int] | np.ndarray, first: Sequence[int], size: int, fill: int
) -> np.ndarray:
    """array (D, H, W) -> (N, size, size): `slices` from the first pixels `first`, `fill` outside the plane."""
    out = np.full((len(slices), size, size), fill, dtype=array.dtype)
    (top, bottom), (left, right) = (
        (max(f, 0), min(f + size, n)) for f, n in zip(first, array.shape[1:], strict=True)
    )
    row, column = first
    for i, d in enumerate(slices):  # slice by slice: a memory map reads these pixels alone
        out[i, top - row : bottom - row, left - column : right - column] = array[d, top:bottom, left:right]
    return out
