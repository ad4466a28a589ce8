"""A volume's logits: each slice encoded once, or each group anew.    python -m benchmarks.bench_predict

    re-encoding     the whole model on the group about each slice, one group at a time
    stream_logits   ours: features of a slice are kept while a group still needs them

A random model of the tiny size on hu (D, S, S); the loop in fp64 is the reference. Forward alone."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aftersam.config import ModelConfig, preset
from aftersam.data.slice_group import slice_group
from aftersam.model.aftersam import AfterSAM
from aftersam.model.build import build_aftersam
from aftersam.streaming import stream_logits
from benchmarks import harness
from benchmarks.harness import Case, Provider

OURS = "stream_logits"


class Shape(NamedTuple):
    depth: int
    slices: int
    image_size: int


SHAPES = [("tiny, 48 px", Shape(16, 5, 48))]


@torch.no_grad()
def loop(model: AfterSAM, config: ModelConfig, hu: Tensor) -> Tensor:
    """hu (D, S, S) -> logits (D, K+1, S, S)."""
    depth, centre = len(hu), config.num_slices // 2
    planes = []
    for d in range(depth):
        group = hu[slice_group(d, depth, config.num_slices, config.slice_stride)]  # (N, S, S)
        logits = model(group[None], query_index=(centre,))[0]
        planes.append(F.interpolate(logits, size=hu.shape[1:], mode="bilinear", align_corners=False))
    return torch.cat(planes)


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    """In fp32 whatever `dtype` is: precision is autocast's business in prediction, and the loop has none."""
    for name, shape in SHAPES:
        depth, slices, side = shape
        config = dataclasses.replace(
            preset("tiny").model, image_size=side, num_slices=slices, fusion_init="xavier"
        )  # fmt: skip
        torch.manual_seed(0)
        model = build_aftersam(config, num_classes=4).to(device).eval()
        wide = copy.deepcopy(model).double()
        # segment_anything makes its position features in fp32 whatever the model is in.
        wide.decoder._positions = lambda *grid, model=model: model.decoder._positions(*grid).double()  # type: ignore[method-assign]
        hu = 300 * torch.randn(depth, side, side, generator=torch.Generator().manual_seed(1)).to(device)

        def ours(
            hu: Tensor, model: AfterSAM = model, config: ModelConfig = config, side: int = side
        ) -> Tensor:
            return torch.stack(list(stream_logits(model, hu.cpu().numpy(), config, box=(0, side, 0, side))))

        def again(hu: Tensor, model: AfterSAM = model, config: ModelConfig = config) -> Tensor:
            return loop(model, config, hu)

        def exact(hu: Tensor, model: AfterSAM = wide, config: ModelConfig = config) -> Tensor:
            return loop(model, config, hu)

        found = {
            "re-encoding": Provider(again, exact, 0),
            OURS: Provider(ours, exact, 0, role="ours"),
        }
        yield (
            {"subject": "predict", "name": name, **shape._asdict(), "items": depth, "unit": "slices"},
            [hu],
            found,
        )


if __name__ == "__main__":
    sys.exit(harness.main(cases))
