"""Launches of the kernels of SAM's attention (rel_pos_kernels.py): strides and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import tiles
from .common import last_axis_contiguous, on
from .rel_pos_kernels import rel_pos_bwd_dkv_kernel, rel_pos_bwd_dq_kernel, rel_pos_fwd_kernel


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
        q, k, v = last_axis_contiguous(*tensors)
        if k.stride() != v.stride():
            k, v = k.contiguous(), v.contiguous()
        self.q, self.k, self.v, self.pad, (self.rel_h, self.rel_w) = q, k, v, pad, tables
        self.scale, self.grid, self.window = scale, grid, window
        self.batch, self.positions, self.heads, self.dim = q.shape
        down, across = (-(-size // side) for size, side in zip(grid, window, strict=True))
        self.windows = self.batch * down * across

    def launch(self, kernel: Any, name: str, before: tuple, after: tuple, *strides: tuple[int, ...]) -> None:
        """Run `kernel`, which the tiles call `name`: pointers `before` and `after` those of all kernels."""
        q, k, rel_h, rel_w = self.q, self.k, self.rel_h, self.rel_w
        count = self.tiles(name)
        with on(q.device):
            kernel[(self.windows * self.heads * count,)](
                *before, q, k, self.v, self.pad, (rel_h, rel_w), *after,
                self.scale, (self.heads, *self.grid, *self.window, count),
                q.stride(), k.stride(), rel_h.stride(), rel_w.stride(), *strides,
                **self.config(name),
            )  # fmt: skip

    def config(self, name: str) -> dict[str, Any]:
        arch, padded = tiles.arch(self.q.device), self.pad is not None
        return tiles.rel_pos(name, arch, self.q.dtype, self.dim, self.window, padded)

    def tiles(self, name: str) -> int:
        """Tiles of a window and head: of keys for dk and dv, else of queries."""
        tile = self.config(name)["TILE"]
        height, width = self.window
        if name == "dkv":
            return -(-height // (tile.BLOCK_N // tile.COLUMNS))
        return -(-height * width // tile.BLOCK_M)

    def forward(self) -> tuple[Tensor, Tensor]:
        """y (B, P, M, D) and the base-2 log-sum-exp of each query's scores (B, M, P), both contiguous."""
        y = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        lse = y.new_empty((self.batch, self.heads, self.positions), dtype=torch.float32)
        if y.numel():
            self.launch(rel_pos_fwd_kernel, "forward", (), (y, lse))
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
        parts = (self.windows, self.heads, self.tiles("dkv"), 2, self.dim)
        dpad = None if self.pad is None else lse.new_empty(parts)
        written = (y, lse, dq, (drel_h, drel_w), delta)
        self.launch(rel_pos_bwd_dq_kernel, "dq", (grad,), written, dq.stride())
        self.launch(rel_pos_bwd_dkv_kernel, "dkv", (grad,), (lse, delta, dk, dv, dpad), dq.stride())
        return None if dpad is None else dpad.sum((0, 2)).transpose(0, 1)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, P, M, D), rel_h (B, M, H', P), rel_w (B, M, P, W') -> y like q, lse (B, M, P)."""
    return _grid(q, k, v, rel_h, rel_w, scale).forward()


def launch_backward(
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs q, k, v, rel_h and rel_w, contiguous."""
    q, k, v, rel_h, rel_w = inputs
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
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor], y: Tensor, lse: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, qkv_bias, rel_h and rel_w, contiguous.

    That of qkv_bias is 0 for q, and for k and v the sum over the padded keys."""
    qkv, qkv_bias, rel_h, rel_w = inputs
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
