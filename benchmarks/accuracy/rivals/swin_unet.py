"""Swin-Unet, from MONAI's parts: a U-Net of Swin transformer stages, patches of 4×4 pixels merged and expanded.

Source: Swin-Unet, arXiv 2105.05537; the sizes of the tiny form in github.com/HuCaoFighting/Swin-Unet, whose skips are
the inputs of the stages. There is no stochastic depth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aftersam.config import ModelConfig
from aftersam.model.aftersam import AfterSAM
from aftersam.model.layers import LayerNorm2d
from benchmarks.accuracy.rivals.imagenet import load_swin
from benchmarks.accuracy.rivals.slice_groups import slice_network

PATCH = 4


class SwinUnet(nn.Module):
    """images (T, 3, H, W) -> logits (T, K+1, H, W). The default sizes are those of the tiny form.

    A stage that has fewer than `window` tokens a side at images of `image_size` has a window of as many."""

    def __init__(
        self,
        num_classes: int,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        from monai.networks.blocks import PatchEmbed
        from monai.networks.nets.swin_unetr import BasicLayer, PatchMergingV2

        widths = [dim * 2**i for i in range(len(depths))]
        sides = [min(window, -(-image_size // (PATCH * 2**i))) for i in range(len(depths))]

        def stage(i: int, merging: Any = None) -> nn.Module:
            return BasicLayer(
                widths[i], depths[i], num_heads[i], (sides[i], sides[i]), drop_path=[0.0] * depths[i],
                qkv_bias=True, downsample=merging,
            )  # fmt: skip

        deepest = len(widths) - 1
        self.embed = PatchEmbed(PATCH, 3, dim, nn.LayerNorm, spatial_dims=2)
        self.encoder = nn.ModuleList(stage(i, PatchMergingV2) for i in range(deepest))
        self.bottleneck = nn.Sequential(stage(deepest), LayerNorm2d(widths[-1]))
        coarse_to_fine = list(pairwise(reversed(widths)))
        self.expand = nn.ModuleList(PatchExpand(coarse, fine, 2) for coarse, fine in coarse_to_fine)
        self.join = nn.ModuleList(nn.Conv2d(2 * fine, fine, 1) for _, fine in coarse_to_fine)
        self.decoder = nn.ModuleList(stage(i) for i in reversed(range(deepest)))
        self.last = nn.Sequential(LayerNorm2d(dim), PatchExpand(dim, dim, PATCH))
        self.out = nn.Conv2d(dim, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)  # sides are padded to whole patches, here and where patches are merged
        skips = []
        for stage in self.encoder:
            skips.append(x)
            x = stage(x)
        x = self.bottleneck(x)
        for expand, join, stage, skip in zip(
            self.expand, self.join, self.decoder, reversed(skips), strict=True
        ):
            x = _cropped(expand(x), skip)
            x = stage(join(torch.cat([x, skip], 1)))
        logits: Tensor = self.out(_cropped(self.last(x), images))
        return logits


class PatchExpand(nn.Module):
    """x (T, C, h, w) -> (T, out, f·h, f·w): a linear layer whose channels become pixels, then a LayerNorm."""

    def __init__(self, channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Conv2d(channels, out_channels * factor**2, 1, bias=False)
        self.norm = LayerNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        expanded: Tensor = self.norm(F.pixel_shuffle(self.linear(x), self.factor))
        return expanded


def _cropped(x: Tensor, like: Tensor) -> Tensor:
    return x[..., : like.shape[2], : like.shape[3]]


def build_swin_unet(config: ModelConfig, num_classes: int, imagenet: Path | None = None) -> AfterSAM:
    """Swin-Unet at the table's size, with windows of 4 tokens as its Swin UNETR.

    From the ImageNet weights in the file `imagenet` it has the published size."""
    if imagenet is not None:
        network = SwinUnet(num_classes, image_size=config.image_size)
        load_swin(network, imagenet)
    else:
        network = SwinUnet(
            num_classes, dim=40, num_heads=(2, 4, 8, 16), window=4, image_size=config.image_size
        )
    return slice_network(network, config, num_classes)
