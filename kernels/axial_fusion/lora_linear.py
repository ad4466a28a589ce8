"""y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ.    Source: LoRA, arXiv 2106.09685, eq. 3.

x Aᵀ is (T, r), so the update is one thin product added to y; W and B A are never merged, which in bf16 would
round a small B A away. The op saves x alone; the gradients are

    dX = dY W + (scaling · dY B) A        dA = (scaling · dY B)ᵀ X        dB = scaling · dYᵀ (X Aᵀ)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from axial_fusion._launch import (
    autocast_dtype,
    check_alike,
    check_shapes,
    dtype_name,
    no_second_derivative,
    plain_on,
    select_backend,
)
from axial_fusion.reference import dropout_mask

_OP = "axial_fusion::lora_linear"
torch.library.define(
    _OP,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? seed, float scaling,"
    " float dropout_p) -> Tensor",
)
torch.library.define(
    f"{_OP}_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor? seed, float scaling,"
    " float dropout_p, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """x (..., K) -> (..., N), contiguous; products in x's dtype with fp32 accumulation inside."""
    rows = x.reshape(-1, x.shape[-1])  # (T, K)
    y = F.linear(rows, weight, bias)
    if lora_a is not None and lora_b is not None:
        xa = F.linear(_dropped(x, seed, dropout_p).reshape(rows.shape), lora_a.to(x.dtype))  # (T, r)
        y = torch.addmm(y, xa, lora_b.to(x.dtype).t(), alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


torch.library.impl(_OP, "CompositeExplicitAutograd", _forward)


@torch.library.register_fake(_OP)
def _(x, weight, bias, lora_a, lora_b, seed, scaling, dropout_p):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd")
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, lora_a, lora_b; an empty tensor for each that is not needed."""
    empty = x.new_empty(0)
    dy = grad.reshape(-1, weight.shape[0])  # (T, N)
    rows = x.reshape(-1, weight.shape[1])  # (T, K)
    dx = dy @ weight if needs[0] else empty
    dw = dy.t() @ rows if needs[1] else empty
    dbias = dy.sum(0) if needs[2] else empty
    da = db = empty
    if lora_a is not None and lora_b is not None:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        dxa = scaling * (dy @ b)  # (T, r)
        dropped = _dropped(x, seed, dropout_p).reshape(rows.shape)
        if needs[0]:
            through = (dxa @ a).view_as(x)
            dx = dx + _dropped(through, seed, dropout_p).view_as(dx)
        if needs[3]:
            da = (dxa.t() @ dropped).to(lora_a.dtype)
        if needs[4]:
            db = (scaling * (dy.t() @ (dropped @ a.t()))).to(lora_b.dtype)
    return dx.view_as(x) if needs[0] else empty, dw, dbias, da, db


@torch.library.register_fake(f"{_OP}_backward")
def _(grad, x, weight, lora_a, lora_b, seed, scaling, dropout_p, needs):
    def like(t: Tensor | None, shape: Any, need: bool) -> Tensor:
        return x.new_empty(shape, dtype=x.dtype if t is None else t.dtype) if need else x.new_empty(0)

    return (
        like(x, x.shape, needs[0]),
        like(weight, weight.shape, needs[1]),
        like(weight, (weight.shape[0],), needs[2]),
        like(lora_a, () if lora_a is None else lora_a.shape, needs[3]),
        like(lora_b, () if lora_b is None else lora_b.shape, needs[4]),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lora_a, lora_b, seed, ctx.scaling, ctx.dropout_p = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    grads = torch.ops.axial_fusion.lora_linear_backward(
        grad, *ctx.saved_tensors, ctx.scaling, ctx.dropout_p, needs
    )
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_save)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("lora_linear"))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x (..., K), weight (N, K), bias (N,), lora_a (r, K), lora_b (N, r) -> (..., N), in x's dtype.

    Without lora_a and lora_b it is the plain linear layer. `dropout_p` drops elements of the x that A sees, by
    an int64 `seed` of one element, drawn from torch's generator where it is not given; the same seed draws the
    same mask. lora_a and lora_b may be fp32 beside a half-precision x. Autocast casts x and the weights.
    Raises ValueError on a shape, dtype or device mismatch."""
    _check(x, weight, bias, lora_a, lora_b, dropout_p, seed)
    select_backend("lora_linear", x, weight, backend=backend)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if lora_a is None or dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), device=x.device)
    run = _forward if plain_on(x) else torch.ops.axial_fusion.lora_linear
    return run(x, weight, bias, lora_a, lora_b, seed, float(scaling), float(dropout_p))


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    sizes = check_shapes("lora_linear", {"weight": (weight, "N K")})
    if x.dim() < 1 or x.shape[-1] != sizes["K"]:
        raise ValueError(
            f"lora_linear: x must be (..., K) with K = {sizes['K']}, found shape {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"lora_linear: bias must be (N,) with N = {sizes['N']}, found shape {tuple(bias.shape)}"
        )
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_linear: lora_a and lora_b come together; one of them is None")
    if lora_a is not None and lora_b is not None:
        if lora_a.dim() != 2 or lora_a.shape[1] != sizes["K"]:
            raise ValueError(
                f"lora_linear: lora_a must be (r, K) with K = {sizes['K']}, found shape {tuple(lora_a.shape)}"
            )
        if lora_b.shape != (sizes["N"], lora_a.shape[0]):
            raise ValueError(
                f"lora_linear: lora_b must be (N, r) = ({sizes['N']}, {lora_a.shape[0]}), found {tuple(lora_b.shape)}"
            )
        check_alike("lora_linear", lora_a=lora_a, lora_b=lora_b)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"lora_linear: dropout_p must lie in [0, 1), found {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(
            f"lora_linear: seed must be one int64, found {tuple(seed.shape)} of {dtype_name(seed.dtype)}"
        )
    if autocast_dtype(x) is None:
        check_alike("lora_linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))


def _dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dropout(x), which is also its own derivative applied to x."""
    if seed is None or p == 0:
        return x
    return x * (dropout_mask(x.shape, p, seed).to(x.dtype) / (1 - p))
