"""z = LN(x) over the channels: (x − mean) · rstd · γ + β, in fp32, rounded once to the dtype that is asked for.

A tile of the Triton kernels holds whole rows, so that the forward reads x once and writes z once, and the backward
reads x and dz once and writes dx once. Each program of the backward adds dγ and dβ of its rows up in registers; the
sum over programs is a second, small one: the same bits every time, no atomics. x and two numbers a row are saved.
On an H100 (bf16, 36,864 rows of 256) the forward takes 15.7 us, torch's layer_norm 48.9 us.

On a CPU, and for what the kernels do not take, it is torch's layer_norm, which has every derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import autocast_dtype, no_second_derivative
from ..dispatch import select_backend, sums_by_triton
from ..gpu.row_norm import launch_backward, launch_column_sums, launch_forward
from ..registry import NAMESPACE, OPS, library

_LIB = library("row_norm")
_OP = f"{NAMESPACE}::row_norm"
torch.library.define(
    _OP,
    "(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    lib=_LIB,
)
torch.library.define(
    f"{_OP}_backward",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor? bias, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    lib=_LIB,
)


@torch.library.impl(_OP, "CompositeExplicitAutograd", lib=_LIB)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """z (..., C) contiguous in `dtype`, mean and rstd (T,) in fp32."""
    z = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not z.numel():
        rows = (x.shape[:-1].numel(),)
        return z, x.new_zeros(rows, dtype=torch.float32), x.new_zeros(rows, dtype=torch.float32)
    return z, *launch_forward(x, weight, bias, z.view(-1, x.shape[-1]), eps)


@torch.library.register_fake(_OP, lib=_LIB)
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[:-1].numel(),), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), mean, rstd


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd", lib=_LIB)
def _backward_op(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias; an empty tensor for each that is not needed."""
    empty = x.new_empty((0,))
    given = (x, weight, empty if bias is None else bias)
    found: tuple[Tensor | None, ...]
    if not x.numel():
        found = tuple(t.new_zeros(t.shape) for t in given)
    else:
        dz = grad.reshape(-1, x.shape[-1])
        dz = dz if dz.stride(-1) == 1 else dz.contiguous()
        found = launch_backward(dz, x, mean, rstd, weight, need_x=needs[0], need_weights=needs[1] or needs[2])
    dx, dweight, dbias = (
        g.to(t.dtype) if need and g is not None else empty
        for t, g, need in zip(given, found, needs, strict=True)
    )
    return dx, dweight, dbias


@torch.library.register_fake(f"{_OP}_backward", lib=_LIB)
def _(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty((0,))
        for t, need in zip((x, weight, bias), needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.save_for_backward(x, output[1], output[2], weight, bias)
    ctx.set_materialize_grads(False)  # no zeros for the statistics, which nobody differentiates


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = OPS.row_norm_backward(grad, *ctx.saved_tensors, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("row_norm"), lib=_LIB)


def column_sums(x: Tensor) -> Tensor:
    """x (T, C) with contiguous rows -> its sum over rows (C,), a bias gradient, in x's dtype.

    On a GPU in two steps, both in fp32: about a thousand partial sums, then the sum of these."""
    return launch_column_sums(x).sum(0).to(x.dtype) if sums_by_triton(x) else x.sum(0)


def row_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-6, dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """LayerNorm of x (..., C) by weight and bias (C,), statistics in fp32 -> z (..., C) in `dtype`.

    `dtype` None is autocast's, or x's where autocast is off. weight and bias may be fp32 beside a half-precision x.
    `backend` is auto, triton or torch. Raises ValueError on a shape or backend mismatch."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"row_norm: {name} must be (C,) = {tuple(x.shape[-1:])}, found shape {tuple(tensor.shape)}"
            )
    if dtype is None:
        dtype = autocast_dtype(x) or x.dtype
    given = (x, weight) if bias is None else (x, weight, bias)
    return run(x, weight, bias, eps, dtype, select_backend("row_norm", *given, backend=backend).backend)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, backend: str
) -> Tensor:
    """`row_norm` of arguments that are checked, on a backend that is decided."""
    if backend == "triton":
        y: Tensor = OPS.row_norm(x, weight, bias, eps, dtype)[0]
        return y
    wide = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias, eps).to(dtype)
