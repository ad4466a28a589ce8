"""A volume's logits: each slice encoded once, or each group anew.    python -m benchmarks.speed.predict

    re-encoding     the whole model on the group about each slice, one group at a time
    stream_logits   ours: features of a slice are kept while a group still needs them

A random model on hu (D, S, S), forward alone. The reference is the loop in fp64 on the first slices; it encodes each
slice once, which is equal since the encoder is 2D, because a ViT-B would take minutes. `flop_ratio` is the loop's
FLOPs over ours."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aftersam.config import ModelConfig, preset
from aftersam.inference.graphs import capture_steps
from aftersam.inference.inputs import Scan
from aftersam.inference.reference import naive_logits
from aftersam.inference.sliding import stream_logits
from aftersam.model.aftersam import AfterSAM
from aftersam.model.build import build_aftersam
from benchmarks import harness
from benchmarks.harness import Case, Provider

OURS, LOOP = "stream_logits", "re-encoding"
CLASSES = 4


class Shape(NamedTuple):
    encoder: str
    depth: int
    slices: int
    image_size: int


SHAPES = [("tiny, 48 px", Shape("tiny", 16, 5, 48))]
LARGE_CPU = [("ViT-B, 256 px", Shape("vit_b", 24, 9, 256))]
GPU_SHAPES = [
    (f"ViT-B, {px} px, {depth} slices", Shape("vit_b", depth, 9, px))
    for depth in (200, 24)
    for px in (1024, 512)
]
CHECKED = 12  # slices that are compared with fp64, in which ViT-B on a whole scan would take minutes
LOOPED = 24  # slices of the longest scan that the re-encoding loop is timed on


def configuration(shape: Shape) -> ModelConfig:
    base = preset("tiny").model if shape.encoder == "tiny" else ModelConfig()
    return dataclasses.replace(
        base, image_size=shape.image_size, num_slices=shape.slices, fusion_init="xavier"
    )


@lru_cache(maxsize=1)
def models(shape: Shape, device: torch.device) -> tuple[AfterSAM, AfterSAM]:
    """The model, and a copy in fp64."""
    torch.manual_seed(0)
    model = build_aftersam(configuration(shape), CLASSES).to(device).eval().requires_grad_(False)
    wide = copy.deepcopy(model).double()
    # segment_anything makes its position features in fp32, whatever the model's dtype.
    wide.decoder._positions = lambda *grid: model.decoder._positions(*grid).double()  # type: ignore[method-assign]  # for this object alone
    return model, wide


@lru_cache(maxsize=1)
def replayed(shape: Shape, device: torch.device) -> AfterSAM:
    """The model as `aftersam.load` gives it: its steps replay CUDA graphs on a GPU."""
    model = copy.copy(models(shape, device)[0])  # the same weights; the loop's steps stay as they are
    capture_steps(model)
    return model


def stream(hu: Tensor, shape: Shape, host: np.ndarray | None = None) -> Tensor:
    """hu (D, S, S) -> logits (D, K+1, S, S); `host` is the same scan in the host's memory, as in prediction."""
    scan = Scan(hu.float().cpu().numpy() if host is None else host, (0, hu.shape[1], 0, hu.shape[2]))
    planes = stream_logits(replayed(shape, hu.device), scan, configuration(shape), precision=hu.dtype)
    return torch.stack([plane.logits for plane in planes])


@torch.no_grad()
def group_by_group(
    hu: Tensor, model: AfterSAM, config: ModelConfig, *, encode_once: bool = False, kept_alone: bool = False
) -> Tensor:
    """hu (D, S, S) -> logits (D, K+1, S, S) by `naive_logits`, in single precision or more outside autocast."""
    hu = hu.to(torch.promote_types(hu.dtype, torch.float32))
    logits, _ = naive_logits(model, hu, config, encode_once=encode_once, kept_alone=kept_alone)
    return F.interpolate(logits, size=hu.shape[1:], mode="bilinear", align_corners=False)


def loop(hu: Tensor, shape: Shape) -> Tensor:
    """The re-encoding loop: hu (D, S, S) -> logits (D, K+1, S, S), every slice encoded again in each group."""
    model, _ = models(shape, hu.device)
    with torch.autocast(hu.device.type, dtype=hu.dtype, enabled=hu.dtype != torch.float32):
        return group_by_group(hu, model, configuration(shape), kept_alone=True)


def exact(hu: Tensor, shape: Shape) -> Tensor:
    """The same in fp64, of features that are computed for each slice alone."""
    _, wide = models(shape, hu.device)
    return group_by_group(hu, wide, configuration(shape), encode_once=True, kept_alone=True)


def _first(run: Callable[[Tensor, Shape], Tensor], hu: Tensor, shape: Shape) -> Tensor:
    return run(hu[:CHECKED], shape)


@cache
def flops(shape: Shape) -> tuple[int, int]:
    """FLOPs of ours and of the loop: torch counts one slice and one group on the meta device."""
    with torch.device("meta"):
        model = build_aftersam(configuration(shape), CLASSES).eval().requires_grad_(False)
        hu = torch.empty(1, shape.image_size, shape.image_size)

    def count(call: Callable[[], object]) -> int:
        # torch's counter knows no formula for fused attention everywhere; the math backend's products it does
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    features = model.encode(hu)
    group = torch.stack([features.embedding] * shape.slices, dim=1)
    encode = count(lambda: model.encode(hu))
    rest = count(lambda: model.fuse(group, query_index=(shape.slices // 2,)))
    rest += count(lambda: model.decode(features.embedding, features.skips))
    return shape.depth * (encode + rest), shape.depth * (shape.slices * encode + rest)


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    gpu = device.type == "cuda"
    for name, shape in GPU_SHAPES if gpu else SHAPES + (LARGE_CPU if full else []):
        ours, again = flops(shape)
        generator = torch.Generator(device).manual_seed(1)
        side = shape.image_size
        hu = 300 * torch.randn(shape.depth, side, side, generator=generator, device=device)
        missing = f"timed on {LOOPED} slices" if gpu and shape.depth > LOOPED else ""

        hu = hu.to(dtype)
        host = hu.float().cpu().numpy()
        reference = partial(_first, exact, shape=shape)
        facts = {
            "subject": "predict",
            "name": name,
            **shape._asdict(),
            "items": shape.depth,
            "unit": "slices",
        }
        yield (
            facts | {"flop_ratio": round(again / ours, 2)},
            [hu],
            {
                LOOP: Provider(
                    None if missing else partial(loop, shape=shape),
                    reference,
                    again,
                    missing,
                    checked=partial(_first, loop, shape=shape),
                    captured=False,
                ),
                OURS: Provider(
                    partial(stream, shape=shape, host=host),
                    reference,
                    ours,
                    role="ours",
                    checked=partial(_first, stream, shape=shape),
                    captured=False,
                ),
            },
        )


if __name__ == "__main__":
    sys.exit(harness.main(cases))
