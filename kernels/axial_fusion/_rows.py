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
