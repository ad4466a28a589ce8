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

from .common import jit, octaves, tl
from .rel_pos_parts import (
    at,
    column_bias,
    first_parts,
    key_offsets,
    key_tile,
    keys,
    load_each,
    load_part,
    load_parts,
    one_row_bias,
    place,
    product,
    queries,
    row_bias,
    store_parts,
    table_of,
    two_products,
    zero_parts,
)


@jit
def _weighted(p, y, v, DIM: tl.constexpr, FULL: tl.constexpr):
    """y + p v, y in parts [BLOCK_M, D], p [BLOCK_M, BLOCK_N] and v rows [BLOCK_N]."""
    y0, y1 = y
    v0 = load_part(v, 0, DIM.D0, DIM.D, FULL)  # [BLOCK_N, D0]
    if DIM.D1 > 0:
        v1 = load_part(v, DIM.D0, DIM.D1, DIM.D, FULL)
        y1 = tl.dot(p, v1, acc=y1, input_precision="ieee")
    y0 = tl.dot(p, v0, acc=y0, input_precision="ieee")
    return y0, y1


@jit
def _scaled(y, factor, DIM: tl.constexpr):
    """factor · y, y in parts [BLOCK_M, D], `factor` [BLOCK_M]."""
    if DIM.D1 > 0:
        return y[0] * factor[:, None], y[1] * factor[:, None]
    else:
        return y[0] * factor[:, None], y[1]


@jit
def _step(row, running, bias, q, source, DIM: tl.constexpr, TILE: tl.constexpr):
    """One tile of keys joins the running softmax: y in parts [BLOCK_M, D], peak and total [BLOCK_M], and the first
    row's rel_h [BLOCK_M], loaded a step ahead where a tile is one row.

    `bias`: log2(e) · scale, log2(e) · rel_w [BLOCK_M, BLOCK_N], the table of rel_h."""
    y, peak, total, h = running
    c, w, table = bias
    ONE_ROW: tl.constexpr = TILE.BLOCK_N == TILE.COLUMNS
    next_h = one_row_bias(table, row + 1, TILE) if ONE_ROW else h
    k, v = key_tile(row, source, TILE)
    s = product(q, k, DIM, TILE.FULL) * c + w
    if ONE_ROW:  # rel_h joins the maximum instead of every score
        higher = tl.maximum(peak, tl.max(s, 1) + h)
        p = tl.exp2(s - (higher - h)[:, None])
    else:
        s += row_bias(table, row, 0.0, 1, TILE)
        higher = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(peak - higher)
    y = _scaled(y, shrink, DIM)
    total = total * shrink + tl.sum(p, 1)
    return _weighted(p.to(q[0].dtype), y, v, DIM, TILE.FULL), higher, total, next_h


@jit
def _step_of_two(row, running, bias, q, source, DIM: tl.constexpr, TILE: tl.constexpr):
    """The same of two tiles of one row each, which share a rescaling; rel_h is that of both rows."""
    y, peak, total, h = running
    h_a, h_b = h
    c, w, table = bias
    next_a = one_row_bias(table, row + 2, TILE)
    k_a, v_a = key_tile(row, source, TILE)
    s_a = product(q, k_a, DIM, TILE.FULL)
    next_b = one_row_bias(table, row + 3, TILE)
    k_b, v_b = key_tile(row + 1, source, TILE)
    s_b = product(q, k_b, DIM, TILE.FULL) * c + w
    s_a = s_a * c + w
    higher = tl.maximum(tl.maximum(peak, tl.max(s_a, 1) + h_a), tl.max(s_b, 1) + h_b)
    p_a = tl.exp2(s_a - (higher - h_a)[:, None])
    shrink = tl.exp2(peak - higher)
    y = _scaled(y, shrink, DIM)
    p_b = tl.exp2(s_b - (higher - h_b)[:, None])
    total = total * shrink + tl.sum(p_a + p_b, 1)
    y = _weighted(p_a.to(q[0].dtype), y, v_a, DIM, TILE.FULL)
    return _weighted(p_b.to(q[0].dtype), y, v_b, DIM, TILE.FULL), higher, total, (next_a, next_b)


