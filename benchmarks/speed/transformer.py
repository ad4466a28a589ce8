"""Six fusion blocks, MLPs included.    python -m benchmarks.speed.transformer

    naive 3D          each block attends over all N·P tokens, scores in memory
    SDPA 3D           the same through scaled_dot_product_attention
    SDPA factorised   the blocks' own function, composed of torch's parts
    compiled          the line above through torch.compile (on a GPU)
    transformer       ours: AxialFusionTransformer

On features (B, N, C, h, w), every parameter trained; the 3D forms are another function with the axial half's weights.
Where the naive form's scores of all blocks do not fit, its forward alone is measured."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from aftersam.model.fusion import AxialFusionTransformer
from axial_fusion import AttentionWeights, AxialFusionAttention, reference
from benchmarks import harness, machine
from benchmarks.harness import Case, Provider
from benchmarks.speed import fusion

OURS = "transformer"


class Shape(NamedTuple):
    batch: int
    slices: int
    side: int
    channels: int
    heads: int
    blocks: int = 6


CPU_SHAPES = [("tiny, 96 px", Shape(1, 3, 12, 128, 4))]
GPU_SHAPES = [(f"SAM, {px} px", Shape(1, 9, px // 16, 256, 8)) for px in (1024, 512)]
CHECKED_SIDE = 16  # tokens a side on which the 3D forms are compared with fp64
Attention = Callable[[Tensor, AxialFusionAttention], Tensor]


class OtherAttention(nn.Module):
    """Replaces a block's attention by `attend`, with the same weights under the same names."""

    def __init__(self, known: AxialFusionAttention, attend: Attention) -> None:
        super().__init__()
        self.inter, self.intra, self.num_heads = known.inter, known.intra, known.num_heads
        self.attend = attend

    def forward(self, x: Tensor, query_index: None = None) -> Tensor:
        return self.attend(x, self)  # type: ignore[arg-type]  # modules out of a ModuleList


def _weights(attention: AxialFusionAttention) -> list[Tensor]:
    return [t for half in (attention.inter, attention.intra) for t in half.weights()[:6]]  # type: ignore[union-attr, misc]  # both halves exist, not None


def joint(x: Tensor, attention: AxialFusionAttention, attend: fusion.Attend) -> Tensor:
    return fusion.joint_attention(x, *_weights(attention), heads=attention.num_heads, attend=attend)


def library(x: Tensor, attention: AxialFusionAttention) -> Tensor:
    return fusion.sdpa_factorised(x, *_weights(attention), heads=attention.num_heads)


def equations(x: Tensor, attention: AxialFusionAttention) -> Tensor:
    return _equations(attention.num_heads, x, *_weights(attention))


def remade(x: Tensor, attention: AxialFusionAttention) -> Tensor:
    """The equations with their scores recomputed in the backward: in fp64 those of six blocks would not fit."""
    weights = _weights(attention)  # as they are now, not as a functional call leaves them behind
    return checkpoint(_equations, attention.num_heads, x, *weights, use_reentrant=False)


def _equations(heads: int, x: Tensor, *w: Tensor) -> Tensor:
    inter, intra = (AttentionWeights._make([*w[i : i + 6], None, None]) for i in (0, 6))
    return reference.axial_fusion_attention(x, inter, intra, num_heads=heads)


def joint_equations(x: Tensor, attention: AxialFusionAttention) -> Tensor:
    """Attention over all N·P tokens, written out, a gigabyte of scores at a time."""
    y = fusion.equations(x.flatten(1, 2), _weights(attention)[:6], attention.num_heads)
    return y.view_as(x)


def _part(call: Callable[..., Tensor], side: int, x: Tensor, *parameters: Tensor) -> Tensor:
    return call(x[..., :side, :side], *parameters)


def with_attention(model: AxialFusionTransformer, attend: Attention) -> AxialFusionTransformer:
    """A copy of `model` whose blocks compute their attention by `attend`."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attention = OtherAttention(block.attention, attend)  # type: ignore[arg-type]  # modules out of a ModuleList
    return model


def form(model: AxialFusionTransformer, attend: Attention | None) -> Callable[..., Tensor]:
    """A function of the features and of every parameter of `model`, its attention computed by `attend`."""
    model = model if attend is None else with_attention(model, attend)
    names = [name for name, _ in model.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    return call


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    gpu = device.type == "cuda"
    for name, shape in GPU_SHAPES if gpu else CPU_SHAPES:
        b, n, side, c, m, blocks = shape
        torch.manual_seed(0)
        model = AxialFusionTransformer(c, m, blocks, grid=(n, side, side), fusion_init="xavier")
        model = model.to(device, dtype)
        x = torch.randn(b, n, c, side, side, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        inputs = [x.requires_grad_(), *model.parameters()]
        tokens, positions = b * n * side**2, side**2
        rest = 16 * tokens * c * c  # the MLP
        whole = blocks * (rest + 8 * tokens * c * c + 4 * tokens * n * positions * c)
        ours = blocks * (rest + 16 * tokens * c * c + 4 * tokens * (n + positions) * c)
        exact, exact_joint = form(model, remade), form(model, joint_equations)
        naive = partial(joint, attend=fusion.materialised)
        scores = 2 * b * m * (n * positions) ** 2 * dtype.itemsize  # scores and probabilities of one block
        free = machine.free_bytes()
        missing = f"its scores need {scores / 2**30:.0f} GiB" if scores > free else ""
        no_step = 2 * blocks * scores > free  # every block's are kept for the backward
        flash = form(model, partial(joint, attend=F.scaled_dot_product_attention))
        # Attention over all tokens is compared on a part of the image, where fp64 takes a second and not minutes.
        exact_joint, flash_part, naive_part = (
            partial(_part, call, min(side, CHECKED_SIDE)) for call in (exact_joint, flash, form(model, naive))
        )
        composed = form(model, library)
        found = {
            "naive 3D": Provider(
                None if missing else form(model, naive),
                exact_joint,
                whole,
                missing,
                "other",
                naive_part,
                forward_only=no_step,
            ),
            "SDPA 3D": Provider(flash, exact_joint, whole, "", "other", flash_part),
            "SDPA factorised": Provider(composed, exact, ours),
        }
        if gpu and (full or side == GPU_SHAPES[0][1].side):
            torch.compiler.reset()
            found["SDPA factorised, compiled"] = Provider(torch.compile(composed, dynamic=False), exact, ours)
        found[OURS] = Provider(form(model, None), exact, ours, role="ours")
        yield {"subject": "transformer", "name": name, **shape._asdict()}, inputs, found


if __name__ == "__main__":
    sys.exit(harness.main(cases))
