"""Triton kernels of the LoRA layers around the library's large products, and what launches them.

Forward: x is copied once into rows [x | x Aᵀ | 0], the weight into [W | s B | 0]; one library product of K + r does
the rest. Backward: one pass over dY and x gives d = s dY B and each program's part of dA and dB; a second, small sum
adds the parts up: the same bits every time, no atomics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import tiles
from .common import jit, on, tl

MAX_REDUCED_RANK = 16  # above, partial sums of dA and dB weigh as much as dY, and library products are faster


class Dropout(NamedTuple):
    """Dropout with probability p: what is dropped follows from one int64 and the element's index; no seed, nothing."""

    seed: Tensor | None = None
    p: float = 0.0


NO_DROPOUT = Dropout()


@jit
def _dropped(x, row, offs_k, K, seed_ptr, threshold, keep_scale):
    """dropout(x) of elements (row, offs_k) of a (T, K) matrix: SplitMix64 of seed + index, as in reference.py."""
    z = (row[:, None].to(tl.int64) * K + offs_k[None, :] + 1) * -0x61C8864680B583EB + tl.load(seed_ptr)
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    kept = (((z ^ ((z >> 31) & 0x1FFFFFFFF)) >> 40) & 0xFFFFFF) >= threshold
    return tl.where(kept, x.to(tl.float32) * keep_scale, 0.0).to(x.dtype)


