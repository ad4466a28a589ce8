"""Slices to features: SAM's ViT with its own parameter names, and a size of it that learns from scratch.

SAM's attention adds to the score of query (h, w) and key (h', w') the bias q·R_h[h − h'] + q·R_w[w − w'], over
the whole grid in a few blocks and inside windows in the others. Windows that leave the grid see keys of padding,
whose input is 0 and whose key and value are therefore the layer's bias.

Source: segment_anything/modeling/image_encoder.py; ViTDet, arXiv 2203.16527; rel-pos, arXiv 2112.01526."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from aftersam.config import ENCODERS, EncoderSize
from aftersam.model.sam import CLASSIFIER
from axial_fusion import lora_linear, rel_pos_attention, window_attention
from axial_fusion.modules import merge_update
from axial_fusion.ops.dense_linear import dense_linear
from axial_fusion.ops.row_norm import row_norm

if TYPE_CHECKING:
    from aftersam.model.tiny_vit import TinyViT

PREFIX = "image_encoder."  # of the encoder's tensors in SAM's state dict


class SliceFeatures(NamedTuple):
    """Features of T slices: `embedding` (T, C, h, w) and `skips` ((T, c, H/s, W/s), ...), finest first."""

    embedding: Tensor
    skips: tuple[Tensor, ...]


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

        Raises ValueError for another image size than the positions are for."""
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


