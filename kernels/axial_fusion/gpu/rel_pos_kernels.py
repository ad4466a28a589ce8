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

from .common import jit, octaves, store, tl
from .rel_pos_parts import (
    column_bias,
    key_offsets,
    keys,
    load_each,
    load_keys,
    load_rows,
    one_row_bias,
    place,
    queries,
    row_bias,
)


@jit
def _at(ptr, batch, head, position, stride):
    """`ptr` at a token's head, of strides of (b, p, m)."""
    return ptr + (batch * stride[0] + head * stride[2] + position * stride[1])


@jit
def _store_pads(ptr, padded, dk, dv, scale, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Sums of dk and dv over the padded keys, columns START .. START + WIDTH − 1, into ptr (2, D)."""
    offs_d = START + tl.arange(0, WIDTH)
    tl.store(ptr + offs_d, tl.sum(tl.where(padded, dk, 0.0), 0) * scale, mask=offs_d < D)
    tl.store(ptr + D + offs_d, tl.sum(tl.where(padded, dv, 0.0), 0), mask=offs_d < D)


@jit
def _products(q0, q1, k_ptr, pad_ptr, offs, real, DIM: tl.constexpr, FULL: tl.constexpr):
    """Queries times a tile of keys.  # [BLOCK_M, BLOCK_N]"""
    k0 = load_keys(k_ptr, pad_ptr, offs, real, 0, DIM.D0, DIM.D, FULL)  # [BLOCK_N, D0]
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if DIM.D1 > 0:
        k1 = load_keys(k_ptr, pad_ptr, offs, real, DIM.D0, DIM.D1, DIM.D, FULL)
        s = tl.dot(q1, tl.trans(k1), acc=s, input_precision="ieee")
    return s


@jit
def _weighted(p, y0, y1, v_ptr, pad_ptr, offs, real, DIM: tl.constexpr, FULL: tl.constexpr):
    """y + p v, in its two parts."""
    v0 = load_keys(v_ptr, pad_ptr, offs, real, 0, DIM.D0, DIM.D, FULL)  # [BLOCK_N, D0]
    if DIM.D1 > 0:
        v1 = load_keys(v_ptr, pad_ptr, offs, real, DIM.D0, DIM.D1, DIM.D, FULL)
        y1 = tl.dot(p, v1, acc=y1, input_precision="ieee")
    y0 = tl.dot(p, v0, acc=y0, input_precision="ieee")
    return y0, y1


@jit
def rel_pos_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, tables, y_ptr, lse_ptr,
    scale, sizes,
    stride_q, stride_k, stride_h, stride_w,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y (B, P, M, D) and lse (B, M, P). k and v have the same strides.

    PAIR takes two tiles of keys a step, of one row each, which share a rescaling."""
    D: tl.constexpr = DIM.D
    D0: tl.constexpr = DIM.D0
    D1: tl.constexpr = DIM.D1
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    FULL: tl.constexpr = TILE.FULL
    ROWS: tl.constexpr = TILE.BLOCK_N // TILE.COLUMNS
    WINDOWED: tl.constexpr = pad_ptr is not None
    M, H, W, WH, WW, _ = sizes
    rel_h_ptr, rel_w_ptr = tables
    tile, head, batch, corner, rows, columns = place(sizes, WINDOWED)
    origin, query, mask_q = queries(tile * BLOCK_M, corner, rows, columns, W, WINDOWED, TILE)
    offs_k = key_offsets(W, TILE) * stride_k[1]
    q_ptr = _at(q_ptr, batch, head, origin, stride_q)
    k_ptr, v_ptr = _at(k_ptr, batch, head, corner, stride_k), _at(v_ptr, batch, head, corner, stride_k)
    k_pad_ptr = pad_ptr + (M + head) * D if WINDOWED else None
    v_pad_ptr = pad_ptr + (2 * M + head) * D if WINDOWED else None
    h_ptrs = rel_h_ptr + batch * stride_h[0] + head * stride_h[1] + origin * stride_h[2] + query * stride_h[2]
    rel_w_ptr += batch * stride_w[0] + head * stride_w[1] + origin * stride_w[2]
    c = octaves(scale)

    q0 = load_rows(q_ptr, query * stride_q[1], mask_q, 0, D0, D, FULL)  # [BLOCK_M, D0]
    y0 = tl.zeros([BLOCK_M, D0], tl.float32)
    q1, y1 = q0, y0
    if D1 > 0:
        q1 = load_rows(q_ptr, query * stride_q[1], mask_q, D0, D1, D, FULL)
        y1 = tl.zeros([BLOCK_M, D1], tl.float32)
    w = column_bias(rel_w_ptr, query * stride_w[2], mask_q, WW, stride_w[3], TILE.BLOCK_N, TILE)
    w = octaves(w.to(tl.float32))
    # Finite: the first keys may all be masked.
    peak = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if ROWS == 1:
        h = one_row_bias(h_ptrs, mask_q, 0, WH, stride_h[3], TILE)
        if TILE.PAIR:
            h_b = one_row_bias(h_ptrs, mask_q, 1, WH, stride_h[3], TILE)
    # A window that the grid cuts has tiles without queries.
    stop = tl.where(tile * BLOCK_M < rows * columns, WH, 0)
    for row in range(0, stop, 2 if TILE.PAIR else ROWS):
        if ROWS == 1:
            next_h = one_row_bias(h_ptrs, mask_q, row + (2 if TILE.PAIR else 1), WH, stride_h[3], TILE)
        real = keys(row, rows, columns, TILE)
        k_ptrs = k_ptr + tl.cast(row * W, tl.int64) * stride_k[1]
        v_ptrs = v_ptr + tl.cast(row * W, tl.int64) * stride_k[1]
        s = _products(q0, q1, k_ptrs, k_pad_ptr, offs_k, real, DIM, FULL)
        if TILE.PAIR:
            next_h_b = one_row_bias(h_ptrs, mask_q, row + 3, WH, stride_h[3], TILE)
            real_b = keys(row + 1, rows, columns, TILE)
            k_ptrs = k_ptr + tl.cast(row * W + W, tl.int64) * stride_k[1]
            s_b = _products(q0, q1, k_ptrs, k_pad_ptr, offs_k, real_b, DIM, FULL)
            s_b = s_b * c + w
        s = s * c + w
        if ROWS == 1:  # rel_h joins the maximum instead of every score
            higher = tl.maximum(peak, tl.max(s, 1) + h)
            if TILE.PAIR:
                higher = tl.maximum(higher, tl.max(s_b, 1) + h_b)
            p = tl.exp2(s - (higher - h)[:, None])
        else:
            s += row_bias(h_ptrs, mask_q, row, WH, stride_h[3], 0.0, 1, TILE)
            higher = tl.maximum(peak, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(peak - higher)
        peak = higher
        y0 = y0 * shrink[:, None]
        if D1 > 0:
            y1 = y1 * shrink[:, None]
        if TILE.PAIR:
            p_b = tl.exp2(s_b - (higher - h_b)[:, None])
            total = total * shrink + tl.sum(p + p_b, 1)
        else:
            total = total * shrink + tl.sum(p, 1)
        y0, y1 = _weighted(p.to(q0.dtype), y0, y1, v_ptrs, v_pad_ptr, offs_k, real, DIM, FULL)
        if TILE.PAIR:
            v_ptrs = v_ptr + tl.cast(row * W + W, tl.int64) * stride_k[1]
            p_b = p_b.to(q0.dtype)
            y0, y1 = _weighted(p_b, y0, y1, v_ptrs, v_pad_ptr, offs_k, real_b, DIM, FULL)
            h_b = next_h_b
        if ROWS == 1:
            h = next_h

    y_ptr += ((batch * H * W + origin) * M + head) * D
    total = tl.where(total == 0.0, 1.0, total)  # a query without keys gives 0
    share = 1.0 / total
    store(y_ptr, query * (M * D), mask_q, y0 * share[:, None], 0, D0, D)
    if D1 > 0:
        store(y_ptr, query * (M * D), mask_q, y1 * share[:, None], D0, D1, D)
    tl.store(lse_ptr + (batch * M + head) * H * W + origin + query, peak + tl.log2(total), mask=mask_q)


@jit
def rel_pos_bwd_dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, tables, y_ptr, lse_ptr, dq_ptr, dtables, delta_ptr,
    scale, sizes,
    stride_q, stride_k, stride_h, stride_w, stride_x,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dq, of strides x, d rel_h and d rel_w like their tables, and delta (B, M, P) = Σ dY · y."""
    D: tl.constexpr = DIM.D
    D0: tl.constexpr = DIM.D0
    D1: tl.constexpr = DIM.D1
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    COLUMNS: tl.constexpr = TILE.COLUMNS
    FULL: tl.constexpr = TILE.FULL
    ROWS: tl.constexpr = BLOCK_N // COLUMNS
    WINDOWED: tl.constexpr = pad_ptr is not None
    M, H, W, WH, WW, _ = sizes
    rel_h_ptr, rel_w_ptr = tables
    drel_h_ptr, drel_w_ptr = dtables
    tile, head, batch, corner, rows, columns = place(sizes, WINDOWED)
    origin, query, mask_q = queries(tile * BLOCK_M, corner, rows, columns, W, WINDOWED, TILE)
    offs_k = key_offsets(W, TILE) * stride_k[1]
    q_ptr = _at(q_ptr, batch, head, origin, stride_q)
    k_ptr, v_ptr = _at(k_ptr, batch, head, corner, stride_k), _at(v_ptr, batch, head, corner, stride_k)
    k_pad_ptr = pad_ptr + (M + head) * D if WINDOWED else None
    v_pad_ptr = pad_ptr + (2 * M + head) * D if WINDOWED else None
    offs_h = batch * stride_h[0] + head * stride_h[1] + origin * stride_h[2] + query * stride_h[2]
    offs_w = batch * stride_w[0] + head * stride_w[1] + origin * stride_w[2] + query * stride_w[2]
    offs_l = (batch * M + head) * H * W + origin + query
    offs_y = query * (M * D)
    g_ptr += ((batch * H * W + origin) * M + head) * D
    y_ptr += ((batch * H * W + origin) * M + head) * D
    c = octaves(scale)

    q0 = load_rows(q_ptr, query * stride_q[1], mask_q, 0, D0, D, FULL)  # [BLOCK_M, D0]
    g0 = load_rows(g_ptr, offs_y, mask_q, 0, D0, D, FULL)
    y0 = load_rows(y_ptr, offs_y, mask_q, 0, D0, D, FULL)
    delta = tl.sum(g0.to(tl.float32) * y0.to(tl.float32), 1)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        q1 = load_rows(q_ptr, query * stride_q[1], mask_q, D0, D1, D, FULL)
        g1 = load_rows(g_ptr, offs_y, mask_q, D0, D1, D, FULL)
        y1 = load_rows(y_ptr, offs_y, mask_q, D0, D1, D, FULL)
        delta += tl.sum(g1.to(tl.float32) * y1.to(tl.float32), 1)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    tl.store(delta_ptr + offs_l, delta, mask=mask_q)
    lse = tl.load(lse_ptr + offs_l, mask=mask_q, other=0.0)
    w = column_bias(rel_w_ptr, offs_w, mask_q, WW, stride_w[3], BLOCK_N, TILE)
    w = octaves(w.to(tl.float32)) - lse[:, None]
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    h_ptrs = rel_h_ptr + offs_h
    if ROWS == 1:
        h = one_row_bias(h_ptrs, mask_q, 0, WH, stride_h[3], TILE)
    # A window that the grid cuts has tiles without queries.
    stop = tl.where(tile * BLOCK_M < rows * columns, WH, 0)
    for row in range(0, stop, ROWS):
        if ROWS == 1:
            next_h = one_row_bias(h_ptrs, mask_q, row + 1, WH, stride_h[3], TILE)
        real = keys(row, rows, columns, TILE)
        k_ptrs = k_ptr + tl.cast(row * W, tl.int64) * stride_k[1]
        v_ptrs = v_ptr + tl.cast(row * W, tl.int64) * stride_k[1]
        k0 = load_keys(k_ptrs, k_pad_ptr, offs_k, real, 0, D0, D, FULL)  # [BLOCK_N, D0]
        v0 = load_keys(v_ptrs, v_pad_ptr, offs_k, real, 0, D0, D, FULL)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(g0, tl.trans(v0), input_precision="ieee")
        if D1 > 0:
            k1 = load_keys(k_ptrs, k_pad_ptr, offs_k, real, D0, D1, D, FULL)
            v1 = load_keys(v_ptrs, v_pad_ptr, offs_k, real, D0, D1, D, FULL)
            s = tl.dot(q1, tl.trans(k1), acc=s, input_precision="ieee")
            dp = tl.dot(g1, tl.trans(v1), acc=dp, input_precision="ieee")
        if ROWS == 1:
            p = tl.exp2(s * c + (w + h[:, None]))
            h = next_h
        else:
            bias = row_bias(h_ptrs, mask_q, row, WH, stride_h[3], 0.0, 1, TILE)
            p = tl.exp2(s * c + (w + bias))
        ds = p * (dp - delta[:, None])
        dw += ds
        dh_ptrs = drel_h_ptr + offs_h + tl.cast(row, tl.int64) * stride_h[3]
        for r in tl.static_range(ROWS):
            row_of = tl.arange(0, BLOCK_N) // COLUMNS
            here = ds if ROWS == 1 else tl.where((row_of == r)[None, :], ds, 0.0)
            dh = tl.sum(here, 1).to(drel_h_ptr.dtype.element_ty)
            tl.store(dh_ptrs + r * stride_h[3], dh, mask=None if FULL else mask_q & (row + r < WH))
        ds = ds.to(q0.dtype)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, acc=dq1, input_precision="ieee")
        dq0 = tl.dot(ds, k0, acc=dq0, input_precision="ieee")

    dq_ptr += batch * stride_x[0] + head * stride_x[2] + origin * stride_x[1]
    store(dq_ptr, query * stride_x[1], mask_q, dq0 * scale, 0, D0, D)
    if D1 > 0:
        store(dq_ptr, query * stride_x[1], mask_q, dq1 * scale, D0, D1, D)
    if ROWS > 1:
        dw = tl.sum(tl.reshape(dw, [BLOCK_M, ROWS, COLUMNS]), 1)
    column = tl.arange(0, COLUMNS)[None, :]
    dw_ptrs = drel_w_ptr + offs_w[:, None] + column * stride_w[3]
    tl.store(dw_ptrs, dw.to(drel_w_ptr.dtype.element_ty), mask=mask_q[:, None] & (column < WW))


