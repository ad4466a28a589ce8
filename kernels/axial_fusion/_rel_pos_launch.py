"""Launches of the kernels of SAM's attention (_rel_pos_kernels.py): tile sizes, strides, outputs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from axial_fusion import _tiles
from axial_fusion._rel_pos_kernels import rel_pos_bwd_dkv_kernel, rel_pos_bwd_dq_kernel, rel_pos_fwd_kernel
from axial_fusion._tiles import block, split
from axial_fusion.axial_attention import _last_axis_contiguous, _on

# Tiles of sm_90 in half precision: (queries, keys, warps, stages) where D is at most 64, 80 and 128, by the padded
# width of a row of keys. A tile of keys is whole rows. Measured on an H100 in bf16 (torch 2.11, Triton 3.6), each
# kernel alone, in us, against the 128 queries by 64 keys on 8 warps of before:
#   64 by 64, B 4, M 12, D 64: forward 1103 to 581, dq 1244 to 860, dkv 3291 to 1410
#   32 by 32, B 8, M 12, D 64: forward 182 to 91, dq 201 to 177, dkv 523 to 193
#   64 by 64, B 2, M 16, D 80: forward 861 to 838, dq wrong to 873, dkv 2789 to 1467
#   windows of 14 on 64 by 64, B 4, M 12, D 64: forward 187 to 157, dkv 566 to 296
# dq in those windows was timed with 64 keys in two stages (248 to 236), and on 32 by 32 with 32 keys in one (164 to
# 138); 32 keys in two stages were not. Every other tile is the nearest one that compiles without spills.
_HOPPER = {
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
def _config(
    kernel: str, device: torch.device, dtype: torch.dtype, dim: int, window: tuple[int, int], padded: bool
) -> dict[str, Any]:
    """Tile sizes of a kernel, how it takes D, and whether it needs masks (FULL: no)."""
    height, width = window
    columns = block(width)
    arch = _tiles.arch(device)
    hopper = dtype != torch.float32 and arch in (0, 90)
    if hopper:
        rows, keys, warps, stages = _HOPPER[kernel][columns][0 if dim <= 64 else 1 if dim <= 80 else 2]
        if kernel == "dkv" and 32 < width < 64 and dim <= 80:
            rows, keys, warps, stages = 32, 64, 4, 2  # masks take registers
    else:
        rows, keys, warps, stages = _elsewhere(kernel, arch, dtype, dim, columns, padded)
    pair = kernel == "forward" and keys == columns == 32
    step = 2 if pair else keys // columns  # rows of keys
    full = not padded and width == columns and height * width % rows == 0 and height % step == 0
    config = {"BLOCK_M": rows, "BLOCK_N": keys, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}
    if kernel == "forward":
        config["PAIR"] = pair
    parts = not hopper or (64 < dim <= 80 and (columns in (32, 64) or kernel == "forward"))
    return config | _widths(dim, parts=parts) | {"FULL": full}


def _widths(dim: int, *, parts: bool) -> dict[str, int]:
    """D as one power of two, or as two `parts` where they are less than that: 80 = 64 + 16.

    ptxas 12.8 miscompiled dq in two parts with one stage of loads (D 80, relative error 0.4 on an H100). sm_90 takes D
    in parts only where one width would cost most, in forms that `wrong_descriptors` of the compile tests passes."""
    widths = split(dim)
    whole = block(dim)
    return widths if parts and widths["D0"] + widths["D1"] < whole else {"D0": whole, "D1": 0}


def _elsewhere(
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
    elif arch >= 120:
        rows, warps = 16, 4
    elif kernel == "dq":
        rows, warps = 32, 8 if padded or dim > 32 else 4
    else:
        rows, warps = 32 if dim <= 32 else 16, 4
    return max(16, rows // 2) if columns > 64 else rows, max(64, columns), warps, stages


class _Problem:
    """Tensors as the kernels read them, and the arguments that all kernels share.

    q, k, v (B, P, M, D); rel_h and rel_w with axes in the order (b, m, query, key), any strides; grid and window
    (rows, columns); pad is the qkv bias (3·M·D,) where windows may leave the grid."""

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        tables: tuple[Tensor, Tensor],
        pad: Tensor | None,
        grid: tuple[int, int],
        window: tuple[int, int],
        scale: float,
    ) -> None:
        q, k, v = _last_axis_contiguous(*tensors)
        if k.stride() != v.stride():
            k, v = k.contiguous(), v.contiguous()
        self.q, self.k, self.v, self.pad, (self.rel_h, self.rel_w) = q, k, v, pad, tables
        self.scale, self.grid, self.window = scale, grid, window
        self.batch, self.positions, self.heads, self.dim = q.shape
        down, across = (-(-size // side) for size, side in zip(grid, window, strict=True))
        self.windows = self.batch * down * across

    def launch(
        self, kernel: Any, name: str, tiles_of: str, before: tuple, after: tuple, strides: tuple = ()
    ) -> None:
        """Run `kernel` over tiles of queries or of keys: pointers `before` and `after` those of all kernels."""
        config = self.config(name)
        tiles = self.tiles(name, tiles_of)
        q, k, rel_h, rel_w = self.q, self.k, self.rel_h, self.rel_w
        with _on(q.device):
            kernel[(self.windows * self.heads * tiles,)](
                *before, q, k, self.v, self.pad, rel_h, rel_w, *after,
                self.scale, self.heads, *self.grid, *self.window, tiles,
                q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
                rel_h.stride(0), rel_h.stride(1), rel_h.stride(2), rel_h.stride(3),
                rel_w.stride(0), rel_w.stride(1), rel_w.stride(2), rel_w.stride(3),
                *strides,
                D=self.dim, WINDOWED=self.pad is not None, **config,
            )  # fmt: skip

    def config(self, name: str) -> dict[str, Any]:
        return _config(name, self.q.device, self.q.dtype, self.dim, self.window, self.pad is not None)

    def tiles(self, name: str, of: str) -> int:
        config = self.config(name)
        height, width = self.window
        if of == "queries":
            return -(-height * width // config["BLOCK_M"])
        return -(-height // (config["BLOCK_N"] // config["COLUMNS"]))

    def forward(self) -> tuple[Tensor, Tensor]:
        """y (B, P, M, D) and the base-2 log-sum-exp of each query's scores (B, M, P), both contiguous."""
        y = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        lse = y.new_empty((self.batch, self.heads, self.positions), dtype=torch.float32)
        if y.numel():
            self.launch(rel_pos_fwd_kernel, "forward", "queries", (), (y, lse))
        return y, lse

    def backward(
        self, grad: Tensor, y: Tensor, lse: Tensor, out: tuple[Tensor, Tensor, Tensor],
        drel_h: Tensor, drel_w: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """Write dq, dk and dv, of equal strides, d rel_h and d rel_w, of their tables' strides.

        Where there is padding, gives its d k and d v (2, M, D) in fp32."""
        dq, dk, dv = out
        if dq.numel() == 0:
            return None if self.pad is None else lse.new_zeros(2, self.heads, self.dim)
        grad = grad.contiguous()
        delta = torch.empty_like(lse)
        tiles = self.tiles("dkv", "keys")
        dpad = None if self.pad is None else lse.new_empty(self.windows, self.heads, tiles, 2, self.dim)
        strides = (dq.stride(0), dq.stride(1), dq.stride(2))
        self.launch(
            rel_pos_bwd_dq_kernel, "dq", "queries", (grad,), (y, lse, dq, drel_h, drel_w, delta), strides
        )
        self.launch(rel_pos_bwd_dkv_kernel, "dkv", "keys", (grad,), (lse, delta, dk, dv, dpad), strides)
        return None if dpad is None else dpad.sum((0, 2)).transpose(0, 1)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, P, M, D), rel_h (B, M, H', P), rel_w (B, M, P, W') -> y like q, lse (B, M, P)."""
    return _grid(q, k, v, rel_h, rel_w, scale).forward()


def launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the five inputs, contiguous."""
    rel_h, rel_w = rel_h.contiguous(), rel_w.contiguous()
    out = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v, rel_h, rel_w)]
    dq, dk, dv, drel_h, drel_w = out
    _grid(q, k, v, rel_h, rel_w, scale).backward(grad, y, lse, (dq, dk, dv), drel_h, drel_w)
    return dq, dk, dv, drel_h, drel_w


