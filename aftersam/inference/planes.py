"""Blends the logits of windows into whole planes, and interpolates planes to another grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aftersam.data.transforms import Box
from aftersam.data.windows import plane_windows
from aftersam.inference.timings import Timings

OUTSIDE = 30.0  # logit of background above the other classes where no window lies


class Plane(NamedTuple):
    """The model's logits of one slice."""

    logits: Tensor
    """(K+1, H, W)."""
    disagreement: Tensor | None = None
    """(1, H, W) in [0, 1], with `PredictOptions.confidence`: see `Votes.disagreement`."""

    def combine(self, other: Plane, function: Callable[[Tensor, Tensor], Tensor]) -> Plane:
        """A plane of `function(logits, other's logits)`, and the same for the disagreements if both have one."""
        logits = function(self.logits, other.logits)
        if self.disagreement is None or other.disagreement is None:
            return Plane(logits)
        return Plane(logits, function(self.disagreement, other.disagreement))

    def resized(self, shape: tuple[int, int]) -> Plane:
        """The plane interpolated to `shape` (H', W')."""
        if tuple(self.logits.shape[-2:]) == shape:
            return self
        return Plane(*(None if part is None else upsample(part[None], shape)[0] for part in self))  # type: ignore[arg-type]  # one value for each field of Plane

    def mirrored(self, label_swap: dict[int, int]) -> Plane:
        """The plane of the mirrored slice: left and right exchanged, both in space and in the classes."""
        order = [label_swap.get(k, k) for k in range(len(self.logits))]
        turned = None if self.disagreement is None else self.disagreement.flip(-1)
        return Plane(self.logits[order].flip(-1), turned)


@dataclass(frozen=True, eq=False)
class Tiling:
    """The windows that cover the body in a plane (H, W), and how their logits are blended."""

    shape: tuple[int, int]
    size: int
    """Side of a window in pixels."""
    windows: list[tuple[int, int]]
    """Top left pixels; a window may reach beyond the plane."""
    weights: list[Tensor | None]
    """Blending weight (size, size) of each window, lower towards the edges. None for a single window."""
    seen: Tensor
    """(H, W), the sum of the weights at each pixel."""

    @classmethod
    def over(cls, shape: tuple[int, int], box: Box, size: int, device: torch.device) -> Tiling:
        """Windows of `size` pixels over the body's `box` in a plane of `shape`."""
        windows = plane_windows(shape, box, size)
        weights = [None if len(windows) == 1 else _blend_weight(size, device) for _ in windows]
        seen = torch.zeros(shape, device=device)
        for window, weight in zip(windows, weights, strict=True):
            image, inside = _overlap(window, shape, size)
            seen[image] += 1 if weight is None else weight[inside]
        return cls(shape, size, windows, weights, seen)

    def assemble(self, logits: Tensor, disagreement: Tensor | None = None) -> Plane:
        """Blend logits (windows, K+1, h, w) into a plane (K+1, H, W), with background outside all windows.

        `disagreement` (windows, 1, h, w) is blended in the same way and is 0 outside all windows."""
        plane = self._blend(logits)
        plane[0] += torch.where(self.seen > 0, 0.0, OUTSIDE)
        return Plane(plane, None if disagreement is None else self._blend(disagreement))

    def background(self, num_classes: int, *, disagreement: bool) -> Plane:
        """A plane (K+1, H, W) of background, for a slice that is not computed."""
        logits = self.seen.new_zeros(num_classes, *self.shape)
        logits[0] = OUTSIDE
        return Plane(logits, self.seen.new_zeros(1, *self.shape) if disagreement else None)

    def _blend(self, values: Tensor) -> Tensor:
        """Weighted mean of windows (windows, C, h, w) -> (C, H, W); 0 outside all windows."""
        values = upsample(values, (self.size, self.size))
        total = values.new_zeros(values.shape[1], *self.shape)
        for value, window, weight in zip(values, self.windows, self.weights, strict=True):
            image, inside = _overlap(window, self.shape, self.size)
            if weight is None:
                total[(..., *image)] = value[(..., *inside)]
            else:
                total[(..., *image)] += (value * weight)[(..., *inside)]
        total /= self.seen.clamp_min(torch.finfo(self.seen.dtype).tiny)
        return total


def _overlap(
    window: tuple[int, int], shape: tuple[int, int], size: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """(slices of the image, slices of the window) for the pixels that both contain."""
    spans = [
        (max(first, 0), min(first + size, length), first) for first, length in zip(window, shape, strict=True)
    ]
    (top, bottom, row), (left, right, column) = spans
    image = (slice(top, bottom), slice(left, right))
    return image, (slice(top - row, bottom - row), slice(left - column, right - column))


def _blend_weight(size: int, device: torch.device) -> Tensor:
    """Weights (size, size) that fall linearly towards the edges."""
    ramp = torch.arange(size, device=device, dtype=torch.float32)
    ramp = torch.minimum(ramp + 1, size - ramp)
    return torch.outer(ramp, ramp) / ramp.max() ** 2


def upsample(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bilinear interpolation (B, C, h, w) -> (B, C, H, W). Pixels are areas (align_corners=False)."""
    return F.interpolate(values, size=shape, mode="bilinear", align_corners=False)


def resample_stream(
    planes: Iterator[Plane],
    depth: int,
    output_shape: tuple[int, int, int],
    timings: Timings | None = None,
) -> Iterator[Plane]:
    """Trilinear interpolation of a stream of `depth` planes (H, W) to `output_shape` (D', H', W').

    Only two planes are in memory at a time. The values are those of F.interpolate on the whole volume with
    align_corners=False."""
    timings = timings or Timings()
    out_depth, *plane_shape = output_shape
    below, above, index = None, next(planes), 0  # planes index-1 and index
    for z in range(out_depth):
        at = min(max((z + 0.5) * depth / out_depth - 0.5, 0.0), depth - 1.0)
        while index < min(int(at) + 1, depth - 1):
            below, above, index = above, next(planes), index + 1
        with timings.stage("upsample"):
            plane = _between(below, above, at - (index - 1)).resized((plane_shape[0], plane_shape[1]))
        yield plane


def _between(below: Plane | None, above: Plane, fraction: float) -> Plane:
    """Linear interpolation from `below` (fraction 0) to `above` (fraction 1). `above` where `below` is None."""
    if below is None or fraction >= 1:
        return above
    if fraction == 0:
        return below
    return below.combine(above, lambda one, other: torch.lerp(one, other, fraction))
