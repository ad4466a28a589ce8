"""Triton kernels of SAM's attention with relative positions: one set for a whole grid and for windows of it.

A grid is one window. Queries are the window's tokens that exist, BLOCK_M at a time. A tile of keys is whole image
rows, each padded to COLUMNS, a power of two: the tile of rel_w is then the same for every tile of keys and is loaded
once, and which row a score belongs to is known where it sits, so that adding rel_h selects nothing at run time.
Softmax is a running one in base 2; y and the base-2 logarithm of each row's sum are what the backward needs of it.
Keys past the grid's end but inside the window hold the qkv bias; keys past the window's end do not count.

Each gradient has one writer: dq, d rel_h and d rel_w the program of their queries, dk and dv that of their keys,
d qkv_bias a partial sum a program, summed after.

Where the output has a part of D1 columns, the wide part's product is written last: it is the one from which Triton
takes how warps divide a tile."""

from __future__ import annotations

from axial_fusion._rows import jit
from axial_fusion.axial_attention import _load, _store

try:
    import triton.language as tl
except ImportError:  # the kernels below then stay plain functions that nothing calls
    tl = None


@jit
def _place(tiles, M, H, W, WH, WW):
    """A program's tile, head and batch element; its window's first row and column, and what of it the grid holds."""
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % M
    window = pid // (tiles * M)
    down = (H + WH - 1) // WH
    across = (W + WW - 1) // WW
    top = (window // across) % down * WH
    left = window % across * WW
    batch = (window // (across * down)).to(tl.int64)
    return tile, head.to(tl.int64), batch, top, left, tl.minimum(WH, H - top), tl.minimum(WW, W - left)


@jit
def _queries(start, top, left, rows, columns, W, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr):
    """A window's tokens start .. start + BLOCK_M − 1: a position in the grid, theirs from there, which exist."""
    index = start + tl.arange(0, BLOCK_M)
    mask = index < rows * columns
    if WINDOWED:
        return (top * W + left).to(tl.int64), index // columns * W + index % columns, mask
    else:
        return tl.cast(start, tl.int64), tl.arange(0, BLOCK_M), mask


@jit
def _keys(row, rows, columns, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys of the tile that starts at `row` lie within the first `rows` and `columns` of the window."""
    index = tl.arange(0, BLOCK_N)
    return (row + index // COLUMNS < rows) & (index % COLUMNS < columns)


@jit
def _load_keys(
    ptr,
    pad_ptr,
    offs,
    real,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Columns START .. START + WIDTH − 1 of keys or values, the bias at `pad_ptr` where the grid ends."""
    x = _load(ptr, offs, real, START, WIDTH, D)
    if WINDOWED:
        offs_d = START + tl.arange(0, WIDTH)
        pad = tl.load(pad_ptr + offs_d, mask=offs_d < D, other=0.0)
        x = tl.where(real[:, None], x, pad[None, :])
    return x


@jit
def _column_bias(
    ptr, offs, mask, WW, stride_k, AXIS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """log2(e) · rel_w of the queries at `offs` against a tile of keys, which lie along AXIS."""
    column = tl.expand_dims(tl.arange(0, BLOCK_N) % COLUMNS, 1 - AXIS)
    ptrs = ptr + tl.expand_dims(offs, AXIS) + column * stride_k
    w = tl.load(ptrs, mask=tl.expand_dims(mask, AXIS) & (column < WW), other=0.0)
    return w.to(tl.float32) * 1.4426950408889634


@jit
def _row_bias(
    ptrs, mask, row, WH, stride_k, less, AXIS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """log2(e) · rel_h − less of queries against a tile of keys along AXIS; that axis is 1 where a tile is a row."""
    h = tl.load(ptrs + row * stride_k, mask=mask, other=0.0).to(tl.float32)
    bias = tl.expand_dims(h * 1.4426950408889634 - less, AXIS)
    for r in tl.static_range(1, BLOCK_N // COLUMNS):
        h = tl.load(ptrs + (row + r) * stride_k, mask=mask & (row + r < WH), other=0.0).to(tl.float32)
        here = tl.expand_dims(tl.arange(0, BLOCK_N) // COLUMNS == r, 1 - AXIS)
        bias = tl.where(here, tl.expand_dims(h * 1.4426950408889634 - less, AXIS), bias)
    return bias


@jit
def rel_pos_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, rel_h_ptr, rel_w_ptr, y_ptr, lse_ptr,
    scale, M, H, W, WH, WW, tiles,
    stride_qb, stride_qp, stride_qm, stride_kb, stride_kp, stride_km,
    stride_hb, stride_hm, stride_hp, stride_hk, stride_wb, stride_wm, stride_wp, stride_wk,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WINDOWED: tl.constexpr, EVEN: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (B, P, M, D) and lse (B, M, P). k and v have the same strides."""
    ROWS: tl.constexpr = BLOCK_N // COLUMNS
    tile, head, batch, top, left, rows, columns = _place(tiles, M, H, W, WH, WW)
    origin, query, mask_q = _queries(tile * BLOCK_M, top, left, rows, columns, W, WINDOWED, BLOCK_M)
    key = tl.arange(0, BLOCK_N) // COLUMNS * W + tl.arange(0, BLOCK_N) % COLUMNS  # from the tile's first
    corner = (top * W + left).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qm + origin * stride_qp
    k_ptr += batch * stride_kb + head * stride_km + corner * stride_kp
    v_ptr += batch * stride_kb + head * stride_km + corner * stride_kp
    k_pad_ptr = pad_ptr + (M + head) * D if WINDOWED else None
    v_pad_ptr = pad_ptr + (2 * M + head) * D if WINDOWED else None
    h_ptrs = rel_h_ptr + batch * stride_hb + head * stride_hm + origin * stride_hp + query * stride_hp
    rel_w_ptr += batch * stride_wb + head * stride_wm + origin * stride_wp

    q0 = _load(q_ptr, query * stride_qp, mask_q, 0, D0, D)  # [BLOCK_M, D0]
    y0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        q1 = _load(q_ptr, query * stride_qp, mask_q, D0, D1, D)
        y1 = tl.zeros([BLOCK_M, D1], tl.float32)
    w = _column_bias(rel_w_ptr, query * stride_wp, mask_q, WW, stride_wk, 1, COLUMNS, BLOCK_N)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for row in range(0, WH, ROWS):
        real = _keys(row, rows, columns, COLUMNS, BLOCK_N)
        k_ptrs = k_ptr + (row * W).to(tl.int64) * stride_kp
        v_ptrs = v_ptr + (row * W).to(tl.int64) * stride_kp
        k0 = _load_keys(k_ptrs, k_pad_ptr, key * stride_kp, real, 0, D0, D, WINDOWED)  # [BLOCK_N, D0]
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if D1 > 0:
            k1 = _load_keys(k_ptrs, k_pad_ptr, key * stride_kp, real, D0, D1, D, WINDOWED)
            s = tl.dot(q1, tl.trans(k1), acc=s, input_precision="ieee")
        s = s * (scale * 1.4426950408889634) + w
        if not EVEN:
            s = tl.where(_keys(row, WH, WW, COLUMNS, BLOCK_N)[None, :], s, -float("inf"))
        if ROWS == 1:  # rel_h is one number a query, which joins the maximum
            h = tl.load(h_ptrs + row * stride_hk, mask=mask_q, other=0.0).to(tl.float32) * 1.4426950408889634
            higher = tl.maximum(peak, tl.max(s, 1) + h)
            p = tl.exp2(s - (higher - h)[:, None])
        else:
            s += _row_bias(h_ptrs, mask_q, row, WH, stride_hk, 0.0, 1, COLUMNS, BLOCK_N)
            higher = tl.maximum(peak, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(peak - higher)
        peak = higher
        total = total * shrink + tl.sum(p, 1)
        p = p.to(k0.dtype)
        v0 = _load_keys(v_ptrs, v_pad_ptr, key * stride_kp, real, 0, D0, D, WINDOWED)
        if D1 > 0:
            v1 = _load_keys(v_ptrs, v_pad_ptr, key * stride_kp, real, D0, D1, D, WINDOWED)
            y1 = tl.dot(p, v1, acc=y1 * shrink[:, None], input_precision="ieee")
        y0 = tl.dot(p, v0, acc=y0 * shrink[:, None], input_precision="ieee")

    y_ptr += ((batch * H * W + origin) * M + head) * D
    _store(y_ptr, query * (M * D), mask_q, y0 / total[:, None], 0, D0, D)
    if D1 > 0:
        _store(y_ptr, query * (M * D), mask_q, y1 / total[:, None], D0, D1, D)
    tl.store(lse_ptr + (batch * M + head) * H * W + origin + query, peak + tl.log2(total), mask=mask_q)


@jit
def rel_pos_bwd_dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, rel_h_ptr, rel_w_ptr, y_ptr, lse_ptr,
    dq_ptr, drel_h_ptr, drel_w_ptr, delta_ptr,
    scale, M, H, W, WH, WW, tiles,
    stride_qb, stride_qp, stride_qm, stride_kb, stride_kp, stride_km,
    stride_hb, stride_hm, stride_hp, stride_hk, stride_wb, stride_wm, stride_wp, stride_wk,
    stride_xb, stride_xp, stride_xm,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WINDOWED: tl.constexpr, EVEN: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, of strides x, d rel_h and d rel_w like their tables, and delta (B, M, P) = Σ dY · y."""
    ROWS: tl.constexpr = BLOCK_N // COLUMNS
    tile, head, batch, top, left, rows, columns = _place(tiles, M, H, W, WH, WW)
    origin, query, mask_q = _queries(tile * BLOCK_M, top, left, rows, columns, W, WINDOWED, BLOCK_M)
    key = tl.arange(0, BLOCK_N) // COLUMNS * W + tl.arange(0, BLOCK_N) % COLUMNS  # from the tile's first
    corner = (top * W + left).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qm + origin * stride_qp
    k_ptr += batch * stride_kb + head * stride_km + corner * stride_kp
    v_ptr += batch * stride_kb + head * stride_km + corner * stride_kp
    k_pad_ptr = pad_ptr + (M + head) * D if WINDOWED else None
    v_pad_ptr = pad_ptr + (2 * M + head) * D if WINDOWED else None
    offs_h = batch * stride_hb + head * stride_hm + origin * stride_hp + query * stride_hp
    offs_w = batch * stride_wb + head * stride_wm + origin * stride_wp + query * stride_wp
    offs_y = ((batch * H * W + origin) * M + head) * D + query * (M * D)
    offs_l = (batch * M + head) * H * W + origin + query

    q0 = _load(q_ptr, query * stride_qp, mask_q, 0, D0, D)  # [BLOCK_M, D0]
    g0 = _load(g_ptr, offs_y, mask_q, 0, D0, D)
    y0 = _load(y_ptr, offs_y, mask_q, 0, D0, D)
    delta = tl.sum(g0.to(tl.float32) * y0.to(tl.float32), 1)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        q1 = _load(q_ptr, query * stride_qp, mask_q, D0, D1, D)
        g1 = _load(g_ptr, offs_y, mask_q, D0, D1, D)
        y1 = _load(y_ptr, offs_y, mask_q, D0, D1, D)
        delta += tl.sum(g1.to(tl.float32) * y1.to(tl.float32), 1)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    tl.store(delta_ptr + offs_l, delta, mask=mask_q)
    lse = tl.load(lse_ptr + offs_l, mask=mask_q, other=0.0)
    w = _column_bias(rel_w_ptr, offs_w, mask_q, WW, stride_wk, 1, COLUMNS, BLOCK_N)
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for row in range(0, WH, ROWS):
        real = _keys(row, rows, columns, COLUMNS, BLOCK_N)
        k_ptrs = k_ptr + (row * W).to(tl.int64) * stride_kp
        v_ptrs = v_ptr + (row * W).to(tl.int64) * stride_kp
        k0 = _load_keys(k_ptrs, k_pad_ptr, key * stride_kp, real, 0, D0, D, WINDOWED)  # [BLOCK_N, D0]
        v0 = _load_keys(v_ptrs, v_pad_ptr, key * stride_kp, real, 0, D0, D, WINDOWED)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(g0, tl.trans(v0), input_precision="ieee")
        if D1 > 0:
            k1 = _load_keys(k_ptrs, k_pad_ptr, key * stride_kp, real, D0, D1, D, WINDOWED)
            v1 = _load_keys(v_ptrs, v_pad_ptr, key * stride_kp, real, D0, D1, D, WINDOWED)
            s = tl.dot(q1, tl.trans(k1), acc=s, input_precision="ieee")
            dp = tl.dot(g1, tl.trans(v1), acc=dp, input_precision="ieee")
        s = s * (scale * 1.4426950408889634) + w
        if not EVEN:
            s = tl.where(_keys(row, WH, WW, COLUMNS, BLOCK_N)[None, :], s, -float("inf"))
        p = tl.exp2(s + _row_bias(rel_h_ptr + offs_h, mask_q, row, WH, stride_hk, lse, 1, COLUMNS, BLOCK_N))
        ds = p * (dp - delta[:, None])
        dw += ds
        for r in tl.static_range(ROWS):
            here = (tl.arange(0, BLOCK_N) // COLUMNS == r)[None, :]
            dh = tl.sum(tl.where(here, ds, 0.0), 1).to(drel_h_ptr.dtype.element_ty)
            tl.store(drel_h_ptr + offs_h + (row + r) * stride_hk, dh, mask=mask_q & (row + r < WH))
        ds = ds.to(k0.dtype)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, acc=dq1, input_precision="ieee")
        dq0 = tl.dot(ds, k0, acc=dq0, input_precision="ieee")

    offs_x = batch * stride_xb + head * stride_xm + origin * stride_xp + query * stride_xp
    _store(dq_ptr, offs_x, mask_q, dq0 * scale, 0, D0, D)
    if D1 > 0:
        _store(dq_ptr, offs_x, mask_q, dq1 * scale, D0, D1, D)
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
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WINDOWED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv, of strides x, and a program's sums over its padded keys, dpad (programs, 2, D). Scores transposed."""
    tile, head, batch, top, left, rows, columns = _place(tiles, M, H, W, WH, WW)
    row = tile * (BLOCK_N // COLUMNS)
    real = _keys(row, rows, columns, COLUMNS, BLOCK_N)
    key = tl.arange(0, BLOCK_N) // COLUMNS * W + tl.arange(0, BLOCK_N) % COLUMNS  # from the tile's first
    corner = ((top + row) * W + left).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qm
    k_ptr += batch * stride_kb + head * stride_km + corner * stride_kp
    v_ptr += batch * stride_kb + head * stride_km + corner * stride_kp
    k_pad_ptr = pad_ptr + (M + head) * D if WINDOWED else None
    v_pad_ptr = pad_ptr + (2 * M + head) * D if WINDOWED else None
    rel_h_ptr += batch * stride_hb + head * stride_hm
    rel_w_ptr += batch * stride_wb + head * stride_wm
    g_ptr += (batch * H * W * M + head) * D
    lse_ptr += (batch * M + head) * H * W
    delta_ptr += (batch * M + head) * H * W
    dk_ptr += batch * stride_xb + head * stride_xm + corner * stride_xp
    dv_ptr += batch * stride_xb + head * stride_xm + corner * stride_xp

    k0 = _load_keys(k_ptr, k_pad_ptr, key * stride_kp, real, 0, D0, D, WINDOWED)  # [BLOCK_N, D0]
    v0 = _load_keys(v_ptr, v_pad_ptr, key * stride_kp, real, 0, D0, D, WINDOWED)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    if D1 > 0:
        k1 = _load_keys(k_ptr, k_pad_ptr, key * stride_kp, real, D0, D1, D, WINDOWED)
        v1 = _load_keys(v_ptr, v_pad_ptr, key * stride_kp, real, D0, D1, D, WINDOWED)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    for start in range(0, rows * columns, BLOCK_M):
        origin, query, mask_q = _queries(start, top, left, rows, columns, W, WINDOWED, BLOCK_M)
        q_ptrs = q_ptr + origin * stride_qp
        g_ptrs = g_ptr + origin * M * D
        q0 = _load(q_ptrs, query * stride_qp, mask_q, 0, D0, D)  # [BLOCK_M, D0]
        g0 = _load(g_ptrs, query * (M * D), mask_q, 0, D0, D)
        s = tl.dot(k0, tl.trans(q0), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(v0, tl.trans(g0), input_precision="ieee")
        if D1 > 0:
            q1 = _load(q_ptrs, query * stride_qp, mask_q, D0, D1, D)
            g1 = _load(g_ptrs, query * (M * D), mask_q, D0, D1, D)
            s = tl.dot(k1, tl.trans(q1), acc=s, input_precision="ieee")
            dp = tl.dot(v1, tl.trans(g1), acc=dp, input_precision="ieee")
        lse = tl.load(lse_ptr + origin + query, mask=mask_q, other=0.0)
        delta = tl.load(delta_ptr + origin + query, mask=mask_q, other=0.0)
        w_ptrs = rel_w_ptr + origin * stride_wp
        w = _column_bias(w_ptrs, query * stride_wp, mask_q, WW, stride_wk, 0, COLUMNS, BLOCK_N)
        h_ptrs = rel_h_ptr + origin * stride_hp + query * stride_hp
        s = s * (scale * 1.4426950408889634) + w
        p = tl.exp2(s + _row_bias(h_ptrs, mask_q, row, WH, stride_hk, lse, 0, COLUMNS, BLOCK_N))
        ds = (p * (dp - delta[None, :])).to(q0.dtype)
        p = p.to(q0.dtype)
        dv0 = tl.dot(p, g0, acc=dv0, input_precision="ieee")
        dk0 = tl.dot(ds, q0, acc=dk0, input_precision="ieee")
        if D1 > 0:
            dv1 = tl.dot(p, g1, acc=dv1, input_precision="ieee")
            dk1 = tl.dot(ds, q1, acc=dk1, input_precision="ieee")

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
