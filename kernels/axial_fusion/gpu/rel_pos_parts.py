"""Parts of the kernels of SAM's attention: where a program works, and the loads of its tiles and of their bias.

A key past the window's end gets the bias -inf, and so does a query that does not exist. FULL promises that there are
none of these, and every mask is left out."""

from __future__ import annotations

from .common import jit, octaves, tl


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
def load_rows(ptr, offs, mask, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr):
    """Columns START .. START + WIDTH − 1 of the rows at `offs`, 0 past D and where `mask` is false."""
    offs_d = START + tl.arange(0, WIDTH)
    ptrs = ptr + offs[:, None] + offs_d[None, :]
    if START + WIDTH > D:
        return tl.load(ptrs, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)
    elif FULL:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask[:, None], other=0.0)


@jit
def load_each(ptrs, mask, FULL: tl.constexpr):
    """One number a query, 0 where `mask` is false."""
    if FULL:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@jit
def load_keys(
    ptr, pad_ptr, offs, real, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """The same of keys or values, with the bias at `pad_ptr` where the grid ends."""
    x = load_rows(ptr, offs, real, START, WIDTH, D, FULL)
    if pad_ptr is not None:
        offs_d = START + tl.arange(0, WIDTH)
        pad = tl.load(pad_ptr + offs_d, mask=offs_d < D, other=0.0)
        x = tl.where(real[:, None], x, pad[None, :])
    return x


@jit
def column_bias(ptr, offs, mask, WW, stride_k, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """rel_w of the queries at `offs` against WIDTH keys, whole rows; -inf past the window.  # [BLOCK_M, WIDTH]"""
    column = tl.arange(0, WIDTH) % TILE.COLUMNS
    ptrs = ptr + offs[:, None] + column[None, :] * stride_k
    if TILE.FULL:
        return tl.load(ptrs)
    else:
        w = tl.load(ptrs, mask=mask[:, None] & (column < WW)[None, :], other=0.0)
        return tl.where((column < WW)[None, :], w, -float("inf"))


@jit
def one_row_bias(ptrs, mask, row, WH, stride_k, TILE: tl.constexpr):
    """log2(e) · rel_h of queries against one row of keys, -inf past the window and for absent queries.  # [BLOCK_M]

    A row past the end may be asked for ahead of its use; FULL then gives the last."""
    if TILE.FULL:
        h = tl.load(ptrs + tl.cast(tl.minimum(row, WH - 1), tl.int64) * stride_k)
    else:
        h = tl.load(ptrs + tl.cast(row, tl.int64) * stride_k, mask=mask & (row < WH), other=-float("inf"))
    return octaves(h.to(tl.float32))


@jit
def row_bias(ptrs, mask, row, WH, stride_k, less, AXIS: tl.constexpr, TILE: tl.constexpr):
    """log2(e) · rel_h − less of queries against a tile of keys along AXIS; that axis is 1 where a tile is a row."""
    bias = tl.expand_dims(one_row_bias(ptrs, mask, row, WH, stride_k, TILE) - less, AXIS)
    for r in tl.static_range(1, TILE.BLOCK_N // TILE.COLUMNS):
        other = tl.expand_dims(one_row_bias(ptrs, mask, row + r, WH, stride_k, TILE) - less, AXIS)
        here = tl.arange(0, TILE.BLOCK_N) // TILE.COLUMNS == r
        bias = tl.where(tl.expand_dims(here, 1 - AXIS), other, bias)
    return bias
