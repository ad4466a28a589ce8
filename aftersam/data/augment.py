"""Random changes of training groups: elastic and affine deformation, mirroring, intensity, noise."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from aftersam.config import DataConfig
from aftersam.data.volume import AIR_HU, label_dtype

NOISE_HU = 30.0  # largest standard deviation that augmentation adds
ROTATION, SCALE, SHIFT = (
    math.radians(15),
    0.2,
    0.08,
)  # largest affine change; the shift as a share of the width
ELASTIC_NODES, ELASTIC_SHIFT = 6, 0.12  # nodes across the plane; standard deviation in nodes' distances


def augment(
    images: np.ndarray,
    labels: np.ndarray,
    generator: np.random.Generator,
    config: DataConfig,
    label_swap: dict[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Randomly changed copy of one group: images (N, H, W) float32 HU and labels (N, H, W).

    Every draw is from `generator`. One displacement field and one set of intensity changes serve all slices, so that
    neighbouring slices still fit. Labels take the value of their nearest pixel. `mirror` swaps the labels that
    `label_swap` pairs."""
    chosen = {name for name in config.augmentation if generator.random() < config.augmentation_probability}
    if chosen & {"elastic", "affine"}:
        images, labels = _deform(
            images, labels, generator, elastic="elastic" in chosen, affine="affine" in chosen
        )
    if "mirror" in chosen:
        images, labels = images[..., ::-1], swap_labels(labels[..., ::-1], label_swap)
    if "intensity" in chosen:  # from air upwards: calibration and contrast agent differ, air does not
        gain, shift = generator.uniform(0.9, 1.1), generator.uniform(-20, 20)
        images = (images - AIR_HU) * np.float32(gain) + np.float32(AIR_HU + shift)
    if "noise" in chosen:
        deviation = np.float32(generator.uniform(0, NOISE_HU))
        images = images + deviation * generator.standard_normal(images.shape, dtype=np.float32)
    return np.ascontiguousarray(images), np.ascontiguousarray(labels)


def _deform(
    images: np.ndarray, labels: np.ndarray, generator: np.random.Generator, *, elastic: bool, affine: bool
) -> tuple[np.ndarray, np.ndarray]:
    """images and labels (N, H, W) sampled along one random 2D grid: bilinear, and nearest for labels. Outside is
    air."""
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
    largest = max(int(labels.max(initial=0)), *label_swap, *label_swap.values(), 0)
    table = np.arange(largest + 1, dtype=np.promote_types(labels.dtype, label_dtype(largest)))
    for value, other in label_swap.items():
        table[value] = other
    swapped: np.ndarray = table[labels]
    return swapped