@jit
def rel_pos_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, tables, y_ptr, lse_ptr,
    scale, sizes,
    stride_q, stride_k, stride_h, stride_w,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y (B, P, M, D) and lse (B, M, P). k and v have the same strides. PAIR takes two tiles of keys a step."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    FULL: tl.constexpr = TILE.FULL
    ROWS: tl.constexpr = TILE.BLOCK_N // TILE.COLUMNS
    WINDOWED: tl.constexpr = pad_ptr is not None
    M, H, W, WH, WW, _ = sizes
    tile, head, batch, corner, rows, columns = place(sizes, WINDOWED)
    origin, query, mask_q = queries(tile * BLOCK_M, corner, rows, columns, W, WINDOWED, TILE)
    first_k, first_v = at(k_ptr, batch, head, corner, stride_k), at(v_ptr, batch, head, corner, stride_k)
    pads = (pad_ptr + (M + head) * DIM.D, pad_ptr + (2 * M + head) * DIM.D) if WINDOWED else (None, None)
    source = ((first_k, first_v), pads, key_offsets(W, TILE) * stride_k[1], stride_k[1], (rows, columns, W))
    rel_h_ptr = tables[0] + (batch * stride_h[0] + head * stride_h[1])
    rel_w_ptr = tables[1] + (batch * stride_w[0] + head * stride_w[1])
    table_h = table_of(rel_h_ptr, origin, query, mask_q, WH, stride_h)
    table_w = table_of(rel_w_ptr, origin, query, mask_q, WW, stride_w)

    q_rows = (at(q_ptr, batch, head, origin, stride_q), query * stride_q[1], mask_q)
    q = load_parts(q_rows, DIM, FULL)  # [BLOCK_M, D]
    w = octaves(column_bias(table_w, TILE.BLOCK_N, TILE).to(tl.float32))
    bias = (octaves(scale), w, table_h)
    # Finite: the first keys may all be masked.
    peak = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    h = total  # unused where a tile is several rows
    if ROWS == 1:
        h = one_row_bias(table_h, 0, TILE)
    # A window that the grid cuts has tiles without queries.
    stop = tl.where(tile * BLOCK_M < rows * columns, WH, 0)
    y = zero_parts(BLOCK_M, DIM)
    if TILE.PAIR:
        running = (y, peak, total, (h, one_row_bias(table_h, 1, TILE)))
        for row in range(0, stop, 2):
            running = _step_of_two(row, running, bias, q, source, DIM, TILE)
    else:
        running = (y, peak, total, h)
        for row in range(0, stop, ROWS):
            running = _step(row, running, bias, q, source, DIM, TILE)

    y, peak, total, _ = running
    y_ptr += ((batch * H * W + origin) * M + head) * DIM.D
    total = tl.where(total == 0.0, 1.0, total)  # a query without keys gives 0
    share = 1.0 / total
    store_parts(y_ptr, query * (M * DIM.D), mask_q, y, share[:, None], DIM)
    tl.store(lse_ptr + (batch * M + head) * H * W + origin + query, peak + tl.log2(total), mask=mask_q)


@jit
def _row_sums(g, y, DIM: tl.constexpr):
    """Σ g · y over D, in fp32, of g and y in parts [BLOCK_M, D].  # [BLOCK_M]"""
    total = tl.sum(g[0].to(tl.float32) * y[0].to(tl.float32), 1)
    if DIM.D1 > 0:
        total += tl.sum(g[1].to(tl.float32) * y[1].to(tl.float32), 1)
    return total


@jit
def _store_row_gradients(table, row, ds, TILE: tl.constexpr):
    """d rel_h of a tile's rows of keys: sums of ds [BLOCK_M, BLOCK_N] over each row's columns."""
    ptr, offs, mask, WH, stride = table
    ptrs = ptr + offs + tl.cast(row, tl.int64) * stride
    ROWS: tl.constexpr = TILE.BLOCK_N // TILE.COLUMNS
    for r in tl.static_range(ROWS):
        row_of = tl.arange(0, TILE.BLOCK_N) // TILE.COLUMNS
        here = ds if ROWS == 1 else tl.where((row_of == r)[None, :], ds, 0.0)
        dh = tl.sum(here, 1).to(ptr.dtype.element_ty)
        tl.store(ptrs + r * stride, dh, mask=None if TILE.FULL else mask & (row + r < WH))


@jit
def _store_column_gradients(table, dw, TILE: tl.constexpr):
    """d rel_w from sums dw [BLOCK_M, BLOCK_N] over the tiles of keys."""
    ptr, offs, mask, WW, stride = table
    ROWS: tl.constexpr = TILE.BLOCK_N // TILE.COLUMNS
    if ROWS > 1:
        dw = tl.sum(tl.reshape(dw, [TILE.BLOCK_M, ROWS, TILE.COLUMNS]), 1)
    column = tl.arange(0, TILE.COLUMNS)[None, :]
    ptrs = ptr + offs[:, None] + column * stride
    tl.store(ptrs, dw.to(ptr.dtype.element_ty), mask=mask[:, None] & (column < WW))


