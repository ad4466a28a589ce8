"""Sliding-group inference in its simplest form: the specification of `sliding.stream_logits`.

Groups go through the model one by one. A slice is encoded again for every group that contains it, and the logits of the
whole scan are in memory. There are no casts here: the caller's autocast applies, and a model in fp64 returns fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from aftersam.config import ModelConfig
from aftersam.data.transforms import body_slices
from aftersam.data.volume import AIR_HU
from aftersam.data.windows import adjacent, crop, slice_group
from aftersam.inference.inputs import PredictOptions, Scan
from aftersam.inference.planes import Plane, Tiling
from aftersam.inference.sliding import DEFAULT, group_plan
from aftersam.model.aftersam import AfterSAM
from aftersam.model.layers import SliceFeatures
from aftersam.model.mask_decoder import of_classes


@torch.no_grad()
def naive_planes(
    model: AfterSAM, scan: Scan, config: ModelConfig, options: PredictOptions = DEFAULT
) -> list[Plane]:
    """Logits (K+1, H, W) of every slice, as `stream_logits` yields them; with `options.confidence` also disagreement.

    Stored features are not read. Several background tokens are merged in each group, not after the interpolation."""
    options.check(config.num_slices)
    if options.label_swap is not None:
        swap, once = options.label_swap, replace(options, label_swap=None)
        straight = naive_planes(model, scan, config, once)
        turned = naive_planes(model, scan.mirrored(swap), config, once)
        pairs = zip(straight, turned, strict=True)
        return [one.combine(other.mirrored(swap), lambda a, b: (a + b) / 2) for one, other in pairs]
    weight = next(model.parameters())
    tiling = Tiling.over(scan.hu.shape[1:], scan.box, config.image_size, weight.device)

    def seen(array: np.ndarray, window: tuple[int, int], fill: int) -> Tensor:
        return torch.from_numpy(crop(array, range(len(array)), window, tiling.size, fill)).to(weight.device)

    logits, disagreements = [], []  # of each window
    for window in tiling.windows:
        labels = None
        if config.prompts != "none" and scan.prompt_labels is not None:
            labels = seen(scan.prompt_labels, window, 0)
        hu = seen(scan.hu, window, AIR_HU).to(weight.dtype)
        mean, disagreement = naive_logits(model, hu, config, options, labels=labels)
        logits.append(mean)
        disagreements.append(disagreement)
    background = tiling.background(model.decoder.num_classes, disagreement=options.confidence)
    body = range(*body_slices(scan.hu)) if options.body else range(len(scan.hu))
    planes = []
    for d in range(len(scan.hu)):
        compared = torch.stack([one[d] for one in disagreements]) if options.confidence else None
        plane = tiling.assemble(torch.stack([one[d] for one in logits]), compared)
        planes.append(plane if d in body else background)
    return planes


@torch.no_grad()
def naive_logits(
    model: AfterSAM,
    hu: Tensor,
    config: ModelConfig,
    options: PredictOptions = DEFAULT,
    *,
    labels: Tensor | None = None,
    encode_once: bool = False,
    kept_alone: bool = False,
) -> tuple[Tensor, Tensor]:
    """hu (D, S, S) of one window -> mean logits (D, K+1, h, w) and disagreement (D, 1, h, w) of the groups.

    A model with prompts draws them from `labels` (D, S, S). Only the `options` about groups are used. With
    `encode_once` each slice is encoded once and alone, instead of again in each group. With `kept_alone` only the kept
    slices of a group are decoded; the disagreement is then among those."""
    size, stride = config.num_slices, config.slice_stride
    centres, kept = group_plan(len(hu), config, options)
    decoded = kept if kept_alone else tuple(range(size))
    each = [model.encode(_near(hu, [d], config)) for d in range(len(hu))] if encode_once else None
    # for each slice: its logits in the groups that keep it; in all groups that contain it
    wanted: list[list[Tensor]] = [[] for _ in hu]
    every: list[list[Tensor]] = [[] for _ in hu]
    for centre in centres:
        group = slice_group(centre, len(hu), size, stride).tolist()
        prompts = None if labels is None else labels[group]
        if each is None:
            logits = model(
                _near(hu, group, config)[None],
                query_index=decoded if kept_alone else None,
                labels=None if prompts is None else prompts[None],
            )[0]  # a tensor, since no coarse logits are requested
        else:
            logits = _from_features(model, [each[d] for d in group], decoded, prompts)
        for position, of_slice in zip(decoded, logits, strict=True):
            d = centre + (position - size // 2) * stride
            if 0 <= d < len(hu):  # not a repeat of the first or last slice
                of_slice = of_slice.to(torch.promote_types(of_slice.dtype, torch.float32))
                every[d].append(of_slice)
                if position in kept:
                    wanted[d].append(of_slice)
    mean = torch.stack([torch.stack(found).mean(0) for found in wanted])
    return mean, torch.stack([divergence(torch.stack(found).softmax(1)) for found in every])


def _near(hu: Tensor, slices: Sequence[int], config: ModelConfig) -> Tensor:
    """The `slices` of hu (D, S, S); with a stem of several slices, each together with its neighbours."""
    return hu[torch.from_numpy(adjacent(slices, len(hu), config.stem_slices))]


def _from_features(
    model: AfterSAM, features: Sequence[SliceFeatures], positions: tuple[int, ...], labels: Tensor | None
) -> Tensor:
    """Logits (positions, K+1, h, w) of a group from its slices' features. `labels` (N, S, S) are those of the group."""
    embedding = torch.stack([one.embedding for one in features], dim=1)
    fused = model.fuse(embedding, query_index=positions)
    levels = zip(*(features[p].skips for p in positions), strict=True)
    prompts = None if labels is None else labels[list(positions)]
    logits = model.decode(fused[0], tuple(torch.cat(level) for level in levels), prompts)
    return of_classes(logits, model.decoder.num_classes)


def divergence(probabilities: Tensor) -> Tensor:
    """Disagreement (1, h, w) in [0, 1] of probabilities (groups, K+1, h, w), by Jensen–Shannon divergence.

    The mean over groups of Σ p log(p / mean), divided by its largest value, log min(groups, classes)."""
    groups, classes = probabilities.shape[:2]
    if groups == 1:
        return probabilities.new_zeros(1, *probabilities.shape[2:])
    excess = probabilities.xlogy(probabilities) - probabilities.xlogy(probabilities.mean(0))
    return excess.sum(1, keepdim=True).mean(0) / math.log(min(groups, classes))
