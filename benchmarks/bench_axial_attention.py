"""Attention across slices, the op alone.    python -m benchmarks.bench_axial_attention

    einsum            the equation as torch.einsum writes it
    multiply-sum      products and sums that broadcast, no matrix product; compiled on a GPU
    batched matmul    (B·P·M) products of (N, D) by (D, N), with the copies that the layout costs
    SDPA              scaled_dot_product_attention on (B·P, M, N, D), with the copies that it makes itself
    varlen            FlashAttention over all positions as sequences of N, where flash-attn is installed
    axial_attention   ours

On (B, N, P, M, D), as the projections leave it. Bytes counted: q, k, v read and y written, and their gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from axial_fusion import axial_attention, reference
from benchmarks import harness
from benchmarks.harness import Case, Provider

OURS = "axial_attention"


class Shape(NamedTuple):
    batch: int
    slices: int
    positions: int
    heads: int
    head_dim: int


CPU_SHAPES = [
    ("small, 128 px", Shape(1, 5, 256, 4, 32)),
    ("SAM, 512 px", Shape(1, 9, 1024, 8, 32)),
    ("D 96", Shape(1, 9, 256, 4, 96)),
]
GPU_SHAPES = [
    (f"B {b}, D {d}", Shape(b, 9, 4096, 256 // d if d == 32 else 8, d)) for b in (1, 4, 16) for d in (32, 96)
]


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bnpmd,bkpmd->bpmnk", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bpmnk,bkpmd->bnpmd", scores.softmax(-1), v)


def multiply_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1, keepdim=True) * q.shape[
        -1
    ] ** -0.5  # (B, N, N, P, M, 1)
    return (scores.softmax(2) * v.unsqueeze(1)).sum(2)


def batched_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.permute(0, 2, 3, 1, 4) for t in (q, k, v))  # (B, P, M, N, D)
    y = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return y.permute(0, 3, 1, 2, 4).contiguous()


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, slices, positions, heads, dim = q.shape
    q, k, v = (t.permute(0, 2, 3, 1, 4).reshape(batch * positions, heads, slices, dim) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    return y.unflatten(0, (batch, positions)).permute(0, 3, 1, 2, 4).contiguous()


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    batch, slices, positions, heads, dim = q.shape
    rows = (t.transpose(1, 2).reshape(-1, heads, dim) for t in (q, k, v))  # one sequence of N a position
    starts = torch.arange(0, batch * positions * slices + 1, slices, device=q.device, dtype=torch.int32)
    y = flash_attn_varlen_func(*rows, starts, starts, slices, slices)
    return y.view(batch, positions, slices, heads, dim).transpose(1, 2).contiguous()


def providers(shape: Shape, *, gpu: bool) -> dict[str, Provider]:
    flops = 4 * shape.batch * shape.positions * shape.heads * shape.slices**2 * shape.head_dim
    found = {
        "einsum": Provider(einsum, reference.axial_attention, flops),
        "multiply-sum": Provider(multiply_sum, reference.axial_attention, flops),
        "batched matmul": Provider(batched_matmul, reference.axial_attention, flops),
        "SDPA": Provider(sdpa, reference.axial_attention, flops),
    }
    if gpu:
        torch.compiler.reset()  # else a few shapes later torch.compile goes eager in silence
        found["multiply-sum, compiled"] = Provider(
            torch.compile(multiply_sum, dynamic=False), reference.axial_attention, flops
        )
        installed = find_spec("flash_attn") is not None
        found["varlen"] = Provider(
            varlen if installed else None,
            reference.axial_attention,
            flops,
            "" if installed else "flash-attn is absent",
        )
    return {**found, OURS: Provider(axial_attention, reference.axial_attention, flops)}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    gpu = device.type == "cuda"
    for name, shape in GPU_SHAPES if gpu else CPU_SHAPES:
        generator = torch.Generator().manual_seed(0)
        b, n, p, m, d = shape
        packed = torch.randn(b, n, p, 3, m, d, generator=generator).to(device, dtype)
        inputs = [t.requires_grad_() for t in packed.unbind(3)]  # views, as a fused projection gives them
        moved = 4 * packed.numel() // 3 * packed.element_size()
        yield (
            {"subject": "axial", "name": name, "bytes": moved, **shape._asdict()},
            inputs,
            providers(shape, gpu=gpu),
        )


def main() -> int:
    """Measure and leave the JSON; 1 where ours was not right."""
    device = harness.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result = harness.run(cases(device, dtype), dtype=dtype, budget_s=3.0)
    print(harness.write(result))
    return int(any(r["provider"] == OURS and r["status"] != "ok" for r in result["records"]))


if __name__ == "__main__":
    sys.exit(main())
