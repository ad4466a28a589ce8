"""Volumes to what the model sees: body box, resampling, HU windows, and augmentation of training groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aftersam.config import DataConfig
from aftersam.data.volume import AIR_HU, Volume

__all__ = [
    "AIR_HU",
    "Preprocessed",
    "augment",
    "body_box",
    "body_slices",
    "normalise",
    "preprocess",
    "resample",
]

PIXEL_MEAN = (123.675, 116.28, 103.53)  # SAM's, of RGB in 0...255
PIXEL_STD = (58.395, 57.12, 57.375)
SAME_SPACING_MM = 1e-3
NOISE_HU = 30.0  # largest standard deviation that augmentation adds
ROTATION, SCALE, SHIFT = (
    math.radians(10),
    0.1,
    0.03,
)  # largest affine change; the shift as a share of the width
ELASTIC_NODES, ELASTIC_SHIFT = 6, 0.12  # nodes across the plane; standard deviation in nodes' distances
BODY_HU = -400  # between air and fat; lungs are inside the body's outline anyway

Box = tuple[int, int, int, int]  # top, bottom, left, right in pixels, ends excluded
Spacing = tuple[float, float, float]


class Preprocessed(NamedTuple):
    """A volume as the model's encoder takes it, before HU windows."""

    array: np.ndarray  # (D, H, W) int16 HU at the model's spacing, over the scan's own extent
    spacing_mm: Spacing  # as asked for: sizes are rounded, extents kept, so the true one differs by < 1/(2n)
    box: Box  # of the body in the plane


