"""The low-rank layer against the frozen one and the usual ways to adapt it.    python -m benchmarks.bench_lora_linear

    frozen            F.linear alone: what the layer costs without LoRA, another function than the rest
    PEFT form         base(x) + scaling · B(A(x)), as PEFT's eager layer computes it; PEFT's own where it is installed
    addmm             the update added to y in place of a sum of its own
    merged each step  W + scaling · B A made anew, then one product; bf16 rounds a small update away
    torch, augmented, triton    ours, each engine, where it runs; lora_linear takes what `auto` chooses

The error against fp64 stands beside each time: it is the reason why merging is no rival in half precision."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from axial_fusion import lora_linear, reference
from benchmarks import harness
from benchmarks.harness import Case, Provider

OURS = "lora_linear"
SCALING = 0.5


class Shape(NamedTuple):
    rows: int
    k: int
    n: int
    rank: int


GPU_QUICK = [Shape(36_864, 768, 2304, 4), Shape(36_864, 256, 768, 4)]
CPU_SHAPES = [Shape(2304, 256, 768, 4), Shape(2304, 768, 2304, 4), Shape(2304, 768, 768, 16)]
GPU_SHAPES = [
    Shape(rows, k, n, rank)
    for rows in (4096, 36_864, 147_456)
    for k, n in ((256, 768), (768, 2304), (768, 768), (1280, 3840))
    for rank in ((4, 16, 64) if rows == 36_864 else (4,))
]


def frozen(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def peft_form(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * SCALING


def addmm(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(F.linear(x, weight, bias), x @ a.t(), b.t(), alpha=SCALING)


def merged(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight + SCALING * (b @ a), bias)


def peft_layer(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[..., Tensor] | None, str]:
    """PEFT's own layer, its parameters replaced by the inputs of each call; None and a reason where it is absent."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError as error:
        return None, f"peft cannot be imported: {error}"

    base = torch.nn.Linear(shape.k, shape.n, device=device, dtype=dtype)
    config = LoraConfig(r=shape.rank, lora_alpha=int(SCALING * shape.rank))
    layer = Linear(base, "default", config=config, r=shape.rank, lora_alpha=int(SCALING * shape.rank)).to(
        device, dtype
    )
    names = ("base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight")

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))  # type: ignore[no-any-return]

    return call, ""


def providers(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Provider]:
    gpu = device.type == "cuda"
    exact = partial(reference.lora_linear, scaling=SCALING)
    base = 2 * shape.rows * shape.k * shape.n
    flops = base + 2 * shape.rows * shape.rank * (shape.k + shape.n)
    peft, absent = peft_layer(shape, dtype, device)
    found = {
        "frozen": Provider(frozen, reference_frozen, base, role="other"),
        "PEFT": Provider(peft, exact, flops, absent),
        "PEFT form": Provider(peft_form, exact, flops),
        "addmm": Provider(addmm, exact, flops),
        "merged each step": Provider(merged, exact, base + 2 * shape.rank * shape.k * shape.n),
    }
    if gpu:
        torch.compiler.reset()
        found["PEFT form, compiled"] = Provider(torch.compile(peft_form, dynamic=False), exact, flops)
    for backend in ("torch", "augmented", "triton") if gpu else ("torch", "augmented"):
        found[f"ours, {backend}"] = Provider(
            partial(lora_linear, scaling=SCALING, backend=backend), exact, flops, role="other"
        )
    return {**found, OURS: Provider(partial(lora_linear, scaling=SCALING), exact, flops, role="ours")}


def reference_frozen(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return reference.lora_linear(x, weight, bias)


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    """W and the bias are frozen, as they are in training; x, A and B want gradients."""
    for shape in (GPU_SHAPES if full else GPU_QUICK) if device.type == "cuda" else CPU_SHAPES:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, scale: float = 1.0, generator: torch.Generator = generator) -> Tensor:
            return (scale * torch.randn(size, generator=generator)).to(device, dtype)

        rows, k, n, rank = shape
        inputs = [draw(rows, k).requires_grad_(), draw(n, k, scale=k**-0.5), draw(n),
                  draw(rank, k, scale=k**-0.5).requires_grad_(), draw(n, rank, scale=0.1).requires_grad_()]  # fmt: skip
        name = f"{k} to {n}, r {rank}, {rows:,} rows"
        yield {"subject": "lora", "name": name, **shape._asdict()}, inputs, providers(shape, dtype, device)


if __name__ == "__main__":
    sys.exit(harness.main(cases, budget_s=2.0))
