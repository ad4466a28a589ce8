"""Attention across slices, the op alone.    python -m benchmarks.speed.axial_attention

    einsum            the equation as torch.einsum writes it
    multiply-sum      products and sums that broadcast, no matrix product; compiled on a GPU
    batched matmul    (B·P·M) products of (N, D) by (D, N), with the copies that the layout costs
    SDPA              scaled_dot_product_attention on (B·P, M, N, D), with the copies that it makes itself
    SDPA, flash       and efficient, cudnn, math: the same held to one backend, on a GPU
    FlexAttention     over all N·P tokens with a mask of documents of N, compiled, on a GPU
    varlen            FlashAttention over all positions as sequences of N, where flash-attn is installed
    xformers          memory_efficient_attention with a block-diagonal mask, where xformers is installed
    axial_attention   ours

On (B, N, P, M, D), as the projections leave it. Bytes counted: q, k, v read and y written, and their gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from axial_fusion import axial_attention, reference
from benchmarks import harness, machine
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
    (f"B {b}, N {n}, P {p}, D {d}", Shape(b, n, p, 8, d))
    for n, p in sorted(product((5, 8, 9, 16), (256, 1024, 4096)), key=lambda s: (s[0] != 9, -s[1]))
    for d in (32, 96, 64)
    for b in (4, 1)
]
COMPILED = Shape(4, 9, 4096, 8, 32)
GPU_QUICK = [
    (name, s) for name, s in GPU_SHAPES if s.slices == 9 and s.positions == 4096 and s.head_dim != 64
]
GPU_SMALL = ("B 1, N 9, P 1024, D 32", Shape(1, 9, 1024, 8, 32))  # so short that the host may bind


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bnpmd,bkpmd->bpmnk", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bpmnk,bkpmd->bnpmd", scores.softmax(-1), v).contiguous()  # as all others give it


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


def sdpa_by(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """SDPA held to one backend: FLASH_ATTENTION, EFFICIENT_ATTENTION, CUDNN_ATTENTION or MATH."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return sdpa(q, k, v)

    return call


def flex(shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention over all N·P tokens, position by position, with a mask of documents of N tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, tokens = shape.slices, shape.slices * shape.positions
    compiled: Any = flex_attention
    if device.type == "cuda":
        compiled = torch.compile(compiled, dynamic=False)

    @cache
    def documents() -> Any:
        return create_block_mask(
            lambda b, h, i, j: i // n == j // n, None, None, tokens, tokens, device=str(device)
        )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (t.transpose(1, 2).flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # (B, M, P·N, D)
        y: Tensor = compiled(*rows, block_mask=documents())
        return y.transpose(1, 2).unflatten(1, (-1, n)).transpose(1, 2).contiguous()

    return call


def block_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    batch, slices, positions, heads, dim = q.shape
    mask = BlockDiagonalMask.from_seqlens([slices] * (batch * positions), device=q.device)
    rows = (t.transpose(1, 2).reshape(1, -1, heads, dim) for t in (q, k, v))
    y: Tensor = memory_efficient_attention(*rows, attn_bias=mask)
    return y.view(batch, positions, slices, heads, dim).transpose(1, 2).contiguous()


def providers(shape: Shape, device: torch.device) -> dict[str, Provider]:
    flops = 4 * shape.batch * shape.positions * shape.heads * shape.slices**2 * shape.head_dim
    gpu = device.type == "cuda"

    def rival(call: Callable[..., Tensor], missing: str = "") -> Provider:
        return Provider(None if missing else call, reference.axial_attention, flops, missing)

    found = {
        "einsum": rival(einsum),
        "multiply-sum": rival(multiply_sum),
        "batched matmul": rival(batched_matmul),
        "SDPA": rival(sdpa),
    }
    no_gpu = "" if gpu else "it needs a GPU"
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH") if gpu else ():
        found[f"SDPA, {name.split('_')[0].lower()}"] = rival(sdpa_by(name))
    if gpu:
        torch.compiler.reset()  # else a few shapes later torch.compile goes eager in silence
    late = "" if shape == COMPILED else "compiled at B 4, N 9, P 4096, D 32 alone"
    found["multiply-sum, compiled"] = rival(
        torch.compile(multiply_sum, dynamic=False) if gpu else multiply_sum, no_gpu or late
    )
    found["FlexAttention"] = rival(flex(shape, device), (no_gpu and "no gradient on a CPU") or late)
    found["varlen"] = rival(varlen, machine.absent("flash_attn") or no_gpu)
    found["xformers"] = rival(block_diagonal, machine.absent("xformers") or no_gpu)
    return {**found, OURS: Provider(axial_attention, reference.axial_attention, flops, role="ours")}


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    gpu = device.type == "cuda"
    for name, shape in (GPU_SHAPES if full else [*GPU_QUICK, GPU_SMALL]) if gpu else CPU_SHAPES:
        generator = torch.Generator(device).manual_seed(0)
        b, n, p, m, d = shape
        packed = torch.randn(b, n, p, 3, m, d, generator=generator, device=device).to(dtype)
        inputs = [t.requires_grad_() for t in packed.unbind(3)]  # views, as a fused projection gives them
        one = packed.numel() // 3 * packed.element_size()
        facts = {"subject": "axial", "name": name, "bytes": 4 * one, "bytes_backward": 7 * one}
        yield facts | shape._asdict(), inputs, providers(shape, device)


if __name__ == "__main__":
    sys.exit(harness.main(cases))
