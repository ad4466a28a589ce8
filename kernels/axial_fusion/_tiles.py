"""Tile sizes of the axial kernels: what was measured fastest, by architecture, and one rule for all else.

`python -m axial_fusion.tune` measures an entry. The number of positions is no key, so that a compiled model is not
compiled again for another image size."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Rows of a tile (positions times slices, filled from below), warps, and stages of the loads' pipeline."""

    rows: int = 64
    num_warps: int = 4
    num_stages: int = 1


class Key(NamedTuple):
    """What a tile is chosen by. `arch` is 90 for sm_90 and 0 in Triton's interpreter; C is 0 without projections."""

    op: str
    arch: int
    dtype: torch.dtype
    slices: int
    head_dim: int
    channels: int = 0


MEASURED: dict[Key, Tile] = {}  # empty until a GPU has measured; `default` is what compiles without spills


def default(key: Key) -> Tile:
    """The tile of a key that nobody has measured: one that builds without spills."""
    return Tile()


def tiles(
    op: str, x: Tensor, num_queries: int, num_keys: int, head_dim: int, channels: int = 0
) -> dict[str, int]:
    """Kernel arguments for `op` on x's device and dtype: positions a tile, its rows, warps and stages."""
    key = Key(op, arch(x.device), x.dtype, max(num_queries, num_keys), head_dim, channels)
    tile = MEASURED.get(key) or default(key)
    group = max(1, tile.rows // key.slices)
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
