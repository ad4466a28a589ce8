"""Slices in, mask slices out: exact sliding-group inference in which each slice is encoded once.

The encoder is 2D, so a slice's features do not depend on its group. They are computed once and kept while a
group still needs them; each group then fuses N of them and decodes its centre. Memory does not grow with depth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aftersam.config import ModelConfig
from aftersam.data.slice_group import crop, slice_group
from aftersam.data.transforms import AIR_HU
from aftersam.model.aftersam import AfterSAM
from aftersam.model.image_encoder import SliceFeatures
from aftersam.timings import Timings

OUTSIDE = 30.0  # background's lead, in logits, where no window looked
Box = tuple[int, int, int, int]  # top, bottom, left, right in pixels, ends excluded


def predict_labels(
    model: AfterSAM,
    hu: np.ndarray,
    config: ModelConfig,
    *,
    box: Box,
    output_shape: tuple[int, int, int],
    batch_size: int = 8,
    precision: torch.dtype = torch.float32,
    prompt_labels: np.ndarray | None = None,
    progress: Callable[[int], None] | None = None,
    timings: Timings | None = None,
) -> np.ndarray:
    """Segment a volume: hu (D, H, W) at the model's spacing -> labels (D', H', W') uint8 on `output_shape`.

    Both grids cover the same extent. Logits are interpolated to the output grid slice by slice, then argmax.
    `box` bounds the body in the plane; `progress` is called with the number of output slices just finished;
    `prompt_labels` (D, H, W) are where a model with prompts draws them from."""
    timings = timings or Timings()
    labels = np.empty(output_shape, dtype=np.uint8)
    logits = stream_logits(
        model,
        hu,
        config,
        box=box,
        batch_size=batch_size,
        precision=precision,
        prompt_labels=prompt_labels,
        timings=timings,
    )
    for z, plane in enumerate(resample_stream(logits, hu.shape[0], output_shape, timings)):
        with timings.stage("upsample"):
            labels[z] = plane.argmax(0).to(torch.uint8).cpu().numpy()
        if progress is not None:
            progress(1)
    return labels


@torch.inference_mode()
def stream_logits(
    model: AfterSAM,
    hu: np.ndarray,
    config: ModelConfig,
    *,
    box: Box,
    batch_size: int = 8,
    precision: torch.dtype = torch.float32,
    prompt_labels: np.ndarray | None = None,
    timings: Timings | None = None,
) -> Iterator[Tensor]:
    """Yield the logits (K+1, H, W) of every slice of hu (D, H, W) in order, on the model's device.

    A group about slice d is the one of `slice_group`: neighbours beyond the ends repeat the nearest slice."""
    if config.prompts == "none":
        prompt_labels = None
    timings = timings or Timings()
    depth, height, width = hu.shape
    device = next(model.parameters()).device
    size, centre = config.image_size, config.num_slices // 2
    windows = [
        (top, left)
        for top in window_starts(height, box[0], box[1], size)
        for left in window_starts(width, box[2], box[3], size)
    ]
    weights = [_blend_weight(window, windows, size, device) for window in windows]
    ring: dict[int, SliceFeatures] = {}  # slice -> features of its windows
    model.eval()
    for first in range(0, depth, batch_size):
        targets = range(first, min(first + batch_size, depth))
        groups = [slice_group(d, depth, config.num_slices, config.slice_stride).tolist() for d in targets]
        needed = sorted({d for group in groups for d in group})
        for d in [d for d in ring if d < needed[0]]:
            del ring[d]
        new = [d for d in needed if d not in ring]
        with _autocast(device, precision):
            with timings.stage("encode"):
                for start in range(0, len(new), batch_size):
                    some = new[start : start + batch_size]
                    features = model.encode(_windowed(hu, some, windows, size, AIR_HU).to(device).float())
                    for i, d in enumerate(some):
                        part = slice(i * len(windows), (i + 1) * len(windows))
                        ring[d] = SliceFeatures(
                            features.embedding[part], tuple(s[part] for s in features.skips)
                        )
            with timings.stage("fuse"):
                # (groups, windows, N, C, h, w), a window beside a group being one more group
                embedding = torch.stack(
                    [torch.stack([ring[d].embedding for d in group], dim=1) for group in groups]
                ).flatten(0, 1)
                fused = model.fuse(embedding, query_index=(centre,)).squeeze(1)
            with timings.stage("decode"):
                skips = tuple(
                    torch.cat(level) for level in zip(*(ring[d].skips for d in targets), strict=True)
                )
                labels = None
                if prompt_labels is not None:
                    labels = _windowed(prompt_labels, targets, windows, size, 0).to(device)
                logits = model.decode(fused, skips, labels).float()
        for planes in logits.unflatten(0, (len(targets), len(windows))):
            with timings.stage("upsample"):
                planes = F.interpolate(planes, size=(size, size), mode="bilinear", align_corners=False)
                plane = _assemble(planes, windows, weights, (height, width))
            yield plane


def resample_stream(
    logits: Iterator[Tensor],
    depth: int,
    output_shape: tuple[int, int, int],
    timings: Timings | None = None,
) -> Iterator[Tensor]:
    """Trilinear interpolation of a stream of `depth` planes (K+1, H, W) to `output_shape` (D', H', W').

    The same numbers as F.interpolate on the whole volume with align_corners=False, two planes at a time."""
    timings = timings or Timings()
    out_depth, *plane_shape = output_shape
    below, above, index = None, next(logits), 0  # planes index-1 and index
    for z in range(out_depth):
        at = min(max((z + 0.5) * depth / out_depth - 0.5, 0.0), depth - 1.0)
        while index < min(int(at) + 1, depth - 1):
            below, above, index = above, next(logits), index + 1
        fraction = at - (index - 1)  # of the way from below to above
        with timings.stage("upsample"):
            plane = above if below is None or fraction >= 1 else torch.lerp(below, above, fraction)
            if list(plane.shape[-2:]) != plane_shape:
                plane = F.interpolate(plane[None], size=plane_shape, mode="bilinear", align_corners=False)[0]
        yield plane


def window_starts(length: int, start: int, stop: int, size: int) -> list[int]:
    """First pixels of the windows of `size` that cover [start, stop) of an axis of `length` pixels.

    One window about the extent's centre where it fits, kept inside the image where that is possible and
    padded where it is not; else evenly spaced windows that overlap by a quarter or more."""
    extent = stop - start
    if extent <= size:
        first = (start + stop - size) // 2
        return [min(max(first, 0), length - size) if length >= size else (length - size) // 2]
    count = -(-(extent - size) * 4 // (3 * size)) + 1
    return [start + round(i * (extent - size) / (count - 1)) for i in range(count)]


def _windowed(
    array: np.ndarray, slices: Sequence[int], windows: list[tuple[int, int]], size: int, fill: int
) -> Tensor:
    """array (D, H, W) -> (slices · windows, size, size), the windows of a slice side by side."""
    crops = np.stack([crop(array, slices, window, size, fill) for window in windows], axis=1)
    return torch.from_numpy(crops).flatten(0, 1)


def _overlap(
    window: tuple[int, int], shape: tuple[int, ...], size: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The shared pixels of a window and an image, as slices of the image and of the window."""
    spans = [
        (max(first, 0), min(first + size, length), first) for first, length in zip(window, shape, strict=True)
    ]
    (top, bottom, row), (left, right, column) = spans
    image = (slice(top, bottom), slice(left, right))
    return image, (slice(top - row, bottom - row), slice(left - column, right - column))


def _blend_weight(
    window: tuple[int, int], windows: list[tuple[int, int]], size: int, device: torch.device
) -> Tensor | None:
    """(size, size) weights that fall towards the edges, or None where one window covers all."""
    if len(windows) == 1:
        return None
    ramp = torch.arange(size, device=device, dtype=torch.float32)
    ramp = torch.minimum(ramp + 1, size - ramp)
    return torch.outer(ramp, ramp) / ramp.max() ** 2


def _assemble(
    planes: Tensor, windows: list[tuple[int, int]], weights: list[Tensor | None], shape: tuple[int, int]
) -> Tensor:
    """Logits of the windows (windows, K+1, S, S) -> of the plane (K+1, H, W), background where none looked."""
    size = planes.shape[-1]
    total = planes.new_zeros(planes.shape[1], *shape)
    seen = planes.new_zeros(shape)
    for logits, window, weight in zip(planes, windows, weights, strict=True):
        image, inside = _overlap(window, shape, size)
        if weight is None:
            total[(..., *image)] = logits[(..., *inside)]
            seen[image] = 1
        else:
            total[(..., *image)] += (logits * weight)[(..., *inside)]
            seen[image] += weight[inside]
    total /= seen.clamp_min(torch.finfo(seen.dtype).tiny)
    total[0] += torch.where(seen > 0, 0.0, OUTSIDE)
    return total


def _autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager[None]:
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)
