"""Triton kernels of the LoRA linear layer, and what launches them.

Forward: one product whose main loop multiplies each tile of x by A as well, so that x is read once for both; the
programs of the first columns store x Aᵀ. dX likewise from dY, W and B, with the gradient of x Aᵀ beside it. dA and dB
are products of a thin and a wide matrix over all rows: sums over slabs of rows, each with one writer, then over slabs:
the same bits every time, no atomics."""

from __future__ import annotations

import torch
from torch import Tensor

from axial_fusion._rows import jit, transposed
from axial_fusion._tiles import block
from axial_fusion.axial_attention import _on

try:
    import triton.language as tl
except ImportError:  # the kernels below then stay plain functions that nothing calls
    tl = None

ROWS_OF_A_SLAB = 4096  # of dA's and dB's sums: enough slabs to fill a GPU, few enough that their sum is cheap


@jit
def _dropped(x, row, offs_k, K, seed_ptr, threshold, keep_scale):
    """dropout(x) of elements (row, offs_k) of a (T, K) matrix: SplitMix64 of seed + index, as in reference.py."""
    z = (row[:, None].to(tl.int64) * K + offs_k[None, :] + 1) * -0x61C8864680B583EB + tl.load(seed_ptr)
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    kept = (((z ^ ((z >> 31) & 0x1FFFFFFFF)) >> 40) & 0xFFFFFF) >= threshold
    return tl.where(kept, x.to(tl.float32) * keep_scale, 0.0).to(x.dtype)


@jit
def lora_linear_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, seed_ptr, y_ptr, xa_ptr,
    scaling, keep_scale, threshold, T, N, stride_xt,
    K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (T, N), and xa = dropout(x) Aᵀ (T, R) from the programs of the first columns."""
    columns = (N + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % columns  # columns fastest: the rows of x are in the cache for them all
    row = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = row < T
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    xa = tl.zeros([BLOCK_T, RANK], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + row[:, None] * stride_xt + offs_k[None, :],
            mask=mask_t[:, None] & mask_k[None, :],
            other=0.0,
        )
        w_ptrs = w_ptr + offs_n[None, :].to(tl.int64) * K + offs_k[:, None]
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc=acc, input_precision="ieee")
        if LORA:
            if DROPOUT:
                x = _dropped(x, row, offs_k, K, seed_ptr, threshold, keep_scale)
            xa = tl.dot(x, transposed(a_ptr, 0, k, R, K, RANK, BLOCK_K), acc=xa, input_precision="ieee")
    if LORA:
        offs_r = tl.arange(0, RANK)
        xa = xa.to(xa_ptr.dtype.element_ty)
        if tile_n == 0:
            tl.store(
                xa_ptr + row[:, None] * R + offs_r[None, :], xa, mask=mask_t[:, None] & (offs_r < R)[None, :]
            )
        b_ptrs = b_ptr + offs_n[None, :] * R + offs_r[:, None]
        b = tl.load(b_ptrs, mask=(offs_r < R)[:, None] & mask_n[None, :], other=0.0)  # [RANK, BLOCK_N]
        acc += scaling * tl.dot(xa, b, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + row[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_n[None, :])


@jit
def lora_linear_dx_kernel(
    dy_ptr, w_ptr, a_ptr, b_ptr, seed_ptr, dx_ptr, d_ptr,
    scaling, keep_scale, threshold, T, K, stride_yt,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, LORA: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dX (T, K), and d = scaling · dY B (T, R) from the programs of the first columns."""
    columns = (K + BLOCK_K - 1) // BLOCK_K
    tile_k = tl.program_id(0) % columns
    row = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = row < T
    offs_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    offs_r = tl.arange(0, RANK)
    acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    d = tl.zeros([BLOCK_T, RANK], tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        dy_ptrs = dy_ptr + row[:, None] * stride_yt + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask_t[:, None] & mask_n[None, :], other=0.0)
        w_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
        w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(dy, w, acc=acc, input_precision="ieee")
        if LORA:
            b_ptrs = b_ptr + offs_n[:, None] * R + offs_r[None, :]
            b = tl.load(b_ptrs, mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0)  # [BLOCK_N, RANK]
            d = tl.dot(dy, b, acc=d, input_precision="ieee")
    if LORA:
        d = (scaling * d).to(d_ptr.dtype.element_ty)
        if tile_k == 0:
            tl.store(
                d_ptr + row[:, None] * R + offs_r[None, :], d, mask=mask_t[:, None] & (offs_r < R)[None, :]
            )
        a_ptrs = a_ptr + offs_r[:, None] * K + offs_k[None, :]
        a = tl.load(a_ptrs, mask=(offs_r < R)[:, None] & mask_k[None, :], other=0.0)  # [RANK, BLOCK_K]
        through = tl.dot(d, a, input_precision="ieee")
        if DROPOUT:
            through = _dropped(through, row, offs_k, K, seed_ptr, threshold, keep_scale)
        acc += through
    dx_ptrs = dx_ptr + row[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_k[None, :])


