"""AFTer-UNet and the Medical SAM Adapter, reimplemented from our parts: both take slice groups, as ours does.

AFTer-UNet is our fusion transformer between a convolutional encoder and decoder. MSA is a SAM with adapters that
segments one organ at a time from a click drawn from its label. A 2D network segments each slice of a group alone.

Source: AFTer-UNet, arXiv 2110.10403; MSA, arXiv 2304.12620; their code was not used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aftersam.config import ENCODERS, Config, ModelConfig, TrainConfig
from aftersam.data.cache import CachedCase
from aftersam.data.slice_group import SliceGroups
from aftersam.model.aftersam import AfterSAM
from aftersam.model.build import build_aftersam
from aftersam.model.fusion import AxialFusionTransformer
from aftersam.model.image_encoder import EncoderBlock, ImageEncoder
from aftersam.model.layers import SliceFeatures
from aftersam.model.mask_decoder import MaskDecoder
from aftersam.model.sam_checkpoint import SamCheckpoint
from aftersam.training.losses import segmentation_loss
from aftersam.training.schedule import batches
from benchmarks.accuracy.rivals.patch_training import Batch, lead_background

UNET_CHANNELS = (24, 48, 96, 192)  # at strides 1, 2, 4 and 8: ours has a token every 8 pixels, too


class UNetEncoder(nn.Module):
    """images (T, 3, H, W) -> features at the coarsest stride, those of the finer ones as skips."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        from monai.networks.blocks import UnetResBlock

        self.levels = nn.ModuleList(
            UnetResBlock(2, before, after, kernel_size=3, stride=stride, norm_name="instance")
            for before, after, stride in zip((3, *channels), channels, (1, 2, 2, 2), strict=False)
        )

    def forward(self, images: Tensor) -> SliceFeatures:
        features = []
        for level in self.levels:
            images = level(images)
            features.append(images)
        return SliceFeatures(features[-1], tuple(features[:-1]))


class UNetDecoder(nn.Module):
    """Fused features (T, C, h, w) and skips -> logits (T, K+1, H, W)."""

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        from monai.networks.blocks import UnetOutBlock, UnetrUpBlock

        self.num_classes = self.num_tokens = num_classes
        fine_to_coarse = list(pairwise(channels))
        self.levels = nn.ModuleList(
            UnetrUpBlock(2, coarse, fine, 3, upsample_kernel_size=2, norm_name="instance", res_block=True)
            for fine, coarse in reversed(fine_to_coarse)
        )
        self.out = lead_background(UnetOutBlock(2, channels[0], num_classes), num_classes)

    def forward(self, x: Tensor, skips: Sequence[Tensor] = (), labels: Tensor | None = None) -> Tensor:
        for level, skip in zip(self.levels, reversed(skips), strict=True):
            x = level(x, skip.to(x.dtype))
        logits: Tensor = self.out(x)
        return logits


def build_after_unet(config: ModelConfig, num_classes: int) -> AfterSAM:
    """AFTer-UNet with the groups, heads and blocks of `config`: what `predict_volume` takes."""
    side = config.image_size // 2 ** (len(UNET_CHANNELS) - 1)
    fusion = AxialFusionTransformer(
        UNET_CHANNELS[-1],
        config.num_heads,
        config.num_blocks,
        grid=(config.num_slices, side, side),
        fusion_init="xavier",
    )
    encoder, decoder = UNetEncoder(UNET_CHANNELS), UNetDecoder(UNET_CHANNELS, num_classes)
    return AfterSAM(encoder, fusion, decoder, hu_windows=config.hu_windows)  # type: ignore[arg-type]  # parts with the same methods


class SliceNetwork(nn.Module):
    """A whole 2D network as an encoder: images (T, 3, H, W) -> its logits as the embedding, without skips."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> SliceFeatures:
        return SliceFeatures(self.network(images), ())


class NoDecoder(nn.Module):
    """The embedding itself, which is logits (T, K+1, H, W)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = self.num_tokens = num_classes

    def forward(self, x: Tensor, skips: Sequence[Tensor] = (), labels: Tensor | None = None) -> Tensor:
        return x


def slice_network(network: nn.Module, config: ModelConfig, num_classes: int) -> AfterSAM:
    """A 2D network that segments each slice alone, in the form that `predict_volume` takes."""
    encoder, decoder = SliceNetwork(lead_background(network, num_classes)), NoDecoder(num_classes)
    return AfterSAM(encoder, None, decoder, hu_windows=config.hu_windows)  # type: ignore[arg-type]  # parts with the same methods


