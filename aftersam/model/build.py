"""Configuration to AfterSAM: builds the parts, loads weights, freezes, adds LoRA. The one reader of every key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aftersam.config import ENCODERS, STEMS, Config, EncoderSize, ModelConfig, StemSize
from aftersam.errors import counted, naming
from aftersam.files import read_tensors, tensor_headers
from aftersam.model.aftersam import AfterSAM
from aftersam.model.fusion import AxialFusionTransformer
from aftersam.model.image_encoder import (
    EncoderAttention,
    EncoderBlock,
    ImageEncoder,
    PatchEmbed,
    StridedPatchEmbed,
)
from aftersam.model.layers import MLP, ConvStem, build_neck
from aftersam.model.lora import LoRAOptions, add_lora
from aftersam.model.mask_decoder import MaskDecoder
from aftersam.model.sam_checkpoint import (
    SamCheckpoint,
    account,
    load_image_encoder_state,
    load_mask_decoder_state,
)
from aftersam.model.tiny_vit import TinyViT

TRAINING_STATE = ("optimizer/", "rng/")  # prefixes of what last.safetensors holds besides weights
FLOATS = ("F16", "BF16", "F32", "F64")  # types of weights, as safetensors names them


def resolve_encoder(config: Config, *, pretrained: bool) -> Config:
    """`config` with encoder "auto" replaced: by "lora" with SAM weights, by "full" without.

    Raises ValueError where random encoder weights would stay frozen."""
    encoder = config.model.encoder
    if encoder == "auto":
        encoder = "lora" if pretrained else "full"
    if encoder != "full" and not pretrained:
        raise ValueError(
            f"encoder is {encoder!r}, which freezes the encoder's random weights; "
            "give --sam-checkpoint or --init, or use --encoder full"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))


def build_aftersam(
    config: ModelConfig,
    num_classes: int,
    *,
    sam: SamCheckpoint | None = None,
    say: Callable[[str], object] = print,
) -> AfterSAM:
    """The model that `config` describes, for `num_classes` classes, background included.

    `sam` gives SAM's weights to the encoder and the decoder; without it they are random (to be trained, or loaded
    from a run). `say` is called with one line on which of SAM's tensors were used, interpolated and left out.
    encoder "auto" means "lora" with `sam` and "full" without."""
    lora = LoRAOptions(config.lora_rank, config.lora_alpha, config.lora_dropout)
    sizes = STEMS[config.stem]
    encoder = build_image_encoder(
        config.image_encoder,
        image_size=config.image_size,
        in_channels=3 * config.stem_slices,
        stem_size=sizes,
    )
    stem = None
    if config.output_stride < 4 and not encoder.skip_channels:
        stem = ConvStem(3, channels=sizes.channels)  # beside SAM's one patch convolution
    fusion = None if config.attention == "none" else _fusion(config, config.attention, lora)
    skip_channels = encoder.skip_channels if stem is None else stem.skip_channels
    decoder = _decoder(config, num_classes, skip_channels)
    if sam is not None:
        interpolated = load_image_encoder_state(encoder, sam.state)
        say(account(sam, interpolated, load_mask_decoder_state(decoder, sam.state), config.image_size))
    mode = config.encoder if config.encoder != "auto" else ("lora" if sam is not None else "full")
    if mode != "full":
        encoder.requires_grad_(False)
    if mode == "lora":
        add_lora(encoder, lora)
    if config.decoder == "lora":
        decoder.freeze_for_lora()
        add_lora(decoder.transformer, lora)
    return AfterSAM(
        encoder,
        fusion,
        decoder,
        hu_windows=config.hu_windows,
        normalisation=config.normalisation,
        stem=stem,
        stem_slices=config.stem_slices,
    )


def _fusion(
    config: ModelConfig, attention: Literal["both", "axial", "slice"], lora: LoRAOptions
) -> AxialFusionTransformer:
    size = ENCODERS[config.image_encoder]
    side = config.image_size // size.patch
    adapted = config.fusion_weights == "lora"
    fusion = AxialFusionTransformer(
        size.out_channels,
        config.num_heads,
        config.num_blocks,
        grid=(config.num_slices, side, side),
        attention=attention,
        position_embedding=config.position_embedding,
        fusion_init=config.fusion_init,
        lora=lora if adapted else None,
    )
    if adapted:
        fusion.freeze_projections()
    return fusion


def _decoder(config: ModelConfig, num_classes: int, skip_channels: tuple[int, ...]) -> MaskDecoder:
    size, shares = ENCODERS[config.image_encoder], config.token_shares
    if shares and len(shares) < num_classes:
        raise ValueError(
            f"token_shares has {counted(len(shares), 'number')}, but needs at least {num_classes}, one for each class"
        )
    return MaskDecoder(
        num_classes,
        size.out_channels,
        upscale=size.patch // config.output_stride,
        output_stride=config.output_stride,
        skip_channels=skip_channels,
        skip_width=STEMS[config.stem].skip_width,
        decoder_attention=config.decoder_attention,
        prompts=config.prompts,
        token_shares=shares,
    )


def build_image_encoder(
    name: str, *, image_size: int, in_channels: int = 3, stem_size: StemSize = STEMS["slim"]
) -> ImageEncoder | TinyViT:
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
        return TinyViT(size, in_channels=in_channels)
    grid = (image_size // size.patch,) * 2
    stem = ConvStem(in_channels, channels=stem_size.channels) if size.stem else None
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


def _block(size: EncoderSize, index: int, grid: tuple[int, int]) -> EncoderBlock:
    window = 0 if index in size.global_blocks else size.window
    attention = EncoderAttention(size.dim, size.num_heads, grid=grid, window=window)
    return EncoderBlock(size.dim, attention, MLP(size.dim))


def check_weights(path: Path, config: ModelConfig, num_classes: int) -> None:
    """Raise ValueError unless the file `path` holds the weights of the model that `config` describes.

    The file's header is compared with a model on the meta device, so that nothing is allocated, whatever sizes they
    name."""
    with naming(path.with_name("config.json"), "cannot be used"), torch.device("meta"):
        model = build_aftersam(config, num_classes)
    headers = tensor_headers(path)
    _check_shapes(path, model, {name: header.shape for name, header in headers.items()})
    for name, expected in model.state_dict().items():
        if headers[name].dtype not in (FLOATS if expected.is_floating_point() else ("I64",)):
            raise ValueError(
                f"{path} has {name} as {headers[name].dtype}, but weights are float16, bfloat16, float32 or float64"
            )


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights in `path` strictly into `model` and return the stored facts.

    Raises ValueError on a truncated or foreign file, or on weights of another architecture."""
    tensors, facts = read_tensors(path)
    load_tensors(path, model, tensors)
    return facts


def load_tensors(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the weights among `tensors`, read from `path`, into `model`.

    Raises ValueError where the names or shapes differ, and as `check_finite` does."""
    _check_shapes(path, model, {name: tuple(value.shape) for name, value in tensors.items()})
    weights = {k: v for k, v in tensors.items() if not k.startswith(TRAINING_STATE)}
    check_finite(path, weights)
    model.load_state_dict(weights)


def check_finite(path: Path, weights: dict[str, Tensor]) -> None:
    """Raise ValueError where the weights, read from `path`, have a NaN or an infinity: no mask could come of them."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{path} has NaN or infinity in {name}; use other weights of the run, or train it again"
            )


def _check_shapes(path: Path, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    weights = {k: shape for k, shape in shapes.items() if not k.startswith(TRAINING_STATE)}
    expected = model.state_dict()
    wrong = [k for k in expected if k not in weights or weights[k] != expected[k].shape]
    wrong += [k for k in weights if k not in expected]
    if wrong:
        raise ValueError(
            f"{path} holds another architecture than the configuration: {len(wrong)} of "
            f"{counted(len(expected), 'tensor')} differ, first {wrong[0]!r:.200}"
        )
