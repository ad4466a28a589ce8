"""Features of a slice to one mask per class: SAM's mask decoder without its IoU head or single-image limit.

Every class, background first, has a token. Tokens and image attend to each other; the image is upscaled ×2 a
stage; a class's logits are the dot product of its token's hypernetwork with the pixel features. Stages at strides
where the encoder has skips take them in. No prompt is needed; prompts.py adds the paper's Table 3.

Source: segment_anything/modeling/mask_decoder.py; the skips are U-Net's, arXiv 1505.04597."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aftersam.config import DECODER
from aftersam.model.layers import ConvBlock, DoubleSize, LayerNorm2d, without_autocast
from aftersam.model.prompts import LabelPrompts
from aftersam.model.segment_anything import segment_anything_modeling

# In logits: at the first step nearly all is background, as in a scan.    Source: RetinaNet's prior, arXiv 1708.02002
BACKGROUND_LEAD = 5.0


class MaskDecoder(nn.Module):
    """Embeddings (T, C, h, w) of T slices -> logits (T, K+1, h·upscale, w·upscale).

    `num_classes` is K+1, background included. `skip_channels` are the channels of the encoder's skips at strides
    1, 2, 4, ..., finest first; stages at those strides use them, those finer than `output_stride` are not needed.
    `skip_width` is the width of `SkipFusion`.
    `decoder_attention` "image_to_token" leaves tokens as they are and only lets the image attend to them.
    `prompts` "box", "point" or "points" adds prompt tokens drawn from each class's label; `forward` then needs labels.
    `token_shares` are those of `ModelConfig`; where they have more than K+1 numbers, there are as many logits, which
    `of_classes` reduces."""

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        upscale: int,
        output_stride: int = 1,
        skip_channels: tuple[int, ...] = (),
        skip_width: int = 1,
        decoder_attention: Literal["two_way", "image_to_token"] = "two_way",
        prompts: Literal["none", "box", "point", "points"] = "none",
        token_shares: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        if upscale < 4 or upscale & (upscale - 1):
            raise ValueError(f"upscale is {upscale}, but must be 4, 8, 16 or a higher power of 2")
        if decoder_attention not in ("two_way", "image_to_token"):
            raise ValueError(
                f"decoder_attention is {decoder_attention!r}, but must be two_way or image_to_token"
            )
        sam = segment_anything_modeling("transformer")
        if decoder_attention == "two_way":
            self.transformer = sam.TwoWayTransformer(
                DECODER.depth, dim, DECODER.num_heads, mlp_dim=DECODER.mlp_ratio * dim
            )
        else:
            self.transformer = ImageToTokenTransformer(DECODER.depth, dim, DECODER.num_heads)
        share_keys(self.transformer, token_shares)
        self.num_classes = num_classes
        self.num_tokens = num_tokens = max(num_classes, len(token_shares))
        self.pe_layer = segment_anything_modeling("prompt_encoder").PositionEmbeddingRandom(dim // 2)
        self.no_mask_embed = nn.Embedding(1, dim)
        self.class_tokens = nn.Embedding(num_tokens, dim)
        self.prompts = None if prompts == "none" else LabelPrompts(prompts, dim)
        stages = int(math.log2(upscale))
        channels = [dim // 4] + [dim // 8] * (stages - 1)
        self.output_upscaling = nn.Sequential(  # SAM's two stages, by SAM's names
            DoubleSize(dim, channels[0]),
            LayerNorm2d(channels[0]),
            nn.GELU(),
            DoubleSize(channels[0], channels[1]),
            nn.GELU(),
        )
        self.added_stages = nn.ModuleList(
            nn.Sequential(DoubleSize(before, after), nn.ReLU(inplace=True))
            for before, after in pairwise(channels[1:])
        )
        self.skip_levels = _skip_levels(stages, output_stride, len(skip_channels))
        self.fusions = nn.ModuleDict(
            {
                str(stage): SkipFusion(channels[stage], skip_channels[level], skip_width)
                for stage, level in enumerate(self.skip_levels)
                if level is not None
            }
        )
        self.output_hypernetworks_mlps = _hypernetworks(num_tokens, dim, channels[-1])
        self.class_bias = nn.Parameter(torch.zeros(num_tokens))
        nn.init.constant_(self.class_bias[:1], BACKGROUND_LEAD)

    def forward(
        self,
        embedding: Tensor,
        skips: Sequence[Tensor] = (),
        labels: Tensor | None = None,
        *,
        coarse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """embedding (T, C, h, w), skips finest first -> logits (T, K+1, H, W).

        `coarse` also returns logits (T, K+1, h, w) at the tokens' stride, before any skip, for deep supervision:
        each class token times the image features.    Source: arXiv 1409.5185; token times pixel is MaskFormer's,
        arXiv 2107.06278. A prompted decoder draws its prompts from labels (T, S, S) of the same slices; other
        decoders ignore them.
        Raises ValueError where a prompted decoder gets none."""
        slices, _, height, width = embedding.shape
        tokens = self.class_tokens.weight.expand(slices, -1, -1)  # (T, K+1, C), or more: of background
        if self.prompts is not None:
            if labels is None:
                raise ValueError(
                    f"the model was trained with prompts={self.prompts.kind}: it needs labels to draw them"
                )
            prompts = self.prompts(labels, self.num_classes)  # (T, K, n, C)
            prompts = prompts + self.class_tokens.weight[1 : self.num_classes, None]  # whose prompt it is
            tokens = torch.cat([tokens, prompts.flatten(1, 2)], dim=1)
        x = embedding + self.no_mask_embed.weight[0, :, None, None]
        tokens, x = self.transformer(x, self._positions(height, width), tokens)
        x = x.transpose(1, 2).unflatten(2, (height, width))  # (T, C, h, w)
        pixels = self._upscale(x, skips)  # (T, c, H, W)
        weights = self._pixel_weights(tokens[:, : self.num_tokens])  # (T, K+1, c)
        logits = weights @ pixels.flatten(2) + self.class_bias[:, None]
        logits = logits.unflatten(2, pixels.shape[2:])
        if not coarse:
            return logits
        scores = tokens[:, : len(self.class_bias)] @ x.flatten(2) / math.sqrt(x.shape[1])
        return logits, (scores + self.class_bias[:, None]).unflatten(2, (height, width))

    def freeze_for_lora(self) -> None:
        """Freeze all but the class tokens, hypernetworks, biases and added layers: the rest is adapted by LoRA."""
        self.requires_grad_(False)
        for part in (self.class_tokens, self.output_hypernetworks_mlps, self.added_stages, self.fusions):
            part.requires_grad_(True)
        self.class_bias.requires_grad_(True)

    def _pixel_weights(self, tokens: Tensor) -> Tensor:
        """Class tokens (T, K+1, C), each through its hypernetwork: (T, K+1, c), one product a layer for all classes."""
        x = tokens.transpose(0, 1)
        layers = list(zip(*(mlp.layers for mlp in self.output_hypernetworks_mlps), strict=True))
        for i, layer in enumerate(layers):
            weight = torch.stack([one.weight for one in layer])  # (K+1, out, in)
            bias = torch.stack([one.bias for one in layer])
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
            x = F.relu(x) if i + 1 < len(layers) else x
        return x.transpose(0, 1)

    def _positions(self, height: int, width: int) -> Tensor:
        """(1, C, h, w): SAM's random Fourier features, in fp32, since bf16 turns their phases by whole radians."""
        with without_autocast(self.class_bias.device):
            return self.pe_layer((height, width))[None]

    def _upscale(self, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        stages = [self.output_upscaling[:3], self.output_upscaling[3:], *self.added_stages]
        for i, (stage, level) in enumerate(zip(stages, self.skip_levels, strict=True)):
            x = stage(x)
            if level is not None:
                x = self.fusions[str(i)](x, skips[level])
        return x


class SkipFusion(nn.Module):
    """x + block(cat(x, skip)): adds the skip's detail to the output of SAM's stage.

    The block is one convolution. With a `width` above 1 it is two, of that multiple of the channels, and a 1×1
    convolution back."""

    def __init__(self, channels: int, skip_channels: int, width: int = 1) -> None:
        super().__init__()
        inner = width * channels
        self.block: nn.Sequential = ConvBlock(channels + skip_channels, inner)
        if width > 1:
            self.block = nn.Sequential(self.block, ConvBlock(inner, inner), nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + self.block(torch.cat([x, skip.to(x.dtype)], dim=1))


class ImageToTokenTransformer(nn.Module):
    """SAM's two-way transformer with image-to-token attention alone, as the paper says, by SAM's names."""

    def __init__(self, depth: int, dim: int, num_heads: int) -> None:
        super().__init__()
        attention = segment_anything_modeling("transformer").Attention
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "cross_attn_image_to_token": attention(dim, num_heads, downsample_rate=2),
                    "norm4": nn.LayerNorm(dim),
                }
            )
            for _ in range(depth)
        )

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """image (T, C, h, w), image_pe (1, C, h, w), tokens (T, K+1, C) -> tokens, image as (T, P, C)."""
        x = image.flatten(2).transpose(1, 2)
        positions = image_pe.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer["norm4"](x + layer["cross_attn_image_to_token"](q=x + positions, k=tokens, v=tokens))
        return tokens, x


