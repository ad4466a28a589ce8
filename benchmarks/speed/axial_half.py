"""The half across slices: norm, projections, attention, output, residual.    python -m benchmarks.speed.axial_half

    library          torch's layer_norm, linear and SDPA, with the transposes that the layout costs
    compiled         the line above through torch.compile (on a GPU)
    axial_half       ours: axial_fusion_attention with intra=None, library products around our kernels on a GPU

On x (B, N, P, C), all weights trained. Bytes counted: x read and y written, the weights once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from axial_fusion import AttentionWeights, axial_fusion_attention
from benchmarks import harness
from benchmarks.harness import Case, Provider
from benchmarks.speed import fusion
from benchmarks.speed.fusion import Shape

OURS = "axial_half"
CPU_SHAPES = [("small, 128 px", Shape(1, 5, 16, 128, 4)), ("SAM, 512 px", Shape(1, 9, 32, 256, 8))]
GPU_SHAPES = [
    (f"C {c}, B {b}, {px} px", Shape(b, 9, px // 16, c, 8))
    for c, px in ((256, 1024), (768, 1024), (256, 512))
    for b in (1, 4)
]


def library(x: Tensor, *weights: Tensor, heads: int) -> Tensor:
    b, _, p, _ = x.shape
    across = x.transpose(1, 2).flatten(0, 1)  # (B·P, N, C)
    y = fusion.half(across, weights, heads, F.scaled_dot_product_attention)
    return y.unflatten(0, (b, p)).transpose(1, 2).contiguous()


def ours(x: Tensor, *weights: Tensor, heads: int) -> Tensor:
    inter = AttentionWeights._make([*weights, None, None])
    return axial_fusion_attention(x, inter, None, num_heads=heads)


def exact(x: Tensor, *weights: Tensor, heads: int) -> Tensor:
    return torch.stack([fusion.equations(g.transpose(0, 1), weights, heads).transpose(0, 1) for g in x])


def providers(shape: Shape, device: torch.device) -> dict[str, Provider]:
    b, n, side, c, m = shape
    tokens, gpu = b * n * side**2, device.type == "cuda"
    flops = 8 * tokens * c * c + 4 * tokens * n * c
    reference, call = partial(exact, heads=m), partial(library, heads=m)
    found = {"library": Provider(call, reference, flops)}
    if gpu:
        torch.compiler.reset()
        found["library, compiled"] = Provider(torch.compile(call, dynamic=False), reference, flops)
    return {**found, OURS: Provider(partial(ours, heads=m), reference, flops, role="ours")}


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    gpu = device.type == "cuda"
    for name, shape in (GPU_SHAPES if full else GPU_SHAPES[:2]) if gpu else CPU_SHAPES:
        inputs = fusion.inputs(shape, dtype, device)[:7]
        moved = (2 * inputs[0].numel() + sum(t.numel() for t in inputs[1:])) * dtype.itemsize
        facts = {"subject": "axial half", "name": name, **shape._asdict()}
        # Bound by bytes on a GPU alone; a CPU computes the projections for longer than it reads x.
        yield facts | ({"bytes": moved} if gpu else {}), inputs, providers(shape, device)


if __name__ == "__main__":
    sys.exit(harness.main(cases))