@jit
def rel_pos_bwd_dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, tables, y_ptr, lse_ptr, dq_ptr, dtables, delta_ptr,
    scale, sizes,
    stride_q, stride_k, stride_h, stride_w, stride_x,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dq, of strides x, d rel_h and d rel_w like their tables, and delta (B, M, P) = Σ dY · y."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    FULL: tl.constexpr = TILE.FULL
    ROWS: tl.constexpr = TILE.BLOCK_N // TILE.COLUMNS
    WINDOWED: tl.constexpr = pad_ptr is not None
    M, H, W, WH, WW, _ = sizes
    tile, head, batch, corner, rows, columns = place(sizes, WINDOWED)
    origin, query, mask_q = queries(tile * BLOCK_M, corner, rows, columns, W, WINDOWED, TILE)
    first_k, first_v = at(k_ptr, batch, head, corner, stride_k), at(v_ptr, batch, head, corner, stride_k)
    pads = (pad_ptr + (M + head) * DIM.D, pad_ptr + (2 * M + head) * DIM.D) if WINDOWED else (None, None)
    source = ((first_k, first_v), pads, key_offsets(W, TILE) * stride_k[1], stride_k[1], (rows, columns, W))
    q_rows = (at(q_ptr, batch, head, origin, stride_q), query * stride_q[1], mask_q)
    offs_y = ((batch * H * W + origin) * M + head) * DIM.D
    g_rows = (g_ptr + offs_y, query * (M * DIM.D), mask_q)
    y_rows = (y_ptr + offs_y, query * (M * DIM.D), mask_q)
    offs_l = (batch * M + head) * H * W + origin + query
    offs_h = batch * stride_h[0] + head * stride_h[1] + origin * stride_h[2] + query * stride_h[2]
    offs_w = batch * stride_w[0] + head * stride_w[1] + origin * stride_w[2] + query * stride_w[2]
    table_h = (tables[0], offs_h, mask_q, WH, stride_h[3])
    table_w = (tables[1], offs_w, mask_q, WW, stride_w[3])
    dtable_h = (dtables[0], offs_h, mask_q, WH, stride_h[3])
    dtable_w = (dtables[1], offs_w, mask_q, WW, stride_w[3])
    c = octaves(scale)

    q, g = load_parts(q_rows, DIM, FULL), load_parts(g_rows, DIM, FULL)  # [BLOCK_M, D]
    delta = _row_sums(g, load_parts(y_rows, DIM, FULL), DIM)
    tl.store(delta_ptr + offs_l, delta, mask=mask_q)
    lse = tl.load(lse_ptr + offs_l, mask=mask_q, other=0.0)
    w = octaves(column_bias(table_w, TILE.BLOCK_N, TILE).to(tl.float32)) - lse[:, None]
    dq0, dq1 = zero_parts(BLOCK_M, DIM)
    dw = tl.full([BLOCK_M, TILE.BLOCK_N], 0.0, tl.float32)
    if ROWS == 1:
        h = one_row_bias(table_h, 0, TILE)
    # A window that the grid cuts has tiles without queries.
    for row in range(0, tl.where(tile * BLOCK_M < rows * columns, WH, 0), ROWS):
        if ROWS == 1:
            next_h = one_row_bias(table_h, row + 1, TILE)
        kv_rows = key_tile(row, source, TILE)
        first = first_parts(kv_rows, DIM, FULL)
        s, dp, k, _v = two_products((q, g), first, kv_rows, DIM, FULL)  # [BLOCK_M, BLOCK_N]
        bias = h[:, None] if ROWS == 1 else row_bias(table_h, row, 0.0, 1, TILE)
        ds = tl.exp2(s * c + (w + bias)) * (dp - delta[:, None])
        dw += ds
        _store_row_gradients(dtable_h, row, ds, TILE)
        ds = ds.to(k[0].dtype)
        if DIM.D1 > 0:
            dq1 = tl.dot(ds, k[1], acc=dq1, input_precision="ieee")
        dq0 = tl.dot(ds, k[0], acc=dq0, input_precision="ieee")
        if ROWS == 1:
            h = next_h

    dq_ptr = at(dq_ptr, batch, head, origin, stride_x)
    store_parts(dq_ptr, query * stride_x[1], mask_q, (dq0, dq1), scale, DIM)
    _store_column_gradients(dtable_w, dw, TILE)


@jit
def _transposed_column_bias(table, TILE: tl.constexpr):
    """rel_w of queries against a tile of keys, in its dtype.  # [BLOCK_N, BLOCK_M]"""
    ROWS: tl.constexpr = TILE.BLOCK_N // TILE.COLUMNS
    w = tl.trans(column_bias(table, TILE.COLUMNS, TILE))
    if ROWS > 1:
        w = tl.broadcast_to(w[None, :, :], [ROWS, TILE.COLUMNS, TILE.BLOCK_M])
        w = tl.reshape(w, [TILE.BLOCK_N, TILE.BLOCK_M])
    return w


