"""MobileSAM's image encoder, TinyViT: a convolutional stage, then three of windowed attention, down to stride 16.

Parameter names are MobileSAM's, so that its weights load strictly; its ImageNet classifier, which SAM never runs, is
left out. BatchNorm always takes its stored statistics: a slice's features are the same in any batch. Windows have one
size at every image size, so nothing is interpolated. Written from the architecture.

Source: TinyViT, arXiv 2207.10666 (MIT); MobileSAM's tiny_vit_sam.py, arXiv 2306.14289 (Apache-2.0)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from aftersam.config import EncoderSize, Stage
from aftersam.model.layers import DenseLinear, SliceFeatures, build_neck

CLASSIFIER = {  # of ImageNet, on top of MobileSAM's encoder, never run
    "image_encoder.norm_head.weight": (320,), "image_encoder.norm_head.bias": (320,),
    "image_encoder.head.weight": (1000, 320), "image_encoder.head.bias": (1000,),
}  # fmt: skip


class TinyViT(nn.Module):
    """Slices to features like `ImageEncoder`, of any size that is a multiple of 16 px; it has no skips."""

    skip_channels: tuple[int, ...] = ()

    def __init__(self, size: EncoderSize, *, in_channels: int = 3) -> None:
        super().__init__()
        first, *later = size.stages
        self.patch_embed = _PatchEmbed(in_channels, first.dim)
        layers: list[_Layer] = []
        for i, stage in enumerate(size.stages):
            following = size.stages[i + 1] if i + 1 < len(size.stages) else None
            merging = None
            if following is not None:  # the last one keeps the grid, for SAM's stride of 16
                merging = _PatchMerging(stage.dim, following.dim, stride=1 if following is later[-1] else 2)
            layers.append(_Layer(stage, merging))
        self.layers = nn.ModuleList(layers)
        self.neck = build_neck(size.dim, size.out_channels)
        self.patch = size.patch
        self.activation_checkpointing = False
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> SliceFeatures:
        """images (T, 3, H, W), normalised -> embedding (T, C, H/16, W/16), and no skips.

        Raises ValueError for a size that is no multiple of 16 px."""
        if images.shape[-2] % self.patch or images.shape[-1] % self.patch:
            raise ValueError(
                f"images are {images.shape[-2]}×{images.shape[-1]} px, but must be multiples of {self.patch}"
            )
        x = self.patch_embed(images)  # (T, c, H/4, W/4)
        for layer in self.layers:
            for block in layer.blocks:
                if self.activation_checkpointing and self.training:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            if layer.downsample is not None:
                x = layer.downsample(x)
        return SliceFeatures(self.neck(x), ())


class _Layer(nn.Module):
    """One stage: its blocks, and the step to the next stage's width and grid."""

    def __init__(self, stage: Stage, downsample: _PatchMerging | None) -> None:
        super().__init__()
        blocks = [_MBConv(stage.dim) if not stage.window else TinyViTBlock(stage) for _ in range(stage.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class _ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm by its stored statistics, also while training."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.c.weight, nonlinearity="linear")  # keeps the variance, as no batch will
        self.bn = nn.BatchNorm2d(out_channels)

    def train(self, mode: bool = True) -> _ConvNorm:
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class _PatchEmbed(nn.Module):
    """Two convolutions of stride 2."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            _ConvNorm(in_channels, dim // 2, 3, stride=2), nn.GELU(), _ConvNorm(dim // 2, dim, 3, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class _MBConv(nn.Module):
    """Inverted bottleneck: widen by 4, 3×3 by channel, narrow; GELU after the residual too."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(dim, 4 * dim)
        self.conv2 = _ConvNorm(4 * dim, 4 * dim, 3, groups=4 * dim)
        self.conv3 = _ConvNorm(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class _PatchMerging(nn.Module):
    """To another width, and to half the grid where `stride` is 2."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(in_channels, out_channels)
        self.conv2 = _ConvNorm(out_channels, out_channels, 3, stride=stride, groups=out_channels)
        self.conv3 = _ConvNorm(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class TinyViTBlock(nn.Module):
    """Attention in windows, a 3×3 convolution by channel, an MLP, on (T, C, h, w)."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.window = stage.window
        self.attn = TinyViTAttention(stage.dim, stage.num_heads, stage.window)
        self.local_conv = _ConvNorm(stage.dim, stage.dim, 3, groups=stage.dim)
        self.mlp = _MLP(stage.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (T, h, w, C)
        x = x + self._windowed(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (x + self.mlp(x)).permute(0, 3, 1, 2)

    def _windowed(self, x: Tensor) -> Tensor:
        """Attention of each window of (T, h, w, C). Beyond the grid are zeros, normalised as if they were tokens."""
        slices, height, width, channels = x.shape
        side = self.window
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # (T, rows, columns, S, S, C)
        rows, columns = x.shape[1:3]
        x = self.attn(x.reshape(-1, side * side, channels))
        x = x.view(slices, rows, columns, side, side, channels).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, :height, :width]


class TinyViTAttention(nn.Module):
    """Attention among the S² tokens of a window; each score has a bias by the distance in
    rows and columns. A fused projection whose rows go by head, (M, 3, D)."""

    qkv_by_head = True

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.norm = nn.LayerNorm(dim)
        self.qkv = DenseLinear(dim, 3 * dim)
        self.proj = DenseLinear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window**2))  # |Δrow| · S + |Δcolumn|

    def forward(self, x: Tensor) -> Tensor:
        """x (G, S², C) -> (G, S², C)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        place = torch.arange(self.window, device=x.device)
        apart = (place[:, None] - place).abs()
        index = (apart[:, None, :, None] * self.window + apart[None, :, None, :]).flatten(2).flatten(0, 1)
        bias = self.attention_biases[:, index].to(q.dtype)  # (M, S², S²)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (G, M, S², D)
        return self.proj(x.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = DenseLinear(dim, 4 * dim)
        self.fc2 = DenseLinear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))
