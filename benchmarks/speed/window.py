"""SAM's windowed attention: windows of a padded grid, or real queries alone.    python -m benchmarks.speed.window

    segment-anything, SDPA with the bias, one-hot, FlexAttention    the forms of rel_pos.py on whole windows
    window_attention                                                ours

The grid is not a whole number of windows. Each rival pads the grid after the norm, as segment-anything does, and
computes the padded queries as well; ours computes the real ones alone. MONAI's WindowAttention with
use_flash_attention is the call of SDPA with the bias."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from axial_fusion import reference, window_attention
from benchmarks import harness
from benchmarks.harness import Case, Provider
from benchmarks.speed.rel_pos import ALL, ATTEND, draw, providers, shapes_of

OURS = "window_attention"


def padded(
    qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, *, window: int, attend: Callable[..., Tensor]
) -> Tensor:
    """qkv (B, H', W', 3, M, D) -> (B, H', W', M, D) by whole windows of a padded grid."""
    b, height, width, _, m, d = qkv.shape
    down, right = -height % window, -width % window
    fill = qkv_bias.view(3, m, d)
    qkv = torch.cat([qkv, fill.expand(b, height, right, 3, m, d)], 2)
    qkv = torch.cat([qkv, fill.expand(b, down, width + right, 3, m, d)], 1)
    rel_h, rel_w = (F.pad(t, (0, 0, 0, 0, 0, right, 0, down)) for t in (rel_h, rel_w))

    def windows(t: Tensor) -> Tensor:  # (B, Hp, Wp, ...) -> (windows, window², ...)
        t = t.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
        return t.flatten(3, 4).flatten(0, 2)

    q, k, v = windows(qkv).unbind(2)
    bias_h, bias_w = (windows(t).transpose(1, 2) for t in (rel_h, rel_w))  # (windows, M, window², window)
    y = attend(q, k, v, bias_h.transpose(-1, -2), bias_w)
    y = y.unflatten(1, (window, window)).unflatten(0, (b, (height + down) // window, -1))
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width].contiguous()


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    for name, whole in shapes_of(device, full):
        shape = whole._replace(window=14)
        b, side, m, d, window = shape
        inputs = draw(
            [(b, side, side, 3, m, d), (3 * m * d,), *[(b, side, side, m, window)] * 2], device, dtype
        )
        flops = 4 * b * m * side**2 * window**2 * d
        exact = partial(reference.window_attention, window=window)
        rivals: dict[str, Callable[..., Tensor]] = {
            rival: partial(padded, window=window, attend=attend) for rival, attend in ATTEND.items()
        }
        # In windows, Inductor of torch 2.11 fails to compile FlexAttention.
        compiled = ALL if full else ("SDPA, bias",) if d == 64 else ()
        found = providers(rivals, exact, flops, gpu=device.type == "cuda", compiled=compiled)
        found[OURS] = Provider(partial(window_attention, window=window), exact, flops, role="ours")
        yield {"subject": "window", "name": name, **shape._asdict()}, inputs, found


if __name__ == "__main__":
    sys.exit(harness.main(cases))
