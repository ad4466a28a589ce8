"""What prediction computes, without its shortcuts: the specification of `sliding.stream_logits`.

Groups go through the model one by one, so a slice is encoded anew for every group that contains it, and the logits of
the whole scan are in memory. Nothing is cast here: the caller's autocast holds, and a model in fp64 answers in fp64."""

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
    """What `stream_logits` yields: logits (K+1, H, W) of every slice, with `options.confidence` the disagreement too.

    Stored features are not read. Further tokens of background are merged group by group, not last of all."""
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

    `labels` (D, S, S) are what a model with prompts draws its prompts from. Of `options`, those about groups hold.
    `encode_once` encodes each slice once, by itself, instead of anew with each group; `kept_alone` decodes only the
    slices of a group that are kept, which are then all that is compared."""
    size, stride = config.num_slices, config.slice_stride
    centres, kept = group_plan(len(hu), config, options)
    decoded = kept if kept_alone else tuple(range(size))
    each = [model.encode(_near(hu, [d], config)) for d in range(len(hu))] if encode_once else None
    # of each slice, its logits in the groups that it is kept of
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
            )[0]  # a tensor, as no coarse logits are asked for
        else:
            logits = _from_features(model, [each[d] for d in group], decoded, prompts)
        for position, of_slice in zip(decoded, logits, strict=True):
            d = centre + (position - size // 2) * stride
            if 0 <= d < len(hu):  # a slice of its own, no repeat
                of_slice = of_slice.to(torch.promote_types(of_slice.dtype, torch.float32))
                every[d].append(of_slice)
                if position in kept:
                    wanted[d].append(of_slice)
    mean = torch.stack([torch.stack(found).mean(0) for found in wanted])
    return mean, torch.stack([divergence(torch.stack(found).softmax(1)) for found in every])


def _near(hu: Tensor, slices: Sequence[int], config: ModelConfig) -> Tensor:
    """Those slices of hu (D, S, S); for a stem of several slices, each between those next to it."""
    return hu[torch.from_numpy(adjacent(slices, len(hu), config.stem_slices))]


def _from_features(
    model: AfterSAM, features: Sequence[SliceFeatures], positions: tuple[int, ...], labels: Tensor | None
) -> Tensor:
    """Logits (positions, K+1, h, w) of a group whose slices are encoded; `labels` (N, S, S) are the group's."""
    embedding = torch.stack([one.embedding for one in features], dim=1)
    fused = model.fuse(embedding, query_index=positions)
    levels = zip(*(features[p].skips for p in positions), strict=True)
    prompts = None if labels is None else labels[list(positions)]
    logits = model.decode(fused[0], tuple(torch.cat(level) for level in levels), prompts)
    return of_classes(logits, model.decoder.num_classes)


def divergence(probabilities: Tensor) -> Tensor:
    """(groups, K+1, h, w) -> (1, h, w): the mean over groups of Σ p log(p / mean), over log min(groups, classes)."""
    groups, classes = probabilities.shape[:2]
    if groups == 1:
        return probabilities.new_zeros(1, *probabilities.shape[2:])
    excess = probabilities.xlogy(probabilities) - probabilities.xlogy(probabilities.mean(0))
    return excess.sum(1, keepdim=True).mean(0) / math.log(min(groups, classes))