def of_classes(logits: Tensor, num_classes: int) -> Tensor:
    """Logits (..., tokens, H, W) -> (..., K+1, H, W): background's is the largest of its tokens'.

    Apply it after interpolation: a maximum and an interpolation do not commute."""
    if logits.shape[-3] == num_classes:
        return logits
    background, organs, further = logits.tensor_split((1, num_classes), dim=-3)
    return torch.cat([torch.cat([background, further], dim=-3).amax(-3, keepdim=True), organs], dim=-3)


def share_keys(transformer: nn.Module, shares: Sequence[float]) -> None:
    """Let token i count `shares[i]` times in every attention of `transformer` to the tokens, in place.

    The attention weight of token i is shares[i] · exp(score_i), normalised; tokens beyond `shares` count once."""
    for name, attention in transformer.named_modules():
        if shares and name.endswith(("self_attn", "cross_attn_image_to_token")):
            # a device of its own: a model without memory, which is filled later, keeps these values
            attention.register_buffer("key_bias", torch.tensor(shares, device="cpu").log(), persistent=False)
            attention.forward = MethodType(_attend, attention)


def _attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SAM's Attention.forward with `key_bias` added to the scores."""
    projected = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
    q, k, v = (self._separate_heads(x, self.num_heads) for x in projected)  # (T, heads, tokens, c)
    bias = F.pad(self.key_bias, (0, k.shape[2] - len(self.key_bias)))
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[3]) + bias, dim=-1)
    out: Tensor = self.out_proj(self._recombine_heads(weights @ v))
    return out


def _hypernetworks(count: int, dim: int, channels: int) -> nn.ModuleList:
    """SAM's MLPs from a class token to the weights of its dot product with the pixels' `channels`; they start small."""
    mlp = segment_anything_modeling("mask_decoder").MLP
    made = nn.ModuleList(mlp(dim, dim, channels, 3) for _ in range(count))
    for hypernetwork in made:
        nn.init.trunc_normal_(hypernetwork.layers[-1].weight, std=0.02)
        nn.init.zeros_(hypernetwork.layers[-1].bias)
    return made


def _skip_levels(stages: int, output_stride: int, levels: int) -> list[int | None]:
    """For each stage, coarse to fine, the index of the skip (stride 2^index) at its stride, or None."""
    strides = [output_stride << (stages - 1 - i) for i in range(stages)]
    return [level if (level := stride.bit_length() - 1) < levels else None for stride in strides]
