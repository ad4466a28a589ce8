"""Dice and cross-entropy over a slice group.    Source: the paper's section 3.6; Dice as in V-Net, arXiv 1606.04797."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Loss(NamedTuple):
    """Scalars: `total` = (dice + ce) / 2, and its two terms."""

    total: Tensor
    dice: Tensor
    ce: Tensor


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    dice: Literal["present", "all"] = "present",
    ce_foreground_weight: float = 1.0,
    ce_hardest: float = 1.0,
) -> Loss:
    """logits (B, N, K+1, h, w), labels (B, N, H, W) integers in 0..K -> Loss.

    Logits are upsampled to the labels' size. Labels are never downsampled: small organs would vanish. Dice takes
    each group as one 3D sample and averages over organs: those present in the group, or all of them (an absent organ
    then costs about 1 and has no gradient). A group without organs has no Dice term. Cross-entropy is a weighted
    mean over the voxels of a group, an organ's voxel with weight `ce_foreground_weight` and a voxel of background
    with weight 1. With `ce_hardest` below 1 only that share of the voxels counts, those of the largest loss: top-k
    cross-entropy (arXiv 1605.06885; nnU-Net's TopK loss). Both terms are means over groups, so that a batch may be
    spread over processes or accumulated.

    Raises ValueError where the shapes do not fit."""
    if logits.dim() != 5 or labels.shape != (*logits.shape[:2], *labels.shape[-2:]):
        raise ValueError(
            f"logits {tuple(logits.shape)} must be (B, N, K+1, h, w) and labels {tuple(labels.shape)} (B, N, H, W)"
        )
    groups, slices, classes = logits.shape[:3]
    logits = logits.flatten(0, 1).float()  # (B·N, K+1, h, w)
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    flat = labels.flatten(0, 1)  # (B·N, H, W)
    log_probabilities = logits.log_softmax(1)

    weight = torch.full((classes,), ce_foreground_weight, device=logits.device)
    weight[:1].fill_(1.0)  # no scalar is copied from the host, which a CUDA graph refuses
    voxels = F.nll_loss(log_probabilities, flat, weight=weight, reduction="none").view(groups, -1)  # (B, V)
    weights = weight[labels].flatten(1)
    if ce_hardest < 1:
        voxels, hardest = voxels.topk(math.ceil(ce_hardest * voxels.shape[1]), sorted=False)
        weights = weights.gather(1, hardest)
    ce = voxels.sum(1) / weights.sum(1)  # (B,)

    organs = log_probabilities[:, 1:].exp().unflatten(0, (groups, slices))  # (B, N, K, H, W)
    truth = labels.unsqueeze(2) == torch.arange(1, classes, device=labels.device).view(-1, 1, 1)
    overlap = (organs * truth).sum((1, 3, 4))  # (B, K)
    reference = truth.sum((1, 3, 4), dtype=organs.dtype)
    score = 2 * overlap / (organs.sum((1, 3, 4)) + reference).clamp_min(1e-5)
    counted = (reference > 0) if dice == "present" else torch.ones_like(reference, dtype=torch.bool)
    dice_loss = ((1 - score) * counted).sum(1) / counted.sum(1).clamp_min(1)  # (B,)
    return Loss((dice_loss + ce).mean() / 2, dice_loss.mean(), ce.mean())
