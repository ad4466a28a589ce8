"""Every op in plain torch: the specification that kernels, tests and benchmarks are held against.

Any device, any float dtype; half precision is computed in fp32 and rounded once at the end of each op.
Letters: B slice groups, N slices, P = H'·W' token positions of a slice, C channels, M heads, D = C / M,
r LoRA rank. "Axial" is the paper's word for *across the slices of a group, at one position*; many vision
papers use it for the rows and columns of one image, which is not meant here.

Source: AFTer-SAM (WACV 2024), section 3.4; SAM's decomposed relative position: MViTv2, arXiv 2112.01526, eq. 4;
LoRA: arXiv 2106.09685, eq. 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LoRA(NamedTuple):
    """A low-rank update of one projection: ΔW = scaling · b a."""

    a: Tensor  # (r, C)
    b: Tensor  # (C, r)
    scaling: float = 1.0  # alpha / r


class AttentionWeights(NamedTuple):
    """Weights of one half of the op; `norm_weight` None leaves the LayerNorm out."""

    qkv_weight: Tensor  # (3C, C), rows q, k, v
    qkv_bias: Tensor | None  # (3C,)
    out_weight: Tensor  # (C, C)
    out_bias: Tensor | None  # (C,)
    norm_weight: Tensor | None = None  # (C,)
    norm_bias: Tensor | None = None  # (C,)
    lora_q: LoRA | None = None
    lora_v: LoRA | None = None


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention across slices at each position: q (B, Nq, P, M, D), k and v (B, N, P, M, D) -> (B, Nq, P, M, D).

    `causal`: query i sees keys 0 .. i + N − Nq. `lengths` (B,): group b has keys 0 .. lengths[b] − 1.
    A query that sees no key gives 0."""
    dtype, scale = q.dtype, _scale(q, scale)
    if causal and q.shape[1] > 1:  # the last query sees all keys
        parts = causal_parts(q, k, v)
        return torch.cat([axial_attention(*part, scale=scale, lengths=lengths) for part in parts], 1)
    q, k, v = _accurate(q, *real_keys(lengths, k, v))
    scores = scale * torch.einsum("bnpmd,bkpmd->bpmnk", q, k)
    visible = axial_mask(q.shape[1], k.shape[1], causal=False, lengths=lengths, device=q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1)
    if visible is not None:
        weights = weights.masked_fill(~visible, 0.0)  # a row without keys is NaN after the softmax
    return torch.einsum("bpmnk,bkpmd->bnpmd", weights, v).to(dtype)


def causal_parts(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each query (B, 1, ...) with the keys and values that it sees: the others may hold inf or NaN."""
    queries, keys = q.shape[1], k.shape[1]
    ends = [max(0, i + 1 + keys - queries) for i in range(queries)]
    return [(q[:, i : i + 1], k[:, :end], v[:, :end]) for i, end in enumerate(ends)]


def axial_mask(
    num_queries: int, num_keys: int, *, causal: bool, lengths: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which keys each query of `axial_attention` sees: (B or 1, 1, 1, Nq, N), or None for all of them."""
    visible = None
    key = torch.arange(num_keys, device=device)
    if causal:
        last = torch.arange(num_queries, device=device) + (num_keys - num_queries)
        visible = (key <= last[:, None])[None, None, None]
    if lengths is not None:
        real = (key < lengths[:, None])[:, None, None, None]
        visible = real if visible is None else visible & real
    return visible


def real_keys(lengths: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v (B, N, ...) with 0 in place of the keys past `lengths`: these may hold anything, and 0 · NaN is NaN."""
    if lengths is None:
        return k, v
    past = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
    past = past.view(*past.shape, *(1,) * (k.dim() - 2))
    return k.masked_fill(past, 0.0), v.masked_fill(past, 0.0)


def slice_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention among the positions of each slice: q, k, v (B, N, P, M, D) -> (B, N, P, M, D)."""
    dtype, scale = q.dtype, _scale(q, scale)
    q, k, v = _accurate(q, k, v)
    weights = (scale * torch.einsum("bnpmd,bnkmd->bnmpk", q, k)).softmax(-1)
    return torch.einsum("bnmpk,bnkmd->bnpmd", weights, v).to(dtype)


def joint_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Full 3D attention, every token with every token of its group: (B, N, P, M, D) -> the same.

    The paper's first equation, which the two functions above factorise: N·P comparisons a token instead of N + P."""
    flat = (t.flatten(1, 2).unsqueeze(1) for t in (q, k, v))
    return slice_attention(*flat, scale=scale).view_as(q)


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    grid: tuple[int, int],
    scale: float | None = None,
) -> Tensor:
    """SAM's attention with decomposed relative position over one grid (H', W').

    q, k, v (B, P, M, D); rel_h (B, M, H', P) and rel_w (B, M, P, W') are the bias of each query against each
    row and each column of keys -> (B, P, M, D). A query whose bias is -inf throughout sees no key and gives 0."""
    dtype, scale = q.dtype, _scale(q, scale)
    q, k, v, rel_h, rel_w = _accurate(q, k, v, rel_h, rel_w)
    rel_h, rel_w, blind = unmasked(rel_h.transpose(-1, -2), rel_w)  # (B, M, P, H'), (B, M, P, W')
    bias = rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)  # (B, M, P, H', W')
    scores = scale * torch.einsum("bpmd,bkmd->bmpk", q, k) + bias.flatten(-2)
    weights = scores.softmax(-1).masked_fill(blind, 0.0)
    return torch.einsum("bmpk,bkmd->bpmd", weights, v).to(dtype)


