"""x Wᵀ + bias by the fastest library product: no op of ours, but the one that ours and models are built of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import autocast_dtype, ordinary

_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_onednn_weight_gradient = getattr(torch.ops.aten, "mkldnn_linear_backward_weights", None)

# Products below which oneDNN's preparation costs more than it saves: 25 us, and copies of both operands for a weight's
# gradient.
FEWEST_PRODUCTS = 2**22
FEWEST_OF_WEIGHT = 2**25


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> x Wᵀ + bias (..., N) by the fastest library product, gradients too.

    On CPUs, in fp32 and above a size, that is oneDNN's, which torch itself leaves to half precision: on an AMD EPYC it
    takes half the time of MKL's. It is the operator that inductor emits."""
    if not by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]  # torch's
        return y
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), contiguous weight (N, K) -> x Wᵀ + bias, without a derivative."""
    y: Tensor = _onednn_linear(x, weight, bias, "none", [], "")  # type: ignore[misc]  # torch's private op
    return y


def dense_product(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ of each pair of matrices: x (B, M, K), y (B, N, K) -> (B, M, N), without a derivative. y has any strides.

    A single large pair in fp32 on a CPU is oneDNN's product, as in `dense_linear`."""
    if len(x) == 1 and y.shape[1] * x.numel() >= FEWEST_PRODUCTS and _onednn_takes(x, y):
        return _product(x[0], y[0]).unsqueeze(0)
    return x @ y.mT


class _Product(torch.autograd.Function):
    """`_product` with dX = dY W, dW = dYᵀ X and dbias = Σ dY."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        dx = dweight = dbias = None
        plain = torch.is_grad_enabled() or not ordinary(grad)  # can be differentiated again, and batched
        if need_x:
            dx = grad @ weight if plain else _product(grad, weight.t().contiguous())
        if need_weight and not plain and rows.numel() * weight.shape[0] >= FEWEST_OF_WEIGHT:
            given = (t.to_mkldnn() for t in (dy, rows, weight))
            dweight, dbias = (t.to_dense() for t in _onednn_weight_gradient(*given, need_bias))  # type: ignore[misc]
        elif need_weight:
            dweight = dy.t() @ rows
        if need_bias and dbias is None:
            dbias = dy.sum(0)
        return dx, dweight, dbias


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `dense_linear` takes oneDNN's product, which knows no autocast, transform or tracing and reads a dense
    bias."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        _onednn_weight_gradient is not None
        and _onednn_takes(*given)
        and x.numel() * weight.shape[0] >= FEWEST_PRODUCTS
        and weight.is_contiguous()
        and (bias is None or bias.is_contiguous())
    )


def _onednn_takes(*given: Tensor) -> bool:
    return (
        _onednn_linear is not None
        and given[0].device.type == "cpu"
        and all(t.dtype == torch.float32 for t in given[:2])
        and ordinary(*given)  # modes that count FLOPs or trace know torch's own products
        and torch._C._get_mkldnn_enabled()
        and autocast_dtype(given[0]) is None
    )