@jit
def rel_pos_bwd_dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, tables, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dpad_ptr,
    scale, sizes,
    stride_q, stride_k, stride_h, stride_w, stride_x,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dk and dv, of strides x, and a program's sums over its padded keys, dpad (programs, 2, D). Scores transposed."""
    D: tl.constexpr = DIM.D
    D0: tl.constexpr = DIM.D0
    D1: tl.constexpr = DIM.D1
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    COLUMNS: tl.constexpr = TILE.COLUMNS
    FULL: tl.constexpr = TILE.FULL
    ROWS: tl.constexpr = BLOCK_N // COLUMNS
    WINDOWED: tl.constexpr = pad_ptr is not None
    M, H, W, WH, WW, _ = sizes
    rel_h_ptr, rel_w_ptr = tables
    tile, head, batch, corner, rows, columns = place(sizes, WINDOWED)
    row = tile * ROWS
    real = keys(row, rows, columns, TILE)
    key = key_offsets(W, TILE)
    first = corner + row * W
    q_ptr += batch * stride_q[0] + head * stride_q[2]
    k_ptr, v_ptr = _at(k_ptr, batch, head, first, stride_k), _at(v_ptr, batch, head, first, stride_k)
    k_pad_ptr = pad_ptr + (M + head) * D if WINDOWED else None
    v_pad_ptr = pad_ptr + (2 * M + head) * D if WINDOWED else None
    rel_h_ptr += batch * stride_h[0] + head * stride_h[1]
    rel_w_ptr += batch * stride_w[0] + head * stride_w[1]
    g_ptr += (batch * H * W * M + head) * D
    lse_ptr += (batch * M + head) * H * W
    delta_ptr += (batch * M + head) * H * W
    origin_x = batch * stride_x[0] + head * stride_x[2] + first * stride_x[1]
    c = octaves(scale)

    k0 = load_keys(k_ptr, k_pad_ptr, key * stride_k[1], real, 0, D0, D, FULL)  # [BLOCK_N, D0]
    v0 = load_keys(v_ptr, v_pad_ptr, key * stride_k[1], real, 0, D0, D, FULL)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    if D1 > 0:
        k1 = load_keys(k_ptr, k_pad_ptr, key * stride_k[1], real, D0, D1, D, FULL)
        v1 = load_keys(v_ptr, v_pad_ptr, key * stride_k[1], real, D0, D1, D, FULL)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    for start in range(0, rows * columns, BLOCK_M):
        origin, query, mask_q = queries(start, corner, rows, columns, W, WINDOWED, TILE)
        q_ptrs = q_ptr + origin * stride_q[1]
        g_ptrs = g_ptr + origin * M * D
        q0 = load_rows(q_ptrs, query * stride_q[1], mask_q, 0, D0, D, FULL)  # [BLOCK_M, D0]
        g0 = load_rows(g_ptrs, query * (M * D), mask_q, 0, D0, D, FULL)
        lse = load_each(lse_ptr + origin + query, mask_q, FULL)
        h_ptrs = rel_h_ptr + origin * stride_h[2] + query * stride_h[2]
        bias = row_bias(h_ptrs, mask_q, row, WH, stride_h[3], lse, 0, TILE)
        w_ptrs = rel_w_ptr + origin * stride_w[2]
        w = tl.trans(column_bias(w_ptrs, query * stride_w[2], mask_q, WW, stride_w[3], COLUMNS, TILE))
        if ROWS > 1:
            w = tl.broadcast_to(w[None, :, :], [ROWS, COLUMNS, BLOCK_M])
            w = tl.reshape(w, [BLOCK_N, BLOCK_M])
        s = tl.dot(k0, tl.trans(q0), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(v0, tl.trans(g0), input_precision="ieee")
        if D1 > 0:
            q1 = load_rows(q_ptrs, query * stride_q[1], mask_q, D0, D1, D, FULL)
            g1 = load_rows(g_ptrs, query * (M * D), mask_q, D0, D1, D, FULL)
            s = tl.dot(k1, tl.trans(q1), acc=s, input_precision="ieee")
            dp = tl.dot(v1, tl.trans(g1), acc=dp, input_precision="ieee")
        delta = load_each(delta_ptr + origin + query, mask_q, FULL)
        p = tl.exp2(s * c + (octaves(w.to(tl.float32)) + bias))
        ds = (p * (dp - delta[None, :])).to(q0.dtype)
        p = p.to(q0.dtype)
        dv0 = tl.dot(p, g0, acc=dv0, input_precision="ieee")
        dk0 = tl.dot(ds, q0, acc=dk0, input_precision="ieee")
        if D1 > 0:
            dv1 = tl.dot(p, g1, acc=dv1, input_precision="ieee")
            dk1 = tl.dot(ds, q1, acc=dk1, input_precision="ieee")

    dk_ptr += origin_x
    dv_ptr += origin_x
    store(dk_ptr, key * stride_x[1], real, dk0 * scale, 0, D0, D)
    store(dv_ptr, key * stride_x[1], real, dv0, 0, D0, D)
    if D1 > 0:
        store(dk_ptr, key * stride_x[1], real, dk1 * scale, D0, D1, D)
        store(dv_ptr, key * stride_x[1], real, dv1, D0, D1, D)
    if WINDOWED:
        padded = (keys(row, WH, WW, TILE) & ~real)[:, None]
        dpad_ptr += tl.program_id(0).to(tl.int64) * 2 * D
        _store_pads(dpad_ptr, padded, dk0, dv0, scale, 0, D0, D)
        if D1 > 0:
            _store_pads(dpad_ptr, padded, dk1, dv1, scale, D0, D1, D)
