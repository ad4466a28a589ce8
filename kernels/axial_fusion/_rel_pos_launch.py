"""Launches of the kernels of SAM's attention (_rel_pos_kernels.py): tile sizes, strides, outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from axial_fusion import _tiles
from axial_fusion._rel_pos_kernels import rel_pos_bwd_dkv_kernel, rel_pos_bwd_dq_kernel, rel_pos_fwd_kernel
from axial_fusion._tiles import block, split
from axial_fusion.axial_attention import _last_axis_contiguous, _on


def _config(kernel: str, q: Tensor, window: tuple[int, int], *, padded: bool) -> dict[str, Any]:
    """Tile sizes of a kernel: what compiles without spills for q's device, dtype and head size.

    On Hopper and data-centre Blackwell, accumulators lie across two warp groups or outside the registers. Elsewhere
    tiles are smaller; where a tile has fewer queries than keys, warps divide its keys and not its queries."""
    height, width = window
    dim = q.shape[-1]
    columns = block(width)
    keys = max(64, columns)
    rows, warps, stages = 128, 8, 1
    if q.dtype == torch.float32:
        rows = 32 if dim <= 96 else 16
    elif (arch := _tiles.arch(q.device)) in (0, 90, 100, 103):
        wide = kernel == "dkv" and arch >= 100 and dim > 64  # one stage spills there under Triton 3.6
        stages = 2 if kernel == "forward" or wide else 1
        if kernel == "dkv" or (kernel == "dq" and padded and dim > 64):
            rows = 64
    elif kernel == "forward":
        rows, warps = 64 if dim <= 64 else 32, 4
    elif kernel == "dq":
        rows, warps = 64 if dim <= 32 and not padded else 32, 4
        if padded:
            warps = 2 if dim <= 32 else 4 if dim <= 64 else 8
    else:
        rows, warps = 32 if dim <= 32 else 16, 4
    if columns > 64:
        rows //= 2
    config = {"BLOCK_M": rows, "num_warps": warps, "num_stages": stages, "COLUMNS": columns, "BLOCK_N": keys}
    if kernel != "dkv":
        config["EVEN"] = columns == width and height % (keys // columns) == 0
    return config | split(dim)


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
        config = _config(name, self.q, self.window, padded=self.pad is not None)
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

    def tiles(self, name: str, of: str) -> int:
        config = _config(name, self.q, self.window, padded=self.pad is not None)
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
