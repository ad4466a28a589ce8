"""Triton kernels of SAM's attention with relative positions: one set for a whole grid and for windows of it.

A grid is one window. Queries are the window's tokens that exist, BLOCK_M at a time. A tile of keys is whole image
rows, each padded to COLUMNS, a power of two: the tile of rel_w is then the same for every tile of keys. The forward
and dq load it once; dk/dv loads it in its own layout, transposes it on the chip and repeats it for the tile's rows.
Where a tile is one row, rel_h is one number a query, and it is loaded a tile ahead.
Softmax is a running one in base 2; y and the base-2 logarithm of each row's sum are what the backward needs of it.
Keys past the grid's end but inside the window hold the qkv bias. A key past the window's end gets the bias -inf.

Each gradient has one writer: dq, d rel_h and d rel_w the program of their queries, dk and dv that of their keys,
d qkv_bias a partial sum a program, summed after.

Where the output has a part of D1 columns, the wide part's product is written last: it is the one from which Triton
takes how warps divide a tile."""

from __future__ import annotations

from axial_fusion._rel_pos_parts import (
    _column_bias,
    _keys,
    _load,
    _load_each,
    _load_keys,
    _one_row_bias,
    _place,
    _queries,
    _row_bias,
)
from axial_fusion._rows import jit
from axial_fusion.axial_attention import _store

try:
    import triton.language as tl
except ImportError:  # the kernels below then stay plain functions that nothing calls
    tl = None


