"""Slices to features: SAM's ViT by SAM's parameter names, and small sizes of it that learn from scratch.

Source: segment_anything/modeling/image_encoder.py; ViTDet, arXiv 2203.16527."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aftersam.model.layers import ConvStem, DenseLinear, RowNorm, SliceFeatures
from axial_fusion.ops.dense_linear import dense_linear
from axial_fusion.sam import SamAttention


class ImageEncoder(nn.Module):
    """SAM's image encoder: patches plus positions, pre-norm transformer blocks, a convolutional neck.

    With a `stem`, patches are made from its coarsest features, and its features are the skips."""

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: Sequence[EncoderBlock],
        neck: nn.Module,
        *,
        grid: tuple[int, int],
        patch: int,
        dim: int,
        stem: ConvStem | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.patch_embed = patch_embed
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, dim))
        self.blocks = nn.ModuleList(blocks)
        self.neck = neck
        self.patch = patch
        self.skip_channels: tuple[int, ...] = () if stem is None else stem.skip_channels
        self.activation_checkpointing = False
        self._reset_parameters()

    def forward(self, images: Tensor) -> SliceFeatures:
        """images (T, 3, H, W), normalised -> embedding (T, C, h, w) with h = H / patch, and skips.

        Raises ValueError where the image size differs from that of the position table."""
        height, width = (n * self.patch for n in self.pos_embed.shape[1:3])
        if images.shape[-2:] != (height, width):
            raise ValueError(
                f"images are {images.shape[-2]}×{images.shape[-1]} px, but this encoder is for {height}×{width}"
            )
        skips = () if self.stem is None else self.stem(images)
        x = self.patch_embed(skips[-1] if skips else images)  # (T, h, w, dim)
        x = x + self.pos_embed
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return SliceFeatures(self.neck(x.permute(0, 3, 1, 2)), skips)

    def _reset_parameters(self) -> None:
        """ViT's initialisation: N(0, 0.02) weights and positions, zero biases and relative positions."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block on tokens (T, h, w, dim)."""

    def __init__(self, dim: int, attention: EncoderAttention, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = RowNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = RowNorm(dim, eps=1e-6)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class EncoderAttention(SamAttention):
    """SAM's attention with relative positions over a grid (h, w) or inside windows. Their tables start at zero."""

    qkv_by_head = False

    def __init__(self, dim: int, num_heads: int, *, grid: tuple[int, int], window: int = 0) -> None:
        rows, columns = (window, window) if window else grid
        super().__init__(
            DenseLinear(dim, 3 * dim),
            DenseLinear(dim, dim),
            nn.Parameter(torch.zeros(2 * rows - 1, dim // num_heads)),
            nn.Parameter(torch.zeros(2 * columns - 1, dim // num_heads)),
            num_heads=num_heads,
            window=window,
        )


class PatchEmbed(nn.Module):
    """SAM's patch embedding by SAM's names, as one matrix product whose output (T, h, w, dim) needs no copy."""

    def __init__(self, patch: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.proj.kernel_size[0]
        x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (T, in, h, patch, w, patch)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return dense_linear(x, self.proj.weight.flatten(1), self.proj.bias)


class StridedPatchEmbed(nn.Module):
    """3×3 convolution of stride 2 from the stem to tokens (T, h, w, dim)."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)
