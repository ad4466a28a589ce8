"""Configuration to AfterSAM: builds the parts, loads SAM's weights, freezes, adds LoRA. Knows every key, no tensor."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import nn

from aftersam.checkpoint import whole_state
from aftersam.config import ENCODERS, Config, ModelConfig
from aftersam.model.aftersam import AfterSAM
from aftersam.model.axial_fusion import AxialFusionBlock, AxialFusionTransformer
from aftersam.model.image_encoder import (
    ConvStem,
    EncoderBlock,
    add_encoder_lora,
    build_image_encoder,
    load_image_encoder_state,
)
from aftersam.model.mask_decoder import MaskDecoder, add_decoder_lora, load_mask_decoder_state
from aftersam.model.sam import SamCheckpoint
from aftersam.model.tiny_vit import TinyViTBlock


def resolve_encoder(config: Config, *, pretrained: bool) -> Config:
    """`config` with encoder "auto" decided: lora with SAM weights, full without.

    Raises ValueError for an encoder that would stay at frozen random weights."""
    encoder = config.model.encoder
    if encoder == "auto":
        encoder = "lora" if pretrained else "full"
    if encoder != "full" and not pretrained:
        raise ValueError(
            f"encoder is {encoder!r}, which freezes the encoder's random weights; "
            "give --sam-checkpoint, or use --encoder full"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))


def build_aftersam(config: ModelConfig, num_classes: int, *, sam: SamCheckpoint | None = None) -> AfterSAM:
    """The model that `config` describes, for `num_classes` classes, background included.

    `sam` gives official weights to the encoder and the decoder; without it they are random (to be trained, or
    loaded from a run). encoder "auto" means "lora" with `sam` and "full" without."""
    size = ENCODERS[config.image_encoder]
    alpha, dropout = config.lora_alpha, config.lora_dropout
    encoder = build_image_encoder(
        config.image_encoder, image_size=config.image_size, in_channels=3 * config.stem_slices
    )
    stem = None
    if config.output_stride < 4 and not encoder.skip_channels:
        stem = ConvStem(3, channels=(16, 32, 64))  # strides 1, 2, 4 beside SAM's one patch convolution
    fusion = None
    if config.attention != "none":
        fusion = AxialFusionTransformer(
            size.out_channels,
            config.num_heads,
            config.num_blocks,
            grid=(config.image_size // size.patch,) * 2,
            num_slices=config.num_slices,
            attention=config.attention,
            position_embedding=config.position_embedding,
            fusion_init=config.fusion_init,
            rank=config.lora_rank if config.fusion_weights == "lora" else 0,
            alpha=alpha,
            dropout=dropout,
        )
        if config.fusion_weights == "lora":
            fusion.freeze_projections()
    decoder = MaskDecoder(
        num_classes,
        size.out_channels,
        upscale=size.patch // config.output_stride,
        output_stride=config.output_stride,
        skip_channels=encoder.skip_channels if stem is None else stem.skip_channels,
        decoder_attention=config.decoder_attention,
        prompts=config.prompts,
    )
    if sam is not None:
        load_image_encoder_state(encoder, sam.state)
        load_mask_decoder_state(decoder, sam.state)
    mode = config.encoder if config.encoder != "auto" else ("lora" if sam is not None else "full")
    if mode != "full":
        encoder.requires_grad_(False)
    if mode == "lora":
        add_encoder_lora(encoder, config.lora_rank, alpha, dropout)
    if config.decoder == "lora":
        add_decoder_lora(decoder, config.lora_rank, alpha, dropout)
    return AfterSAM(
        encoder, fusion, decoder, hu_windows=config.hu_windows, normalisation=config.normalisation, stem=stem,
        stem_slices=config.stem_slices,
    )  # fmt: skip


def shard(model: AfterSAM, device: torch.device) -> None:
    """Spread weights, gradients and moments over the processes, block by block (FSDP2), in place.

    Blocks are the units since what is inside them is read by their own forward alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # slow to import

    if not torch.distributed.is_initialized():
        raise ValueError("shard is for several processes; start them with torchrun")
    # the losses do nothing in place to the logits, which are a view
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    model.to(device)
    for block in [
        m for m in model.modules() if isinstance(m, (EncoderBlock, TinyViTBlock, AxialFusionBlock))
    ]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_copy(model: AfterSAM, config: ModelConfig, num_classes: int) -> AfterSAM:
    """A copy of a sharded model with all its weights, on the CPU; every process must ask."""
    state = whole_state(model)
    with torch.device("meta"):
        copy = build_aftersam(config, num_classes)
    copy.load_state_dict(state, assign=True)
    return copy


def merge_lora(model: nn.Module) -> None:
    """Fold every LoRA update of `model` into its weight, in place, for inference."""
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()


def compile_steps(model: AfterSAM, *, backend: str = "inductor") -> None:
    """Compile what prediction calls of `model`, in place: the encoder, the fusion and the decoder, each whole.

    A batch size is compiled for once as it is, and once more for all others."""
    for part in (model.encoder, model.fusion, model.decoder):
        if part is not None:
            part.compile(fullgraph=True, backend=backend)
