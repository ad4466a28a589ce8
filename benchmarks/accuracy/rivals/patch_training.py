"""The rivals' training loop: batches, a loss, AdamW with a polynomial learning rate, until the limit.

The 3D networks learn from random patches of the preprocessed scans, two of three about an organ. They segment a scan
by a sliding window, and logits are interpolated to the scan's own grid before the argmax, as in ours."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aftersam.config import TrainConfig
from aftersam.data.cache import CachedCase
from aftersam.data.volume import AIR_HU
from aftersam.inference.planes import Plane, resample_stream
from aftersam.model.mask_decoder import BACKGROUND_LEAD
from aftersam.training.losses import segmentation_loss
from aftersam.training.schedule import Progress, average_share, batches, learning_rate
from aftersam.training.step import add_to_average, take_average

WINDOW_HU = (-200.0, 400.0)
FOREGROUND = 0.66  # share of patches about an organ, as in our own presets
# Weight of organ voxels in the cross-entropy; background has 1. A patch has more background than a group of a few
# slices. With weight 1, and without a bias towards background to start from, DynUNet found no esophagus of OpenKBP in
# 40 minutes: it is 0.06 % of a patch.
ORGAN_WEIGHT = 20.0
TURN = (0.26, 0.09, 0.09)  # largest rotation in radians about the axes d, h, w; voxels are longer along d

Batch = dict[str, Any]


class Spent(NamedTuple):
    """The cost of a training: wall and processor minutes, optimiser steps, peak memory of the process or GPU."""

    minutes: float
    cpu_minutes: float
    steps: int
    peak_mib: float


def fit(
    model: nn.Module,
    source: Iterator[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    config: TrainConfig,
    *,
    device: torch.device,
    precision: torch.dtype,
) -> Spent:
    """Optimiser steps on batches of `source` until the limit of `config`, whose schedule follows progress.

    The model then has the moving average of its weights and running statistics, where `config` asks for one.

    Raises FloatingPointError where the loss is no longer finite, ValueError without a limit."""
    if config.max_minutes is None and config.max_steps is None:
        raise ValueError("a rival needs a limit: --max-minutes or --max-steps")
    model.to(device).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=config.weight_decay)
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    statistics = [buffer.clone() for buffer in buffers]
    progress, began, cpu = Progress(), time.monotonic(), time.process_time()
    while (done := progress.fraction(config, 1)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, done)
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in next(source).items()}
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(trainable, config.clip_norm)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss is {value.item()} at step {progress.step + 1}")
        optimizer.step()
        progress.step += 1
        if average := average_share(config, done, progress.step):
            add_to_average(optimizer, average)
            for mean, buffer in zip(statistics, buffers, strict=True):
                mean.lerp_(buffer, average)
        progress.seconds = time.monotonic() - began
    if config.average:
        take_average(optimizer)
        for mean, buffer in zip(statistics, buffers, strict=True):
            buffer.copy_(mean)
    model.eval()
    return Spent(progress.seconds / 60, (time.process_time() - cpu) / 60, progress.step, peak_mib(device))


def peak_mib(device: torch.device) -> float:
    """Most memory so far: of the GPU as torch allocates it, else of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def patches(cached: Sequence[CachedCase], size: Sequence[int], config: TrainConfig) -> Iterator[Batch]:
    """Endless {"image": (B, 1, d, h, w) float32 in 0 ... 1, "labels": (B, 1, d, h, w) int64}, augmented."""
    from monai.transforms import Compose, RandAffined, RandGaussianNoised, RandScaleIntensityd

    change = Compose(
        [
            RandAffined(
                ["image", "labels"], prob=0.5, rotate_range=TURN, scale_range=0.1, padding_mode="border",
                mode=("bilinear", "nearest"), cache_grid=True, spatial_size=tuple(size),
            ),
            RandScaleIntensityd("image", factors=0.1, prob=0.5),
            RandGaussianNoised("image", prob=0.2, std=0.05),
        ]
    )  # fmt: skip
    change.set_random_state(config.seed)
    rng = np.random.default_rng(config.seed)
    for drawn in batches(config.seed, len(cached), config.batch_size, rank=0, world=1, start=0):
        items = []
        for _, case in drawn:
            hu, labels = random_patch(cached[case], size, rng)
            item = change({"image": scaled(hu)[None], "labels": torch.from_numpy(labels)[None].float()})
            items.append((item["image"].as_tensor(), item["labels"].as_tensor().long()))
        yield {"image": torch.stack([i for i, _ in items]), "labels": torch.stack([y for _, y in items])}


