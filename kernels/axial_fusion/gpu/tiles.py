"""Every tile choice of the Triton kernels: what was measured fastest, by architecture, and rules for all else.

A choice is what a launcher passes on: the kernel's constants, `num_warps` and `num_stages`. The number of positions is
no key of one, so that a compiled model is not compiled again for another image size. `python -m axial_fusion.tune`
measures an entry of `MEASURED`."""

from __future__ import annotations

from functools import cache, lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tuned import measurements
from .common import TensorDescriptor


@cache
def arch(device: torch.device) -> int:
    """90 for sm_90; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def block(rows: int) -> int:
    """The smallest tile side that holds `rows`: a power of two, 16 at least, as a matrix unit takes."""
    return max(16, 1 << (rows - 1).bit_length())


class HeadDim(NamedTuple):
    """A head's columns D, loaded D0 and then D1 at a time; D1 is 0 where D0 holds them all. A kernel's constant."""

    D: int
    D0: int
    D1: int


def split(head_dim: int) -> HeadDim:
    """D as its largest power of two and the rest: 80 = 64 + 16 costs less than 128."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return HeadDim(head_dim, first, block(rest) if rest > 0 else 0)


# Axial attention.


class Tile(NamedTuple):
    """Rows of a tile (positions times slices, filled from below), warps, stages of the loads' pipeline, and heads.

    `heads` is the most that one program takes of them."""

    rows: int = 64
    num_warps: int = 4
    num_stages: int = 1
    heads: int = 1


class Key(NamedTuple):
    """What a tile is chosen by. `arch` is 90 for sm_90 and 0 in Triton's interpreter."""

    op: str
    arch: int
    dtype: torch.dtype
    slices: int
    head_dim: int


MEASURED = {  # what was measured fastest; all else is `default`
    Key(e["op"], m["arch"], getattr(torch, e["dtype"]), e["slices"], e["head_dim"]): Tile(*e["tile"])
    for m in measurements() for e in m.get("tiles", ())
}  # fmt: skip


@lru_cache(maxsize=1024)
def default(key: Key) -> Tile:
    """The tile of a key without an entry: one that builds without spills where N is 32 at most."""
    return _forward(key) if key.op == "axial_attention" else _backward(key)