@jit
def _store_pads(ptr, padded, dk, dv, scale, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Sums of dk and dv over the padded keys, columns START .. START + WIDTH − 1, into ptr (2, D)."""
    offs_d = START + tl.arange(0, WIDTH)
    tl.store(ptr + offs_d, tl.sum(tl.where(padded, dk, 0.0), 0) * scale, mask=offs_d < D)
    tl.store(ptr + D + offs_d, tl.sum(tl.where(padded, dv, 0.0), 0), mask=offs_d < D)


@jit
def rel_pos_bwd_dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, tables, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dpad_ptr,
    scale, sizes,
    stride_q, stride_k, stride_h, stride_w, stride_x,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dk and dv, of strides x, and a program's sums over its padded keys, dpad (programs, 2, D). Scores transposed."""
    D: tl.constexpr = DIM.D
    FULL: tl.constexpr = TILE.FULL
    WINDOWED: tl.constexpr = pad_ptr is not None
    M, H, W, WH, WW, _ = sizes
    tile, head, batch, corner, rows, columns = place(sizes, WINDOWED)
    row = tile * (TILE.BLOCK_N // TILE.COLUMNS)
    real = keys(row, rows, columns, TILE)
    key, token = key_offsets(W, TILE), corner + row * W
    pads = (pad_ptr + (M + head) * D, pad_ptr + (2 * M + head) * D) if WINDOWED else (None, None)
    first_k, first_v = at(k_ptr, batch, head, corner, stride_k), at(v_ptr, batch, head, corner, stride_k)
    source = ((first_k, first_v), pads, key * stride_k[1], stride_k[1], (rows, columns, W))
    k_rows, v_rows = key_tile(row, source, TILE)
    dk_ptr, dv_ptr = at(dk_ptr, batch, head, token, stride_x), at(dv_ptr, batch, head, token, stride_x)
    q_ptr += batch * stride_q[0] + head * stride_q[2]
    rel_h_ptr = tables[0] + (batch * stride_h[0] + head * stride_h[1])
    rel_w_ptr = tables[1] + (batch * stride_w[0] + head * stride_w[1])
    g_ptr += (batch * H * W * M + head) * D
    lse_ptr += (batch * M + head) * H * W
    delta_ptr += (batch * M + head) * H * W
    c = octaves(scale)

    k, v = load_parts(k_rows, DIM, FULL), load_parts(v_rows, DIM, FULL)  # [BLOCK_N, D]
    dk0, dk1 = zero_parts(TILE.BLOCK_N, DIM)
    dv0, dv1 = zero_parts(TILE.BLOCK_N, DIM)
    for start in range(0, rows * columns, TILE.BLOCK_M):
        origin, query, mask_q = queries(start, corner, rows, columns, W, WINDOWED, TILE)
        q_rows = (q_ptr + origin * stride_q[1], query * stride_q[1], mask_q)
        g_rows = (g_ptr + origin * M * D, query * (M * D), mask_q)
        first = first_parts((q_rows, g_rows), DIM, FULL)
        lse = load_each(lse_ptr + origin + query, mask_q, FULL)
        h = row_bias(table_of(rel_h_ptr, origin, query, mask_q, WH, stride_h), row, lse, 0, TILE)
        w = _transposed_column_bias(table_of(rel_w_ptr, origin, query, mask_q, WW, stride_w), TILE)
        s, dp, q, g = two_products((k, v), first, (q_rows, g_rows), DIM, FULL)  # [BLOCK_N, BLOCK_M]
        delta = load_each(delta_ptr + origin + query, mask_q, FULL)
        p = tl.exp2(s * c + (octaves(w.to(tl.float32)) + h))
        ds = (p * (dp - delta[None, :])).to(q[0].dtype)
        p = p.to(q[0].dtype)
        dv0 = tl.dot(p, g[0], acc=dv0, input_precision="ieee")
        dk0 = tl.dot(ds, q[0], acc=dk0, input_precision="ieee")
        if DIM.D1 > 0:
            dv1 = tl.dot(p, g[1], acc=dv1, input_precision="ieee")
            dk1 = tl.dot(ds, q[1], acc=dk1, input_precision="ieee")

    store_parts(dk_ptr, key * stride_x[1], real, (dk0, dk1), scale, DIM)
    store_parts(dv_ptr, key * stride_x[1], real, (dv0, dv1), 1.0, DIM)
    if WINDOWED:
        padded = (keys(row, WH, WW, TILE) & ~real)[:, None]
        dpad_ptr += tl.program_id(0).to(tl.int64) * 2 * D
        _store_pads(dpad_ptr, padded, dk0, dv0, scale, 0, DIM.D0, D)
        if DIM.D1 > 0:
            _store_pads(dpad_ptr, padded, dk1, dv1, scale, DIM.D0, DIM.D1, D)