@jit
def thin_product_kernel(
    thin_ptr, wide_ptr, seed_ptr, out_ptr,
    keep_scale, threshold, T, C, stride_wt, slab,
    R: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Slab by slab of `slab` rows: thinᵀ wide, (R, C) of thin (T, R) and wide (T, C), in fp32."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_r = tl.arange(0, RANK)
    mask_r = offs_r < R
    start = tl.program_id(1).to(tl.int64) * slab
    acc = tl.zeros([RANK, BLOCK_C], tl.float32)
    for t in range(0, slab, BLOCK_T):
        row = start + t + tl.arange(0, BLOCK_T)
        mask_t = row < T
        thin = tl.load(
            thin_ptr + row[None, :] * R + offs_r[:, None], mask=mask_r[:, None] & mask_t[None, :], other=0.0
        )
        wide_ptrs = wide_ptr + row[:, None] * stride_wt + offs_c[None, :]
        wide = tl.load(wide_ptrs, mask=mask_t[:, None] & mask_c[None, :], other=0.0)
        if DROPOUT:
            wide = _dropped(wide, row, offs_c, C, seed_ptr, threshold, keep_scale)
        acc = tl.dot(thin, wide, acc=acc, input_precision="ieee")
    out_ptrs = out_ptr + (tl.program_id(1).to(tl.int64) * R + offs_r[:, None]) * C + offs_c[None, :]
    tl.store(out_ptrs, acc, mask=mask_r[:, None] & mask_c[None, :])


def _config(weight: Tensor, rank: int) -> dict[str, int]:
    """Tile of the two large products with W (N, K): what builds without spills for every architecture.

    fp32 is exact on the FMA units and takes a smaller one. Rows that are no multiple of 16 bytes are
    loaded an element at a time, and their pointers fill the registers."""
    if weight.dtype == torch.float32:
        return {"BLOCK_T": 64, "num_warps": 4, "num_stages": 2}
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return {"BLOCK_T": 64, "num_warps": 8, "num_stages": 2}
    if rank > 16:
        return {"BLOCK_T": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_T": 128, "num_warps": 8, "num_stages": 3 if rank else 2}


def _drop(seed: Tensor | None, p: float) -> tuple[float, int]:
    """1 / (1 − p) and the threshold on 24 bits."""
    return (1.0, 0) if seed is None else (1 / (1 - p), round(p * 2**24))


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, seed: Tensor | None,
    scaling: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (T, K) with contiguous rows -> y (T, N) and xa (T, r), all in x's dtype."""
    rows, wide, rank = x.shape[0], x.shape[1], 1 if a is None else a.shape[0]
    y = x.new_empty(rows, weight.shape[0])
    xa = x.new_empty((0,) if a is None else (rows, rank))
    config = _config(weight, 0 if a is None else rank)
    block_n = 64 if x.dtype == torch.float32 else 128
    grid = (-(-rows // config["BLOCK_T"]) * -(-weight.shape[0] // block_n),)
    with _on(x.device):
        lora_linear_fwd_kernel[grid](
            x, weight, bias, a, b, seed, y, xa,
            scaling, *_drop(seed, p), rows, weight.shape[0], x.stride(0),
            K=wide, R=rank, RANK=block(rank), BIAS=bias is not None, LORA=a is not None, DROPOUT=seed is not None,
            BLOCK_N=block_n, BLOCK_K=32, **config,
        )  # fmt: skip
    return y, xa


def launch_dx(
    dy: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    """dy (T, N) with contiguous rows -> dX (T, K) and d = scaling · dY B (T, r)."""
    rows, wide, rank = dy.shape[0], weight.shape[1], 1 if a is None else a.shape[0]
    dx, d = dy.new_empty(rows, wide), dy.new_empty((0,) if a is None else (rows, rank))
    config = _config(weight, 0 if a is None else rank)
    block_k = 64 if dy.dtype == torch.float32 else 128
    grid = (-(-rows // config["BLOCK_T"]) * -(-wide // block_k),)
    with _on(dy.device):
        lora_linear_dx_kernel[grid](
            dy, weight, a, b, seed, dx, d,
            scaling, *_drop(seed, p), rows, wide, dy.stride(0),
            N=weight.shape[0], R=rank, RANK=block(rank), LORA=a is not None, DROPOUT=seed is not None,
            BLOCK_K=block_k, BLOCK_N=32, **config,
        )  # fmt: skip
    return dx, d


def launch_thin(thin: Tensor, wide: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """thin (T, r)ᵀ · dropout(wide (T, C)) -> (r, C) in fp32."""
    (rows, rank), columns = thin.shape, wide.shape[1]
    slabs = max(1, -(-rows // ROWS_OF_A_SLAB))
    slab = block(-(-rows // slabs))
    slabs = max(1, -(-rows // slab))
    out = wide.new_empty(slabs, rank, columns, dtype=torch.float32)
    with _on(wide.device):
        thin_product_kernel[(-(-columns // 64), slabs)](
            thin, wide, seed, out,
            *_drop(seed, p), rows, columns, wide.stride(0), slab,
            R=rank, RANK=block(rank), DROPOUT=seed is not None, BLOCK_T=min(slab, 64), BLOCK_C=64,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out.sum(0)