def rel_terms(
    q: Tensor, table_h: Tensor, table_w: Tensor, *, windowed: bool = False
) -> tuple[Tensor, Tensor]:
    """SAM's relative-position terms of q (T, h, w, M, D): its products with tables (2·keys − 1, D) of distances.

    rel_h and rel_w are (T, M, keys, h·w) and (T, M, h·w, keys), or where `windowed` both (T, h, w, M, keys)."""
    dtype = q.dtype
    q, table_h, table_w = _accurate(q, table_h, table_w)
    rows, columns = (
        table[distances(table.shape[0], length, q.device)]
        for table, length in zip((table_h, table_w), q.shape[1:3], strict=True)
    )  # (h, keys, D), (w, keys, D)
    rel_h = torch.einsum("thwmd,hkd->thwmk", q, rows).to(dtype)
    rel_w = torch.einsum("thwmd,wkd->thwmk", q, columns).to(dtype)
    if windowed:
        return rel_h, rel_w
    return rel_h.permute(0, 3, 4, 1, 2).flatten(3), rel_w.permute(0, 3, 1, 2, 4).flatten(2, 3)


def distances(entries: int, length: int, device: torch.device) -> Tensor:
    """Indices (length, keys) of query i and key j in a table of 2·keys − 1: (i mod keys) − j + keys − 1."""
    keys = (entries + 1) // 2
    i = torch.arange(length, device=device) % keys
    j = torch.arange(keys, device=device)
    return i[:, None] - j + keys - 1