@jit
def _products(
    q0, q1, k_ptr, pad_ptr, offs, real,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WINDOWED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Queries times a tile of keys.  # [BLOCK_M, BLOCK_N]"""
    k0 = _load_keys(k_ptr, pad_ptr, offs, real, 0, D0, D, WINDOWED, FULL)  # [BLOCK_N, D0]
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        k1 = _load_keys(k_ptr, pad_ptr, offs, real, D0, D1, D, WINDOWED, FULL)
        s = tl.dot(q1, tl.trans(k1), acc=s, input_precision="ieee")
    return s


@jit
def _weighted(
    p, y0, y1, v_ptr, pad_ptr, offs, real,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WINDOWED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """y + p v, in its two parts."""
    v0 = _load_keys(v_ptr, pad_ptr, offs, real, 0, D0, D, WINDOWED, FULL)  # [BLOCK_N, D0]
    if D1 > 0:
        v1 = _load_keys(v_ptr, pad_ptr, offs, real, D0, D1, D, WINDOWED, FULL)
        y1 = tl.dot(p, v1, acc=y1, input_precision="ieee")
    y0 = tl.dot(p, v0, acc=y0, input_precision="ieee")
    return y0, y1


@jit
def rel_pos_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, rel_h_ptr, rel_w_ptr, y_ptr, lse_ptr,
    scale, M, H, W, WH, WW, tiles,
    stride_qb, stride_qp, stride_qm, stride_kb, stride_kp, stride_km,
    stride_hb, stride_hm, stride_hp, stride_hk, stride_wb, stride_wm, stride_wp, stride_wk,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WINDOWED: tl.constexpr, FULL: tl.constexpr,
    PAIR: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (B, P, M, D) and lse (B, M, P). k and v have the same strides.

    PAIR takes two tiles of keys a step, of one row each, which share a rescaling."""
    ROWS: tl.constexpr = BLOCK_N // COLUMNS
    tile, head, batch, corner, rows, columns = _place(tiles, M, H, W, WH, WW, WINDOWED)
    origin, query, mask_q = _queries(tile * BLOCK_M, corner, rows, columns, W, WINDOWED, BLOCK_M)
    offs_k = (tl.arange(0, BLOCK_N) // COLUMNS * W + tl.arange(0, BLOCK_N) % COLUMNS) * stride_kp
    q_ptr += batch * stride_qb + head * stride_qm + origin * stride_qp
    k_ptr += batch * stride_kb + head * stride_km + corner * stride_kp
    v_ptr += batch * stride_kb + head * stride_km + corner * stride_kp
    k_pad_ptr = pad_ptr + (M + head) * D if WINDOWED else None
    v_pad_ptr = pad_ptr + (2 * M + head) * D if WINDOWED else None
    h_ptrs = rel_h_ptr + batch * stride_hb + head * stride_hm + origin * stride_hp + query * stride_hp
    rel_w_ptr += batch * stride_wb + head * stride_wm + origin * stride_wp
    c = scale * 1.4426950408889634

    q0 = _load(q_ptr, query * stride_qp, mask_q, 0, D0, D, FULL)  # [BLOCK_M, D0]
    y0 = tl.zeros([BLOCK_M, D0], tl.float32)
    q1, y1 = q0, y0
    if D1 > 0:
        q1 = _load(q_ptr, query * stride_qp, mask_q, D0, D1, D, FULL)
        y1 = tl.zeros([BLOCK_M, D1], tl.float32)
    w = _column_bias(rel_w_ptr, query * stride_wp, mask_q, WW, stride_wk, COLUMNS, BLOCK_N, FULL)
    w = w.to(tl.float32) * 1.4426950408889634
    peak = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)  # finite: the first keys may all be masked
    total = tl.zeros([BLOCK_M], tl.float32)
    if ROWS == 1:
        h = _one_row_bias(h_ptrs, mask_q, 0, WH, stride_hk, FULL)
        if PAIR:
            h_b = _one_row_bias(h_ptrs, mask_q, 1, WH, stride_hk, FULL)
    # A window that the grid cuts has tiles without queries.
    stop = tl.where(tile * BLOCK_M < rows * columns, WH, 0)
    for row in range(0, stop, 2 if PAIR else ROWS):
        if ROWS == 1:
            next_h = _one_row_bias(h_ptrs, mask_q, row + (2 if PAIR else 1), WH, stride_hk, FULL)
        real = _keys(row, rows, columns, COLUMNS, BLOCK_N)
        k_ptrs = k_ptr + tl.cast(row * W, tl.int64) * stride_kp
        v_ptrs = v_ptr + tl.cast(row * W, tl.int64) * stride_kp
        s = _products(q0, q1, k_ptrs, k_pad_ptr, offs_k, real, D, D0, D1, WINDOWED, FULL)
        if PAIR:
            next_h_b = _one_row_bias(h_ptrs, mask_q, row + 3, WH, stride_hk, FULL)
            real_b = _keys(row + 1, rows, columns, COLUMNS, BLOCK_N)
            k_ptrs = k_ptr + tl.cast(row * W + W, tl.int64) * stride_kp
            s_b = _products(q0, q1, k_ptrs, k_pad_ptr, offs_k, real_b, D, D0, D1, WINDOWED, FULL)
            s_b = s_b * c + w
        s = s * c + w
        if ROWS == 1:  # rel_h joins the maximum instead of every score
            higher = tl.maximum(peak, tl.max(s, 1) + h)
            if PAIR:
                higher = tl.maximum(higher, tl.max(s_b, 1) + h_b)
            p = tl.exp2(s - (higher - h)[:, None])
        else:
            s += _row_bias(h_ptrs, mask_q, row, WH, stride_hk, 0.0, 1, COLUMNS, BLOCK_N, FULL)
            higher = tl.maximum(peak, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(peak - higher)
        peak = higher
        y0 = y0 * shrink[:, None]
        if D1 > 0:
            y1 = y1 * shrink[:, None]
        if PAIR:
            p_b = tl.exp2(s_b - (higher - h_b)[:, None])
            total = total * shrink + tl.sum(p + p_b, 1)
        else:
            total = total * shrink + tl.sum(p, 1)
        y0, y1 = _weighted(p.to(q0.dtype), y0, y1, v_ptrs, v_pad_ptr, offs_k, real, D, D0, D1, WINDOWED, FULL)
        if PAIR:
            v_ptrs = v_ptr + tl.cast(row * W + W, tl.int64) * stride_kp
            p_b = p_b.to(q0.dtype)
            y0, y1 = _weighted(p_b, y0, y1, v_ptrs, v_pad_ptr, offs_k, real_b, D, D0, D1, WINDOWED, FULL)
            h_b = next_h_b
        if ROWS == 1:
            h = next_h

    y_ptr += ((batch * H * W + origin) * M + head) * D
    if not FULL:
        total = tl.where(mask_q, total, 1.0)
    share = 1.0 / total  # a query without keys gives NaN, as the softmax does
    _store(y_ptr, query * (M * D), mask_q, y0 * share[:, None], 0, D0, D)
    if D1 > 0:
        _store(y_ptr, query * (M * D), mask_q, y1 * share[:, None], D0, D1, D)
    tl.store(lse_ptr + (batch * M + head) * H * W + origin + query, peak + tl.log2(total), mask=mask_q)


@jit
def rel_pos_bwd_dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, rel_h_ptr, rel_w_ptr, y_ptr, lse_ptr,
    dq_ptr, drel_h_ptr, drel_w_ptr, delta_ptr,
    scale, M, H, W, WH, WW, tiles,
    stride_qb, stride_qp, stride_qm, stride_kb, stride_kp, stride_km,
    stride_hb, stride_hm, stride_hp, stride_hk, stride_wb, stride_wm, stride_wp, stride_wk,
    stride_xb, stride_xp, stride_xm,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WINDOWED: tl.constexpr, FULL: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, of strides x, d rel_h and d rel_w like their tables, and delta (B, M, P) = Σ dY · y."""
    ROWS: tl.constexpr = BLOCK_N // COLUMNS
    tile, head, batch, corner, rows, columns = _place(tiles, M, H, W, WH, WW, WINDOWED)
    origin, query, mask_q = _queries(tile * BLOCK_M, corner, rows, columns, W, WINDOWED, BLOCK_M)
    offs_k = (tl.arange(0, BLOCK_N) // COLUMNS * W + tl.arange(0, BLOCK_N) % COLUMNS) * stride_kp
    q_ptr += batch * stride_qb + head * stride_qm + origin * stride_qp
    k_ptr += batch * stride_kb + head * stride_km + corner * stride_kp
    v_ptr += batch * stride_kb + head * stride_km + corner * stride_kp
    k_pad_ptr = pad_ptr + (M + head) * D if WINDOWED else None
    v_pad_ptr = pad_ptr + (2 * M + head) * D if WINDOWED else None
    offs_h = batch * stride_hb + head * stride_hm + origin * stride_hp + query * stride_hp
    offs_w = batch * stride_wb + head * stride_wm + origin * stride_wp + query * stride_wp
    offs_l = (batch * M + head) * H * W + origin + query
    offs_y = query * (M * D)
    g_ptr += ((batch * H * W + origin) * M + head) * D
    y_ptr += ((batch * H * W + origin) * M + head) * D
    c = scale * 1.4426950408889634

    q0 = _load(q_ptr, query * stride_qp, mask_q, 0, D0, D, FULL)  # [BLOCK_M, D0]
    g0 = _load(g_ptr, offs_y, mask_q, 0, D0, D, FULL)
    y0 = _load(y_ptr, offs_y, mask_q, 0, D0, D, FULL)
    delta = tl.sum(g0.to(tl.float32) * y0.to(tl.float32), 1)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        q1 = _load(q_ptr, query * stride_qp, mask_q, D0, D1, D, FULL)
        g1 = _load(g_ptr, offs_y, mask_q, D0, D1, D, FULL)
        y1 = _load(y_ptr, offs_y, mask_q, D0, D1, D, FULL)
        delta += tl.sum(g1.to(tl.float32) * y1.to(tl.float32), 1)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    tl.store(delta_ptr + offs_l, delta, mask=mask_q)
    lse = tl.load(lse_ptr + offs_l, mask=mask_q, other=0.0)
    w = _column_bias(rel_w_ptr, offs_w, mask_q, WW, stride_wk, COLUMNS, BLOCK_N, FULL)
    w = w.to(tl.float32) * 1.4426950408889634 - lse[:, None]
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    h_ptrs = rel_h_ptr + offs_h
    if ROWS == 1:
        h = _one_row_bias(h_ptrs, mask_q, 0, WH, stride_hk, FULL)
    # A window that the grid cuts has tiles without queries.
    stop = tl.where(tile * BLOCK_M < rows * columns, WH, 0)
    for row in range(0, stop, ROWS):
        if ROWS == 1:
            next_h = _one_row_bias(h_ptrs, mask_q, row + 1, WH, stride_hk, FULL)
        real = _keys(row, rows, columns, COLUMNS, BLOCK_N)
        k_ptrs = k_ptr + tl.cast(row * W, tl.int64) * stride_kp
        v_ptrs = v_ptr + tl.cast(row * W, tl.int64) * stride_kp
        k0 = _load_keys(k_ptrs, k_pad_ptr, offs_k, real, 0, D0, D, WINDOWED, FULL)  # [BLOCK_N, D0]
        v0 = _load_keys(v_ptrs, v_pad_ptr, offs_k, real, 0, D0, D, WINDOWED, FULL)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(g0, tl.trans(v0), input_precision="ieee")
        if D1 > 0:
            k1 = _load_keys(k_ptrs, k_pad_ptr, offs_k, real, D0, D1, D, WINDOWED, FULL)
            v1 = _load_keys(v_ptrs, v_pad_ptr, offs_k, real, D0, D1, D, WINDOWED, FULL)
            s = tl.dot(q1, tl.trans(k1), acc=s, input_precision="ieee")
            dp = tl.dot(g1, tl.trans(v1), acc=dp, input_precision="ieee")
        if ROWS == 1:
            p = tl.exp2(s * c + (w + h[:, None]))
            h = next_h
        else:
            bias = _row_bias(h_ptrs, mask_q, row, WH, stride_hk, 0.0, 1, COLUMNS, BLOCK_N, FULL)
            p = tl.exp2(s * c + (w + bias))
        ds = p * (dp - delta[:, None])
        dw += ds
        dh_ptrs = drel_h_ptr + offs_h + tl.cast(row, tl.int64) * stride_hk
        for r in tl.static_range(ROWS):
            here = ds if ROWS == 1 else tl.where((tl.arange(0, BLOCK_N) // COLUMNS == r)[None, :], ds, 0.0)
            dh = tl.sum(here, 1).to(drel_h_ptr.dtype.element_ty)
            tl.store(dh_ptrs + r * stride_hk, dh, mask=None if FULL else mask_q & (row + r < WH))
        ds = ds.to(q0.dtype)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, acc=dq1, input_precision="ieee")
        dq0 = tl.dot(ds, k0, acc=dq0, input_precision="ieee")

    dq_ptr += batch * stride_xb + head * stride_xm + origin * stride_xp
    _store(dq_ptr, query * stride_xp, mask_q, dq0 * scale, 0, D0, D)
    if D1 > 0:
        _store(dq_ptr, query * stride_xp, mask_q, dq1 * scale, D0, D1, D)
    if ROWS > 1:
        dw = tl.sum(tl.reshape(dw, [BLOCK_M, ROWS, COLUMNS]), 1)
    column = tl.arange(0, COLUMNS)[None, :]
    dw_ptrs = drel_w_ptr + offs_w[:, None] + column * stride_wk
    tl.store(dw_ptrs, dw.to(drel_w_ptr.dtype.element_ty), mask=mask_q[:, None] & (column < WW))


@jit
def rel_pos_bwd_dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, rel_h_ptr, rel_w_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dpad_ptr,
    scale, M, H, W, WH, WW, tiles,
    stride_qb, stride_qp, stride_qm, stride_kb, stride_kp, stride_km,
    stride_hb, stride_hm, stride_hp, stride_hk, stride_wb, stride_wm, stride_wp, stride_wk,
    stride_xb, stride_xp, stride_xm,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WINDOWED: tl.constexpr, FULL: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv, of strides x, and a program's sums over its padded keys, dpad (programs, 2, D). Scores transposed."""
    ROWS: tl.constexpr = BLOCK_N // COLUMNS
    tile, head, batch, corner, rows, columns = _place(tiles, M, H, W, WH, WW, WINDOWED)
    row = tile * ROWS
    real = _keys(row, rows, columns, COLUMNS, BLOCK_N)
    key = tl.arange(0, BLOCK_N) // COLUMNS * W + tl.arange(0, BLOCK_N) % COLUMNS  # from the tile's first
    first = corner + row * W
    q_ptr += batch * stride_qb + head * stride_qm
    k_ptr += batch * stride_kb + head * stride_km + first * stride_kp
    v_ptr += batch * stride_kb + head * stride_km + first * stride_kp
    k_pad_ptr = pad_ptr + (M + head) * D if WINDOWED else None
    v_pad_ptr = pad_ptr + (2 * M + head) * D if WINDOWED else None
    rel_h_ptr += batch * stride_hb + head * stride_hm
    rel_w_ptr += batch * stride_wb + head * stride_wm
    g_ptr += (batch * H * W * M + head) * D
    lse_ptr += (batch * M + head) * H * W
    delta_ptr += (batch * M + head) * H * W
    origin_x = batch * stride_xb + head * stride_xm + first * stride_xp
    c = scale * 1.4426950408889634

    k0 = _load_keys(k_ptr, k_pad_ptr, key * stride_kp, real, 0, D0, D, WINDOWED, FULL)  # [BLOCK_N, D0]
    v0 = _load_keys(v_ptr, v_pad_ptr, key * stride_kp, real, 0, D0, D, WINDOWED, FULL)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    if D1 > 0:
        k1 = _load_keys(k_ptr, k_pad_ptr, key * stride_kp, real, D0, D1, D, WINDOWED, FULL)
        v1 = _load_keys(v_ptr, v_pad_ptr, key * stride_kp, real, D0, D1, D, WINDOWED, FULL)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    for start in range(0, rows * columns, BLOCK_M):
        origin, query, mask_q = _queries(start, corner, rows, columns, W, WINDOWED, BLOCK_M)
        q_ptrs = q_ptr + origin * stride_qp
        g_ptrs = g_ptr + origin * M * D
        q0 = _load(q_ptrs, query * stride_qp, mask_q, 0, D0, D, FULL)  # [BLOCK_M, D0]
        g0 = _load(g_ptrs, query * (M * D), mask_q, 0, D0, D, FULL)
        lse = _load_each(lse_ptr + origin + query, mask_q, FULL)
        h_ptrs = rel_h_ptr + origin * stride_hp + query * stride_hp
        bias = _row_bias(h_ptrs, mask_q, row, WH, stride_hk, lse, 0, COLUMNS, BLOCK_N, FULL)
        w_ptrs = rel_w_ptr + origin * stride_wp
        w = tl.trans(_column_bias(w_ptrs, query * stride_wp, mask_q, WW, stride_wk, COLUMNS, COLUMNS, FULL))
        if ROWS > 1:
            w = tl.reshape(tl.broadcast_to(w[None, :, :], [ROWS, COLUMNS, BLOCK_M]), [BLOCK_N, BLOCK_M])
        s = tl.dot(k0, tl.trans(q0), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(v0, tl.trans(g0), input_precision="ieee")
        if D1 > 0:
            q1 = _load(q_ptrs, query * stride_qp, mask_q, D0, D1, D, FULL)
            g1 = _load(g_ptrs, query * (M * D), mask_q, D0, D1, D, FULL)
            s = tl.dot(k1, tl.trans(q1), acc=s, input_precision="ieee")
            dp = tl.dot(v1, tl.trans(g1), acc=dp, input_precision="ieee")
        delta = _load_each(delta_ptr + origin + query, mask_q, FULL)
        p = tl.exp2(s * c + (w.to(tl.float32) * 1.4426950408889634 + bias))
        ds = (p * (dp - delta[None, :])).to(q0.dtype)
        p = p.to(q0.dtype)
        dv0 = tl.dot(p, g0, acc=dv0, input_precision="ieee")
        dk0 = tl.dot(ds, q0, acc=dk0, input_precision="ieee")
        if D1 > 0:
            dv1 = tl.dot(p, g1, acc=dv1, input_precision="ieee")
            dk1 = tl.dot(ds, q1, acc=dk1, input_precision="ieee")

    dk_ptr += origin_x
    dv_ptr += origin_x
    _store(dk_ptr, key * stride_xp, real, dk0 * scale, 0, D0, D)
    _store(dv_ptr, key * stride_xp, real, dv0, 0, D0, D)
    if D1 > 0:
        _store(dk_ptr, key * stride_xp, real, dk1 * scale, D0, D1, D)
        _store(dv_ptr, key * stride_xp, real, dv1, D0, D1, D)
    if WINDOWED:
        padded = (_keys(row, WH, WW, COLUMNS, BLOCK_N) & ~real)[:, None]
        dpad_ptr += tl.program_id(0).to(tl.int64) * 2 * D
        offs_d = tl.arange(0, D0)
        tl.store(dpad_ptr + offs_d, tl.sum(tl.where(padded, dk0, 0.0), 0) * scale, mask=offs_d < D)
        tl.store(dpad_ptr + D + offs_d, tl.sum(tl.where(padded, dv0, 0.0), 0), mask=offs_d < D)
        if D1 > 0:
            offs_d = D0 + tl.arange(0, D1)
            tl.store(dpad_ptr + offs_d, tl.sum(tl.where(padded, dk1, 0.0), 0) * scale, mask=offs_d < D)
            tl.store(dpad_ptr + D + offs_d, tl.sum(tl.where(padded, dv1, 0.0), 0), mask=offs_d < D)
