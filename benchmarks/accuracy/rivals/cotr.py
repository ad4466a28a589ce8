"""CoTr, from MONAI's parts: a 3D CNN, deformable attention over its two coarsest levels, a decoder with added skips.

Source: CoTr, arXiv 2103.03024; Deformable DETR, arXiv 2010.04159; the sizes of github.com/YtongXie/CoTr. There is no
deep supervision and no dropout; offsets start along the six directions of the axes, one for each head."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 6
Shape = tuple[int, ...]  # (d, h, w) of a level, in tokens


class CoTr(nn.Module):
    """image (B, 1, d, h, w) -> logits (B, K+1, d, h, w). The default sizes are those of the paper.

    `widths` are the channels at strides (1, 2, 2), (2, 4, 4), (4, 8, 8) and (8, 16, 16); the last two are equal."""

    def __init__(
        self,
        num_classes: int,
        *,
        widths: Sequence[int] = (64, 192, 384, 384),
        depths: Sequence[int] = (3, 3, 2),
        num_layers: int = 6,
        points: int = 4,
    ) -> None:
        super().__init__()
        from monai.networks.blocks import Convolution, ResidualUnit

        style: dict[str, Any] = {
            "norm": ("instance", {"affine": True}),
            "act": ("leakyrelu", {"negative_slope": 0.01}),
            "bias": False,
        }
        first, *_, dim = widths
        stem = Convolution(3, 1, first, (1, 2, 2), 7, adn_ordering="NA", **style)
        self.levels = nn.ModuleList([stem])
        for before, after, depth in zip(widths, widths[1:], depths, strict=False):
            blocks = (ResidualBlock(after, after) for _ in range(depth - 1))
            self.levels.append(nn.Sequential(ResidualBlock(before, after, stride=2), *blocks))
        self.level_embedding = nn.Parameter(torch.randn(2, dim))
        self.layers = nn.ModuleList(DeformableLayer(dim, levels=2, points=points) for _ in range(num_layers))
        coarse_to_fine = list(reversed(widths))
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(coarse, fine, 2, 2, bias=False) for coarse, fine in pairwise(coarse_to_fine)
        )
        self.merge = nn.ModuleList(
            ResidualUnit(3, fine, fine, adn_ordering="NA", **style) for fine in coarse_to_fine[1:]
        )
        self.out = nn.Conv3d(first, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = [image]
        for level in self.levels:
            features.append(level(features[-1]))
        *skips, x = self._attend(features[-2:])
        skips = [*features[1:-2], *skips]
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            d, h, w = skip.shape[2:]
            x = merge(up(x)[..., :d, :h, :w] + skip)
        logits: Tensor = self.out(F.interpolate(x, size=image.shape[2:], mode="trilinear"))
        return logits

    def _attend(self, features: list[Tensor]) -> list[Tensor]:
        """The transformer on the tokens of all levels together."""
        shapes = [tuple(x.shape[2:]) for x in features]
        counts = [math.prod(shape) for shape in shapes]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in features], 1)  # (B, T, C)
        where = torch.cat([centres(shape, tokens.device) for shape in shapes])  # (T, 3)
        levels = self.level_embedding.repeat_interleave(torch.tensor(counts, device=tokens.device), 0)
        position = sines(where, tokens.shape[2]) + levels
        for layer in self.layers:
            tokens = layer(tokens, position, where, shapes)
        parts = tokens.transpose(1, 2).split(counts, 2)
        return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


class ResidualBlock(nn.Module):
    """A convolution and its norm beside the input or a 1³ convolution of it, then leaky ReLU."""

    def __init__(self, before: int, after: int, *, stride: int = 1) -> None:
        super().__init__()
        from monai.networks.blocks import Convolution

        part = functools.partial(
            Convolution, 3, before, after, stride, norm=("instance", {"affine": True}), act=None, bias=False
        )
        self.conv = part(3)
        self.shortcut = part(1) if (before, 1) != (after, stride) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x) + self.shortcut(x), 0.01)


class DeformableLayer(nn.Module):
    """Deformable attention and an MLP, each followed by a LayerNorm."""

    def __init__(self, dim: int, *, levels: int, points: int) -> None:
        super().__init__()
        from monai.networks.blocks import MLPBlock

        self.attention = DeformableAttention(dim, levels=levels, points=points)
        self.mlp = MLPBlock(dim, 4 * dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, where: Tensor, shapes: Sequence[Shape]) -> Tensor:
        x = self.norm1(x + self.attention(x + position, x, where, shapes))
        y: Tensor = self.norm2(x + self.mlp(x))
        return y


class DeformableAttention(nn.Module):
    """Each head's weighted mean of values at a few points a level, whose offsets and weights the query predicts."""

    def __init__(self, dim: int, *, levels: int, points: int) -> None:
        super().__init__()
        self.samples = (HEADS, levels, points)
        self.offsets = nn.Linear(dim, 3 * math.prod(self.samples))
        self.weights = nn.Linear(dim, math.prod(self.samples))
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(parameter)
        directions = torch.cat([torch.eye(3), -torch.eye(3)])[:, None, None]
        start = directions * torch.arange(1, points + 1).view(points, 1)  # the n-th point is n tokens away
        self.offsets.bias = nn.Parameter(start.expand(*self.samples, 3).flatten())

    def forward(self, query: Tensor, value: Tensor, where: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """query and value (B, T, C) of the tokens of all levels, `where` (T, 3) as of `centres` -> (B, T, C)."""
        batch, count, _ = query.shape
        offsets = self.offsets(query).float().view(batch, count, *self.samples, 3)
        weights = self.weights(query).float().view(batch, count, HEADS, -1).softmax(-1)
        # (levels, B, heads, T, points)
        weights = weights.view(batch, count, *self.samples).permute(3, 0, 2, 1, 4)
        values = self.value(value).float().view(batch, count, HEADS, -1).permute(0, 2, 3, 1)
        mean = torch.zeros_like(values.flatten(0, 1))  # (B·heads, c, T)
        parts = values.flatten(0, 1).split([math.prod(shape) for shape in shapes], -1)
        for level, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            points = where[:, None, None] + offsets[:, :, :, level] / offsets.new_tensor(shape[::-1])
            grid = (2 * points - 1).transpose(1, 2).flatten(0, 1)[:, :, :, None]  # (B·heads, T, points, 1, 3)
            sampled = F.grid_sample(part.unflatten(-1, shape), grid, align_corners=False)[..., 0]
            mean = mean + (sampled * weights[level].flatten(0, 1)[:, None]).sum(-1)
        attended: Tensor = self.out(mean.view(batch, -1, count).transpose(1, 2))
        return attended


def centres(shape: Shape, device: torch.device) -> Tensor:
    """Centres (T, 3) of the tokens of a level as parts of its width, height and depth, in 0 ... 1."""
    d, h, w = ((torch.arange(side, device=device) + 0.5) / side for side in shape)
    return torch.stack(torch.meshgrid(d, h, w, indexing="ij")[::-1], -1).flatten(0, 2)


def sines(where: Tensor, dim: int) -> Tensor:
    """Sines and cosines (T, dim) of points (T, 3): a third of the channels for each axis."""
    frequencies = 10_000 ** (-torch.arange(dim // 6, device=where.device) / (dim // 6))
    angles = (2 * math.pi * where[:, :, None] * frequencies).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], 1)


def build_cotr(num_classes: int) -> CoTr:
    """CoTr at the table's size."""
    return CoTr(num_classes, widths=(16, 48, 96, 96), num_layers=3)
