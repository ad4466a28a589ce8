"""Attention across slices at each position in plain torch: what runs on a CPU, and where no kernel does.

Scores and softmax are fp32. Half precision converts q and k first: fp16 scores overflow before they are scaled, and
rounded scores of some tens move the weights by per cents. Scores lie keys first: torch's softmax over a last axis of 9
takes 2.9 ms where that over the axis before takes 0.7 ms (P 256, 8 heads)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import no_autocast, no_derivative
from ..reference import axial_mask, real_keys
from . import bf16_weights

_LONG = 64  # slices or channels of a head, from which on torch's fused attention is faster than two products


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool) -> Tensor:
    """The torch backend: q (B, Nq, P, M, D) -> contiguous (B, Nq, P, M, D), differentiable."""
    visible = axial_mask(q.shape[1], k.shape[1], causal=causal, lengths=lengths, device=q.device)
    k, v = real_keys(lengths, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    traced = torch.compiler.is_compiling()  # a graph is not made anew for each number of slices
    if not traced and q.shape[1] * k.shape[1] <= 16:
        # So few slices that N² products of rows cost less than the copies a batched matmul makes.
        dtype, (q, k, v) = q.dtype, (t.to(wide) for t in (q, k, v))
        scores = scale * (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1)  # (B, Nq, N, P, M)
        weights = _softmax(scores, None if visible is None else visible[:, 0, 0, :, :, None, None], 2)
        return (weights.unsqueeze(-1) * v.unsqueeze(1)).sum(2).to(dtype)
    with no_autocast(q):
        longest = max(1 if traced else k.shape[1], k.shape[4])
        long = visible is None and q.dtype == wide and longest >= _LONG
        if long and q.device.type == "cpu" and no_derivative(q, k, v):
            flat_q, flat_k, flat_v = (_rows(t).flatten(0, 1) for t in (q, k, v))  # (B·P, M, N, D)
            y = F.scaled_dot_product_attention(flat_q, flat_k, flat_v, scale=scale)
            return y.unflatten(0, (q.shape[0], q.shape[2])).permute(0, 3, 1, 2, 4).contiguous()
        if bf16_weights.suits(q, k, v):
            return _in_bf16(q, k, v, visible, scale)
        weights = _weights(_rows(q, wide), _rows(k, wide), visible, scale).transpose(-1, -2)
        product = torch.bfloat16 if q.dtype == torch.bfloat16 else wide
        y = weights.to(product) @ _rows(v, product)
        return y.to(q.dtype).permute(0, 3, 1, 2, 4).contiguous()


def _in_bf16(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    q, k, v = (_rows(t).contiguous() for t in (q, k, v))
    hidden = empty = None
    if visible is not None:
        empty = ~visible.any(-1, keepdim=True)  # queries without keys: they look at all, and get 0
        hidden = ~(visible | empty).transpose(-1, -2)
    y = bf16_weights.weights(k, q, scale, -2, hidden=hidden).transpose(-1, -2) @ v
    return (y if empty is None else y.masked_fill(empty, 0.0)).permute(0, 3, 1, 2, 4).contiguous()


def _rows(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(B, N, P, M, D) -> (B, P, M, N, D), a copy where the dtype changes."""
    t = t.permute(0, 2, 3, 1, 4)
    return t if dtype in (None, t.dtype) else t.to(dtype, memory_format=torch.contiguous_format)


def _weights(q: Tensor, k: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Softmax of q (..., Nq, D) over the keys k (..., N, D), keys first: (..., N, Nq)."""
    scores = (k @ q.transpose(-1, -2)).mul_(scale)
    return _softmax(scores, None if visible is None else visible.transpose(-1, -2), -2)


def _softmax(scores: Tensor, visible: Tensor | None, dim: int) -> Tensor:
    if visible is None:
        return scores.softmax(dim)
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = ~visible.any(dim, keepdim=True)  # a query without keys: no NaN, forward or backward
    return scores.masked_fill(empty, 0.0).softmax(dim).masked_fill(empty, 0.0)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    visible = axial_mask(q.shape[1], k.shape[1], causal=causal, lengths=lengths, device=q.device)
    k, v = real_keys(lengths, k, v)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    dy, q, k, v = (_rows(t, wide) for t in (grad, q, k, v))
    p = _weights(q, k, visible, scale)  # (B, P, M, N, Nq), as all that follows
    dp = v @ dy.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-2, keepdim=True)) * scale
    grads = (ds.transpose(-1, -2) @ k, ds @ q, p @ dy)
    dq, dk, dv = (t.to(dtype).permute(0, 3, 1, 2, 4).contiguous() for t in grads)
    return dq, *real_keys(lengths, dk, dv)
