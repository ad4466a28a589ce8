"""The paper's pair of attentions against attention over all N·P tokens.    python -m benchmarks.speed.fusion

Every provider is a whole pre-norm residual attention on x (B, N, P, C), projections included, all weights
trained:

    naive 3D          softmax(q kᵀ) v over N·P tokens, scores and probabilities in memory
    SDPA 3D           the same through torch's scaled_dot_product_attention, which need not keep scores
    SDPA factorised   across N at each position, then across P in each slice, composed of torch's own parts
    compiled          the line above through torch.compile (on a GPU)
    axial_fusion      ours: axial_fusion.axial_fusion_attention

The first two compute another function than the last three; each is held to the fp64 equations of its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from axial_fusion import AttentionWeights, axial_fusion_attention
from benchmarks import harness, machine
from benchmarks.harness import Case, Provider

OURS = "axial_fusion"
SCORES_HELD = 2**27  # at once by the fp64 equations: a gigabyte


class Shape(NamedTuple):
    """Slice groups, slices a group, side of the token grid, channels, heads."""

    batch: int
    slices: int
    side: int
    channels: int
    heads: int


# (name, shape): the presets tiny and small, and SAM's 16-pixel patches. Shapes of a curve have no name.
CPU_SHAPES = [
    ("tiny, 96 px", Shape(1, 3, 12, 128, 4)),
    ("small, 128 px", Shape(1, 5, 16, 128, 4)),
    ("SAM, 256 px", Shape(1, 9, 16, 256, 8)),
]
CPU_CURVE = [Shape(1, n, 16, 256, 8) for n in (1, 3, 5, 17, 33)] + [Shape(1, 9, s, 256, 8) for s in (8, 24)]
GPU_SHAPES = [(f"SAM, {px} px", Shape(1, 9, px // 16, 256, 8)) for px in (256, 512, 1024)]
GPU_CURVE = [Shape(1, n, 64, 256, 8) for n in (1, 3, 5, 17, 33)] + [Shape(1, 9, 48, 256, 8)]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    """x (B, N, P, C), then for the axial and the slice half: qkv_weight, qkv_bias, out_weight, out_bias,
    norm_weight, norm_bias. Queries and keys are large enough that the softmax is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    c = shape.channels

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*size, generator=generator)
        return values.to(device=device, dtype=dtype).requires_grad_()

    weights = [draw(shape.batch, shape.slices, shape.side**2, c)]
    for _ in range(2):
        weights += [draw(3 * c, c, scale=1.5 / math.sqrt(c)), draw(3 * c, scale=0.1)]
        weights += [draw(c, c, scale=1 / math.sqrt(c)), draw(c, scale=0.1), draw(c), draw(c, scale=0.1)]
    return weights


def providers(shape: Shape, *, itemsize: int = 4, compiled: bool = False) -> dict[str, Provider]:
    b, n, side, c, m = shape
    tokens, positions = b * n * side**2, side**2
    projections = 8 * tokens * c * c  # q, k, v and output
    joint = projections + 4 * tokens * n * positions * c
    factorised = 2 * projections + 4 * tokens * (n + positions) * c
    exact, exact_joint = partial(reference_factorised, heads=m), partial(reference_joint, heads=m)
    library = partial(sdpa_factorised, heads=m)
    scores = 4 * b * m * (n * positions) ** 2 * itemsize  # scores and probabilities, and their gradients
    found = {
        "naive 3D": Provider(
            partial(joint_attention, heads=m, attend=materialised), exact_joint, joint, role="other"
        ),
        "SDPA 3D": Provider(
            partial(joint_attention, heads=m, attend=F.scaled_dot_product_attention),
            exact_joint,
            joint,
            role="other",
        ),
        "SDPA factorised": Provider(library, exact, factorised),
    }
    if compiled:
        torch.compiler.reset()  # else a few shapes later torch.compile goes eager in silence
        found["SDPA factorised, compiled"] = Provider(
            torch.compile(library, dynamic=False), exact, factorised
        )
    if scores > machine.free_bytes():
        missing = f"its scores need {scores / 2**30:.0f} GiB, {machine.free_bytes() / 2**30:.0f} are free"
        found["naive 3D"] = Provider(None, exact_joint, joint, missing, role="other")
    return {**found, OURS: Provider(partial(ours, heads=m), exact, factorised, role="ours")}


