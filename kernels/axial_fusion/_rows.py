"""LayerNorm of rows and the thin products that follow it, shared by the kernels that project normalised rows.

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
def raw(x_ptr, offs, mask, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Columns c .. c + BLOCK_C − 1 of the rows at `offs`, in fp32, 0 past C."""
    offs_c = c + tl.arange(0, BLOCK_C)
    ptrs = x_ptr + offs[:, None] + offs_c[None, :]
    return tl.load(ptrs, mask=mask[:, None] & (offs_c < C)[None, :], other=0.0).to(tl.float32)


@jit
def normalised(x_ptr, offs, mask, mean, rstd, gamma_ptr, beta_ptr, c, C: tl.constexpr,
               NORM: tl.constexpr, BETA: tl.constexpr, BLOCK_C: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """The same columns of LN(x), or of x itself without NORM, in `dtype`."""
    z = raw(x_ptr, offs, mask, c, C, BLOCK_C)
    if NORM:
        offs_c = c + tl.arange(0, BLOCK_C)
        gamma = tl.load(gamma_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        z = (z - mean[:, None]) * rstd[:, None] * gamma[None, :]
        if BETA:
            z += tl.load(beta_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    return z.to(dtype)


@jit
def transposed(
    w_ptr, row, c, ROWS: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """W[row : row + ROWS, c : c + BLOCK_C]ᵀ of a contiguous W (..., C), zeros past its ends.  # [BLOCK_C, BLOCK_R]"""
    offs_r, offs_c = tl.arange(0, BLOCK_R), c + tl.arange(0, BLOCK_C)
    mask = (offs_c < C)[:, None] & (offs_r < ROWS)[None, :]
    return tl.load(w_ptr + (row + offs_r)[None, :] * C + offs_c[:, None], mask=mask, other=0.0)


@jit
def rows_kernel(
    x_ptr, gamma_ptr, beta_ptr, a_q_ptr, a_v_ptr, mean_ptr, rstd_ptr, z_ptr, xa_ptr,
    eps, N, P, rows, stride_xb, stride_xn, stride_xp, stride_zt, stride_at, v_column,
    C: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, NORM: tl.constexpr, BETA: tl.constexpr,
    LORA_Q: tl.constexpr, LORA_V: tl.constexpr, WRITE_Z: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of each row of x (B, N, P, C): mean, 1 / deviation, z = LN(x) where WRITE_Z, and z A_Qᵀ and z A_Vᵀ (rows, R).

    The latter start at columns 0 and `v_column` of xa, whose rows are `stride_at` apart."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = row < rows
    offs = (row // P // N) * stride_xb + (row // P % N) * stride_xn + (row % P) * stride_xp
    mean = tl.zeros([BLOCK_T], tl.float32)
    rstd = tl.full([BLOCK_T], 1.0, tl.float32)
    if NORM:
        for c in range(0, C, BLOCK_C):
            mean += tl.sum(raw(x_ptr, offs, mask, c, C, BLOCK_C), 1)
        mean = mean / C
        square = tl.zeros([BLOCK_T], tl.float32)
        for c in range(0, C, BLOCK_C):
            x = raw(x_ptr, offs, mask, c, C, BLOCK_C) - mean[:, None]
            square += tl.sum(tl.where((c + tl.arange(0, BLOCK_C) < C)[None, :], x * x, 0.0), 1)
        rstd = 1.0 / tl.sqrt(square / C + eps)
        tl.store(mean_ptr + row, mean, mask=mask)
        tl.store(rstd_ptr + row, rstd, mask=mask)
    if WRITE_Z:
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            z = normalised(
                x_ptr,
                offs,
                mask,
                mean,
                rstd,
                gamma_ptr,
                beta_ptr,
                c,
                C,
                NORM,
                BETA,
                BLOCK_C,
                z_ptr.dtype.element_ty,
            )
            tl.store(
                z_ptr + row[:, None] * stride_zt + offs_c[None, :],
                z,
                mask=mask[:, None] & (offs_c < C)[None, :],
            )
    offs_r = tl.arange(0, RANK)
    at = row[:, None] * stride_at + offs_r[None, :]
    mask_a = mask[:, None] & (offs_r < R)[None, :]
    if LORA_Q:
        acc = tl.zeros([BLOCK_T, RANK], tl.float32)
        for c in range(0, C, BLOCK_C):
            a = transposed(a_q_ptr, 0, c, R, C, RANK, BLOCK_C)  # [BLOCK_C, RANK]
            z = normalised(
                x_ptr, offs, mask, mean, rstd, gamma_ptr, beta_ptr, c, C, NORM, BETA, BLOCK_C, a.dtype
            )
            acc = tl.dot(z, a, acc=acc, input_precision="ieee")
        tl.store(xa_ptr + at, acc.to(xa_ptr.dtype.element_ty), mask=mask_a)
    if LORA_V:
        acc = tl.zeros([BLOCK_T, RANK], tl.float32)
        for c in range(0, C, BLOCK_C):
            a = transposed(a_v_ptr, 0, c, R, C, RANK, BLOCK_C)
            z = normalised(
                x_ptr, offs, mask, mean, rstd, gamma_ptr, beta_ptr, c, C, NORM, BETA, BLOCK_C, a.dtype
            )
            acc = tl.dot(z, a, acc=acc, input_precision="ieee")
        tl.store(xa_ptr + v_column + at, acc.to(xa_ptr.dtype.element_ty), mask=mask_a)


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
