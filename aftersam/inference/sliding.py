"""Slices in, mask slices out: exact sliding-group inference in which each slice is encoded once.

The encoder is 2D, so a slice's features do not depend on its group. They are computed once and kept while a
group still needs them; each group then fuses N of them and decodes its centre. Memory does not grow with depth."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aftersam.config import ModelConfig
from aftersam.data.augment import swap_labels
from aftersam.data.stored_features import StoredScan
from aftersam.data.transforms import body_slices
from aftersam.data.volume import AIR_HU
from aftersam.data.windows import plane_windows, slice_group, window_crops
from aftersam.device import autocast
from aftersam.inference.timings import Timings
from aftersam.model.aftersam import AfterSAM
from aftersam.model.layers import SliceFeatures

OUTSIDE = 30.0  # background's lead, in logits, where no window looked
Box = tuple[int, int, int, int]  # top, bottom, left, right in pixels, ends excluded


@dataclass(frozen=True)
class Sliding:
    """How groups slide over a scan. The default is the paper's: a group about every slice, its centre kept."""

    keep: int = 1
    """Groups are this many slices apart, and as many of their middle slices are kept."""
    average: bool = False
    """Keep every slice of a group: a slice's logits are the mean over all groups that saw it."""
    label_swap: dict[int, int] | None = None
    """Where given, the mean with the mirrored scan's logits is taken, these labels being each other's other side."""
    body: bool = False
    """Leave out the slices at both ends that show no body: they are background."""
    disagreement: bool = False
    """Decode every slice of a group, also where it is not kept, for one channel more: see `Votes.disagreement`."""


