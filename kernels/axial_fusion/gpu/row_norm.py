"""Triton kernels over the rows of a matrix, LayerNorm with its backward and sums of columns, and their launches.

A row is normalised where it is loaded: (x − mean) · rstd · γ + β in fp32, rounded as a LayerNorm of its own would
round it. Nothing is folded into the weights, which would subtract two large numbers where a row's mean is large."""

from __future__ import annotations

import torch
from torch import Tensor

from . import tiles
from .common import jit, on, tl


@jit
def row_norm_fwd_kernel(
    x_ptr, gamma_ptr, beta_ptr, a_ptr, z_ptr, mean_ptr, rstd_ptr,
    eps, P, rows, stride_xb, stride_xp, stride_zt,
    C: tl.constexpr, THIN: tl.constexpr, RANK: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z = LN(x), mean and 1 / deviation of each row of x (B, P, C); a tile holds whole rows, so x is read once.

    Where THIN: z aᵀ of a (THIN, C) as well, into the TAIL columns behind z, filled up with zeros."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = row < rows
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    inside = mask[:, None] & mask_c[None, :]
    offs = (row // P).to(tl.int64) * stride_xb + (row % P).to(tl.int64) * stride_xp
    x = tl.load(x_ptr + offs[:, None] + offs_c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    x = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    tl.store(mean_ptr + row, mean, mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=mask)
    z = x * rstd[:, None] * tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if beta_ptr is not None:
        z += tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    z = z.to(z_ptr.dtype.element_ty)
    z_ptrs = z_ptr + row[:, None].to(tl.int64) * stride_zt
    tl.store(z_ptrs + offs_c[None, :], z, mask=inside)
    if THIN > 0:
        offs_r = tl.arange(0, RANK)
        a_ptrs = a_ptr + offs_r[:, None] * C + offs_c[None, :]
        a = tl.load(a_ptrs, mask=(offs_r < THIN)[:, None] & mask_c[None, :], other=0.0)  # [RANK, BLOCK_C]
        xa = tl.dot(z, tl.trans(a), input_precision="ieee").to(z.dtype)
        tl.store(z_ptrs + C + offs_r[None, :], xa, mask=mask[:, None] & (offs_r < TAIL)[None, :])


@jit
def row_norm_bwd_kernel(
    dz_ptr, x_ptr, mean_ptr, rstd_ptr, gamma_ptr, dx_ptr, sums_ptr,
    P, rows, stride_zt, stride_xb, stride_xp,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx (rows, C), and this program's part of dgamma and dbeta, sums (programs, 2, C) in fp32; None is left out.

    A program takes every programs-th tile of BLOCK_T rows. With x' = (x − mean) · rstd and w = dz · gamma:
    dx = rstd · (w − mean(w) − x' · mean(w x')), dgamma = Σ dz x', dbeta = Σ dz."""
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    dgamma = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    dbeta = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_T, rows, tl.num_programs(0) * BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        mask = row < rows
        inside = mask[:, None] & mask_c[None, :]
        offs = (row // P).to(tl.int64) * stride_xb + (row % P).to(tl.int64) * stride_xp
        wide = row[:, None].to(tl.int64)
        x = tl.load(x_ptr + offs[:, None] + offs_c[None, :], mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(dz_ptr + wide * stride_zt + offs_c[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=mask, other=0.0)
        x = tl.where(mask_c[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)
        if sums_ptr is not None:
            dgamma += dz * x
            dbeta += dz
        if dx_ptr is not None:
            w = dz * gamma[None, :]
            w = w - (tl.sum(w, 1) / C)[:, None] - x * (tl.sum(w * x, 1) / C)[:, None]
            dx = (w * rstd[:, None]).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + wide * C + offs_c[None, :], dx, mask=inside)
    if sums_ptr is not None:
        sums_ptrs = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + offs_c
        tl.store(sums_ptrs, tl.sum(dgamma, 0), mask=mask_c)
        tl.store(sums_ptrs + C, tl.sum(dbeta, 0), mask=mask_c)


@jit
def column_sums_kernel(
    x_ptr, sums_ptr, rows, stride_xt, slab,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of x (rows, C) over slabs of `slab` rows, sums (slabs, C) in fp32."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(1).to(tl.int64) * slab
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for t in range(0, slab, BLOCK_T):
        row = start + t + tl.arange(0, BLOCK_T)
        mask = (row < rows)[:, None] & (offs_c < C)[None, :]
        acc += tl.load(x_ptr + row[:, None] * stride_xt + offs_c[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * C + offs_c, tl.sum(acc, 0), mask=offs_c < C)


def _groups(x: Tensor) -> Tensor:
    """x (..., C) as (B, P, C), copied only where no such view exists."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(x.shape[0] if x.dim() > 2 else 1, -1, x.shape[-1])


def launch_forward(
    x: Tensor, gamma: Tensor, beta: Tensor | None, out: Tensor, eps: float, a: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (..., C) -> mean and rstd (T,); writes LN(x) to the first C columns of out (T, C or more).

    With a (r, C), out's other columns, a multiple of 16 that holds r, become [z aᵀ | 0]."""
    groups, channels, thin = _groups(x), x.shape[-1], 0 if a is None else a.shape[0]
    rows = groups.shape[0] * groups.shape[1]
    mean, rstd = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    config = tiles.norm(channels, thin)
    with on(x.device):
        row_norm_fwd_kernel[(-(-rows // config["BLOCK_T"]),)](
            groups, gamma.contiguous(), None if beta is None else beta.contiguous(), a, out, mean, rstd,
            eps, groups.shape[1], rows, groups.stride(0), groups.stride(1), out.stride(0),
            C=channels, THIN=thin, RANK=tiles.block(thin), TAIL=out.shape[1] - channels, **config,
        )  # fmt: skip
    return mean, rstd


def launch_backward(
    dz: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, *, need_x: bool, need_weights: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz (T, C) with contiguous rows, x (..., C) -> dx in x's shape and dtype, dgamma and dbeta (C,) in fp32."""
    groups, channels, rows = _groups(x), x.shape[-1], dz.shape[0]
    config = tiles.norm(channels)
    programs = min(tiles.NORM_PROGRAMS, -(-rows // config["BLOCK_T"]))
    dx = x.new_empty(x.shape) if need_x else None
    sums = x.new_empty((programs, 2, channels), dtype=torch.float32) if need_weights else None
    with on(x.device):
        row_norm_bwd_kernel[(programs,)](
            dz, groups, mean, rstd, gamma.contiguous(), dx, sums,
            groups.shape[1], rows, dz.stride(0), groups.stride(0), groups.stride(1),
            C=channels, **config,
        )  # fmt: skip
    dgamma, dbeta = (None, None) if sums is None else sums.sum(0).unbind()
    return dx, dgamma, dbeta


def launch_column_sums(x: Tensor) -> Tensor:
    """x (T, C) with contiguous rows -> sums of slabs of rows, (slabs, C) in fp32."""
    rows, channels = x.shape
    slab = tiles.column_slab(rows, channels)
    slabs, columns = -(-rows // slab), -(-channels // tiles.COLUMN_SUMS["BLOCK_C"])
    sums = x.new_empty((slabs, channels), dtype=torch.float32)
    with on(x.device):
        column_sums_kernel[(columns, slabs)](
            x, sums, rows, x.stride(0), slab, C=channels, **tiles.COLUMN_SUMS
        )
    return sums