def random_patch(
    scan: CachedCase, size: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """HU and labels (d, h, w) of a patch: about one slice of a random organ, or anywhere; air beyond the scan."""
    rows = scan.foreground
    if len(rows) and rng.random() < FOREGROUND:
        rows = rows[rows[:, 0] == rng.choice(np.unique(rows[:, 0]))]
        _, d, top, bottom, left, right = rng.choice(rows).tolist()
        centre = [d, (top + bottom) // 2, (left + right) // 2]
        centre = [int(c + rng.integers(-s // 4, s // 4 + 1)) for c, s in zip(centre, size, strict=True)]
    else:
        centre = [int(rng.integers(n)) for n in scan.shape]
    first = [
        min(max(c - s // 2, 0), n - s) if n >= s else (n - s) // 2
        for c, s, n in zip(centre, size, scan.shape, strict=True)
    ]
    inside = tuple(slice(max(f, 0), min(f + s, n)) for f, s, n in zip(first, size, scan.shape, strict=True))
    pad = [(max(-f, 0), max(f + s - n, 0)) for f, s, n in zip(first, size, scan.shape, strict=True)]
    hu = np.pad(scan.hu[inside], pad, constant_values=AIR_HU)
    return hu, np.pad(scan.labels[inside], pad)


def scaled(hu: np.ndarray) -> Tensor:
    """HU of any shape -> float32 in 0 ... 1 over WINDOW_HU."""
    low, high = WINDOW_HU
    return ((torch.from_numpy(np.asarray(hu, np.float32)) - low) / (high - low)).clamp(0, 1)


def lead_background(network: nn.Module, num_classes: int) -> nn.Module:
    """`network` itself, its last convolution with a bias towards background, as ours has.

    Without the bias the first hundreds of steps are spent on learning that organs are rare."""
    convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    *_, last = (m for m in convolutions if m.out_channels == num_classes)
    assert last.bias is not None, "MONAI's networks end in a convolution with a bias"
    with torch.no_grad():
        last.bias[0] += BACKGROUND_LEAD
    return network


class SoundConv3d(nn.Conv3d):
    """A convolution that computes an input two slices deep in fp32, on a CPU and under autocast.

    There the bfloat16 gradient of a 3³ weight reads uninitialised memory (torch 2.13 with oneDNN, avx512_bf16):
    Swin UNETR, whose 64-voxel patches end in 2³ tokens, had gradients of 1e34 and a loss of NaN within 14 steps."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] == 2 and x.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


def with_sound_gradients(network: nn.Module) -> nn.Module:
    """`network` itself, its 3D convolutions being `SoundConv3d`; names and weights stay."""
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = SoundConv3d
    return network


def patch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Our loss with a patch as one slice group: Dice is over the organs present, so that small ones start to learn."""
    logits = model(batch["image"]).movedim(1, 2)  # (B, d, K+1, h, w)
    return segmentation_loss(logits, batch["labels"][:, 0], ce_foreground_weight=ORGAN_WEIGHT).total


@torch.inference_mode()
def segment_by_patches(
    model: nn.Module,
    hu: np.ndarray,
    size: Sequence[int],
    output_shape: tuple[int, int, int],
    *,
    device: torch.device,
    precision: torch.dtype,
) -> np.ndarray:
    """hu (D, H, W) at the network's spacing -> labels uint8 on `output_shape`, by Gaussian half-overlapping patches."""
    from monai.inferers import sliding_window_inference

    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        logits = sliding_window_inference(
            scaled(hu)[None, None].to(device), tuple(size), 2, model, overlap=0.5, mode="gaussian"
        )
    planes = map(Plane, logits[0].float().movedim(1, 0))  # D planes (K+1, H, W)
    labels = np.empty(output_shape, np.uint8)
    for z, plane in enumerate(resample_stream(planes, hu.shape[0], output_shape)):
        labels[z] = plane.logits.argmax(0).cpu().numpy()
    return labels
