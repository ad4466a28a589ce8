"""Attention across slices at each position in plain torch: what runs on a CPU, and where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import no_derivative
from ..dispatch import HALF
from ..reference import axial_mask


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool) -> Tensor:
    """The torch backend: q (B, Nq, P, M, D) -> contiguous (B, Nq, P, M, D), differentiable."""
    visible = axial_mask(q.shape[1], k.shape[1], causal=causal, lengths=lengths, device=q.device)
    if q.dtype not in HALF and q.shape[1] * k.shape[1] <= 16:
        # So few slices that N² products of rows cost less than the copies a batched matmul makes.
        scores = scale * (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1)  # (B, Nq, N, P, M)
        weights = _softmax(scores, None if visible is None else visible[:, 0, 0, :, :, None, None], 2)
        return (weights.unsqueeze(-1) * v.unsqueeze(1)).sum(2)
    rows = [t.permute(0, 2, 3, 1, 4) for t in (q, k, v)]  # (B, P, M, N, D)
    if visible is None and q.dtype not in HALF and q.device.type == "cpu" and no_derivative(q, k, v):
        # Nothing is kept for a backward: half the time of two products with a softmax between them.
        q, k, v = (t.flatten(0, 1) for t in rows)
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)  # (B·P, M, N, D)
        return y.unflatten(0, rows[0].shape[:2]).permute(0, 3, 1, 2, 4).contiguous()
    weights = _softmax(rows[0] @ rows[1].transpose(-1, -2) * scale, visible, -1)
    return (weights @ rows[2]).permute(0, 3, 1, 2, 4).contiguous()


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
    dy, q, k, v = (t.permute(0, 2, 3, 1, 4) for t in (grad, q, k, v))  # (B, P, M, N, D)
    p = _softmax(q @ k.transpose(-1, -2) * scale, visible, -1)
    dp = dy @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    grads = (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dy)
    dq, dk, dv = (t.permute(0, 3, 1, 2, 4).contiguous() for t in grads)
    return dq, dk, dv
