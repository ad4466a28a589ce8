"""TransUNet, from MONAI's parts: a ResNet to stride 16, a vision transformer on its features, a decoder with skips.

Source: TransUNet, arXiv 2102.04306; the sizes of R50-ViT-B_16 in github.com/Beckschen/TransUNet. The pooling pads, as
in the ResNet of the ImageNet weights, and there is no dropout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aftersam.config import ModelConfig
from aftersam.model.aftersam import AfterSAM
from benchmarks.accuracy.rivals.imagenet import load_r50_vit
from benchmarks.accuracy.rivals.slice_groups import slice_network

EPS = 1e-6  # of the norms in ResNet and transformer


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 over each output channel.    Source: arXiv 1903.10520"""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return self._conv_forward(x, (self.weight - mean) * (variance + 1e-5).rsqrt(), self.bias)


class TransUNet(nn.Module):
    """images (T, 3, H, W) -> logits (T, K+1, H, W). The default sizes are those of R50-ViT-B_16.

    `grid` is the number of learned token positions (h, w); they are interpolated to the grid of another image size."""

    def __init__(
        self,
        num_classes: int,
        grid: tuple[int, int],
        *,
        width: int = 64,
        depths: Sequence[int] = (3, 4, 9),
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        decoder: Sequence[int] = (512, 256, 128, 64, 16),
    ) -> None:
        super().__init__()
        from monai.networks.blocks import Convolution
        from monai.networks.nets.basic_unet import TwoConv

        norm: tuple[str, dict[str, Any]] = ("group", {"num_groups": width // 2, "eps": EPS})
        self.root = Convolution(2, 3, width, strides=2, kernel_size=7, norm=norm, act="relu", bias=False)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        before = (width, 4 * width, 8 * width)
        self.stages = nn.ModuleList(  # at strides 4, 8 and 16
            _bottlenecks(channels, width * 2**i, depth, 1 if i == 0 else 2, norm)
            for i, (channels, depth) in enumerate(zip(before, depths, strict=True))
        )
        for module in (*self.root.modules(), *self.stages.modules()):
            if type(module) is nn.Conv2d:
                module.__class__ = StandardisedConv2d
        self.embed = nn.Conv2d(16 * width, dim, 1)
        self.position = nn.Parameter(torch.zeros(1, dim, *grid))
        self.blocks = nn.Sequential(*(_transformer_block(dim, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.unembed = Convolution(2, dim, decoder[0], norm="batch", act="relu", bias=False)
        self.levels = nn.ModuleList(
            TwoConv(2, coarse + skip, fine, act="relu", norm="batch", bias=False)
            for coarse, skip, fine in zip(decoder, (*reversed(before), 0), decoder[1:], strict=False)
        )
        self.out = nn.Conv2d(decoder[-1], num_classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        skips = [self.root(images)]
        x = self.pool(skips[0])
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        x = self.unembed(self._attend(self.embed(x)))
        for level, skip in zip(self.levels, (*reversed(skips[:-1]), None), strict=True):
            size = (images if skip is None else skip).shape[2:]
            x = F.interpolate(x, size=size, mode="bilinear")
            x = level(x if skip is None else torch.cat([x, skip], 1))
        logits: Tensor = self.out(x)
        return logits

    def _attend(self, x: Tensor) -> Tensor:
        """The transformer on features (T, C, h, w)."""
        grid = x.shape[2:]
        position: Tensor = self.position
        if position.shape[2:] != grid:
            position = F.interpolate(position, size=grid, mode="bilinear")
        tokens: Tensor = self.blocks((x + position).flatten(2).transpose(1, 2))  # (T, h·w, C)
        return self.norm(tokens).transpose(1, 2).unflatten(2, grid)


def _bottlenecks(
    before: int, planes: int, depth: int, stride: int, norm: tuple[str, dict[str, Any]]
) -> nn.Module:
    """`depth` blocks of a ResNet, 4 · `planes` channels wide; the first has the stride."""
    from monai.networks.blocks import Convolution
    from monai.networks.nets.resnet import ResNetBottleneck

    after = 4 * planes
    per_channel = ("group", {"num_groups": after})
    shortcut = Convolution(2, before, after, stride, 1, norm=per_channel, act=None, bias=False)
    first = ResNetBottleneck(before, planes, 2, stride, shortcut, norm=norm)
    return nn.Sequential(first, *(ResNetBottleneck(after, planes, 2, norm=norm) for _ in range(depth - 1)))


def _transformer_block(dim: int, num_heads: int) -> nn.Module:
    from monai.networks.blocks import TransformerBlock

    block = TransformerBlock(dim, 4 * dim, num_heads, qkv_bias=True)
    del block.norm_cross_attn  # parameters of cross-attention, which is not used
    block.norm1.eps = block.norm2.eps = EPS
    return block


def build_transunet(config: ModelConfig, num_classes: int, imagenet: Path | None = None) -> AfterSAM:
    """TransUNet at the table's size, with a token every 16 pixels of the images of `config`.

    From the ImageNet weights in the file `imagenet` it has the published size."""
    side = config.image_size // 16
    if imagenet is not None:
        network = TransUNet(num_classes, (side, side))
        load_r50_vit(network, imagenet)
    else:
        network = TransUNet(
            num_classes, (side, side), width=16, depths=(2, 2, 2), dim=192, num_layers=4, num_heads=6,
            decoder=(128, 64, 32, 16, 16),
        )  # fmt: skip
    return slice_network(network, config, num_classes)
