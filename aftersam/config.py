"""Every choice of a run in three frozen dataclasses, and the presets: the only file that knows sizes.

A field's docstring is its `--help`, its type has the bounds of a number. Where the paper leaves a point open, the
default is our reading and the `paper` preset the literal one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

Args = TypeVar("Args")


class Range(NamedTuple):
    """Bounds of a number, as metadata of a field's type. `open` names the bound that is excluded."""

    low: float
    high: float
    open: Literal["", "low", "high"] = ""

    def has(self, value: float) -> bool:
        return self.low <= value <= self.high and value != getattr(self, self.open, None)

    def __str__(self) -> str:
        low = "above" if self.open == "low" else "at least"
        high = "below" if self.open == "high" else "at most"
        return f"must be {low} {self.low:g} and {high} {self.high:g}"


Count = Annotated[int, Range(1, 1e9)]
Small = Annotated[int, Range(1, 256)]  # sizes that a model or a group has
Index = Annotated[int, Range(0, 256)]
Seed = Annotated[int, Range(0, 2**31)]
Share = Annotated[float, Range(0, 1)]
Partial = Annotated[float, Range(0, 1, "high")]
Weight = Annotated[float, Range(0, 1e6)]
Positive = Annotated[float, Range(0, 1e6, "low")]
Millimetres = Annotated[float, Range(0, 1e3, "low")]


def checked(args: Args) -> Args:
    """The dataclass `args` itself. Raises ValueError on the first number outside the bounds of its type."""
    for name, ranges in _ranges(type(args)).items():  # type: ignore[arg-type]  # types are hashable
        value = getattr(args, name)
        if dataclasses.is_dataclass(value):
            checked(value)
        for number in _numbers(value):
            for bounds in ranges:
                if not bounds.has(number):
                    flag = f"--{name.replace('_', '-')}" if type(args).__name__.endswith("Args") else name
                    raise ValueError(f"{flag} is {number}, but {bounds}")
    return args


