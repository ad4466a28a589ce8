"""SAM's windowed attention in plain torch: the grid is cut into at most four parts of equal windows.

One part holds the whole windows. The others hold the windows that the grid's lower and right edges cut: their queries
are the tokens that exist, and their keys are padded with the bias."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .biased_attention import Attend, attend_backward


def _sizes(size: int, window: int) -> list[int]:
    """Sizes of an axis's parts: its whole windows, and the partial window at its end."""
    whole = size - size % window
    return [part for part in (whole, size - whole) if part]


def _parts(window: int, *grids: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The parts of the grids (B, H', W', ...) as views, row by row.

    Parts are split, not sliced: the gradient of a slice is a grid of zeros with one part filled."""
    rows, columns = (_sizes(size, window) for size in grids[0].shape[1:3])
    for bands in zip(*(t.split(rows, 1) for t in grids), strict=True):
        yield from zip(*(band.split(columns, 2) for band in bands), strict=True)


def _cut(part: Tensor, window: int) -> Tensor:
    """The windows of a part: (B, h, w, ...) -> (B', height, width, ...)."""
    height, width = (min(window, size) for size in part.shape[1:3])
    return part.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3).flatten(0, 2)


def _join(windows: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `_cut`: (B', height, width, ...) -> (B, rows, columns, ...)."""
    height, width = windows.shape[1:3]
    grid = windows.unflatten(0, (-1, rows // height, columns // width))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _operands(
    part: Tensor, rel_h: Tensor, rel_w: Tensor, qkv_bias: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q (B', h·w, M, D), k and v (B', window², M, D), bias_h and bias_w (B', M, h·w, window) of a part's windows.

    Where the grid ends before the window does, keys and values are the bias alone."""
    q, *kv = _cut(part, window).unbind(3)
    _, height, width, heads, dim = q.shape
    for i, pad in enumerate(qkv_bias.view(3, heads, dim)[1:].unbind()):
        if width < window:
            kv[i] = torch.cat([kv[i], pad.expand(q.shape[0], height, window - width, heads, dim)], 2)
        if height < window:
            kv[i] = torch.cat([kv[i], pad.expand(q.shape[0], window - height, window, heads, dim)], 1)
    bias_h, bias_w = (_cut(rel, window).flatten(1, 2).transpose(1, 2) for rel in (rel_h, rel_w))
    k, v = (t.flatten(1, 2) for t in kv)
    return q.flatten(1, 2), k, v, bias_h, bias_w


def forward(
    qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, window: int, scale: float, attend: Attend
) -> Tensor:
    """qkv (B, H', W', 3, M, D), not empty -> (B, H', W', M, D), contiguous, each part of the grid by `attend`."""
    padded = qkv.shape[1] % window or qkv.shape[2] % window
    if not padded and qkv_bias.requires_grad and torch.is_grad_enabled():
        rel_w = rel_w + qkv_bias[:0].sum()  # a bias that no padding holds has a gradient too, of zeros
    parts = []
    for part, h, w in _parts(window, qkv, rel_h, rel_w):
        rows, columns = part.shape[1:3]
        y = attend(*_operands(part, h, w, qkv_bias, window), scale)
        parts.append(_join(y.unflatten(1, (min(window, rows), -1)), rows, columns))
    across = len(_sizes(qkv.shape[2], window))
    return _cat([_cat(parts[i : i + across], 2) for i in range(0, len(parts), across)], 1).contiguous()


def backward(
    grad: Tensor, qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, y: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the four inputs, contiguous, block by block."""
    found = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qkv, rel_h, rel_w)]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    dpad = torch.zeros((2, *qkv.shape[4:]), dtype=wide, device=qkv.device)
    for dy, part, h, w, out, *places in _parts(window, grad, qkv, rel_h, rel_w, y, *found):
        rows, columns = part.shape[1:3]
        height, width = min(window, rows), min(window, columns)
        operands = _operands(part, h, w, qkv_bias, window)
        dy, out = (_cut(t, window).flatten(1, 2) for t in (dy, out))
        dq, dk, dv, dh, dw = attend_backward(dy, *operands, out, scale)
        dkv = torch.stack([dk, dv], 2).unflatten(1, (window, window))  # (B', window, window, 2, M, D)
        real = dkv[:, :height, :width]
        dpad += dkv[:, height:].sum((0, 1, 2), dtype=wide) + dkv[:, :height, width:].sum(
            (0, 1, 2), dtype=wide
        )
        dq = dq.unflatten(1, (height, width)).unsqueeze(3)
        tables = (t.transpose(1, 2).unflatten(1, (height, width)) for t in (dh, dw))
        for place, windows in zip(places, (torch.cat([dq, real], 3), *tables), strict=True):
            place.copy_(_join(windows, rows, columns))
    dqkv, drel_h, drel_w = found
    dbias = torch.cat([torch.zeros_like(dpad[:1]), dpad]).flatten().to(qkv_bias.dtype)
    return dqkv, dbias, drel_h, drel_w
