"""The Triton kernel of the relative-position terms of SAM's attention, and its launch.

A program takes BLOCK_M queries that lie in one line of the grid, a row or a column: they share the line's entries of
the table, so that their terms are one product. q is read as it lies, and terms are written as attention reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import tiles
from .common import jit, last_axis_contiguous, on, tl


@jit
def _line_terms(
    q_ptr, table_ptr, out_ptr, t, line, tile, length, keys,
    q_line, q_along, stride_q, out_line, out_along, stride_out,
    WINDOWED: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Terms of one tile of a line of `length` positions against `keys` keys.

    Where WINDOWED a tile runs over positions and their heads, in the order of the result; else it is of one head."""
    if WINDOWED:
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m, head, along = offs_m < length * M, offs_m % M, offs_m // M
    else:
        tiles_m = tl.cdiv(length, BLOCK_M)
        along = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m, head = along < length, tile // tiles_m
    t, line, head, along = t.to(tl.int64), line.to(tl.int64), head.to(tl.int64), along.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    q_ptrs = q_ptr + t * stride_q[0] + line * q_line + (along * q_along + head * stride_q[3])[:, None]
    q = tl.load(q_ptrs + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0)
    out_ptr += t * stride_out[0] + line * out_line
    offs_out = along * out_along + head * stride_out[3]
    for start in range(0, keys, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < keys
        entry = line % keys + keys - 1 - offs_k
        table_ptrs = table_ptr + entry[:, None] * D + offs_d[None, :]
        entries = tl.load(table_ptrs, mask=mask_k[:, None] & mask_d[None, :], other=0.0).to(q.dtype)
        terms = tl.dot(q, tl.trans(entries), input_precision="ieee").to(out_ptr.dtype.element_ty)
        out_ptrs = out_ptr + offs_out[:, None] + (offs_k.to(tl.int64) * stride_out[4])[None, :]
        tl.store(out_ptrs, terms, mask=mask_m[:, None] & mask_k[None, :])


@jit
def rel_terms_kernel(
    q_ptr, table_h_ptr, table_w_ptr, rel_h_ptr, rel_w_ptr,
    height, width, keys_h, keys_w, tiles_h, tiles_w,
    stride_q, stride_h, stride_w,
    WINDOWED: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Terms of q (T, h, w, M, D), an image after the other: `tiles_h` tiles a row, then `tiles_w` a column.

    Strides of the results are in the order (t, h, w, m, k)."""
    programs = height * tiles_h + width * tiles_w
    t, i = tl.program_id(0) // programs, tl.program_id(0) % programs
    if i < height * tiles_h:
        _line_terms(
            q_ptr, table_h_ptr, rel_h_ptr, t, i // tiles_h, i % tiles_h, width, keys_h,
            stride_q[1], stride_q[2], stride_q, stride_h[1], stride_h[2], stride_h,
            WINDOWED, M, D, BLOCK_M, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    else:
        i -= height * tiles_h
        _line_terms(
            q_ptr, table_w_ptr, rel_w_ptr, t, i // tiles_w, i % tiles_w, height, keys_w,
            stride_q[2], stride_q[1], stride_q, stride_w[2], stride_w[1], stride_w,
            WINDOWED, M, D, BLOCK_M, BLOCK_K, BLOCK_D,
        )  # fmt: skip


def empty_terms(q: Tensor, table_h: Tensor, table_w: Tensor, windowed: bool) -> tuple[Tensor, Tensor]:
    """rel_h and rel_w of q (T, h, w, M, D) and tables (2·keys − 1, D), uninitialised: as `rel_terms` gives them."""
    batch, height, width, heads, _ = q.shape
    keys_h, keys_w = ((table.shape[0] + 1) // 2 for table in (table_h, table_w))
    if windowed:
        queries = (batch, height, width, heads)
        return q.new_empty((*queries, keys_h)), q.new_empty((*queries, keys_w))
    tokens = height * width
    return q.new_empty((batch, heads, keys_h, tokens)), q.new_empty((batch, heads, tokens, keys_w))


def by_query(rel_h: Tensor, rel_w: Tensor, grid: torch.Size, windowed: bool) -> tuple[Tensor, Tensor]:
    """rel_h and rel_w of a grid (h, w) as views (T, h, w, M, keys)."""
    if windowed:
        return rel_h, rel_w
    rel_h, rel_w = rel_h.unflatten(3, grid), rel_w.unflatten(2, grid)
    return rel_h.permute(0, 3, 4, 1, 2), rel_w.permute(0, 2, 3, 1, 4)


def launch(q: Tensor, table_h: Tensor, table_w: Tensor, windowed: bool) -> tuple[Tensor, Tensor]:
    """rel_h and rel_w of q (T, h, w, M, D) and tables (2·keys − 1, D), contiguous, in q's dtype."""
    terms = empty_terms(q, table_h, table_w, windowed)
    if not q.numel():
        return terms[0].zero_(), terms[1].zero_()
    (q,) = last_axis_contiguous(q)
    batch, height, width, heads, dim = q.shape
    rel_h, rel_w = by_query(*terms, q.shape[1:3], windowed)
    keys_h, keys_w = rel_h.shape[-1], rel_w.shape[-1]
    config = tiles.rel_terms(q.dtype, dim, max(keys_h, keys_w), windowed)
    side = config["BLOCK_M"]
    tiles_h, tiles_w = (
        -(-length * heads // side) if windowed else heads * -(-length // side) for length in (width, height)
    )
    with on(q.device):
        rel_terms_kernel[(batch * (height * tiles_h + width * tiles_w),)](
            q, table_h.contiguous(), table_w.contiguous(), rel_h, rel_w,
            height, width, keys_h, keys_w, tiles_h, tiles_w,
            q.stride(), rel_h.stride(), rel_w.stride(), WINDOWED=windowed, M=heads, D=dim, **config,
        )  # fmt: skip
    return terms