def unmasked(bias_h: Tensor, bias_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bias (..., H) and (..., W) with 0 for queries that see no key, and a mask of these queries (..., 1).

    A softmax over -inf alone would be NaN, in its gradient too."""
    blind = blind_queries(bias_h, bias_w)
    return bias_h.masked_fill(blind, 0.0), bias_w.masked_fill(blind, 0.0), blind


def blind_queries(bias_h: Tensor, bias_w: Tensor) -> Tensor:
    """Which queries see no key, from their bias (..., H) and (..., W): (..., 1)."""
    return (bias_h.amax(-1, keepdim=True) == -torch.inf) | (bias_w.amax(-1, keepdim=True) == -torch.inf)


def window_attention(
    qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, *, window: int, scale: float | None = None
) -> Tensor:
    """SAM's windowed attention on an unpadded grid: qkv (B, H', W', 3, M, D) -> (B, H', W', M, D).

    SAM pads the grid to whole windows after the norm, so padded tokens are keys and values that hold
    `qkv_bias` (3·M·D,) alone; they are made here instead of projected. rel_h and rel_w (B, H', W', M, window) are
    the bias of each query against the rows and the columns of its window, padding included. A query whose bias is -inf
    throughout gives 0."""
    batch, height, width, _, heads, dim = qkv.shape
    dtype, scale = qkv.dtype, dim**-0.5 if scale is None else scale
    down, right = -height % window, -width % window
    qkv, qkv_bias, rel_h, rel_w = _accurate(qkv, qkv_bias, rel_h, rel_w)
    pad = qkv_bias.view(3, heads, dim)
    qkv = torch.cat([qkv, pad.expand(batch, height, right, 3, heads, dim)], 2)
    qkv = torch.cat([qkv, pad.expand(batch, down, width + right, 3, heads, dim)], 1)
    rel_h, rel_w = (F.pad(rel, (0, 0, 0, 0, 0, right, 0, down)) for rel in (rel_h, rel_w))

    def windows(t: Tensor) -> Tensor:  # (B, Hp, Wp, ...) -> (B, rows, columns, window², ...)
        t = t.unflatten(2, (-1, window)).unflatten(1, (-1, window))
        return t.transpose(2, 3).flatten(3, 4)

    q, k, v = windows(qkv).unbind(4)  # each (B, rows, columns, window², M, D)
    bias_h, bias_w, blind = unmasked(windows(rel_h), windows(rel_w))
    bias = bias_h.unsqueeze(-1) + bias_w.unsqueeze(-2)  # (B, rows, columns, q, M, window, window)
    scores = scale * torch.einsum("brcqmd,brckmd->brcqmk", q, k) + bias.flatten(-2)
    y = torch.einsum("brcqmk,brckmd->brcqmd", scores.softmax(-1).masked_fill(blind, 0.0), v)
    grid: Tensor = (
        y.unflatten(3, (window, window)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    )  # (B, Hp, Wp, M, D)
    return grid[:, :height, :width].to(dtype)


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
) -> Tensor:
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ: x (..., K), weight (N, K), a (r, K), b (N, r) -> (..., N).

    Dropout needs its int64 `seed`, a tensor of one element."""
    dtype = x.dtype
    x, weight = _accurate(x, weight)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if lora_a is not None and lora_b is not None:
        if dropout_p > 0:
            assert seed is not None
            x = x * dropout_mask(x.shape, dropout_p, seed).to(x.dtype) / (1 - dropout_p)
        y = y + scaling * (x @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T
    return y.to(dtype)


def dropout_mask(shape: Sequence[int], p: float, seed: Tensor) -> Tensor:
    """Which elements dropout keeps: a bool tensor, a function of `seed` and the element's index alone.

    SplitMix64 of seed + index, top 24 bits against p, so that every backend, a compiled graph and a
    checkpoint's second pass draw the same. Source: Steele et al., OOPSLA 2014, figure 17."""
    count = 1
    for size in shape:
        count *= size
    z = torch.arange(1, count + 1, device=seed.device) * -0x61C8864680B583EB + seed.reshape(())
    z = (z ^ _shift_right(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shift_right(z, 27)) * -0x6B2FB644ECCEEE15
    return (_shift_right(z ^ _shift_right(z, 31), 40) >= round(p * 2**24)).view(tuple(shape))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis, computed in fp32 or better; the identity where `weight` is None."""
    if weight is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), None if bias is None else bias.to(wide), eps)
    return y.to(x.dtype)


def axial_fusion_attention(
    x: Tensor,
    inter: AttentionWeights | None,
    intra: AttentionWeights | None,
    *,
    num_heads: int,
    residual: bool = True,
    query_index: Sequence[int] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The paper's pair of attentions on x (B, N, P, C):

        z' = x  + FC_inter(Attn_N(LN(x)))      across the slices, at each position
        y  = z' + FC_intra(Attn_P(LN(z')))     among the positions of each slice

    `query_index` keeps those slices of the result alone; `residual` False returns the last FC without its z'."""

    def projections(z: Tensor, w: AttentionWeights) -> tuple[Tensor, Tensor, Tensor]:
        z = layer_norm(z, w.norm_weight, w.norm_bias, eps)
        weights = w.qkv_weight.chunk(3)
        biases = (None, None, None) if w.qkv_bias is None else w.qkv_bias.chunk(3)
        q, k, v = (
            lora_linear(
                z,
                weight,
                bias,
                *((None, None) if lora is None else lora[:2]),
                scaling=lora.scaling if lora else 1.0,
            )
            for weight, bias, lora in zip(weights, biases, (w.lora_q, None, w.lora_v), strict=True)
        )
        return tuple(t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))

    index = slice(None) if query_index is None else list(query_index)
    if inter is not None:
        q, k, v = projections(x, inter)
        update = lora_linear(axial_attention(q[:, index], k, v).flatten(3), inter.out_weight, inter.out_bias)
        x = x[:, index] + update if residual or intra is not None else update
    else:
        x = x[:, index]
    if intra is not None:
        update = lora_linear(
            slice_attention(*projections(x, intra)).flatten(3), intra.out_weight, intra.out_bias
        )
        x = x + update if residual else update
    return x


def _accurate(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in fp32, or in their own dtype where that is wider."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """z >> bits with zeros shifted in, as for an unsigned integer."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