@functools.cache
def _ranges(cls: type) -> dict[str, list[Range]]:
    return {name: _bounds(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def _bounds(hint: Any) -> list[Range]:
    """The bounds in a type, or in the members of a union or a tuple."""
    found = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    return found + [bounds for member in get_args(hint) for bounds in _bounds(member)]


class Stage(NamedTuple):
    """One stage of TinyViT: width, blocks, heads, side of a window; without a window it is convolutional."""

    dim: int
    depth: int
    num_heads: int
    window: int


@dataclass(frozen=True)
class EncoderSize:
    """Geometry of an image encoder. `patch` is the token stride in pixels. `window` and `global_blocks`
    are SAM's. With `stem`, tokens come from a convolutional stem instead of SAM's 16×16 patch convolution, and the
    stem's strides 1, 2 and 4 feed the decoder. `stages` are those of a TinyViT; its last stage has the other sizes."""

    dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    window: int = 14
    patch: int = 16
    out_channels: int = 256
    stem: bool = False
    stages: tuple[Stage, ...] = ()


ENCODERS: dict[str, EncoderSize] = {
    "vit_b": EncoderSize(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": EncoderSize(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": EncoderSize(1280, 32, 16, (7, 15, 23, 31)),
    "vit_t": EncoderSize(320, 12, 10, (), window=7, stages=(  # MobileSAM's
        Stage(64, 2, 2, 0), Stage(128, 2, 4, 7), Stage(160, 6, 5, 14), Stage(320, 2, 10, 7),
    )),
    "small": EncoderSize(128, 4, 4, (3,), window=8, patch=8, out_channels=128, stem=True),
    "tiny": EncoderSize(128, 4, 4, (3,), window=6, patch=8, out_channels=128, stem=True),
}  # fmt: skip


class StemSize(NamedTuple):
    """Geometry of a convolutional stem: channels at strides 1, 2 and 4, and the width of the decoder's convolutions
    on them, as a multiple of a stage's channels."""

    channels: tuple[int, int, int]
    skip_width: int


STEMS = {"slim": StemSize((16, 32, 64), 1), "wide": StemSize((24, 48, 96), 2)}


class DecoderSize(NamedTuple):
    """Geometry of SAM's two-way transformer: blocks, heads, width of an MLP as a multiple of the channels."""

    depth: int
    num_heads: int
    mlp_ratio: int


DECODER = DecoderSize(2, 8, 8)
SAM_IMAGE_SIZE = 1024  # px that SAM's position tables are for


class HUWindow(NamedTuple):
    """CT range in Hounsfield units: clip to [low, high], then scale to [0, 1]."""

    low: float
    high: float


WIDE, SOFT_TISSUE, BONE = HUWindow(-1000, 1000), HUWindow(-160, 240), HUWindow(-50, 1200)


@dataclass(frozen=True)
class ModelConfig:
    image_encoder: Literal["vit_b", "vit_l", "vit_h", "vit_t", "small", "tiny"] = "vit_b"
    """SAM's ViT by its official name, MobileSAM's vit_t, or a size with a stem that learns from scratch."""
    image_size: Annotated[int, Range(1, 4096)] = 1024
    """Side in pixels of the square that the encoder sees; larger planes are tiled, smaller padded."""
    encoder: Literal["auto", "frozen", "lora", "full"] = "auto"
    """Which weights of the encoder train. auto: LoRA on q and v with a SAM checkpoint, all weights without one."""
    lora_rank: Small = 4
    """r of every LoRA pair, A (r, in) and B (out, r)."""
    lora_alpha: Positive | None = None
    """LoRA's alpha; the update is scaled by alpha / rank. None means alpha = rank, as printed."""
    lora_dropout: Partial = 0.0
    """Dropout rate on the input of the LoRA branch."""
    num_heads: Small = 8
    """M, heads of a fusion block."""
    num_blocks: Small = 6
    """L, fusion blocks."""
    attention: Literal["both", "axial", "slice", "none"] = "both"
    """Attention of a fusion block: across slices, then within a slice. none: a 2D model."""
    num_slices: Small = 9
    """Slices of a group, N = N_A + 1: the target and its neighbours; the centre is num_slices // 2."""
    slice_stride: Small = 1
    """N_f, distance in slices between neighbours of a group."""
    fusion_weights: Literal["full", "lora"] = "full"
    """lora: the paper's equations, W_Q W_K W_V frozen at their initial values, LoRA on q and v."""
    fusion_init: Literal["zero", "xavier"] = "zero"
    """zero: output projections, last MLP layers and positions start at 0, so step 0 is SAM's features."""
    position_embedding: Literal["factored", "full"] = "factored"
    """Learned table of the fusion: (position) + (slice), or one entry for each pair (the paper's)."""
    decoder: Literal["full", "lora"] = "full"
    """Mask decoder: fully trained, or its attention adapted by LoRA (the paper's Table 4)."""
    decoder_attention: Literal["two_way", "image_to_token"] = "two_way"
    """SAM's two-way transformer, or image-to-token attention alone (the paper's words)."""
    token_shares: tuple[Annotated[float, Range(0, 1, "low")], ...] = ()
    """Set by --init, not by hand: weight of each class token as a key of attention, background first; empty: all 1.
    Tokens beyond the classes are further tokens of background."""
    prompts: Literal["none", "box", "point", "points"] = "none"
    """Prompt each class from its label by a box, one click or three (the paper's Table 3); such scores are marked."""
    stem_slices: Small = 1
    """Adjacent slices that are input channels of the stem of small or tiny, the slice itself in the middle. 1: 2D."""
    stem: Literal["slim", "wide"] = "slim"
    """Channels of the stem and of the decoder's convolutions on its features."""
    output_stride: Small = 4
    """Pixels of the input a logit. 4 is SAM's own upscaling; 1 and 2 need skips from finer strides."""
    hu_windows: Annotated[tuple[tuple[float, float], ...], Range(-32768, 32767)] = (WIDE, SOFT_TISSUE, BONE)
    """Three HU windows (low, high) become the three input channels; a single one is repeated."""
    normalisation: Literal["sam", "unit"] = "sam"
    """What follows the windows: SAM's pixel mean and deviation; unit: nothing, [0, 1] as MedSAM's weights expect."""


@dataclass(frozen=True)
class DataConfig:
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres] | Literal["median", "native"] = (2.5, 1.0, 1.0)
    """Voxel size (d, h, w) the model works at. median: of the training set. native: each scan's own."""
    augmentation: tuple[Literal["elastic", "affine", "intensity", "noise", "mirror"], ...] = ("elastic",)
    """Random transforms, the same for all slices of a group. mirror swaps left and right labels, and needs both."""
    augmentation_probability: Share = 0.2
    """Probability of each transform for a group."""
    crops: Literal["random", "prediction"] = "random"
    """Training windows: shifted at random about the body, or exactly those of prediction, which --embeddings needs."""
    foreground_sampling: Share = 0.0
    """Share of groups drawn about a random slice of a random organ; the others are drawn uniformly, as in the paper."""


@dataclass(frozen=True)
class TrainConfig:
    epochs: Count = 550
    """Epochs of one random group a scan. Ignored where max_steps or max_minutes limits the run."""
    max_steps: Count | None = None
    """Stop after this many optimiser steps; schedules follow progress."""
    max_minutes: Positive | None = None
    """Stop after this many minutes of training; schedules follow progress."""
    batch_size: Count = 1
    """Groups a process computes at once."""
    accumulate: Count = 1
    """Batches whose gradients make one optimiser step: a larger batch in the memory of a small one."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """adam adds the weight decay to the gradient, as in the paper; adamw decays the weights themselves."""
    learning_rate: Positive = 1e-4
    """Highest learning rate; schedule and warmup lower it."""
    weight_decay: Weight = 1e-4
    """L2 penalty of the optimiser."""
    schedule: Literal["step", "poly"] = "step"
    """step: a tenth of the rate for the last 50 of 550 epochs. poly: (1 - progress)^0.9."""
    warmup: Partial = 0.0
    """Share of the run in which the learning rate rises linearly from 0."""
    clip_norm: Weight = 0.0
    """Largest gradient norm; 0 leaves gradients alone."""
    average: Partial = 0.0
    """Moving average of the weights, over this share of the run. It is validated and saved as best. 0: off."""
    supervision: Literal["all", "centre"] = "all"
    """Slices of a group whose logits enter the loss. Prediction keeps the centre slice only."""
    dice: Literal["present", "all"] = "present"
    """Classes in the Dice term: those present in the group, or all."""
    ce_foreground_weight: Weight = 1.0
    """Weight of every organ against background in the cross-entropy."""
    ce_hardest: Annotated[float, Range(0, 1, "low")] = 1.0
    """Top-k cross-entropy: the fraction of voxels with the highest loss that is averaged. 1 uses all voxels."""
    deep_supervision: Weight = 0.0
    """Weight of the same loss on coarse logits, before any skip. From scratch, encoder and fusion need it to learn."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device computes it natively, else fp32."""
    activation_checkpointing: bool = False
    """Recompute encoder and fusion blocks in the backward: less memory, about a third more time."""
    shard: bool = False
    """Spread weights, gradients and moments over the processes (FSDP): for vit_h where a GPU cannot hold them."""
    validations: Annotated[int, Range(0, 1e4)] = 10
    """Validations of whole scans, spread evenly over the run. 0: the weights at the end are kept as the best."""
    checkpoint_steps: Count = 200
    """Steps between writes of last.safetensors. A killed run loses at most so many."""
    seed: Seed = 0
    """Every random draw is a function of (seed, epoch, case)."""
    num_workers: Index | None = None
    """Processes that load groups; 0 loads in the training process. None: 4 for a GPU, 0 for a CPU."""
    tracker: str = "tensorboard"
    """Where curves go: tensorboard, or an installed tracker that accelerate knows, such as wandb, mlflow or clearml."""


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


_PAPER = Config(model=ModelConfig(fusion_weights="lora", position_embedding="full"))
_BEST = Config(model=ModelConfig(image_size=512, output_stride=2))
_SMALL = Config(
    model=ModelConfig(
        image_encoder="small", image_size=96, num_heads=4, num_blocks=2, num_slices=5, slice_stride=6, stem_slices=3,
        stem="wide", output_stride=1,
    ),
    data=DataConfig(
        # 96 pixels then show most of a body, a token is 32 mm, and a group spans 6 cm. Distant slices show where an
        # organ ends; adjacent slices look nearly the same, and the stem sees their outlines.
        spacing_mm=(2.5, 4.0, 4.0),
        augmentation=("elastic", "affine", "intensity", "noise"),
        foreground_sampling=0.66,
    ),
    train=TrainConfig(
        max_steps=6000, batch_size=2, optimizer="adamw", learning_rate=1e-3, schedule="poly", warmup=0.03,
        clip_norm=1.0, average=0.15, ce_hardest=0.1, deep_supervision=0.5, validations=4,
    ),
)  # fmt: skip
_TINY = Config(
    model=dataclasses.replace(
        _SMALL.model, image_encoder="tiny", num_slices=3, slice_stride=1, stem_slices=1, stem="slim"
    ),
    data=dataclasses.replace(_SMALL.data, spacing_mm="median", augmentation=()),
    # with so few steps, the weight makes small organs appear sooner
    train=dataclasses.replace(
        _SMALL.train, max_steps=1500, ce_foreground_weight=5.0, ce_hardest=1.0, validations=2
    ),
)

PRESETS: dict[str, Config] = {"paper": _PAPER, "best": _BEST, "small": _SMALL, "tiny": _TINY}


def preset(name: str) -> Config:
    """The preset called `name`. Raises ValueError that names the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}{_nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def validate(config: Config) -> Config:
    """`config` itself, or ValueError in one sentence that names the key, its value and the rule."""
    model = checked(config).model
    size = ENCODERS[model.image_encoder]
    side, patch = model.image_size, size.patch
    if side % patch:
        raise ValueError(f"image_size is {side}, but must be a multiple of the patch of {patch}")
    if size.out_channels % model.num_heads:
        raise ValueError(f"num_heads is {model.num_heads}, but must divide the {size.out_channels} channels")
    if model.stem_slices % 2 == 0 or (model.stem_slices > 1 and not size.stem):
        raise ValueError(f"stem_slices is {model.stem_slices}, but must be odd, and 1 without a stem")
    strides = [stride for stride in (1, 2, 4) if 4 * stride <= patch]  # SAM's upscaling is ×4 at least
    if model.output_stride not in strides:
        allowed, kind = ", ".join(map(str, strides)), model.image_encoder
        raise ValueError(f"output_stride is {model.output_stride}, but must be one of {allowed} for {kind}")
    if model.stem == "wide" and not size.stem and model.output_stride == 4:
        raise ValueError(f"stem is wide, but {model.image_encoder} has none at output_stride 4")
    if len(model.hu_windows) not in (1, 3) or any(low >= high for low, high in model.hu_windows):
        needed = "1 or 3 pairs (low, high) with low below high"
        raise ValueError(f"hu_windows is {model.hu_windows}, but must be {needed}")
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values, from_dict's inverse."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Any, *, where: str = "config") -> Any:
    """An instance of the dataclass `cls` from a JSON object; keys not named keep their defaults.

    Raises ValueError on an unknown key, naming the nearest one, on a missing one, and on a value of the wrong type."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds a {type(values).__name__}, but must be an object")
    hints = typing.get_type_hints(cls)
    for field_ in dataclasses.fields(cls):
        if field_.name not in values and field_.default is field_.default_factory:
            raise ValueError(f"{where} lacks {field_.name!r}")
    for key in values:
        if key not in hints:
            raise ValueError(f"{where} has no key {key!r:.60}{_nearest(key, hints)}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` wants it: nested dataclasses and tuples come from dicts and lists."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where=where)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            choices = ", ".join(map(str, args)) + _nearest(value, args)
            raise ValueError(f"{where} is {value!r:.60}, but must be one of {choices}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r:.60}, but must be an object")
        return {key: _convert(args[1], entry, f"{where}.{key:.40}") for key, entry in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (args[-1] is not Ellipsis and len(value) != len(args)):
            count = "" if args[-1] is Ellipsis else f" of {len(args)}"
            raise ValueError(f"{where} is {value!r:.60}, but must be a list{count}")
        inner = args[:1] * len(value) if args[-1] is Ellipsis else args
        pairs = enumerate(zip(inner, value, strict=True))
        return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in pairs)
    if args:  # a union: the first member that takes the value
        errors = []
        for member in args:
            try:
                return _convert(member, value, where)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(errors[0])
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**63 else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} is {value!r:.60}, but must be {_KINDS.get(hint, hint.__name__)}")
    return value


# In JSON's words.
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}


def _nearest(key: Any, names: Any) -> str:
    close = difflib.get_close_matches(str(key)[:60], [str(name) for name in names], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
