"""Attention across slices at each position in plain torch: what runs where no kernel does.

Scores and softmax are fp32. Half precision converts q and k first: fp16 scores overflow before they are scaled, and
rounded scores of some tens move the weights by per cents. Scores lie keys first: torch's softmax over a last axis of 9
takes 2.9 ms where that over the axis before takes 0.7 ms (P 256, 8 heads).

An inf or NaN of a later slice must not reach a causal query, and a weight of 0 does not hide it: 0 · inf is NaN. If a
sum shows that scores or result are not finite, each query is computed again from its own keys. Compiled graphs,
transforms and devices other than a CPU skip this, since they cannot wait for the sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import no_autocast, no_derivative, under_transform, without_overlap
from ..reference import axial_mask, causal_parts, real_keys

_LONG = 64  # from so many slices or channels of a head, torch's fused attention is faster than two products


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool) -> Tensor:
    """The torch backend: q (B, Nq, P, M, D) -> contiguous (B, Nq, P, M, D), differentiable."""
    causal = causal and q.shape[1] > 1  # the last query sees all keys
    y, apart = _forward(q, k, v, lengths, scale, causal)
    if apart or (causal and _spoiled(y[:, -1])):  # the last query meets every value
        parts = causal_parts(q, k, v)
        y = torch.cat([_forward(*part, lengths, scale, False)[0] for part in parts], 1)
    return y


def _spoiled(*tensors: Tensor) -> bool:
    """Whether CPU tensors hold an inf or NaN; a sum that overflows counts as one."""
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling() or under_transform(tensors):
        return False
    return not all(math.isfinite(t.detach().sum().item()) for t in tensors)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, bool]:
    """y, and whether attention is causal with an inf or NaN in scores that the gradient would read."""
    visible = axial_mask(q.shape[1], k.shape[1], causal=causal, lengths=lengths, device=q.device)
    k, v = real_keys(lengths, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    traced = torch.compiler.is_compiling()  # a graph is not made anew for each number of slices
    if not traced and q.shape[1] * k.shape[1] <= 16:
        # So few slices that N² products of rows cost less than the copies a batched matmul makes.
        dtype, (q, k, v) = q.dtype, (t.to(wide) for t in (q, k, v))
        scores = scale * (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1)  # (B, Nq, N, P, M)
        weights = _softmax(scores, None if visible is None else visible[:, 0, 0, :, :, None, None], 2)
        apart = causal and scores.requires_grad and _spoiled(scores)
        return (weights.unsqueeze(-1) * v.unsqueeze(1)).sum(2).to(dtype), apart
    with no_autocast(q):
        longest = max(1 if traced else k.shape[1], k.shape[4])
        long = visible is None and q.dtype == wide and longest >= _LONG
        if long and q.device.type == "cpu" and no_derivative(q, k, v):
            flat_q, flat_k, flat_v = (_rows(t).flatten(0, 1) for t in (q, k, v))  # (B·P, M, N, D)
            y = F.scaled_dot_product_attention(*without_overlap(flat_q, flat_k, flat_v), scale=scale)
            return y.unflatten(0, (q.shape[0], q.shape[2])).permute(0, 3, 1, 2, 4).contiguous(), False
        scores = _scores(_rows(q, wide), _rows(k, wide), scale)
        apart = causal and scores.requires_grad and _spoiled(scores)
        weights = _weights(scores, visible).transpose(-1, -2)
        product = torch.bfloat16 if q.dtype == torch.bfloat16 else wide
        y = weights.to(product) @ _rows(v, product)
        return y.to(q.dtype).permute(0, 3, 1, 2, 4).contiguous(), apart


def _rows(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(B, N, P, M, D) -> (B, P, M, N, D), a copy where the dtype changes."""
    t = t.permute(0, 2, 3, 1, 4)
    return t if dtype in (None, t.dtype) else t.to(dtype, memory_format=torch.contiguous_format)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Of q (..., Nq, D) and the keys k (..., N, D), keys first: (..., N, Nq)."""
    return (k @ q.transpose(-1, -2)).mul_(scale)


def _weights(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax of scores (..., N, Nq) over the keys."""
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
    causal = causal and q.shape[1] > 1
    grads = _backward(grad, q, k, v, lengths, scale, causal)
    if causal and _spoiled(*grads):
        dq, dk, dv = (torch.zeros_like(t) for t in grads)
        for i, part in enumerate(causal_parts(q, k, v)):
            mine = slice(i, i + 1), slice(part[1].shape[1]), slice(part[1].shape[1])
            found = _backward(grad[:, mine[0]], *part, lengths, scale, False)
            for total, rows, value in zip((dq, dk, dv), mine, found, strict=True):
                total[:, rows] += value
        grads = dq, dk, dv
    dq, dk, dv = (t.to(q.dtype).contiguous() for t in grads)
    return dq, *real_keys(lengths, dk, dv)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    """Gradients in fp32 or better."""
    visible = axial_mask(q.shape[1], k.shape[1], causal=causal, lengths=lengths, device=q.device)
    k, v = real_keys(lengths, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    dy, q, k, v = (_rows(t, wide) for t in (grad, q, k, v))
    p = _weights(_scores(q, k, scale), visible)  # (B, P, M, N, Nq), as all that follows
    dp = v @ dy.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-2, keepdim=True)) * scale
    grads = (ds.transpose(-1, -2) @ k, ds @ q, p @ dy)
    return tuple(t.permute(0, 3, 1, 2, 4) for t in grads)