def launch_window_forward(
    qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """qkv (B, H', W', 3, M, D), rel_h and rel_w (B, H', W', M, window) -> y (B, H', W', M, D), lse (B, M, H'·W')."""
    y, lse = _windows(qkv, qkv_bias, rel_h, rel_w, window, scale).forward()
    return y.view(*qkv.shape[:3], *qkv.shape[4:]), lse


def launch_window_backward(
    grad: Tensor, qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, y: Tensor, lse: Tensor,
    window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the four inputs, contiguous; that of qkv_bias is 0 for q and the padded keys' sum for k and v."""
    rel_h, rel_w = rel_h.contiguous(), rel_w.contiguous()
    dqkv, drel_h, drel_w = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qkv, rel_h, rel_w))
    dq, dk, dv = dqkv.flatten(1, 2).unbind(2)
    dpad = _windows(qkv, qkv_bias, rel_h, rel_w, window, scale).backward(
        grad, y, lse, (dq, dk, dv), drel_h, drel_w
    )
    assert dpad is not None
    dbias = torch.cat([torch.zeros_like(dpad[:1]), dpad]).flatten().to(qkv_bias.dtype)
    return dqkv, dbias, drel_h, drel_w


def _grid(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> _Problem:
    whole = (rel_h.shape[2], rel_w.shape[3])
    return _Problem((q, k, v), (rel_h.transpose(2, 3), rel_w), None, whole, whole, scale)


def _windows(
    qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, window: int, scale: float
) -> _Problem:
    q, k, v = qkv.flatten(1, 2).unbind(2)  # (B, P, M, D)
    rel_h, rel_w = (rel.flatten(1, 2).transpose(1, 2) for rel in (rel_h, rel_w))  # (B, M, P, window)
    grid = (qkv.shape[1], qkv.shape[2])
    return _Problem((q, k, v), (rel_h, rel_w), qkv_bias.contiguous(), grid, (window, window), scale)
