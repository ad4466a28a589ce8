"""Tile sizes of the axial kernels: what was measured fastest, by architecture, and one rule for all else.

`python -m axial_fusion.tune` measures an entry. The number of positions is no key, so that a compiled model is not
compiled again for another image size."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


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


MEASURED: dict[Key, Tile] = {}  # entries of the tuner; all else is `default`


def default(key: Key) -> Tile:
    """The tile of a key without an entry: one that builds without spills where N is 32 at most."""
    return _forward(key) if key.op == "axial_attention" else _backward(key)


# Axial attention on an H100 (torch 2.11, Triton 3.6): µs at B 4, P 4096, M 8 in bf16, q, k and v views of one tensor.
# Each number is of the fastest kernel tried with such a tile. 16 rows hold 3 positions of 5 slices.
# "wrong": products of 64 rows run on wgmma, and ptxas 12.8 miscompiles those of D's two parts, 64 + 32
# (tests/kernel_builds.py, wrong_descriptors).
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
    return _one_head(key, 32 if key.head_dim > 64 else 16)


def _one_head(key: Key, rows: int) -> Tile:
    if key.dtype == torch.float32:
        return Tile(rows, 8 if key.head_dim > 64 or key.slices > 16 else 4)
    return Tile(rows, 1 if max(rows, key.slices) <= 16 else 2)  # fewer than the 4 warps that wgmma takes


def choose(op: str, x: Tensor, slices: int, head_dim: int) -> Tile:
    """The tile of `op` on x's device and dtype."""
    key = Key(op, arch(x.device), x.dtype, slices, head_dim)
    return MEASURED.get(key) or default(key)


def packed(tile: Tile, num_queries: int, num_keys: int) -> dict[str, int]:
    """Kernel arguments of a tile: positions in it, its rows, warps and stages."""
    group = max(1, tile.rows // max(num_queries, num_keys))
    return {
        "GROUP": group,
        "BLOCK_Q": block(group * num_queries),
        "BLOCK_K": block(group * num_keys),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def block(rows: int) -> int:
    """The smallest tile side that holds `rows`: a power of two, 16 at least, as a matrix unit takes."""
    return max(16, 1 << (rows - 1).bit_length())


def split(head_dim: int) -> dict[str, int]:
    """D as its largest power of two and the rest: 80 = 64 + 16 costs less than 128."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return {"D0": first, "D1": block(rest) if rest > 0 else 0}


@cache
def arch(device: torch.device) -> int:
    """90 for sm_90; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
