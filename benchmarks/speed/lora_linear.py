"""The LoRA layer against the frozen layer and the usual ways to compute LoRA.    python -m benchmarks.speed.lora_linear

    frozen            F.linear alone: what the layer costs without LoRA, another function than the rest
    PEFT              its own layer, where it is installed; PEFT form is base(x) + scaling · B(A(x)), as it computes it
    addmm             the update is added to y in place, by the product's own epilogue
    S, then fused     S = x Aᵀ, then S Bᵀ with the bias, to which the base product is added in its epilogue
    merged each step  W + scaling · B A is made at each step, then one product; bf16 rounds a small update away
    torch, augmented, triton    ours, each engine, where it runs; lora_linear takes what `auto` chooses

Cases with fp32 adapters have x and W in half precision and run under autocast, as training does. The error against
fp64 stands beside each time, since merging in half precision rounds small updates away."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
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

    @property
    def name(self) -> str:
        return f"{self.k} to {self.n}, r {self.rank}, {self.rows:,} rows"


GPU_QUICK = [Shape(36_864, 768, 2304, 4), Shape(36_864, 256, 768, 4)]
MIXED_ROWS = 36_864
CPU_SHAPES = [Shape(2304, 256, 768, 4), Shape(2304, 768, 2304, 4), Shape(2304, 768, 768, 16)]
GPU_SHAPES = [
    Shape(rows, k, n, rank)
    for rows in (4096, 36_864, 147_456)
    for k, n in ((256, 768), (768, 2304), (768, 768), (1280, 3840))
    for rank in (4, 16, 64)
]


def frozen(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def peft_form(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * SCALING


def addmm(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y, s = F.linear(x, weight, bias), F.linear(x, a)
    return y.addmm_(s, b.t().to(s.dtype), alpha=SCALING)  # autocast leaves what is in place alone


def thin_first(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    s = F.linear(x, a)
    return torch.addmm(bias, s, b.t().to(s.dtype), alpha=SCALING).addmm_(x, weight.t())


def merged(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight + SCALING * (b @ a), bias)


def under_autocast(provider: Provider, device: torch.device, dtype: torch.dtype) -> Provider:
    """The same provider, called under autocast to `dtype`."""
    call = provider.call
    if call is None:
        return provider

    def within(*inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return call(*inputs)

    return replace(provider, call=within)


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
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    return call, ""


def providers(
    shape: Shape, dtype: torch.dtype, device: torch.device, full: bool = False
) -> dict[str, Provider]:
    """Every provider by its name; on a CPU compiled ones are left to full runs."""
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
        "S, then fused": Provider(thin_first, exact, flops),
        "merged each step": Provider(merged, exact, base + 2 * shape.rank * shape.k * shape.n),
    }
    if gpu or full:
        torch.compiler.reset()
        if full:
            found["PEFT, compiled"] = Provider(
                peft and torch.compile(peft, dynamic=False), exact, flops, absent
            )
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
    gpu = device.type == "cuda"
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    shapes = CPU_SHAPES if not gpu else GPU_SHAPES if full else GPU_QUICK
    yield from (_case(shape, device, dtype, full) for shape in shapes)
    if gpu or full:
        mixed = [s for s in shapes if (s.rows, s.rank) == (MIXED_ROWS, 4)] if gpu else CPU_SHAPES[:2]
        yield from (_case(shape, device, half, full, mixed=True) for shape in mixed)


def _case(shape: Shape, device: torch.device, dtype: torch.dtype, full: bool, *, mixed: bool = False) -> Case:
    """One shape; `mixed` has A and B in fp32 beside x and W in `dtype`, under autocast."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype)

    rows, k, n, rank = shape
    thin = torch.float32 if mixed else dtype
    inputs = [draw(rows, k).requires_grad_(), draw(n, k, scale=k**-0.5), draw(n),
              draw(rank, k, scale=k**-0.5, dtype=thin).requires_grad_(),
              draw(n, rank, scale=0.1, dtype=thin).requires_grad_()]  # fmt: skip
    found = providers(shape, dtype, device, full)
    if mixed:
        found = {name: under_autocast(way, device, dtype) for name, way in found.items()}
    name = shape.name + (", fp32 adapters" if mixed else "")
    facts = {"subject": "lora", "name": name, **shape._asdict(), "dtype": str(dtype).removeprefix("torch.")}
    return facts, inputs, found


if __name__ == "__main__":
    sys.exit(harness.main(cases, budget_s=2.0))
