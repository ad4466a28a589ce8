"""Triton kernels of attention across slices at each position, and their launches.

N is tiny (9) and D is 32: the products cost little, and the op is bound by memory. A tile holds whole softmax rows, of
one position or of several, so the backward recomputes them and nothing but q, k and v is saved. Each output
is written once, without atomics. A program takes one head, or HEADS neighbouring heads as one batched product, whose
rows of D elements are contiguous in memory. Heads are the fastest axis of the grid: neighbours share cache lines.
Traffic: forward reads q, k, v and writes y; backward reads these and dY and writes dq, dk, dv.

Scores between positions of one tile, and of causal keys, are masked. A weight of 0 does not mask an inf or NaN, since
0 · inf is NaN. Where a tile holds several positions or the rule is causal, one sum over the tile tells whether it holds
an inf or NaN; only then is what was written computed again, each row of the values that it sees.

Tiles keep off wgmma, which Triton takes for 64 rows and 4 warps: on an H100 (Triton 3.6) the sum of D's two parts,
64 + 32, came out wrong there."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import aligned, jit, last_axis_contiguous, load, octaves, on, pointers, started, store, tl
from .tiles import Tile, choose, packed, split


@jit
def _rows(tile, batch, head, P, strides, SLICES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Rows of a tile, position by position and slice by slice: offset, slice, position in the tile, mask.

    `strides` of b, n, p and m. Offsets are [BLOCK] for one head, else [BLOCK, HEADS]."""
    row = tl.arange(0, BLOCK)
    local = row // SLICES
    index = row % SLICES
    position = tile * TILE.GROUP + local
    mask = (row < TILE.GROUP * SLICES) & (position < P)
    offs = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    offs += index.to(tl.int64) * strides[1] + position.to(tl.int64) * strides[2]
    if TILE.HEADS > 1:
        offs = offs[:, None] + (tl.arange(0, TILE.HEADS).to(tl.int64) * strides[3])[None, :]
    return offs, index, local, mask


@jit
def _real(index, mask, lengths_ptr, batch):
    """Mask of the rows of keys that count. Those past the length may hold anything, so that they are not read."""
    if lengths_ptr is not None:
        mask = mask & (index < tl.load(lengths_ptr + batch))
    return mask


@jit
def _of_keys(a, b, real, lengths_ptr):
    """Gradients of keys a b [..., BLOCK_K, D], 0 past the length."""
    x = tl.dot(a, b, input_precision="ieee")
    if lengths_ptr is not None:
        x = tl.where(real[:, None] if len(x.shape) == 2 else real[None, :, None], x, 0.0)
    return x


@jit
def _visible(queries, keys, NQ: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr):
    """Scores that count: same position, rows that count, and the causal rule.  # [BLOCK_Q, BLOCK_K]

    `queries` and `keys`: each row's slice, position in the tile, and mask."""
    index_q, local_q, mask_q = queries
    index_k, local_k, mask_k = keys
    visible = (local_q[:, None] == local_k[None, :]) & mask_q[:, None] & mask_k[None, :]
    if CAUSAL:
        visible = visible & (index_k[None, :] <= index_q[:, None] + (N - NQ))
    return visible


@jit
def _probabilities(s, visible, scale):
    """Softmax rows of scores s before their division: exp(scale · s − maximum), and 1 / its row sums.

    s [..., BLOCK_Q, BLOCK_K]; `scale` may have any sign."""
    AXIS: tl.constexpr = len(s.shape) - 1
    s = tl.where(visible, s * octaves(scale), -float("inf"))
    top = tl.max(s, AXIS)
    p = tl.exp2(s - tl.expand_dims(tl.where(top == -float("inf"), 0.0, top), AXIS))
    total = tl.sum(p, AXIS)
    return p, 1.0 / tl.where(total == 0.0, 1.0, total)  # a query without keys gives 0


