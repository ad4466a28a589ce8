"""SAM's attention with relative positions over one grid (H', W').    python -m benchmarks.speed.rel_pos

    segment-anything    scores, bias and probabilities in memory, as its Attention computes them
    SDPA, bias          scaled_dot_product_attention with the bias (B, M, P, P) as its mask
    one-hot             SDPA on Q' = [q, rel_h, rel_w] and K' = [k, one-hot row, one-hot column]: the bias as a product
    FlexAttention       rel_h and rel_w captured by the score function; on a GPU, compiled
    vLLM                its fused kernel for DeepEncoder, forward at D 64 alone, where vllm is installed
    rel_pos_attention   ours
    ..., compiled       through torch.compile, on a GPU

q, k and v are given, and so are rel_h and rel_w: the products that make them are the same for all. window.py has the
windowed attention of the same shapes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from axial_fusion import reference, rel_pos_attention
from benchmarks import harness, machine
from benchmarks.harness import Case, Provider

OURS = "rel_pos_attention"


class Shape(NamedTuple):
    batch: int
    side: int
    heads: int
    head_dim: int
    window: int = 0


CPU_SHAPES = [("ViT-B, 256 px", Shape(4, 16, 12, 64)), ("ViT-B, 512 px", Shape(1, 32, 12, 64))]
GPU_SHAPES = [
    ("ViT-B, 1024 px", Shape(4, 64, 12, 64)),
    ("ViT-B, 512 px", Shape(8, 32, 12, 64)),
    ("ViT-H, 1024 px", Shape(4, 64, 16, 80)),
]
GPU_SHAPES_FULL = [
    *GPU_SHAPES,
    ("ViT-B, 256 px", Shape(32, 16, 12, 64)),
    ("ViT-H, 512 px", Shape(8, 32, 16, 80)),
]


def _bias(rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """rel_h (B, M, H', P) and rel_w (B, M, P, W') -> (B, M, P, H'·W')."""
    return (rel_h.transpose(-1, -2).unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(-2)


def materialised(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, M, P, D)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + _bias(rel_h, rel_w)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def sdpa_bias(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_bias(rel_h, rel_w)).transpose(1, 2)


def one_hot(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    side = rel_w.shape[-1]
    axis = torch.eye(side, dtype=q.dtype, device=q.device)
    places = torch.cat([axis.repeat_interleave(side, 0), axis.repeat(side, 1)], 1)  # (P, H' + W')
    query = torch.cat([q * q.shape[-1] ** -0.5, rel_h.transpose(-1, -2), rel_w], -1)
    key = torch.cat([k, places.expand(*k.shape[:2], *places.shape)], -1)
    value = F.pad(v, (0, query.shape[-1] - v.shape[-1]))  # fused kernels want one head size
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., : v.shape[-1]].transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """FlexAttention; fused inside torch.compile alone."""
    from torch.nn.attention.flex_attention import flex_attention

    width = rel_w.shape[-1]

    def biased(score: Tensor, b: Tensor, m: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rel_h[b, m, key // width, query] + rel_w[b, m, query, key % width]

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y: Any = flex_attention(q, k, v, score_mod=biased)
    return y.transpose(1, 2)


def vllm(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    from vllm.model_executor.models.deepencoder import deepencoder_rel_pos_attention as attend

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y: Tensor = attend(q, k, v, rel_h.transpose(-1, -2), rel_w, rel_w.shape[-1], q.shape[-1] ** -0.5)
    return y.transpose(1, 2)


def _without_vllm(q: Tensor) -> str:
    """Why vLLM's kernel cannot take q (B, P, M, D), empty where it can."""
    if q.device.type != "cuda" or q.dtype == torch.float32 or q.shape[-1] != 64:
        return "half precision at head dim 64 on a GPU alone"
    return machine.absent("vllm")


ATTEND = {
    "segment-anything": materialised,
    "SDPA, bias": sdpa_bias,
    "one-hot": one_hot,
    "FlexAttention": flex,
}
ALL = tuple(ATTEND)
COMPILED = ("FlexAttention", "SDPA, bias")  # in a quick run, at head dim 64


def providers(
    rivals: dict[str, Callable[..., Tensor]],
    exact: Callable[..., Tensor],
    flops: int,
    *,
    gpu: bool,
    compiled: Sequence[str],
) -> dict[str, Provider]:
    """The rivals that can run here; on a GPU those named in `compiled` through torch.compile as well."""
    found = {}
    for name, call in rivals.items():
        if name != "FlexAttention":
            found[name] = Provider(call, exact, flops)
        elif not gpu:
            found[name] = Provider(None, exact, flops, "no gradient on a CPU")
        elif name not in compiled:
            found[name] = Provider(None, exact, flops, "compiled in a full run")
        if gpu and name in compiled:
            torch.compiler.reset()
            label = name if name == "FlexAttention" else f"{name}, compiled"
            found[label] = Provider(torch.compile(call, dynamic=False), exact, flops)
    return found


def shapes_of(device: torch.device, full: bool) -> list[tuple[str, Shape]]:
    return (GPU_SHAPES_FULL if full else GPU_SHAPES) if device.type == "cuda" else CPU_SHAPES


def draw(sizes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(s, generator=generator, device=device).to(dtype).requires_grad_() for s in sizes]


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    for name, shape in shapes_of(device, full):
        b, side, m, d, _ = shape
        p = side**2
        sizes = [(b, p, m, d)] * 3 + [(b, m, side, p), (b, m, p, side)]
        inputs = draw(sizes, device, dtype)
        flops = 4 * b * m * p * p * d
        exact = partial(reference.rel_pos_attention, grid=(side, side))
        ours = partial(rel_pos_attention, grid=(side, side))
        compiled = ALL if full else COMPILED if d == 64 else ()
        found = providers(dict(ATTEND), exact, flops, gpu=device.type == "cuda", compiled=compiled)
        why = _without_vllm(inputs[0])
        found["vLLM"] = Provider(None if why else vllm, exact, flops, why, forward_only=True)
        found[OURS] = Provider(ours, exact, flops, role="ours")
        yield {"subject": "rel_pos", "name": name, **shape._asdict()}, inputs, found


if __name__ == "__main__":
    sys.exit(harness.main(cases))