class Adapter(nn.Module):
    """x + up(GELU(down(x))), which starts as x. Source: arXiv 1902.00751."""

    def __init__(self, dim: int, ratio: float = 0.25) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, int(dim * ratio)), nn.Linear(int(dim * ratio), dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(nn.functional.gelu(self.down(x)))
        return x + added


class AdaptedBlock(nn.Module):
    """An encoder block with an adapter after its attention and one beside its MLP, as MSA's Figure 2 has them."""

    def __init__(self, block: EncoderBlock, dim: int) -> None:
        super().__init__()
        self.block = block
        self.after_attention, self.beside_mlp = Adapter(dim), Adapter(dim)

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        x = x + self.after_attention(block.attn(block.norm1(x)))
        normed = block.norm2(x)
        adapted: Tensor = x + block.mlp(normed) + (self.beside_mlp(normed) - normed)
        return adapted


class OneOrganAtATime(nn.Module):
    """A prompted decoder of two classes, run once for each organ: its logit minus background's; background has logit 0.

    While `organ` is set, that organ alone is decoded: (T, 2, H, W)."""

    def __init__(self, decoder: MaskDecoder, num_classes: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.num_classes = self.num_tokens = num_classes
        self.organ: int | None = None

    def forward(
        self, embedding: Tensor, skips: Sequence[Tensor] = (), labels: Tensor | None = None
    ) -> Tensor:
        if labels is None:
            raise ValueError("MSA draws its prompts from labels, and there are none")
        if self.organ is not None:
            logits: Tensor = self.decoder(embedding, skips, (labels == self.organ).long())
            return logits
        leads = []
        for organ in range(1, self.num_classes):
            off, on = self.decoder(embedding, skips, (labels == organ).long()).unbind(1)
            leads.append(on - off)
        return torch.stack([torch.zeros_like(leads[0]), *leads], dim=1)


def build_msa(config: ModelConfig, num_classes: int, sam: SamCheckpoint | None = None) -> AfterSAM:
    """SAM with adapters. With official weights adapters and decoder are trained, without them everything."""
    two_d = dataclasses.replace(config, attention="none", prompts="point", encoder="full")
    model = build_aftersam(two_d, 2, sam=sam)
    if sam is not None:
        model.encoder.requires_grad_(False)
    if not isinstance(model.encoder, ImageEncoder):
        raise ValueError(
            f"MSA's adapters go into the blocks of SAM's ViT, which {config.image_encoder} has not"
        )
    dim = ENCODERS[config.image_encoder].dim
    model.encoder.blocks = nn.ModuleList(AdaptedBlock(block, dim) for block in model.encoder.blocks)  # type: ignore[arg-type]  # parts with the same methods
    model.decoder = OneOrganAtATime(model.decoder, num_classes)  # type: ignore[assignment]  # with the same methods
    return model


def groups(cached: Sequence[CachedCase], config: Config) -> Iterator[Batch]:
    """Endless batches {"hu", "labels"} (B, N, S, S) of our own slice groups."""
    dataset = SliceGroups(cached, model=config.model, data=config.data, seed=config.train.seed, label_swap={})
    order = batches(config.train.seed, len(cached), config.train.batch_size, rank=0, world=1, start=0)
    yield from DataLoader(dataset, batch_sampler=order)


def group_loss(model: nn.Module, batch: Batch, *, config: TrainConfig) -> Tensor:
    """The loss of our own rows. MSA gets one organ a step, in nine of ten steps one that is present."""
    hu, labels = batch["hu"], batch["labels"]
    decoder = model.decoder
    if isinstance(decoder, OneOrganAtATime):
        present = labels.unique().tolist()
        present = [value for value in present if value]
        if not present or torch.rand(()) < 0.1:  # absent organs must be learned, too
            present = list(range(1, decoder.num_classes))
        decoder.organ = present[int(torch.randint(len(present), ()))]
        labels = (labels == decoder.organ).long() * decoder.organ
    logits = model(hu, labels=labels)
    if isinstance(decoder, OneOrganAtATime):
        labels = (labels > 0).long()
        decoder.organ = None
    return segmentation_loss(
        logits,
        labels,
        dice=config.dice,
        ce_foreground_weight=config.ce_foreground_weight,
        ce_hardest=config.ce_hardest,
    ).total
