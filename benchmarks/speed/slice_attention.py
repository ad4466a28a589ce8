"""Attention within each slice, by every backend that runs here.    python -m benchmarks.speed.slice_attention

    torch             scores in memory
    sdpa, flash, xformers    fused attentions of others, where they are installed and run on the device
    sdpa_...          SDPA held to its flash, cuDNN or memory-efficient kernel
    flex              FlexAttention, compiled, on a GPU; it has no gradient on a CPU
    triton, cpu       the kernels of this package, wherever they run
    slice_attention   ours: what `auto` chooses among all of them

On q, k, v (B, N, P, M, D), as the projections leave them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from axial_fusion import reference, select_backend, slice_attention
from axial_fusion.dispatch import BACKENDS
from benchmarks import harness
from benchmarks.harness import Case, Provider

OURS = "slice_attention"


class Shape(NamedTuple):
    batch: int
    slices: int
    positions: int
    heads: int
    head_dim: int


CPU_SHAPES = [("small, 128 px", Shape(1, 5, 256, 4, 32)), ("SAM, 512 px", Shape(1, 9, 1024, 8, 32))]
COMPILED_P = 4096
GPU_SHAPES = [(f"P {p}, D {d}", Shape(1, 9, p, 8, d)) for d in (32, 64) for p in (4096, 1024)]


def providers(shape: Shape, inputs: list[torch.Tensor]) -> dict[str, Provider]:
    b, n, p, m, d = shape
    flops = 4 * b * n * m * p * p * d
    exact, device = reference.slice_attention, inputs[0].device
    found = {}
    for backend in BACKENDS["slice_attention"]:
        call = partial(slice_attention, backend=backend)
        missing = ""
        try:
            select_backend("slice_attention", *inputs, backend=backend)
        except ValueError as error:
            missing = str(error)
        if backend == "flex" and device.type == "cuda" and p < COMPILED_P:
            missing = f"compiled at P {COMPILED_P} alone"
        if backend == "flex" and device.type == "cuda":
            torch.compiler.reset()
            call = torch.compile(call, dynamic=False)  # type: ignore[assignment]  # still a callable
        role: Any = "other" if backend in ("triton", "cpu") else "rival"  # other: ours by name
        found[backend] = Provider(None if missing else call, exact, flops, missing, role)
    chosen = select_backend("slice_attention", *inputs).backend
    same_as = chosen if found[chosen].role == "rival" else ""
    return {**found, OURS: Provider(slice_attention, exact, flops, role="ours", same_as=same_as)}


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    for name, shape in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        b, n, p, m, d = shape
        generator = torch.Generator(device).manual_seed(0)
        packed = torch.randn(b, n, p, 3, m, d, generator=generator, device=device)
        inputs = [t.requires_grad_() for t in packed.to(dtype).unbind(3)]
        yield {"subject": "slice", "name": name, **shape._asdict()}, inputs, providers(shape, inputs)


if __name__ == "__main__":
    sys.exit(harness.main(cases))
