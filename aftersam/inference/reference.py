"""Prediction group by group: the specification that sliding.py is held to.

Every group goes through the model by itself, so that a slice is encoded once for each group that contains it, and the
logits of the whole volume are in memory. One window covers the plane; there is no tiling here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aftersam.config import ModelConfig
from aftersam.data.windows import adjacent, slice_group
from aftersam.model.aftersam import AfterSAM

GroupLogits = Callable[[np.ndarray, Sequence[int]], Tensor]
"""The slices (N,) of a group and the positions in it that are kept -> their logits (Nq, K+1, h, w)."""


def whole_model(
    model: AfterSAM, hu: Tensor | np.ndarray, config: ModelConfig, *, kept_alone: bool = False
) -> GroupLogits:
    """Logits by encoder, fusion and decoder on the slices of hu (D, S, S), computed anew for each group.

    All slices of a group are decoded; with `kept_alone` the last fusion block and the decoder compute the kept ones."""
    planes = torch.as_tensor(hu)

    def group_logits(slices: np.ndarray, positions: Sequence[int]) -> Tensor:
        group = planes[torch.from_numpy(adjacent(slices, len(planes), config.stem_slices))][None]
        group = group.to(torch.promote_types(group.dtype, torch.float32))  # (1, N, S, S), or (1, N, s, S, S)
        if kept_alone:
            return model(group, query_index=positions)[0]
        return model(group)[0, list(positions)]

    return group_logits


@torch.no_grad()
def sliding_logits(
    group_logits: GroupLogits,
    shape: Sequence[int],
    config: ModelConfig,
    *,
    centres: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """Logits (D, K+1, H, W) of a volume of `shape` (D, H, W): of each slice the mean over the groups that keep it.

    There is a group about each of `centres`, all slices unless given. It keeps its slices at `positions`, the centre
    unless given, but no repeats beyond the ends. Each slice must be kept by one group or more."""
    votes = _votes(group_logits, shape[0], config, centres, positions)
    return _upsampled(torch.stack([torch.stack(planes).mean(0) for planes in votes]), shape)


@torch.no_grad()
def sliding_disagreement(group_logits: GroupLogits, shape: Sequence[int], config: ModelConfig) -> Tensor:
    """Disagreement (D, H, W) in [0, 1] of all groups that contain a slice, each slice being the centre of one.

    Σ p_g log(p_g / mean) / groups, over log min(groups, classes); 0 where one group alone contains the slice."""
    planes = []
    for logits in _votes(group_logits, shape[0], config, None, range(config.num_slices)):
        p = torch.stack(logits).softmax(1)  # (groups, K+1, h, w)
        divergence = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean(0)
        planes.append(divergence / math.log(min(p.shape[:2])) if len(p) > 1 else torch.zeros_like(divergence))
    return _upsampled(torch.stack(planes)[:, None], shape)[:, 0]


def _votes(
    group_logits: GroupLogits,
    depth: int,
    config: ModelConfig,
    centres: Sequence[int] | None,
    positions: Sequence[int] | None,
) -> list[list[Tensor]]:
    """For each slice its logits (K+1, h, w) by every group that keeps it, in single precision or more."""
    middle = config.num_slices // 2
    kept = (middle,) if positions is None else tuple(positions)
    votes: list[list[Tensor]] = [[] for _ in range(depth)]
    for centre in range(depth) if centres is None else centres:
        logits = group_logits(slice_group(centre, depth, config.num_slices, config.slice_stride), kept)
        for position, plane in zip(kept, logits, strict=True):
            d = centre + (position - middle) * config.slice_stride
            if 0 <= d < depth:
                votes[d].append(plane.to(torch.promote_types(plane.dtype, torch.float32)))
    return votes


def _upsampled(planes: Tensor, shape: Sequence[int]) -> Tensor:
    return F.interpolate(planes, size=tuple(shape[1:]), mode="bilinear", align_corners=False)
