"""A volume's logits, one technique after the other.    python -m benchmarks.speed.waterfall

    naive 3D          each group anew; attention over all its N·P tokens, scores in memory; every slice decoded
    + SDPA            the same without scores in memory
    + factorised      across the slices, then within each: torch's own parts
    + axial_fusion    our op in its place
    + centre alone    the last block and the decoder compute the slice that is kept
    + encoded once    a slice's features are kept while a group still needs them: stream_logits, ours

Each row adds one technique to the row above it. The first two rows compute another function than the others, and are
compared with fp64 equations of their own. A random model on hu (D, S, S); forward alone."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aftersam.config import ModelConfig, preset
from aftersam.inference.inputs import Scan
from aftersam.inference.sliding import stream_logits
from aftersam.model.aftersam import AfterSAM
from aftersam.model.build import build_aftersam
from benchmarks import harness
from benchmarks.harness import Case, Provider
from benchmarks.speed import fusion, transformer
from benchmarks.speed.predict import group_by_group
from benchmarks.speed.transformer import Attention

OURS = "+ encoded once"


class Shape(NamedTuple):
    depth: int
    slices: int
    image_size: int
    encoder: Literal["small", "vit_b"]
    blocks: int


CPU_SHAPE = ("small, 128 px", Shape(8, 5, 128, "small", 2))
GPU_SHAPE = ("ViT-B, 512 px", Shape(32, 9, 512, "vit_b", 6))


def loop(
    hu: Tensor,
    model: AfterSAM,
    config: ModelConfig,
    *,
    centre_alone: bool,
    precision: torch.dtype | None = None,
) -> Tensor:
    """hu (D, S, S) -> logits (D, K+1, S, S), the whole model on the group about each slice."""
    with torch.autocast(hu.device.type, precision, enabled=precision is not None):
        return group_by_group(hu, model, config, kept_alone=centre_alone)


def stream(
    hu: Tensor, model: AfterSAM, config: ModelConfig, *, precision: torch.dtype | None = None
) -> Tensor:
    side = hu.shape[-1]
    scan = Scan(hu.float().cpu().numpy(), (0, side, 0, side))
    planes = stream_logits(model, scan, config, precision=precision or torch.float32)
    return torch.stack([plane.logits for plane in planes]).to(hu.dtype)


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    """hu is in `dtype`, so that models and reference see the same values; the models compute under autocast."""
    name, shape = GPU_SHAPE if device.type == "cuda" else CPU_SHAPE
    depth, slices, side, encoder, blocks = shape
    config = dataclasses.replace(
        preset("small").model, image_encoder=encoder, image_size=side, num_slices=slices, num_blocks=blocks,
        slice_stride=1, stem_slices=1, fusion_init="xavier",
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_aftersam(config, num_classes=7).to(device).eval()
    generator = torch.Generator().manual_seed(1)
    hu = (300 * torch.randn(depth, side, side, generator=generator)).to(device, dtype)

    def variant(attend: Attention) -> AfterSAM:
        changed = copy.copy(model)
        changed._modules = dict(model._modules)  # every part shared but the fusion
        changed.fusion = transformer.with_attention(model.fusion, attend)  # type: ignore[arg-type]  # the model has a fusion, not None
        return changed

    naive: Attention = partial(transformer.joint, attend=fusion.materialised)
    flash: Attention = partial(transformer.joint, attend=F.scaled_dot_product_attention)
    anew = partial(
        loop, config=config, centre_alone=False, precision=None if dtype == torch.float32 else dtype
    )
    exact = partial(loop, model=in_fp64(model), config=config, centre_alone=True)
    exact_joint = partial(loop, model=in_fp64(variant(naive)), config=config, centre_alone=False)
    found = {
        "naive 3D": Provider(partial(anew, model=variant(naive)), exact_joint, 0, role="other", captured=False),
        "+ SDPA": Provider(partial(anew, model=variant(flash)), exact_joint, 0, role="other", captured=False),
        "+ factorised": Provider(partial(anew, model=variant(transformer.library)), exact, 0, captured=False),
        "+ axial_fusion": Provider(partial(anew, model=model), exact, 0, captured=False),
        "+ centre alone": Provider(partial(anew, model=model, centre_alone=True), exact, 0, captured=False),
        OURS: Provider(
            partial(stream, model=model, config=config, precision=anew.keywords["precision"]),
            exact, 0, role="ours", captured=False,
        ),
    }  # fmt: skip
    facts = {"subject": "waterfall", "name": name, **shape._asdict(), "items": depth, "unit": "slices"}
    yield facts, [hu], found


def in_fp64(model: AfterSAM) -> AfterSAM:
    wide = copy.deepcopy(model).double()
    # segment_anything makes its position features in fp32, whatever the model's dtype.
    wide.decoder._positions = lambda *grid: model.decoder._positions(*grid).double()  # type: ignore[method-assign]  # for this object alone
    return wide


if __name__ == "__main__":
    sys.exit(harness.main(cases))