def normalise(hu: Tensor, windows: Sequence[tuple[float, float]], *, unit: bool = False) -> Tensor:
    """hu (..., H, W) -> image (..., 3, H, W): three HU windows as SAM's normalised RGB; one window is repeated.

    `unit` leaves the channels in [0, 1]."""
    if len(windows) not in (1, 3):
        raise ValueError(f"windows has {len(windows)} HU ranges, but must have 1 or 3")
    windows = list(windows) * (3 // len(windows))
    channels = [((hu - low) / (high - low)).clamp(0, 1) for low, high in windows]
    if unit:
        return torch.stack(channels, dim=-3)
    # (255 x - mean) / std, one multiply-add a channel
    scaled = [
        x * (255 / std) - mean / std for x, mean, std in zip(channels, PIXEL_MEAN, PIXEL_STD, strict=True)
    ]
    return torch.stack(scaled, dim=-3)


def preprocess(volume: Volume, spacing_mm: Spacing | None) -> Preprocessed:
    """Resample a scan to `spacing_mm` (None: its own), as int16 HU, and find the body."""
    target = volume.spacing_mm if spacing_mm is None else spacing_mm
    array = resample(volume.array, volume.spacing_mm, target)
    if array.dtype != np.int16:
        limits = np.iinfo(np.int16)
        array = np.clip(np.rint(array), limits.min, limits.max).astype(np.int16)
    return Preprocessed(array, target, body_box(array))


def body_box(array: np.ndarray, *, margin: int = 2) -> Box:
    """Bounding box in the plane of the body in array (D, H, W) HU: the largest object of each slice, joined.

    An opening parts the patient from the table's shell. The whole plane where nothing is denser than air."""
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
    """The slices (first, end excluded) of array (D, H, W) HU from the first to the last that shows a body, and one
    more at each end; (0, 0) where none does."""
    step = _step(array)
    found = [d for d, plane in enumerate(array) if _solid(plane, step).any()]
    return (max(found[0] - 1, 0), min(found[-1] + 2, len(array))) if found else (0, 0)


def _step(array: np.ndarray) -> int:
    """How coarse a look at a plane finds the outline of a body."""
    return max(1, min(array.shape[1:]) // 128)


def _solid(plane: np.ndarray, step: int) -> np.ndarray:
    """What is denser than air in every `step`-th pixel of plane (H, W), without what is thin."""
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
            plane = sum((w * _image_plane(array[d]) for d, w in taps), start=torch.zeros(()))
            plane = _resize(plane[None, None], shape[1:])[0, 0]
            out[z] = plane.round().numpy() if array.dtype.kind in "iu" else plane.numpy()
    return out


def _triangle(size: int, new_size: int) -> Iterator[list[tuple[int, float]]]:
    """Of each index of an axis of `new_size`: the (index, weight) pairs of the old axis that make it up."""
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
    best = torch.full(shape, -1.0)
    winner = np.empty(shape, dtype=array.dtype)
    for value in classes:
        share = sum(
            (w * torch.from_numpy((p == value).astype(np.float32)) for p, w in planes), torch.zeros(())
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


def augment(
    images: np.ndarray,
    labels: np.ndarray,
    generator: np.random.Generator,
    config: DataConfig,
    label_swap: dict[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Random changes of one group: images (N, H, W) float32 HU and labels (N, H, W), every draw from `generator`.

    One displacement field and one set of intensity changes serve all slices: the neighbours stay neighbours.
    Labels move with their nearest pixel. `mirror` swaps the labels that `label_swap` pairs."""
    chosen = {name for name in config.augmentation if generator.random() < config.augmentation_probability}
    if chosen & {"elastic", "affine"}:
        images, labels = _deform(
            images, labels, generator, elastic="elastic" in chosen, affine="affine" in chosen
        )
    if "mirror" in chosen:
        images, labels = images[..., ::-1], swap_labels(labels[..., ::-1], label_swap)
    if (
        "intensity" in chosen
    ):  # from air upwards: a scanner's calibration and contrast agent differ, air does not
        gain, shift = generator.uniform(0.9, 1.1), generator.uniform(-20, 20)
        images = (images - AIR_HU) * np.float32(gain) + np.float32(AIR_HU + shift)
    if "noise" in chosen:
        deviation = np.float32(generator.uniform(0, NOISE_HU))
        images = images + deviation * generator.standard_normal(images.shape, dtype=np.float32)
    return np.ascontiguousarray(images), np.ascontiguousarray(labels)


def _deform(
    images: np.ndarray, labels: np.ndarray, generator: np.random.Generator, *, elastic: bool, affine: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Both (N, H, W) sampled along one random 2D grid: bilinear for images, nearest for labels, air from outside."""
    from monai.transforms import RandAffineGrid, RandDeformGrid, Resample

    height, width = images.shape[-2:]
    spacing = max(height, width) // ELASTIC_NODES
    strength = ELASTIC_SHIFT * spacing if elastic else 0.0
    seeds = generator.integers(2**32, size=2)
    deform = RandDeformGrid(spacing=spacing, magnitude_range=(strength, strength))
    deform.set_random_state(int(seeds[0]))
    grid = torch.as_tensor(deform((height, width)))  # (3, nodes, nodes): homogeneous pixel coordinates
    if affine:
        turn = RandAffineGrid(
            rotate_range=ROTATION, scale_range=(SCALE, SCALE), translate_range=SHIFT * width
        )
        turn.set_random_state(int(seeds[1]))
        grid = torch.as_tensor(turn(grid=grid))
    grid = F.interpolate(grid[None], scale_factor=spacing, mode="bicubic", align_corners=False)[0]
    top, left = (grid.shape[-2] - height) // 2, (grid.shape[-1] - width) // 2
    grid = grid[:, top : top + height, left : left + width]
    sample = Resample(padding_mode="zeros")
    moved = sample(torch.from_numpy(images) - AIR_HU, grid, mode="bilinear").numpy() + np.float32(AIR_HU)
    moved_labels = sample(torch.from_numpy(labels).float(), grid, mode="nearest").numpy()
    return moved, moved_labels.astype(labels.dtype)


def swap_labels(labels: np.ndarray, label_swap: dict[int, int]) -> np.ndarray:
    """Labels with every value replaced by its counterpart in `label_swap`."""
    table = np.arange(
        max(int(labels.max(initial=0)), *label_swap, *label_swap.values(), 0) + 1, dtype=labels.dtype
    )
    for value, other in label_swap.items():
        table[value] = other
    return table[labels]
