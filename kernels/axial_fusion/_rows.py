"""Triton kernels over the rows of a matrix: LayerNorm with its backward, and sums of columns.

A row is normalised where it is loaded: (x − mean) · rstd · γ + β in fp32, rounded as a LayerNorm of its own would
round it. Nothing is folded into the weights, which would subtract two large numbers where a row's mean is large."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels below then stay plain functions that nothing calls
    triton = tl = None

jit = (lambda function: function) if triton is None else triton.jit


@jit
def row_norm_fwd_kernel(
    x_ptr, gamma_ptr, beta_ptr, a_ptr, z_ptr, mean_ptr, rstd_ptr,
    eps, P, rows, stride_xb, stride_xp, stride_zt,
    C: tl.constexpr, BETA: tl.constexpr, THIN: tl.constexpr, RANK: tl.constexpr, TAIL: tl.constexpr,
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
    if BETA:
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
    C: tl.constexpr, DX: tl.constexpr, SUMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx (rows, C), and where SUMS this program's part of dgamma and dbeta, sums (programs, 2, C) in fp32.

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
        if SUMS:
            dgamma += dz * x
            dbeta += dz
        if DX:
            w = dz * gamma[None, :]
            w = w - (tl.sum(w, 1) / C)[:, None] - x * (tl.sum(w * x, 1) / C)[:, None]
            dx = (w * rstd[:, None]).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + wide * C + offs_c[None, :], dx, mask=inside)
    if SUMS:
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