def predict_volume(
    model: AfterSAM,
    hu: np.ndarray,
    config: ModelConfig,
    *,
    box: Box,
    output_shape: tuple[int, int, int],
    sliding: Sliding | None = None,
    batch_size: int = 8,
    precision: torch.dtype = torch.float32,
    prompt_labels: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
    confidence: np.ndarray | None = None,
    stored: StoredScan | None = None,
    progress: Callable[[int], None] | None = None,
    timings: Timings | None = None,
) -> np.ndarray:
    """Segment a volume: hu (D, H, W) at the model's spacing -> labels (D', H', W') uint8 on `output_shape`.

    Both grids cover the same extent. Logits are interpolated to the output grid slice by slice, then argmax.
    `box` bounds the body in the plane; `progress` is called with the number of output slices just finished;
    `prompt_labels` (D, H, W) are where a model with prompts draws them from. Each class's probability is written
    into `probabilities` (K+1, D', H', W') of any float type, which may be a file's memory map. `confidence`
    (D', H', W') uint8 is filled with how far the groups that saw a slice agree, 0 to 255; each slice is then decoded
    once for each. `stored` holds what the encoder makes of this very `hu`, which is then not encoded again."""
    timings = timings or Timings()
    sliding = dataclasses.replace(sliding or Sliding(), disagreement=confidence is not None)
    labels = np.empty(output_shape, dtype=np.uint8)
    logits = stream_logits(
        model,
        hu,
        config,
        box=box,
        sliding=sliding,
        batch_size=batch_size,
        precision=precision,
        prompt_labels=prompt_labels,
        stored=stored,
        timings=timings,
    )
    for z, plane in enumerate(resample_stream(logits, hu.shape[0], output_shape, timings)):
        with timings.stage("upsample"):
            if confidence is not None:
                confidence[z] = (255 * (1 - plane[-1])).round().to(torch.uint8).cpu().numpy()
                plane = plane[:-1]
            labels[z] = plane.max(0).indices.to(torch.uint8).cpu().numpy()  # on CPUs twice as fast as argmax
            if probabilities is not None:
                probabilities[:, z] = plane.softmax(0).cpu().numpy()
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
    sliding: Sliding | None = None,
    batch_size: int = 8,
    precision: torch.dtype = torch.float32,
    prompt_labels: np.ndarray | None = None,
    stored: StoredScan | None = None,
    timings: Timings | None = None,
) -> Iterator[Tensor]:
    """Yield the logits (K+1, H, W) of every slice of hu (D, H, W) in order, on the model's device.

    A group about slice d is the one of `slice_group`: neighbours beyond the ends repeat the nearest slice, and
    such repeats are never kept. With `sliding.disagreement` a last channel holds it. Raises ValueError where `sliding`
    keeps fewer slices than 1 or more than a group has."""
    sliding = sliding or Sliding()
    if not 1 <= sliding.keep <= config.num_slices:
        raise ValueError(f"keep is {sliding.keep}, but a group has 1 to {config.num_slices} slices to keep")
    if sliding.label_swap is not None:
        yield from _mirror_mean(
            model,
            hu,
            config,
            box=box,
            sliding=sliding,
            batch_size=batch_size,
            precision=precision,
            prompt_labels=prompt_labels,
            stored=stored,
            timings=timings,
        )
        return
    if config.prompts == "none":
        prompt_labels = None
    timings = timings or Timings()
    depth, height, width = hu.shape
    device = next(model.parameters()).device
    size = config.image_size
    windows = plane_windows((height, width), box, size)
    weights = [_blend_weight(window, windows, size, device) for window in windows]
    background = torch.zeros(model.decoder.num_classes + sliding.disagreement, height, width, device=device)
    background[0] = OUTSIDE
    centres, kept = group_plan(depth, config, sliding)
    positions = tuple(range(config.num_slices)) if sliding.disagreement else kept
    offsets = {p: (p - config.num_slices // 2) * config.slice_stride for p in positions}
    body = range(*body_slices(hu)) if sliding.body else range(depth)
    centres = [c for c in centres if any(c + offset in body for offset in offsets.values())]
    batch = max(1, batch_size // len(positions))  # of groups: no more slices are decoded at once than encoded
    ring: dict[int, SliceFeatures] = {}  # slice -> features of its windows
    votes: dict[int, Votes] = defaultdict(Votes)
    done = 0  # slices handed out

    def finished(until: int) -> Iterator[Tensor]:
        nonlocal done
        while done < min(until, depth):
            plane = background
            if (found := votes.pop(done, None)) is not None and done in body:
                with timings.stage("upsample"):
                    channels = found.channels(with_disagreement=sliding.disagreement)
                    planes = F.interpolate(channels, size=(size, size), mode="bilinear", align_corners=False)
                    plane = _assemble(planes, windows, weights, (height, width))
            yield plane
            done += 1

    model.eval()
    for first in range(0, len(centres), batch):
        some_centres = centres[first : first + batch]
        groups = [
            slice_group(c, depth, config.num_slices, config.slice_stride).tolist() for c in some_centres
        ]
        needed = sorted({d for group in groups for d in group})
        for d in [d for d in ring if d < needed[0]]:
            del ring[d]
        new = [d for d in needed if d not in ring]
        targets = [group[p] for group in groups for p in positions]
        with autocast(device, precision):
            with timings.stage("encode"):
                for start in range(0, len(new), batch_size):
                    some = new[start : start + batch_size]
                    images = window_crops(hu, some, windows, size, AIR_HU, stem_slices=model.stem_slices)
                    images = images.to(device).float()
                    known = None
                    if stored is not None:
                        levels = stored.read(some, device)
                        known = SliceFeatures(levels[0], levels[1:])
                    features = model.encode(images, known)
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
                fused = model.fuse(embedding, query_index=positions).unflatten(0, (len(groups), len(windows)))
                fused = fused.transpose(1, 2).flatten(0, 2)  # (groups · kept · windows, C, h, w)
            with timings.stage("decode"):
                skips = tuple(
                    torch.cat(level) for level in zip(*(ring[d].skips for d in targets), strict=True)
                )
                labels = None
                if prompt_labels is not None:
                    labels = window_crops(prompt_labels, targets, windows, size, 0).to(device)
                logits = (
                    model.decode(fused, skips, labels).float().unflatten(0, (len(groups), -1, len(windows)))
                )
                for centre, group_logits in zip(some_centres, logits, strict=True):
                    for (position, offset), planes in zip(offsets.items(), group_logits, strict=True):
                        if 0 <= centre + offset < depth:  # a slice of its own, no repeat
                            votes[centre + offset].add(planes, position in kept, sliding.disagreement)
        if first + batch < len(centres):
            yield from finished(centres[first + batch] + offsets[positions[0]])  # no later group sees these
    yield from finished(depth)


@dataclass
class Votes:
    """What the groups that saw a slice have said of it so far."""

    logits: Tensor | float = 0.0  # (windows, K+1, h, w), the sum over the groups that it is kept of
    kept: int = 0
    probabilities: Tensor | float = 0.0  # the sum over all groups that saw it
    entropy: Tensor | float = 0.0  # (windows, 1, h, w), the sum of each group's
    seen: int = 0

    def add(self, logits: Tensor, keep: bool, compare: bool) -> None:
        """One group's logits (windows, K+1, h, w): into the mean, into the comparison, or into both."""
        if keep:
            self.logits, self.kept = self.logits + logits, self.kept + 1
        if compare:
            probabilities = logits.softmax(1)
            self.probabilities = self.probabilities + probabilities
            self.entropy, self.seen = self.entropy + _entropy(probabilities), self.seen + 1

    def channels(self, *, with_disagreement: bool) -> Tensor:
        """The mean logits (windows, K+1, h, w), and one channel more where it is asked for."""
        mean = torch.as_tensor(self.logits) / self.kept
        return torch.cat([mean, self.disagreement()], dim=1) if with_disagreement else mean

    def disagreement(self) -> Tensor:
        """(windows, 1, h, w) in [0, 1]: the groups' Jensen–Shannon divergence as a share of the largest possible.

        0 where all groups give the same probabilities, or one alone saw the slice; 1 where each is sure of a class
        that no other names. It is the entropy of the mean less the mean entropy.  Source: Lin, IEEE TIT 37 (1991)."""
        mean = torch.as_tensor(self.probabilities) / self.seen
        divergence = _entropy(mean) - self.entropy / self.seen
        return (divergence / math.log(max(2, min(self.seen, mean.shape[1])))).clamp(0, 1)


def _entropy(probabilities: Tensor) -> Tensor:
    """(windows, K+1, h, w) -> (windows, 1, h, w), in nats."""
    return torch.special.entr(probabilities).sum(1, keepdim=True)


def group_plan(depth: int, config: ModelConfig, sliding: Sliding) -> tuple[list[int], tuple[int, ...]]:
    """The groups' centres in rising order, and the positions in a group whose slices are kept.

    Every slice is kept of one group at least. With a stride, slices that far apart form a scan of their own."""
    stride, keep, centre = config.slice_stride, sliding.keep, config.num_slices // 2
    centres = set()
    for start in range(min(stride, depth)):
        last = (depth - 1 - start) // stride
        centres |= {start + min(i + keep // 2, last) * stride for i in range(0, last + 1, keep)}
    first = centre - keep // 2
    positions = range(config.num_slices) if sliding.average else range(first, first + keep)
    return sorted(centres), tuple(positions)


def _mirror_mean(
    model: AfterSAM,
    hu: np.ndarray,
    config: ModelConfig,
    *,
    box: Box,
    sliding: Sliding,
    prompt_labels: np.ndarray | None,
    stored: StoredScan | None,
    **options: Any,
) -> Iterator[Tensor]:
    """`stream_logits` of the scan and of its mirror image, turned back, averaged plane by plane."""
    swap = sliding.label_swap or {}
    once = dataclasses.replace(sliding, label_swap=None)
    width = hu.shape[2]
    turned_box = (box[0], box[1], width - box[3], width - box[2])
    turned_labels = None if prompt_labels is None else swap_labels(prompt_labels[..., ::-1], swap)
    straight = stream_logits(
        model, hu, config, box=box, sliding=once, prompt_labels=prompt_labels, stored=stored, **options
    )
    turned = stream_logits(
        model, hu[..., ::-1], config, box=turned_box, sliding=once, prompt_labels=turned_labels, **options
    )
    for one, other in zip(straight, turned, strict=True):
        yield (one + mirror_logits(other, swap)) / 2


def mirror_logits(logits: Tensor, label_swap: dict[int, int]) -> Tensor:
    """Logits (K+1, H, W) of a plane -> of its mirror image: left and right, and the classes of the two sides."""
    order = [label_swap.get(k, k) for k in range(len(logits))]
    return logits[order].flip(-1)


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
            if below is None or fraction >= 1:
                plane = above
            else:
                plane = below if fraction == 0 else torch.lerp(below, above, fraction)
            if list(plane.shape[-2:]) != plane_shape:
                plane = F.interpolate(plane[None], size=plane_shape, mode="bilinear", align_corners=False)[0]
        yield plane


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
