"""Attention weights of bfloat16 rows on a CPU: scores and softmax in fp32, every other product in bfloat16.

A CPU multiplies bfloat16 about twice as fast as fp32, but rounds what it gives, and a score of some tens that is
rounded moves the weights by per cents. So the scores alone are products in fp32; the weights and the gradient of the
scores are rounded once, as flash attention rounds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import under_transform


def suits(*tensors: Tensor) -> bool:
    """Whether `weights` takes these tensors: bfloat16 on a CPU that autograd alone will differentiate."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not wanted or tensors[0].dtype != torch.bfloat16 or tensors[0].device.type != "cpu":
        return False
    traced = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
    return not traced and not under_transform(tensors)


def weights(
    a: Tensor,
    b: Tensor,
    scale: float,
    dim: int,
    *,
    bias: tuple[Tensor, Tensor] | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Softmax over `dim` of scale · a bᵀ + bias, -inf where `hidden`: a (..., R, D), b (..., S, D) -> (..., R, S).

    `bias` is (..., R, H) and (..., R, W) with H · W = S. Something must be finite along `dim`."""
    return _Weights.apply(a, b, *(bias or (None, None)), hidden, scale, dim)  # type: ignore[no-any-return,no-untyped-call]


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, bias_h: Tensor | None, bias_w: Tensor | None, hidden: Tensor | None,
        scale: float, dim: int,
    ) -> Tensor:  # fmt: skip
        wide_a, wide_b = a.float(), b.float().transpose(-1, -2)
        if bias_h is None or bias_w is None:
            scores = (wide_a @ wide_b).mul_(scale)
        else:
            ctx.grid = bias_h.shape[-1], bias_w.shape[-1]
            scores = (bias_h.float().contiguous().unsqueeze(-1) + bias_w.float().unsqueeze(-2)).flatten(-2)
            flat = scores.flatten(0, -3)  # the same memory
            flat.baddbmm_(wide_a.flatten(0, -3), wide_b.flatten(0, -3), alpha=scale)
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        p = scores.softmax(dim).to(a.dtype)
        ctx.save_for_backward(a, b, p)
        ctx.scale, ctx.dim = scale, dim
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Made of operators that have a derivative, so that there is a second one."""
        a, b, p = ctx.saved_tensors
        for_a, for_b, *for_bias = ctx.needs_input_grad[:4]
        ds = torch._softmax_backward_data(grad, p, ctx.dim, p.dtype)
        da = (ds @ b) * ctx.scale if for_a else None
        db = (ds.transpose(-1, -2) @ a) * ctx.scale if for_b else None
        dbias = [ds.unflatten(-1, ctx.grid).sum(axis) if wanted else None
                 for wanted, axis in zip(for_bias, (-1, -2), strict=True)]  # fmt: skip
        return da, db, *dbias, None, None, None