class EncoderAttention(nn.Module):
    """SAM's attention with relative positions: over a grid (h, w), or inside windows where `window` is given."""

    qkv_by_head = False

    def __init__(self, dim: int, num_heads: int, *, grid: tuple[int, int], window: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        rows, columns = (window, window) if window else grid
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (T, h, w, 3, M, D)
        q = qkv[..., 0, :, :]
        rows = _relative(self.rel_pos_h, height, self.window or height)  # (h, keys, D)
        columns = _relative(self.rel_pos_w, width, self.window or width)  # (w, keys, D)
        if self.window:
            rel_h = torch.einsum("thwmd,hkd->thwmk", q, rows)
            rel_w = torch.einsum("thwmd,wkd->thwmk", q, columns)
            bias = self.qkv.bias.to(qkv.dtype)
            x = window_attention(qkv, bias, rel_h.to(qkv.dtype), rel_w.to(qkv.dtype), window=self.window)
        else:
            rel_h = torch.einsum("thwmd,hkd->tmkhw", q, rows).flatten(3)  # (T, M, h, P)
            rel_w = torch.einsum("thwmd,wkd->tmhwk", q, columns).flatten(2, 3)  # (T, M, P, w)
            q, k, v = qkv.flatten(1, 2).unbind(2)  # (T, P, M, D)
            x = rel_pos_attention(q, k, v, rel_h.to(q.dtype), rel_w.to(q.dtype), grid=(height, width))
            x = x.unflatten(1, (height, width))
        return self.proj(x.flatten(-2))


class MLP(nn.Module):
    """SAM's MLPBlock, by its names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lin1 = Linear(dim, 4 * dim)
        self.lin2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Linear(nn.Linear):
    """nn.Linear by the fastest library product."""

    def forward(self, x: Tensor) -> Tensor:
        return dense_linear(x, self.weight, self.bias)


class RowNorm(nn.LayerNorm):
    """nn.LayerNorm in one pass over the rows on a GPU, its result in the dtype that the next product takes."""

    def forward(self, x: Tensor) -> Tensor:
        return row_norm(x, self.weight, self.bias, eps=self.eps)


class ConvStem(nn.Module):
    """Convolutions at strides 1, 2 and 4, each level's features a skip for the decoder.

    GroupNorm: statistics of one slice alone, so that a slice encoded by itself is a slice encoded in a batch.
    Few channels at stride 1, where memory traffic and not arithmetic takes the time."""

    def __init__(self, in_channels: int, *, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.skip_channels = channels
        fine, *coarser = channels
        levels: list[nn.Module] = [ConvBlock(in_channels, fine)]
        for before, after in zip(channels, coarser, strict=False):
            levels.append(nn.Sequential(ConvBlock(before, after, stride=2), ResidualBlock(after)))
        self.levels = nn.ModuleList(levels)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images (T, in, H, W) -> ((T, c, H/s, W/s) for s = 1, 2, 4)."""
        skips = []
        x = images
        for level in self.levels:
            x = level(x)
            skips.append(x)
        return tuple(skips)


class ConvBlock(nn.Sequential):
    """3×3 convolution, GroupNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(max(out_channels // 8, 1), out_channels),
            nn.ReLU(inplace=True),
        )
        nn.init.kaiming_normal_(self[0].weight, nonlinearity="relu")


class ResidualBlock(nn.Module):
    """x + norm(conv(block(x))), then ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = ConvBlock(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(max(channels // 8, 1), channels)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(self.block(x))))


class PatchEmbed(nn.Module):
    """SAM's patch embedding under its names, as a product that writes tokens (T, h, w, dim) where they stay."""

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


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (T, C, h, w), as SAM's and with its names, in one pass."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class LoRAQKV(Linear):
    """A fused projection (3C, C) to q, k, v with LoRA on q and v: q = (W_Q + s·B_Q A_Q) x, v likewise.

    The base weights keep their names. `heads` above 1 says that rows go by head, (M, 3, D), as in TinyViT.
    Source: LoRA, arXiv 2106.09685, and the paper's section 3.3."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        heads: int = 1,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.heads = heads
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling = (rank if alpha is None else alpha) / rank
        self.dropout = dropout
        self.merged = False
        dim = linear.in_features
        for part in "qv":
            a = nn.Parameter(linear.weight.new_empty(rank, dim))
            nn.init.kaiming_uniform_(a, a=5**0.5)
            self.register_parameter(f"lora_{part}_a", a)
            self.register_parameter(f"lora_{part}_b", nn.Parameter(linear.weight.new_zeros(dim, rank)))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return super().forward(x)
        a, b = self._stacked()
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.weight, self.bias, a, b, scaling=self.scaling, dropout_p=dropout)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the weight, for inference: computed in fp32, rounded once."""
        self._fold(1.0)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of the weight again, to within one rounding."""
        self._fold(-1.0)

    def _fold(self, sign: float) -> None:
        if self.merged == (sign > 0):
            return
        merge_update(self.weight, *self._stacked(), sign * self.scaling)
        self.merged = sign > 0

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Both pairs as one: A (2r, C), and B (3C, 2r) with B_Q and B_V on its diagonal, zeros for k."""
        q, v = self.lora_q_b, self.lora_v_b
        rank = q.shape[1]
        b = torch.cat([F.pad(q, (0, rank)), q.new_zeros(q.shape[0], 2 * rank), F.pad(v, (rank, 0))])
        if self.heads > 1:
            b = b.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        return torch.cat([self.lora_q_a, self.lora_v_a]), b


def build_image_encoder(name: str, *, image_size: int, in_channels: int = 3) -> ImageEncoder | TinyViT:
    """The encoder called `name` in `config.ENCODERS` for square images of `image_size` px, weights random.

    Raises ValueError for an unknown name or a size that its patches do not divide."""
    if name not in ENCODERS:
        raise ValueError(f"image_encoder is {name!r}, but must be one of {', '.join(ENCODERS)}")
    size = ENCODERS[name]
    if image_size <= 0 or image_size % size.patch:
        raise ValueError(
            f"image_size is {image_size}, but must be a multiple of {name}'s patch of {size.patch}"
        )
    if size.stages:
        from aftersam.model.tiny_vit import TinyViT

        return TinyViT(size, in_channels=in_channels)
    grid = (image_size // size.patch,) * 2
    stem = ConvStem(in_channels, channels=(16, 32, 64)) if size.stem else None
    patch_embed: nn.Module
    if stem is not None:
        patch_embed = StridedPatchEmbed(stem.skip_channels[-1], size.dim)
    else:
        patch_embed = PatchEmbed(size.patch, in_channels, size.dim)
    return ImageEncoder(
        patch_embed,
        [_block(size, i, grid) for i in range(size.depth)],
        build_neck(size.dim, size.out_channels),
        grid=grid,
        patch=size.patch,
        dim=size.dim,
        stem=stem,
    )


def load_image_encoder_state(encoder: ImageEncoder | TinyViT, state: Mapping[str, Tensor]) -> None:
    """Load SAM's `image_encoder.*` tensors strictly, position tables interpolated to the encoder's grid.

    The classifier that MobileSAM's file carries is left out.

    Raises ValueError that names the first tensor that is missing, unknown or of another shape."""
    weights = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    weights = {k: v for k, v in weights.items() if PREFIX + k not in CLASSIFIER}
    expected = encoder.state_dict()
    for key, value in expected.items():
        if key not in weights:
            raise ValueError(f"the SAM weights lack {PREFIX}{key}, which this encoder needs")
        if weights[key].shape != value.shape:
            weights[key] = _interpolated(key, weights[key], value.shape)
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ValueError(f"the SAM weights hold {PREFIX}{unknown[0]}, which this encoder does not have")
    encoder.load_state_dict(weights)


def add_encoder_lora(
    encoder: ImageEncoder | TinyViT, rank: int, alpha: float | None = None, dropout: float = 0.0
) -> None:
    """Put LoRA on q and v of every attention of `encoder`, in place. `alpha` None means alpha = rank."""
    for attention in [module for module in encoder.modules() if hasattr(module, "qkv_by_head")]:
        heads = attention.num_heads if attention.qkv_by_head else 1
        attention.qkv = LoRAQKV(attention.qkv, rank, alpha, dropout, heads=heads)


def _block(size: EncoderSize, index: int, grid: tuple[int, int]) -> EncoderBlock:
    window = 0 if index in size.global_blocks else size.window
    attention = EncoderAttention(size.dim, size.num_heads, grid=grid, window=window)
    return EncoderBlock(size.dim, attention, MLP(size.dim))


def build_neck(dim: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


def _relative(table: Tensor, queries: int, keys: int) -> Tensor:
    """table (2·keys − 1, D) -> (queries, keys, D): entry [i, j] for the distance (i mod keys) − j."""
    i = torch.arange(queries, device=table.device) % keys
    j = torch.arange(keys, device=table.device)
    return table[i[:, None] - j + keys - 1]


def _interpolated(key: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A position table for another grid: linear in each direction, as SAM's get_rel_pos does."""
    if key == "pos_embed" and value.dim() == 4 and value.shape[-1] == shape[-1]:
        table = F.interpolate(
            value.permute(0, 3, 1, 2), size=shape[1:3], mode="bilinear", align_corners=False
        )
        return table.permute(0, 2, 3, 1)
    if ".rel_pos_" in key and value.dim() == 2 and value.shape[-1] == shape[-1]:
        return F.interpolate(value.T[None], size=shape[0], mode="linear", align_corners=False)[0].T
    raise ValueError(
        f"the SAM weights have {PREFIX}{key} of shape {tuple(value.shape)}, but this encoder needs {tuple(shape)}"
    )
