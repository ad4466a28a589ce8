"""Parts of the kernels of SAM's attention: where a program works, and the loads of its tiles and of their bias.

A key past the window's end gets the bias -inf, and so does a query that does not exist. FULL promises that there are
none of these, and every mask is left out.

A tile's rows are a tuple: pointer, offsets [rows], which exist [rows], and with windows a pointer to the bias [D] that
stands in for keys or values past the grid.
A loaded tile is a tuple of its parts of D0 and D1 columns; where D1 is 0, the first stands in both places.
A table of the bias is a tuple too: pointer, offsets of the queries [BLOCK_M], which exist [BLOCK_M], the keys of a
window along that axis, their stride."""

from __future__ import annotations

from .common import jit, octaves, store, tl


@jit
def place(sizes, WINDOWED: tl.constexpr):
    """A program's tile, head and batch element; its window's first token, and the rows and columns the grid holds.

    `sizes`: heads, rows and columns of the grid, those of a window, tiles of a window."""
    M, H, W, WH, WW, tiles = sizes
    pid = tl.program_id(0)
    tile = pid % tiles
    head = ((pid // tiles) % M).to(tl.int64)
    window = pid // (tiles * M)
    if WINDOWED:
        down = (H + WH - 1) // WH
        across = (W + WW - 1) // WW
        top = (window // across) % down * WH
        left = window % across * WW
        batch = (window // (across * down)).to(tl.int64)
        corner = (top * W + left).to(tl.int64)
        return tile, head, batch, corner, tl.minimum(WH, H - top), tl.minimum(WW, W - left)
    else:
        return tile, head, window.to(tl.int64), tl.cast(0, tl.int64), H, W


@jit
def queries(start, corner, rows, columns, W, WINDOWED: tl.constexpr, TILE: tl.constexpr):
    """A window's tokens start .. start + BLOCK_M − 1: a position in the grid, offsets from it, which exist."""
    index = start + tl.arange(0, TILE.BLOCK_M)
    mask = index < rows * columns
    if WINDOWED:
        return corner, index // columns * W + index % columns, mask
    else:
        return tl.cast(start, tl.int64), tl.arange(0, TILE.BLOCK_M), mask


@jit
def keys(row, rows, columns, TILE: tl.constexpr):
    """Which keys of the tile that starts at `row` lie within the first `rows` and `columns` of the window."""
    index = tl.arange(0, TILE.BLOCK_N)
    return (row + index // TILE.COLUMNS < rows) & (index % TILE.COLUMNS < columns)


@jit
def key_offsets(W, TILE: tl.constexpr):
    """Positions of a tile's keys in the grid, from its first."""
    return tl.arange(0, TILE.BLOCK_N) // TILE.COLUMNS * W + tl.arange(0, TILE.BLOCK_N) % TILE.COLUMNS


@jit
def at(ptr, batch, head, position, stride):
    """`ptr` at a token's head, of strides of (b, p, m)."""
    return ptr + (batch * stride[0] + head * stride[2] + position * stride[1])


@jit
def table_of(ptr, origin, query, mask, keys, stride):
    """The bias of the queries at origin + query as a table; `ptr`: a head's first, `stride` of (b, m, query, key)."""
    return ptr + origin * stride[2], query * stride[2], mask, keys, stride[3]


@jit
def key_tile(row, source, TILE: tl.constexpr):
    """The keys and the values of the tile that starts at `row`, as rows [BLOCK_N].

    `source`: pointers to a window's first key and value, what pads them, offsets of a tile's keys, the stride of
    positions, (rows, columns, W)."""
    ptrs, pad_ptrs, offs, stride, extent = source
    rows, columns, W = extent
    real = keys(row, rows, columns, TILE)
    ahead = tl.cast(row * W, tl.int64) * stride
    if pad_ptrs[0] is None:
        return (ptrs[0] + ahead, offs, real), (ptrs[1] + ahead, offs, real)
    else:
        return (ptrs[0] + ahead, offs, real, pad_ptrs[0]), (ptrs[1] + ahead, offs, real, pad_ptrs[1])


@jit
def load_part(rows, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr):
    """Columns START .. START + WIDTH − 1 of the rows, 0 past D.  # [rows, WIDTH]"""
    mask = rows[2]
    offs_d = START + tl.arange(0, WIDTH)
    ptrs = rows[0] + rows[1][:, None] + offs_d[None, :]
    if START + WIDTH > D:
        x = tl.load(ptrs, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)
    elif FULL:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=mask[:, None], other=0.0)
    if len(rows) == 4:
        pad = tl.load(rows[3] + offs_d, mask=offs_d < D, other=0.0)
        x = tl.where(mask[:, None], x, pad[None, :])
    return x


@jit
def load_parts(rows, DIM: tl.constexpr, FULL: tl.constexpr):
    """The rows in their parts [rows, D0] and [rows, D1]."""
    x0 = load_part(rows, 0, DIM.D0, DIM.D, FULL)
    if DIM.D1 > 0:
        return x0, load_part(rows, DIM.D0, DIM.D1, DIM.D, FULL)
    else:
        return x0, x0


@jit
def zero_parts(ROWS: tl.constexpr, DIM: tl.constexpr):
    """Sums in fp32, 0 at first, in parts [ROWS, D0] and [ROWS, D1]."""
    x0 = tl.full([ROWS, DIM.D0], 0.0, tl.float32)
    if DIM.D1 > 0:
        return x0, tl.full([ROWS, DIM.D1], 0.0, tl.float32)
    else:
        return x0, x0


@jit
def store_parts(ptr, offs, mask, x, factor, DIM: tl.constexpr):
    """Store factor · x, given in parts, in the rows at `offs`. `factor`: a number, or one a row [rows, 1]."""
    store(ptr, offs, mask, x[0] * factor, 0, DIM.D0, DIM.D)
    if DIM.D1 > 0:
        store(ptr, offs, mask, x[1] * factor, DIM.D0, DIM.D1, DIM.D)


@jit
def product(a, b, DIM: tl.constexpr, FULL: tl.constexpr):
    """a bᵀ of a in parts [A, D] and of the rows b.  # [A, B]"""
    b0 = load_part(b, 0, DIM.D0, DIM.D, FULL)  # [B, D0]
    s = tl.dot(a[0], tl.trans(b0), input_precision="ieee")
    if DIM.D1 > 0:
        b1 = load_part(b, DIM.D0, DIM.D1, DIM.D, FULL)
        s = tl.dot(a[1], tl.trans(b1), acc=s, input_precision="ieee")
    return s


@jit
def first_parts(b, DIM: tl.constexpr, FULL: tl.constexpr):
    """The first parts of two tiles' rows, [B, D0] each."""
    return load_part(b[0], 0, DIM.D0, DIM.D, FULL), load_part(b[1], 0, DIM.D0, DIM.D, FULL)


@jit
def two_products(a, first, b, DIM: tl.constexpr, FULL: tl.constexpr):
    """a bᵀ [A, B] of each of two, and both b in parts: `a` in parts [A, D], `b` rows, `first` their first parts."""
    x0, y0 = first
    s = tl.dot(a[0][0], tl.trans(x0), input_precision="ieee")
    t = tl.dot(a[1][0], tl.trans(y0), input_precision="ieee")
    if DIM.D1 > 0:
        x1 = load_part(b[0], DIM.D0, DIM.D1, DIM.D, FULL)
        y1 = load_part(b[1], DIM.D0, DIM.D1, DIM.D, FULL)
        s = tl.dot(a[0][1], tl.trans(x1), acc=s, input_precision="ieee")
        t = tl.dot(a[1][1], tl.trans(y1), acc=t, input_precision="ieee")
        return s, t, (x0, x1), (y0, y1)
    else:
        return s, t, (x0, x0), (y0, y0)


@jit
def load_each(ptrs, mask, FULL: tl.constexpr):
    """One number a query, 0 where `mask` is false.  # [BLOCK_M]"""
    if FULL:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@jit
def column_bias(table, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """rel_w of the table's queries against WIDTH keys, whole rows; -inf past the window.  # [BLOCK_M, WIDTH]"""
    ptr, offs, mask, WW, stride = table
    column = tl.arange(0, WIDTH) % TILE.COLUMNS
    ptrs = ptr + offs[:, None] + column[None, :] * stride
    if TILE.FULL:
        return tl.load(ptrs)
    else:
        w = tl.load(ptrs, mask=mask[:, None] & (column < WW)[None, :], other=0.0)
        return tl.where((column < WW)[None, :], w, -float("inf"))


@jit
def one_row_bias(table, row, TILE: tl.constexpr):
    """log2(e) · rel_h of queries against one row of keys, -inf past the window and for absent queries.  # [BLOCK_M]

    A row past the end may be asked for ahead of its use; FULL then gives the last."""
    ptr, offs, mask, WH, stride = table
    ptrs = ptr + offs
    if TILE.FULL:
        h = tl.load(ptrs + tl.cast(tl.minimum(row, WH - 1), tl.int64) * stride)
    else:
        h = tl.load(ptrs + tl.cast(row, tl.int64) * stride, mask=mask & (row < WH), other=-float("inf"))
    return octaves(h.to(tl.float32))


@jit
def row_bias(table, row, less, AXIS: tl.constexpr, TILE: tl.constexpr):
    """log2(e) · rel_h − less of queries against a tile of keys along AXIS; that axis is 1 where a tile is a row."""
    bias = tl.expand_dims(one_row_bias(table, row, TILE) - less, AXIS)
    for r in tl.static_range(1, TILE.BLOCK_N // TILE.COLUMNS):
        other = tl.expand_dims(one_row_bias(table, row + r, TILE) - less, AXIS)
        here = tl.arange(0, TILE.BLOCK_N) // TILE.COLUMNS == r
        bias = tl.where(tl.expand_dims(here, 1 - AXIS), other, bias)
    return bias
