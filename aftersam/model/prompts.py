"""Prompts drawn from labels: SAM's box or click for each class of a slice, the paper's Table 3.

Such a model is told where every organ is, so its scores are marked as prompted and compared with nothing else.

Source: segment_anything/modeling/prompt_encoder.py, whose parameter names and half-pixel shift are kept."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from aftersam.model.layers import without_autocast
from aftersam.model.segment_anything import segment_anything_modeling

POSITIVE, TOP_LEFT, BOTTOM_RIGHT = 1, 2, 3  # SAM's rows of point_embeddings; 0 is a click on background


class LabelPrompts(nn.Module):
    """Labels (T, H, W) -> prompt tokens (T, K, n, C) of classes 1 to K: "box" 2 corners, "point" 1 click, "points" 3.

    The first click is the pixel of the class nearest to the class's centroid, so that it lies inside even where the
    organ is a ring; each other one is the pixel farthest from those before. A class that the slice lacks gets SAM's
    not-a-point vector."""

    def __init__(self, kind: Literal["box", "point", "points"], dim: int) -> None:
        super().__init__()
        if kind not in ("box", "point", "points"):
            raise ValueError(f"prompts is {kind!r}, but must be box, point or points")
        self.kind = kind
        self.pe_layer = segment_anything_modeling("prompt_encoder").PositionEmbeddingRandom(dim // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))  # SAM's names
        self.not_a_point_embed = nn.Embedding(1, dim)

    def forward(self, labels: Tensor, num_classes: int) -> Tensor:
        """labels (T, H, W) integers, `num_classes` K+1 with background -> (T, K, n, C)."""
        values = torch.arange(1, num_classes, device=labels.device)
        masks = labels[:, None] == values[:, None, None]  # (T, K, H, W)
        roles: tuple[int, ...]
        if self.kind == "box":
            points, roles = box_corners(masks), (TOP_LEFT, BOTTOM_RIGHT)
        else:
            count = 1 if self.kind == "point" else 3
            points, roles = clicks(masks, count), (POSITIVE,) * count
        with without_autocast(labels.device):  # phases of a Fourier feature need fp32
            slices, classes, count, _ = points.shape
            flat = (points + 0.5).reshape(slices, classes * count, 2)
            where = self.pe_layer.forward_with_coords(flat, tuple(labels.shape[-2:]))
        role = torch.cat([p for i in roles for p in self.point_embeddings[i].parameters()])  # (n, C)
        tokens = where.unflatten(1, (classes, count)) + role
        present = masks.flatten(2).any(2)[:, :, None, None]
        return torch.where(present, tokens, self.not_a_point_embed.weight)


def box_corners(masks: Tensor) -> Tensor:
    """masks (..., H, W) bool -> first and last pixel (..., 2, 2) as (x, y); any value for an empty mask."""
    spans = []
    for seen in (masks.any(-2), masks.any(-1)):  # columns, then rows
        last = seen.shape[-1] - 1 - seen.flip(-1).int().argmax(-1)
        spans.append(torch.stack([seen.int().argmax(-1), last], dim=-1))
    return torch.stack(spans, dim=-1).float()


def clicks(masks: Tensor, count: int) -> Tensor:
    """masks (..., H, W) bool -> `count` pixels (..., count, 2) as (x, y): one near the centroid, then far from it."""
    height, width = masks.shape[-2:]
    y = torch.arange(height, device=masks.device).float()[:, None].expand(height, width).flatten()
    x = torch.arange(width, device=masks.device).float().repeat(height)
    inside = masks.flatten(-2)
    area = inside.sum(-1, keepdim=True).clamp_min(1)
    from_centroid = (x - (inside * x).sum(-1, keepdim=True) / area) ** 2
    from_centroid = from_centroid + (y - (inside * y).sum(-1, keepdim=True) / area) ** 2
    found = [from_centroid.masked_fill(~inside, torch.inf).argmin(-1, keepdim=True)]
    far = torch.full_like(from_centroid, torch.inf)
    while len(found) < count:
        # from the nearest click so far
        far = torch.minimum(far, (x - x[found[-1]]) ** 2 + (y - y[found[-1]]) ** 2)
        found.append(far.masked_fill(~inside, -1.0).argmax(-1, keepdim=True))
    index = torch.cat(found, -1)
    return torch.stack([index % width, index // width], dim=-1).float()