@jit
def lora_tail_kernel(
    x_ptr, a_ptr, seed_ptr, out_ptr, xa_ptr,
    keep_scale, threshold, T, stride_xt, stride_ot,
    K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dropout(x) Aᵀ, filled up with zeros, into the WIDTH columns of out (T, K + WIDTH) behind the first K.

    Without a seed, no dropout. With xa (T, R): x goes into the first K columns as well, and dropout(x) Aᵀ into xa."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = row < T
    offs_r = tl.arange(0, RANK)
    acc = tl.zeros([BLOCK_T, RANK], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = mask_t[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_xt + offs_k[None, :], mask=mask, other=0.0)
        if xa_ptr is not None:
            tl.store(out_ptr + row[:, None] * stride_ot + offs_k[None, :], x, mask=mask)
        if seed_ptr is not None:
            x = _dropped(x, row, offs_k, K, seed_ptr, threshold, keep_scale)
        a_ptrs = a_ptr + offs_r[None, :] * K + offs_k[:, None]
        a = tl.load(a_ptrs, mask=(offs_r < R)[None, :] & (offs_k < K)[:, None], other=0.0)  # [BLOCK_K, RANK]
        acc = tl.dot(x, a, acc=acc, input_precision="ieee")
    xa = acc.to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + row[:, None] * stride_ot + K + offs_r[None, :]
    tl.store(out_ptrs, xa, mask=mask_t[:, None] & (offs_r < WIDTH)[None, :])
    if xa_ptr is not None:
        xa_ptrs = xa_ptr + row[:, None] * R + offs_r[None, :]
        tl.store(xa_ptrs, xa, mask=mask_t[:, None] & (offs_r < R)[None, :])


@jit
def lora_weight_kernel(
    w_ptr, b_ptr, c_ptr, out_ptr,
    scaling_b, scaling_c, end_b, start_c, K, WIDTH,
    R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (N, K + WIDTH): W (N, K), then scaling_b · B in the rows before end_b, then scaling_c · C from start_c on."""
    n = tl.program_id(0)
    row = n.to(tl.int64)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + row * K + offs_k, mask=offs_k < K, other=0.0)
        tl.store(out_ptr + row * (K + WIDTH) + offs_k, w, mask=offs_k < K)
    offs_r = tl.arange(0, BLOCK_K)
    b = tl.load(b_ptr + row * R + offs_r, mask=(offs_r < R) & (n < end_b), other=0.0).to(tl.float32)
    mask_c = (offs_r >= R) & (offs_r < 2 * R) & (n >= start_c)
    c = tl.load(c_ptr + (row - start_c) * R + offs_r - R, mask=mask_c, other=0.0).to(tl.float32)
    tail = (scaling_b * b + scaling_c * c).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * (K + WIDTH) + K + offs_r, tail, mask=offs_r < WIDTH)


@jit
def lora_reduce_kernel(
    dy_ptr, x_ptr, xa_ptr, b_ptr, seed_ptr, d_ptr, da_ptr, db_ptr,
    scaling, keep_scale, threshold, T, stride_yt, stride_xt,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_T rows: d = scaling · dY B (T, RANK), zeros past R, and their part of dA and dB.

    da (programs, R, K) = dᵀ dropout(x), db (programs, R, N) = scaling · xaᵀ dY, both in fp32; None is left out."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = row < T
    offs_r = tl.arange(0, RANK)
    mask_r = offs_r < R
    if db_ptr is not None:
        xa_ptrs = xa_ptr + row[None, :] * R + offs_r[:, None]
        xa = tl.load(xa_ptrs, mask=mask_r[:, None] & mask_t[None, :], other=0.0)  # [RANK, BLOCK_T]
    d = tl.zeros([BLOCK_T, RANK], tl.float32)
    for n in range(0, N, BLOCK_C):
        offs_n = n + tl.arange(0, BLOCK_C)
        mask_n = offs_n < N
        dy_ptrs = dy_ptr + row[:, None] * stride_yt + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask_t[:, None] & mask_n[None, :], other=0.0)
        b_ptrs = b_ptr + offs_n[:, None] * R + offs_r[None, :]
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_C, RANK]
        d = tl.dot(dy, b, acc=d, input_precision="ieee")
        if db_ptr is not None:
            db = tl.dot(xa, dy, input_precision="ieee") * scaling  # [RANK, BLOCK_C]
            db_ptrs = db_ptr + (pid * R + offs_r[:, None]) * N + offs_n[None, :]
            tl.store(db_ptrs, db, mask=mask_r[:, None] & mask_n[None, :])
    d = (d * scaling).to(d_ptr.dtype.element_ty)
    tl.store(d_ptr + row[:, None] * RANK + offs_r[None, :], d, mask=mask_t[:, None])
    if da_ptr is not None:
        d = tl.trans(d)  # [RANK, BLOCK_T]
        for k in range(0, K, BLOCK_C):
            offs_k = k + tl.arange(0, BLOCK_C)
            mask_k = offs_k < K
            x_ptrs = x_ptr + row[:, None] * stride_xt + offs_k[None, :]
            x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
            if seed_ptr is not None:
                x = _dropped(x, row, offs_k, K, seed_ptr, threshold, keep_scale)
            da = tl.dot(d, x, input_precision="ieee")  # [RANK, BLOCK_C]
            da_ptrs = da_ptr + (pid * R + offs_r[:, None]) * K + offs_k[None, :]
            tl.store(da_ptrs, da, mask=mask_r[:, None] & mask_k[None, :])


def _drop(dropout: Dropout) -> tuple[float, int]:
    """1 / (1 − p) and the threshold on 24 bits."""
    return (1.0, 0) if dropout.seed is None else (1 / (1 - dropout.p), round(dropout.p * 2**24))


def tail_width(rank: int) -> int:
    """Columns of a tail that holds `rank`: a multiple of 16."""
    return -(-rank // tiles.LORA_TAIL) * tiles.LORA_TAIL


def launch_tail(
    x: Tensor, a: Tensor, out: Tensor, dropout: Dropout = NO_DROPOUT, xa: Tensor | None = None
) -> None:
    """Writes dropout(x (T, K)) Aᵀ of a (r, K) behind the first K columns of out (T, K + tail).

    Where xa (T, r) is given, writes xa and x's copy in out too; else out's first K columns are x."""
    (rows, wide), rank = x.shape, a.shape[0]
    config = tiles.lora_tail(x, dropout=dropout.seed is not None)
    with on(x.device):
        lora_tail_kernel[(-(-rows // config["BLOCK_T"]),)](
            x, a, dropout.seed, out, xa,
            *_drop(dropout), rows, x.stride(0), out.stride(0),
            K=wide, R=rank, RANK=tiles.block(rank), WIDTH=out.shape[1] - wide, **config,
        )  # fmt: skip


def launch_weight(
    weight: Tensor, b: Tensor, scaling: float, c: Tensor | None = None, scaling_c: float = 0.0
) -> Tensor:
    """[W | s B | 0] of W (N, K), B (n, r) in the first n rows; C (n, r), if given, behind B in the last n rows."""
    (rows, wide), (height, rank) = weight.shape, b.shape
    width = tail_width(rank if c is None else 2 * rank)
    out = weight.new_empty((rows, wide + width))
    with on(weight.device):
        lora_weight_kernel[(rows,)](
            weight.contiguous(), b.contiguous(), b if c is None else c.contiguous(), out,
            scaling, scaling_c, height, rows if c is None else rows - height, wide, width,
            R=rank, **tiles.lora_weight(width),
        )  # fmt: skip
    return out


def launch_reduce(
    dy: Tensor, x: Tensor, xa: Tensor, b: Tensor, scaling: float, dropout: Dropout,
    *, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dy (T, N), x (T, K), xa (T, r) -> d (T, 16), zeros past r, dA (r, K) and dB (N, r) in fp32; r at most 16."""
    (rows, n), k, rank = dy.shape, x.shape[1], b.shape[1]
    config = tiles.lora_reduce(dy.dtype)
    programs = -(-rows // config["BLOCK_T"])
    d = dy.new_empty((rows, tiles.LORA_TAIL))
    da = dy.new_empty((programs, rank, k), dtype=torch.float32) if need_a else None
    db = dy.new_empty((programs, rank, n), dtype=torch.float32) if need_b else None
    with on(dy.device):
        lora_reduce_kernel[(programs,)](
            dy, x, xa, b, dropout.seed, d, da, db,
            scaling, *_drop(dropout), rows, dy.stride(0), x.stride(0),
            N=n, K=k, R=rank, RANK=tiles.LORA_TAIL, **config,
        )  # fmt: skip
    return d, None if da is None else da.sum(0), None if db is None else db.sum(0).t()
