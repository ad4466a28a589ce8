"""SAM's windowed attention in plain torch: the grid is cut into at most four parts of equal windows.

One part holds the whole windows; the others hold those that the grid's lower and right ends cut, whose queries are the
tokens that exist and whose keys are filled up with the bias."""

from __future__ import annotations

import torch
from torch import Tensor

from .biased_attention import Attend, attend_backward


def _bands(size: int, window: int) -> list[tuple[slice, int]]:
    """An axis cut into the whole windows and the last, partial one: where each part lies and its windows' extent."""
    whole = size - size % window
    bands = [(slice(0, whole), window)] if whole else []
    return [*bands, (slice(whole, size), size - whole)] if whole < size else bands


def _cut(t: Tensor, rows: slice, height: int, columns: slice, width: int) -> Tensor:
    """The windows of one part of the grid: (B, H', W', ...) -> (B', height, width, ...)."""
    t = t[:, rows, columns].unflatten(2, (-1, width)).unflatten(1, (-1, height))
    return t.transpose(2, 3).flatten(0, 2)


def _join(t: Tensor, batch: int, rows: slice, height: int, columns: slice, width: int) -> Tensor:
    """The inverse of `_cut`: (B', height·width or height, width, ...) -> (B, rows, columns, ...)."""
    t = t.unflatten(0, (batch, (rows.stop - rows.start) // height, -1))
    return t.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _keys(windows: Tensor, qkv_bias: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """k and v (B', window², M, D) of the windows (B', h, w, 3, M, D), the bias alone where the grid ends."""
    kv = windows[:, :, :, 1:]
    count, height, width, _, heads, dim = kv.shape
    pad = qkv_bias.view(3, heads, dim)[1:]
    if width < window:
        kv = torch.cat([kv, pad.expand(count, height, window - width, 2, heads, dim)], 2)
    if height < window:
        kv = torch.cat([kv, pad.expand(count, window - height, window, 2, heads, dim)], 1)
    k, v = kv.flatten(1, 2).unbind(2)
    return k, v


def forward(
    qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, window: int, scale: float, attend: Attend
) -> Tensor:
    """qkv (B, H', W', 3, M, D), not empty -> (B, H', W', M, D), contiguous, each part of the grid by `attend`."""
    batch = qkv.shape[0]
    padded = qkv.shape[1] % window or qkv.shape[2] % window
    if not padded and qkv_bias.requires_grad and torch.is_grad_enabled():
        rel_w = rel_w + qkv_bias[:0].sum()  # a bias that no padding holds has a gradient too, of zeros
    bands = []
    for rows, height in _bands(qkv.shape[1], window):
        parts = []
        for columns, width in _bands(qkv.shape[2], window):
            place = (rows, height, columns, width)
            windows = _cut(qkv, *place)
            k, v = _keys(windows, qkv_bias, window)
            bias_h, bias_w = (_cut(rel, *place).flatten(1, 2).transpose(1, 2) for rel in (rel_h, rel_w))
            y = attend(windows[:, :, :, 0].flatten(1, 2), k, v, bias_h, bias_w, scale)
            parts.append(_join(y.unflatten(1, (height, width)), batch, *place))
        bands.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
    return (bands[0] if len(bands) == 1 else torch.cat(bands, 1)).contiguous()


def backward(
    grad: Tensor, qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, y: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the four inputs, contiguous, block by block."""
    batch = qkv.shape[0]
    dqkv, drel_h, drel_w = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qkv, rel_h, rel_w))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    dpad = torch.zeros((2, *qkv.shape[4:]), dtype=wide, device=qkv.device)
    for rows, height in _bands(qkv.shape[1], window):
        for columns, width in _bands(qkv.shape[2], window):
            place = (rows, height, columns, width)
            windows = _cut(qkv, *place)
            k, v = _keys(windows, qkv_bias, window)
            bias_h, bias_w = (_cut(rel, *place).flatten(1, 2).transpose(1, 2) for rel in (rel_h, rel_w))
            q = windows[:, :, :, 0].flatten(1, 2)
            dy, part = (_cut(t, *place).flatten(1, 2) for t in (grad, y))
            dq, dk, dv, dh, dw = attend_backward(dy, q, k, v, bias_h, bias_w, part, scale)
            dkv = torch.stack([dk, dv], 2).unflatten(1, (window, window))  # (B', window, window, 2, M, D)
            real = dkv[:, :height, :width]
            dpad += dkv[:, height:].sum((0, 1, 2), dtype=wide) + dkv[:, :height, width:].sum(
                (0, 1, 2), dtype=wide
            )
            dq = dq.unflatten(1, (height, width)).unsqueeze(3)
            dqkv[:, rows, columns] = _join(torch.cat([dq, real], 3), batch, *place)
            for whole, table in ((drel_h, dh), (drel_w, dw)):
                whole[:, rows, columns] = _join(
                    table.transpose(1, 2).unflatten(1, (height, width)), batch, *place
                )
    dbias = torch.cat([torch.zeros_like(dpad[:1]), dpad]).flatten().to(qkv_bias.dtype)
    return dqkv, dbias, drel_h, drel_w