@jit
def _apart(x, GROUP: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether rows of a tile must be kept apart: x holds an inf or NaN, and some pairs of rows are masked."""
    if GROUP > 1 or CAUSAL:
        return tl.sum(x * 0.0) != 0.0
    else:
        return False


@jit
def _seen(x, visible, apart):
    """Scores' values x [..., R, C], 0 where they do not count; done where `apart`."""
    if apart:
        x = tl.where(visible, x, 0.0)
    return x


@jit
def _row_by_row(out, a, x, visible, factor, D: tl.constexpr):
    """Write factor · a x over what `out` holds, each row of the rows of x that are `visible` [R, C] to it alone.

    a [..., R, C] is 0 elsewhere. `out` and `x`: pointer, offsets and mask of rows. Rare, so 16 columns at a time: what
    lies in registers here, the whole kernel pays for."""
    out_ptr, offs_out, mask_out = out
    x_ptr, offs_x, mask_x = x
    tl.debug_barrier()  # writes before these
    rows = tl.arange(0, visible.shape[0])
    for r in range(visible.shape[0]):
        seen = tl.max(((rows == r)[:, None] & visible).to(tl.int32), 0) > 0  # [C]
        for start in range(0, D, 16):
            columns = start + tl.arange(0, 16) < D
            ptrs, mask = pointers(x_ptr + start, offs_x, mask_x & seen, 0, 16, 16)
            part = tl.load(ptrs, mask=mask & columns, other=0.0)
            part = part if len(offs_x.shape) == 1 else part.permute(1, 0, 2)
            y = (tl.dot(a, part, input_precision="ieee") * factor).to(out_ptr.dtype.element_ty)
            ptrs, mask = pointers(out_ptr + start, offs_out, mask_out & (rows == r), 0, 16, 16)
            tl.store(ptrs, y if len(offs_out.shape) == 1 else y.permute(1, 0, 2), mask=mask & columns)


@jit
def _place(tiles, M, HEADS: tl.constexpr):
    """A program's tile, batch element and first head."""
    groups = M // HEADS
    pid = tl.program_id(0)
    return (pid // groups) % tiles, pid // (groups * tiles), pid % groups * HEADS


@jit
def axial_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, y_ptr,
    scale, sizes,
    stride_q, stride_k, stride_v,
    NQ: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """y (B, Nq, P, M, D), contiguous. Tiles of q, k and v are [HEADS, rows, columns], without HEADS where it is 1."""
    D: tl.constexpr = DIM.D
    D0: tl.constexpr = DIM.D0
    D1: tl.constexpr = DIM.D1
    P, M, tiles = sizes
    tile, batch, head = _place(tiles, M, TILE.HEADS)
    stride_yn = tl.cast(P, tl.int64) * M * D
    stride_y = (NQ * stride_yn, stride_yn, M * D, D)
    offs_q, index_q, local_q, mask_q = _rows(tile, batch, head, P, stride_q, NQ, TILE.BLOCK_Q, TILE)
    offs_k, index_k, local_k, mask_k = _rows(tile, batch, head, P, stride_k, N, TILE.BLOCK_K, TILE)
    offs_v, _, _, _ = _rows(tile, batch, head, P, stride_v, N, TILE.BLOCK_K, TILE)
    offs_y, _, _, _ = _rows(tile, batch, head, P, stride_y, NQ, TILE.BLOCK_Q, TILE)
    real_k = _real(index_k, mask_k, lengths_ptr, batch)

    q0 = load(q_ptr, offs_q, mask_q, 0, D0, D)  # [HEADS, BLOCK_Q, D0]
    k0 = load(k_ptr, offs_k, real_k, 0, D0, D)  # [HEADS, BLOCK_K, D0]
    v0 = load(v_ptr, offs_v, real_k, 0, D0, D)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [HEADS, BLOCK_Q, BLOCK_K]
    if D1 > 0:
        q1 = load(q_ptr, offs_q, mask_q, D0, D1, D)
        k1 = load(k_ptr, offs_k, real_k, D0, D1, D)
        s = tl.dot(q1, tl.trans(k1), acc=s, input_precision="ieee")

    visible = _visible((index_q, local_q, mask_q), (index_k, local_k, real_k), NQ, N, CAUSAL)
    p, share = _probabilities(s, visible, scale)
    share = tl.expand_dims(share, len(s.shape) - 1)
    p = p.to(v0.dtype)
    y0 = tl.dot(p, v0, input_precision="ieee") * share
    store(y_ptr, offs_y, mask_q, y0, 0, D0, D)
    apart = _apart(y0, TILE.GROUP, CAUSAL)
    if D1 > 0:
        v1 = load(v_ptr, offs_v, real_k, D0, D1, D)
        y1 = tl.dot(p, v1, input_precision="ieee") * share
        store(y_ptr, offs_y, mask_q, y1, D0, D1, D)
        apart = apart | _apart(y1, TILE.GROUP, CAUSAL)
    if apart:
        _row_by_row((y_ptr, offs_y, mask_q), p, (v_ptr, offs_v, real_k), visible, share, D)


@jit
def axial_attention_bwd_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, lengths_ptr, dq_ptr, dk_ptr, dv_ptr,
    scale, sizes,
    stride_g, stride_q, stride_k, stride_v,
    NQ: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dq (B, Nq, P, M, D), dk and dv (B, N, P, M, D), contiguous; g is dY. Tiles as in the forward."""
    D: tl.constexpr = DIM.D
    D0: tl.constexpr = DIM.D0
    D1: tl.constexpr = DIM.D1
    P, M, tiles = sizes
    tile, batch, head = _place(tiles, M, TILE.HEADS)
    stride_n = tl.cast(P, tl.int64) * M * D  # of what is written
    stride_dq = (NQ * stride_n, stride_n, M * D, D)
    stride_dk = (N * stride_n, stride_n, M * D, D)
    offs_g, index_q, local_q, mask_q = _rows(tile, batch, head, P, stride_g, NQ, TILE.BLOCK_Q, TILE)
    offs_q, _, _, _ = _rows(tile, batch, head, P, stride_q, NQ, TILE.BLOCK_Q, TILE)
    offs_k, index_k, local_k, mask_k = _rows(tile, batch, head, P, stride_k, N, TILE.BLOCK_K, TILE)
    offs_v, _, _, _ = _rows(tile, batch, head, P, stride_v, N, TILE.BLOCK_K, TILE)
    offs_dq, _, _, _ = _rows(tile, batch, head, P, stride_dq, NQ, TILE.BLOCK_Q, TILE)
    offs_dk, _, _, _ = _rows(tile, batch, head, P, stride_dk, N, TILE.BLOCK_K, TILE)
    real_k = _real(index_k, mask_k, lengths_ptr, batch)

    q0 = load(q_ptr, offs_q, mask_q, 0, D0, D)  # [HEADS, BLOCK_Q, D0]
    k0 = load(k_ptr, offs_k, real_k, 0, D0, D)  # [HEADS, BLOCK_K, D0]
    g0 = load(g_ptr, offs_g, mask_q, 0, D0, D)
    v0 = load(v_ptr, offs_v, real_k, 0, D0, D)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [HEADS, BLOCK_Q, BLOCK_K]
    dp = tl.dot(g0, tl.trans(v0), input_precision="ieee")
    if D1 > 0:
        q1 = load(q_ptr, offs_q, mask_q, D0, D1, D)
        k1 = load(k_ptr, offs_k, real_k, D0, D1, D)
        g1 = load(g_ptr, offs_g, mask_q, D0, D1, D)
        v1 = load(v_ptr, offs_v, real_k, D0, D1, D)
        s = tl.dot(q1, tl.trans(k1), acc=s, input_precision="ieee")
        dp = tl.dot(g1, tl.trans(v1), acc=dp, input_precision="ieee")

    visible = _visible((index_q, local_q, mask_q), (index_k, local_k, real_k), NQ, N, CAUSAL)
    apart = _apart(s + dp, TILE.GROUP, CAUSAL)
    p, share = _probabilities(s, visible, scale)
    AXIS: tl.constexpr = len(s.shape) - 1
    p = _seen(p * tl.expand_dims(share, AXIS), visible, apart)
    dp = _seen(dp, visible, apart | (lengths_ptr is not None))  # 0 · inf would be NaN
    ds = _seen(p * (dp - tl.expand_dims(tl.sum(p * dp, AXIS), AXIS)) * scale, visible, apart)
    p = tl.trans(p.to(q0.dtype))  # [HEADS, BLOCK_K, BLOCK_Q]
    ds = ds.to(q0.dtype)
    ds_t = tl.trans(ds)
    store(dv_ptr, offs_dk, mask_k, _of_keys(p, g0, real_k, lengths_ptr), 0, D0, D)
    store(dq_ptr, offs_dq, mask_q, tl.dot(ds, k0, input_precision="ieee"), 0, D0, D)
    store(dk_ptr, offs_dk, mask_k, _of_keys(ds_t, q0, real_k, lengths_ptr), 0, D0, D)
    if D1 > 0:
        store(dv_ptr, offs_dk, mask_k, _of_keys(p, g1, real_k, lengths_ptr), D0, D1, D)
        store(dq_ptr, offs_dq, mask_q, tl.dot(ds, k1, input_precision="ieee"), D0, D1, D)
        store(dk_ptr, offs_dk, mask_k, _of_keys(ds_t, q1, real_k, lengths_ptr), D0, D1, D)
    if apart:
        _row_by_row((dk_ptr, offs_dk, mask_k), ds_t, (q_ptr, offs_q, mask_q), tl.trans(visible), 1.0, D)
        _row_by_row((dq_ptr, offs_dq, mask_q), ds, (k_ptr, offs_k, real_k), visible, 1.0, D)
        _row_by_row((dv_ptr, offs_dk, mask_k), p, (g_ptr, offs_g, mask_q), tl.trans(visible), 1.0, D)


class _Config(NamedTuple):
    """What a launch takes from sizes and tile alone."""

    programs: int
    shape: tuple[int, int, int]
    """P, M, and tiles of a batch element."""
    constants: dict[str, Any]
    mark: object
    """Stands for all of it in a key: hashed in no time."""


@lru_cache(maxsize=256)
def _config(tile: Tile, sizes: torch.Size, slices: int, causal: bool) -> _Config:
    """For q of `sizes` and N slices."""
    batch, num_queries, positions, heads, dim = sizes
    constants: dict[str, Any] = {"CAUSAL": causal, "NQ": num_queries, "N": slices, "DIM": split(dim)}
    constants |= packed(tile, num_queries, slices, heads)
    count = -(-positions // constants["TILE"].GROUP)
    programs = batch * count * (heads // constants["TILE"].HEADS)
    return _Config(programs, (positions, heads, count), constants, object())


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """q (B, Nq, P, M, D), k and v (B, N, P, M, D), lengths (B,) -> y (B, Nq, P, M, D), contiguous."""
    q, k, v = last_axis_contiguous(q, k, v)
    lengths = None if lengths is None else lengths.contiguous()
    sizes, slices = q.shape, k.shape[1]
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    if slices == 0:
        return y.zero_()
    tile = choose("axial_attention", q, max(sizes[1], slices), sizes[4])
    config = _config(tile, sizes, slices, causal)
    strides = q.stride(), k.stride(), v.stride()
    key = None
    if lengths is None and aligned(q, k, v, y):
        key = "forward", config.mark, q.dtype, q.device, strides
    args = q, k, v, lengths, y, scale, config.shape, *strides
    with on(q.device):
        started(axial_attention_fwd_kernel, config.programs, args, config.constants, key)
    return y


def launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous; `grad` is like q and may have any strides."""
    grad, q, k, v = last_axis_contiguous(grad, q, k, v)
    lengths = None if lengths is None else lengths.contiguous()
    sizes, slices = q.shape, k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    tile = choose("axial_attention_backward", q, max(sizes[1], slices), sizes[4])
    config = _config(tile, sizes, slices, causal)
    strides = grad.stride(), q.stride(), k.stride(), v.stride()
    key = None
    if lengths is None and aligned(grad, q, k, v, dq, dk, dv):
        key = "backward", config.mark, q.dtype, q.device, strides
    args = grad, q, k, v, lengths, dq, dk, dv, scale, config.shape, *strides
    with on(q.device):
        started(axial_attention_bwd_kernel, config.programs, args, config.constants, key)
    return dq, dk, dv
