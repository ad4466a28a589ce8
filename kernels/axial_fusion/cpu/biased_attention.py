"""Attention with SAM's decomposed bias in plain torch: what runs on a CPU, and where no kernel does.

The bias of a query against the key in row h and column w is bias_h[h] + bias_w[w], two small tables a query, never held
for all queries at once: computed block by block, forward and backward. Only where scores are few (`choose`), on a CPU,
does autograd keep the softmax, which saves computing it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import no_autocast, under_transform, without_overlap
from ..dispatch import plain_on
from ..ops.dense_linear import dense_product
from ..reference import blind_queries, unmasked

_SAVED = 1 << 24  # scores that autograd may keep for a backward: 64 MiB in fp32
_KEYS = 512  # of a query; with more, fp32 scores are computed again faster than read
# Scores that a block holds; half of it in a backward, which has three such tensors at a time.
_BLOCK = 1 << 22
# Fewest queries of a block on a CPU. From 768 queries torch's fused attention takes steps of 256: four of them keep two
# threads busy to the end.
_QUERIES = 1024

# An attention over biased keys: q (B, Q, M, D), k and v (B, K, M, D), bias_h (B, M, Q, H), bias_w (B, M, Q, W) with
# H · W = K, scale -> (B, Q, M, D).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def attend_plain(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor, scale: float) -> Tensor:
    """All scores at once, in fp32, by products that autograd and every transform see through."""
    dtype = q.dtype
    given = (q, k, v, bias_h, bias_w)
    with no_autocast(q):
        q, k, bias_h, bias_w = (_wide(t) for t in (q, k, bias_h, bias_w))
        v = v if dtype == torch.bfloat16 else _wide(v)
        # Masks cost a training step 5 %: they are left out where values can be read and every query has a key.
        blind = None
        traced = torch.compiler.is_compiling() or under_transform(given) or q.device.type == "meta"
        if traced or blind_queries(bias_h.detach(), bias_w.detach()).any():
            bias_h, bias_w, blind = unmasked(bias_h, bias_w)
        heads = bias_h.shape[:2]
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        scores = torch.baddbmm(_bias(bias_h, bias_w).flatten(0, 1), q, k.transpose(1, 2), alpha=scale)
        y = (scores.softmax(-1).to(v.dtype) @ v).unflatten(0, heads)
        return (y if blind is None else y.masked_fill(blind, 0.0)).transpose(1, 2).to(dtype)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor, scale: float) -> Tensor:
    """Fused attention, block by block; no gradient."""
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    keys, most, fewest = k.shape[2], _BLOCK, 1
    if q.device.type == "cpu" and q.shape[:3].numel() * keys > _BLOCK:
        most, fewest = _BLOCK // 2, _QUERIES  # stays in its cache
    for b, m, rows in _blocks(q, keys, most, fewest):
        bias = _bias(_wide(bias_h[b, m, rows]), _wide(bias_w[b, m, rows]))
        query, key, value = q[b, rows, m].transpose(1, 2), k[b, m], v[b, m]
        if q.device.type != "cpu":  # a GPU's SDPA takes only a bias of q's dtype, or misreads it
            query, key, value = _wide(query), _wide(key), _wide(value)
        with no_autocast(q):
            part = F.scaled_dot_product_attention(
                *without_overlap(query, key, value), attn_mask=bias, scale=scale
            )
        part = part.transpose(1, 2)
        if part.shape == q.shape:
            return part.to(q.dtype).contiguous()
        y[b, rows, m] = part
    return y


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor, y: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs, block by block, computed in fp32.

    Where scores are many, a block on a CPU is one head, whose five products are `dense_product`'s."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys = q.shape[1], k.shape[1]
    one_head = q.device.type == "cpu" and queries * keys > _KEYS**2
    most = min(queries * keys, _BLOCK // 2) if one_head else _BLOCK // 2
    dq, dbias_h, dbias_w = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, bias_h, bias_w))
    k, v = (t.transpose(1, 2).contiguous() for t in (k, v))  # (B, M, K, D)
    dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k, v))
    for b, m, rows in _blocks(q, keys, most):
        here = (b, m, rows)
        # (b·m, rows, D)
        query, dy, part = (_wide(t[b, rows, m]).transpose(1, 2).flatten(0, 1) for t in (q, grad, y))
        key, value = _wide(k[b, m]).flatten(0, 1), _wide(v[b, m]).flatten(0, 1)
        block_h, block_w, blind = unmasked(_wide(bias_h[here]), _wide(bias_w[here]))
        dy = dy.masked_fill(blind.flatten(0, 1), 0.0)
        scores = _bias(block_h, block_w).flatten(0, 1)  # (b·m, rows, K)
        query = query * scale
        p = scores.add_(dense_product(query, key)).softmax(-1)
        ds = dense_product(dy, value).sub_((dy * part).sum(-1, keepdim=True)).mul_(p)
        dv[b, m] += dense_product(dy.mT, p.mT).mT.view_as(dv[b, m])
        dk[b, m] += dense_product(query.mT, ds.mT).mT.view_as(dk[b, m])
        dq[b, rows, m] = (
            dense_product(ds, key.mT).mul_(scale).view_as(dq[b, rows, m].transpose(1, 2)).transpose(1, 2)
        )
        cells = ds.unflatten(-1, (bias_h.shape[-1], bias_w.shape[-1]))
        dbias_h[here] = cells.sum(-1).view_as(dbias_h[here])
        dbias_w[here] = cells.sum(-2).view_as(dbias_w[here])
    return dq, dk.transpose(1, 2).to(q.dtype), dv.transpose(1, 2).to(q.dtype), dbias_h, dbias_w


def backward_with_graph(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, of a forward in plain products: it holds all scores at once."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(forward(*inputs), wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needs)


def _wide(t: Tensor) -> Tensor:
    """Half precision in fp32: rounded scores of some tens would move the weights by per cents, and fp16's overflow."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _bias(bias_h: Tensor, bias_w: Tensor) -> Tensor:
    """(B, M, Q, H) and (B, M, Q, W) -> (B, M, Q, H·W)."""
    # the sum takes the order of its terms' axes, and flattening another order copies all of it
    return (bias_h.contiguous().unsqueeze(-1) + bias_w.contiguous().unsqueeze(-2)).flatten(-2)


def _blocks(q: Tensor, keys: int, most: int, fewest: int = 1) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of q (B, Q, M, D) along B, M and Q, of at most `most` scores (or of `fewest` queries) each.

    Queries are divided last: fused attention is slower on few of them."""
    batch, queries, heads, _ = q.shape
    rows = max(1, min(queries, max(fewest, most // max(1, keys))))
    m = max(1, min(heads, most // max(1, rows * keys)))
    b = max(1, min(batch, most // max(1, m * rows * keys)))
    for i, j, r in product(range(0, batch, b), range(0, heads, m), range(0, queries, rows)):
        yield slice(i, i + b), slice(j, j + m), slice(r, r + rows)


def choose(q: Tensor, keys: int, *others: Tensor) -> Attend | None:
    """`attend_plain` where autograd may keep the scores, `attend_blocks` without gradients, else None for the op."""
    tensors = (q, *others)
    # An exported graph runs without this package.
    if under_transform(tensors) or torch.compiler.is_exporting():
        return attend_plain
    if not plain_on(q):
        return None
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return None if torch.compiler.is_compiling() else attend_blocks
    few = keys <= _KEYS or q.dtype != torch.float32
    return attend_plain if few and q.shape[0] * q.shape[1] * q.shape[2] * keys <= _SAVED else None