# On an H100 (torch 2.11, Triton 3.6): µs at B 4, P 4096, M 8 in bf16, q, k and v views of one tensor.
# Each number is of the fastest kernel tried with such a tile. 16 rows hold 3 positions of 5 slices.
# "wrong": products of 64 rows run on wgmma, and ptxas 12.8 miscompiles those of D's two parts, 64 + 32
# (counts/sass.py, wrong_descriptors).
#                   16 rows, 8 heads,   16 rows,   32 rows,   64 rows,
#                             4 warps     1 warp    2 warps    4 warps
# N 9   D 32   fwd             104.0      113.2      116.0      112.8
#              bwd             227.6      199.8      206.7      210.1
# N 5   D 32   fwd              58.0          -       62.6       62.9
#              bwd             108.3          -      113.1      115.6
# N 16  D 32   fwd             179.6      203.1      204.5      213.1
#              bwd             336.4      389.2      385.6      389.5
# N 9   D 96   fwd             450.9      329.3      329.0      wrong
#              bwd                 -      714.4      627.5      758.4
# What follows takes the best of each row, the one with the fewest positions a tile where two are within 1 %, and
# extends it by rule. fp32, whose products run on the FMA units, was not measured: its tiles build without spills.
def _forward(key: Key) -> Tile:
    if key.dtype != torch.float32 and key.head_dim <= 32:
        return Tile(16, 4, 1, heads=max(1, 128 // block(key.slices)))
    return _one_head(key, 16)


def _backward(key: Key) -> Tile:
    if key.dtype == torch.float32:
        return _one_head(key, 16)
    used = 16 // key.slices * key.slices  # rows of 16 that hold a slice
    if key.head_dim <= 32 and used >= 12:
        return Tile(16, 4, 1, heads=8)
    if key.head_dim > 64 and 80 <= key.arch < 90:
        return Tile(16, 2)  # 32 rows spill there at D 80 or 96, under Triton 3.6 and 3.7; none was timed
    return _one_head(key, 32 if key.head_dim > 64 else 16)


def _one_head(key: Key, rows: int) -> Tile:
    if key.dtype == torch.float32:
        return Tile(rows, 8 if key.head_dim > 64 or key.slices > 16 else 4)
    return Tile(rows, 1 if max(rows, key.slices) <= 16 else 2)  # fewer than the 4 warps that wgmma takes


def choose(op: str, x: Tensor, slices: int, head_dim: int) -> Tile:
    """The tile of `op`, axial_attention or axial_attention_backward, on x's device and dtype."""
    key = Key(op, arch(x.device), x.dtype, slices, head_dim)
    return MEASURED.get(key) or default(key)


class AxialTile(NamedTuple):
    """Heads of a program, positions in a tile, and the tile's rows of queries and of keys. A kernel's constant."""

    HEADS: int
    GROUP: int
    BLOCK_Q: int
    BLOCK_K: int


def packed(tile: Tile, num_queries: int, num_keys: int, heads: int) -> dict[str, Any]:
    """Launch options of an axial kernel for `tile` and these sizes: TILE (an AxialTile), num_warps and num_stages.

    A program takes gcd(tile.heads, heads) heads. `num_warps` shrinks in proportion."""
    together = gcd(tile.heads, heads)
    group = max(1, tile.rows // max(num_queries, num_keys))
    return {
        "TILE": AxialTile(together, group, block(group * num_queries), block(group * num_keys)),
        "num_warps": max(1, tile.num_warps * together // tile.heads),
        "num_stages": tile.num_stages,
    }


# SAM's attention with relative positions.


class RelPosTile(NamedTuple):
    """A tile of queries, of keys, and the columns that a row of keys is padded to. A kernel's constant.

    FULL: nothing has to be masked. PAIR: the forward takes two tiles of keys a step."""

    BLOCK_M: int
    BLOCK_N: int
    COLUMNS: int
    FULL: bool
    PAIR: bool


# Tiles of sm_90 in half precision: (queries, keys, warps, stages) where D is at most 64, 80 and 128, by the padded
# width of a row of keys. A tile of keys is whole rows. Measured on an H100 in bf16 (torch 2.11, Triton 3.6), each
# kernel alone, in us, against the 128 queries by 64 keys on 8 warps of before:
#   64 by 64, B 4, M 12, D 64: forward 1103 to 581, dq 1244 to 860, dkv 3291 to 1410
#   32 by 32, B 8, M 12, D 64: forward 182 to 91, dq 201 to 177, dkv 523 to 193
#   64 by 64, B 2, M 16, D 80: forward 861 to 838, dq wrong to 873, dkv 2789 to 1467
#   windows of 14 on 64 by 64, B 4, M 12, D 64: forward 187 to 157, dkv 566 to 296
# dq in those windows was timed with 64 keys in two stages (248 to 236), and on 32 by 32 with 32 keys in one (164 to
# 138); 32 keys in two stages were not. Every other tile is the nearest one that compiles without spills.
_REL_POS_HOPPER = {
    "forward": {
        16: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        32: ((64, 32, 4, 3), (128, 32, 8, 2), (128, 64, 8, 2)),
        64: ((64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 2)),
        128: ((64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2)),
    },
    "dq": {
        16: ((64, 32, 4, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        32: ((64, 32, 4, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        64: ((64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 2)),
        128: ((32, 128, 8, 1), (32, 128, 8, 1), (32, 128, 8, 1)),
    },
    "dkv": {
        16: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        32: ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
        64: ((64, 64, 4, 1), (64, 128, 8, 1), (32, 128, 8, 1)),
        128: ((32, 128, 8, 1), (16, 128, 8, 1), (16, 128, 8, 1)),
    },
}


@lru_cache(maxsize=4096)
def rel_pos(
    kernel: str, arch: int, dtype: torch.dtype, dim: int, window: tuple[int, int], padded: bool
) -> dict[str, Any]:
    """The tile of a kernel (forward, dq or dkv), and how it takes D.

    `padded`: windows may leave the grid."""
    height, width = window
    columns = block(width)
    hopper = dtype != torch.float32 and arch in (0, 90)
    if hopper:
        rows, keys, warps, stages = _REL_POS_HOPPER[kernel][columns][
            0 if dim <= 64 else 1 if dim <= 80 else 2
        ]
        if kernel == "dkv" and 32 < width < 64 and dim <= 80:
            rows, keys, warps, stages = 32, 64, 4, 2  # masks take registers
    else:
        rows, keys, warps, stages = _rel_pos_elsewhere(kernel, arch, dtype, dim, columns, padded)
    pair = kernel == "forward" and keys == columns == 32
    step = 2 if pair else keys // columns  # rows of keys
    full = not padded and width == columns and height * width % rows == 0 and height % step == 0
    parts = not hopper or (64 < dim <= 80 and (columns in (32, 64) or kernel == "forward"))
    return {
        "DIM": _rel_pos_dim(dim, parts=parts),
        "TILE": RelPosTile(rows, keys, columns, full, pair),
        "num_warps": warps,
        "num_stages": stages,
    }


def _rel_pos_dim(dim: int, *, parts: bool) -> HeadDim:
    """D as one power of two, or as two `parts` where they are less than that: 80 = 64 + 16.

    ptxas 12.8 miscompiled dq in two parts with one stage of loads (D 80, relative error 0.4 on an H100). sm_90 takes D
    in parts only where one width would cost most, in forms that `wrong_descriptors` of the compile tests passes."""
    widths, whole = split(dim), HeadDim(dim, block(dim), 0)
    return widths if parts and sum(widths) < sum(whole) else whole


def _rel_pos_elsewhere(
    kernel: str, arch: int, dtype: torch.dtype, dim: int, columns: int, padded: bool
) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages of fp32 and of other devices: these compile without spills; none was timed.

    On data-centre Blackwell, accumulators lie outside the registers. Elsewhere tiles are smaller; where a tile has
    fewer queries than keys, warps divide its keys and not its queries."""
    rows, warps, stages = 128, 8, 1
    if dtype == torch.float32:
        rows = 32 if dim <= (96 if kernel == "dkv" else 32) else 16
    elif arch in (100, 103):
        stages = 1 if kernel == "dq" else 2  # dkv spills in one stage under Triton 3.6
        if kernel == "dkv":
            rows = 32
        elif kernel == "dq" and padded:
            rows = 64
    elif kernel == "forward":
        rows, warps = 64 if dim <= 64 and not padded else 32, 4
        if padded and ((arch >= 120 and dim <= 32) or (arch in (86, 89) and dim > 32)):
            stages = 2  # one spills under Triton 3.6
    elif arch >= 120:
        rows, warps = 16, 4
        if kernel == "dq" and padded and dim <= 32:
            stages = 2  # one spills under Triton 3.6
    elif kernel == "dq":
        rows, warps = 32, 8 if padded or dim > 32 else 4
    else:
        rows, warps = 32 if dim <= 32 else 16, 4
    return max(16, rows // 2) if columns > 64 else rows, max(64, columns), warps, stages


@lru_cache(maxsize=4096)
def rel_terms(dtype: torch.dtype, dim: int, keys: int, windowed: bool) -> dict[str, int]:
    """Queries, keys and columns of a tile of the relative-position terms: it builds without spills; none was timed.

    Memory is the bound. In half precision two warps, fewer than the four that wgmma takes; fp32 on the FMA units."""
    rows, most, warps = (32, 32, 8) if dtype == torch.float32 else (64, 64, 2)
    if not windowed:
        rows = min(rows, block(keys))  # a tile lies in one line, which is as long as the keys are many
        if rows <= 32 and dtype != torch.float32:
            warps = 1  # two spill on sm_120
    return {
        "BLOCK_M": rows, "BLOCK_K": min(most, block(keys)), "BLOCK_D": block(dim), "num_warps": warps, "num_stages": 1
    }  # fmt: skip


# Slice attention.


class SliceTile(NamedTuple):
    """A tile of queries, of keys, and a head's columns. A kernel's constant.

    EVEN: tiles of keys fill the slice. TMA: it loads the keys and values."""

    BLOCK_M: int
    BLOCK_N: int
    D: int
    EVEN: bool
    TMA: bool


def slice_forward(q: Tensor) -> dict[str, Any]:
    """The tile of q (B', P, M, D): on sm_90 the measured one, elsewhere one that builds without spills.

    TMA loads the keys and values on sm_90, wherever Triton has descriptors."""
    keys, stages, tma, (_, positions, _, dim) = 64, 2, False, q.shape
    if arch(q.device) == 90:
        keys, stages, tma = 128, 3 if dim <= 32 else 2, TensorDescriptor is not None
    return {
        "TILE": SliceTile(64, keys, dim, positions % keys == 0, tma),
        "num_warps": 4,
        "num_stages": stages,
    }


# Rows of a matrix: LayerNorm, sums of columns.

NORM_PROGRAMS = 512  # of LayerNorm's backward: about four a multiprocessor; their partial sums stay small


def norm(channels: int, thin: int = 0) -> dict[str, int]:
    """Rows of a tile and its warps: 16 elements a thread, or as many rows fewer as the channels are more.

    With a thin product of `thin` columns: 16 rows, as a matrix unit takes."""
    block_c = block(channels)
    if thin:
        return {"BLOCK_T": 16, "BLOCK_C": block_c, "num_warps": 4 if block_c <= 256 else 8, "num_stages": 1}
    warps = 8 if block_c > 2048 else 4
    return {"BLOCK_T": max(1, 2048 // block_c), "BLOCK_C": block_c, "num_warps": warps, "num_stages": 1}


def thin_in_norm(channels: int, thin: int, dtype: torch.dtype) -> bool:
    """Whether the kernel that normalises a row also multiplies it by `thin` columns; elsewhere it needs registers."""
    return 0 < thin <= 32 and channels <= 1024 and dtype != torch.float32


COLUMN_SUMS = {"BLOCK_T": 32, "BLOCK_C": 128, "num_warps": 4, "num_stages": 1}


def column_slab(rows: int, channels: int) -> int:
    """Rows that one program sums, for about 1024 programs: a multiple of BLOCK_T."""
    block_t, columns = COLUMN_SUMS["BLOCK_T"], -(-channels // COLUMN_SUMS["BLOCK_C"])
    return -(-rows * columns // (1024 * block_t)) * block_t


# LoRA.

LORA_TAIL = (
    16  # columns of a tail are a multiple of it: the library's fast products want rows that are aligned
)


def lora_tail(x: Tensor, *, dropout: bool) -> dict[str, int]:
    """Of x (T, K). Exact products, the mask and rows that are loaded an element at a time need registers."""
    exact = x.dtype == torch.float32
    narrow = exact or dropout or x.stride(0) % 8 or x.shape[1] % 8
    few = not narrow and x.shape[1] <= 256 and arch(x.device) in (100, 103)
    stages = 2 if few else 3  # a third one spills there
    return {
        "BLOCK_T": 64, "BLOCK_K": 32 if narrow else 128, "num_warps": 8 if exact else 4, "num_stages": stages
    }  # fmt: skip


def lora_weight(tail: int) -> dict[str, int]:
    """Of a row with a tail of so many columns, which one step must hold."""
    return {"BLOCK_K": max(256, block(tail)), "num_warps": 2}


def lora_reduce(dtype: torch.dtype) -> dict[str, int]:
    """Rows of a program, each of which writes a part of dA and dB, and columns of a step."""
    exact = dtype == torch.float32
    return {
        "BLOCK_T": 64 if exact else 256, "BLOCK_C": 32 if exact else 64, "num_warps": 8, "num_stages": 3
    }  # fmt: skip