def ours(x: Tensor, *weights: Tensor, heads: int) -> Tensor:
    inter, intra = (AttentionWeights._make([*weights[i : i + 6], None, None]) for i in (0, 6))
    return axial_fusion_attention(x, inter, intra, num_heads=heads)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v


def half(x: Tensor, weights: Sequence[Tensor], heads: int, attend: Attend) -> Tensor:
    """x + FC(attention(LN(x))) over the tokens of x (G, T, C)."""
    qkv_weight, qkv_bias, out_weight, out_bias, norm_weight, norm_bias = weights
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps=1e-6)
    qkv = F.linear(normed, qkv_weight, qkv_bias).unflatten(-1, (3, heads, -1))  # (G, T, 3, M, D)
    out = attend(*qkv.permute(2, 0, 3, 1, 4))  # (G, M, T, D)
    return x + F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)


def joint_attention(x: Tensor, *weights: Tensor, heads: int, attend: Attend) -> Tensor:
    """Every token attends to all N·P of its group, with the axial half's weights."""
    return half(x.flatten(1, 2), weights[:6], heads, attend).view_as(x)


def sdpa_factorised(x: Tensor, *weights: Tensor, heads: int) -> Tensor:
    b, n, p, _ = x.shape
    attend: Attend = F.scaled_dot_product_attention
    across = half(x.transpose(1, 2).flatten(0, 1), weights[:6], heads, attend)  # (B·P, N, C)
    z = across.unflatten(0, (b, p)).transpose(1, 2)
    return half(z.flatten(0, 1), weights[6:], heads, attend).unflatten(0, (b, n))


def reference_joint(x: Tensor, *weights: Tensor, heads: int) -> Tensor:
    return equations(x.flatten(1, 2), weights[:6], heads).view_as(x)


def reference_factorised(x: Tensor, *weights: Tensor, heads: int) -> Tensor:
    b, n, p, c = x.shape
    z = torch.stack([equations(x[i].transpose(0, 1), weights[:6], heads).transpose(0, 1) for i in range(b)])
    return equations(z.reshape(b * n, p, c), weights[6:], heads).view_as(x)


def equations(x: Tensor, weights: Sequence[Tensor], heads: int) -> Tensor:
    """x + FC(softmax(q kᵀ / √D) v) on (G, T, C), written out, a gigabyte of scores at a time."""
    qkv_weight, qkv_bias, out_weight, out_bias, gain, shift = weights
    variance, mean = torch.var_mean(x, dim=-1, unbiased=False, keepdim=True)
    normed = (x - mean) / torch.sqrt(variance + 1e-6) * gain + shift
    q, k, v = (
        (normed @ w.T + bias).unflatten(-1, (heads, -1))
        for w, bias in zip(qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    )

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("gimd,gjmd->gmij", q, k) / math.sqrt(q.shape[-1])
        exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
        return torch.einsum("gmij,gjmd->gimd", exponentials / exponentials.sum(-1, keepdim=True), v)

    groups, tokens, _ = x.shape
    chunk = max(1, SCORES_HELD // (groups * heads * tokens))
    parts = [checkpoint(rows, part, k, v, use_reentrant=False) for part in q.split(chunk, dim=1)]
    return x + torch.cat(parts, dim=1).flatten(2) @ out_weight.T + out_bias


def case(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Case:
    facts = {"subject": "fusion", "name": name, **shape._asdict()}
    found = providers(shape, itemsize=dtype.itemsize, compiled=device.type == "cuda")
    return facts, inputs(shape, dtype, device), found


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    """Named shapes, then the curves over N and over the image size; the largest shapes are left to full runs."""
    gpu = device.type == "cuda"
    shapes, curve = (GPU_SHAPES, GPU_CURVE) if gpu else (CPU_SHAPES, CPU_CURVE)
    if not gpu and not full:
        curve = [shape for shape in curve if shape.slices <= 17]
    elif not gpu:
        shapes = [*shapes, ("SAM, 512 px", Shape(1, 9, 32, 256, 8))]
    for name, shape in [*shapes, *(("", shape) for shape in curve)]:
        yield case(name, shape, device, dtype)


if __name__ == "__main__":
    sys.exit(harness.main(cases, budget_s=5.0))
