"""Sliding-group inference, slice by slice, with each slice encoded only once.

The encoder is 2D, so the features of a slice do not depend on the group. They are computed once and kept as long as a
group needs them. Each group fuses the features of its N slices and decodes the kept ones. Only the scan and its labels
take memory that grows with depth. `reference.naive_logits` computes the same numbers without these shortcuts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftersam.config import ModelConfig
from aftersam.data.transforms import body_slices
from aftersam.data.volume import AIR_HU, label_dtype
from aftersam.data.windows import slice_group, window_crops
from aftersam.device import autocast
from aftersam.inference.inputs import PredictOptions, Scan
from aftersam.inference.planes import Plane, Tiling, resample_stream
from aftersam.inference.timings import Timings
from aftersam.model.aftersam import AfterSAM
from aftersam.model.layers import SliceFeatures
from aftersam.model.mask_decoder import of_classes

DEFAULT = PredictOptions()


class Prediction(NamedTuple):
    """A segmented scan on the output grid."""

    labels: np.ndarray
    """(D, H, W) uint8, or int16 where the model has more than 256 classes including background."""
    confidence: np.ndarray | None = None
    """(D, H, W) uint8, with `PredictOptions.confidence`: 255 where all groups that contain a slice agree, 0 where each
    is sure of another class."""
    expected_dsc: np.ndarray | None = None
    """(K,), one per organ, with `PredictOptions.expected_dsc`. NaN for an organ that the labels do not contain."""


def predict_volume(
    model: AfterSAM,
    scan: Scan,
    config: ModelConfig,
    options: PredictOptions = DEFAULT,
    *,
    output_shape: tuple[int, int, int],
    precision: torch.dtype = torch.float32,
    probabilities: np.ndarray | None = None,
    progress: Callable[[int], None] | None = None,
) -> Prediction:
    """Segment a scan (D, H, W) at the model's spacing: labels (D', H', W') on `output_shape`.

        predict_volume(model, Scan(hu, box), config, PredictOptions(keep=2), output_shape=hu.shape).labels

    Both grids cover the same extent. Logits are interpolated to the output grid slice by slice; the label is their
    argmax. If given, `probabilities` (K+1, D', H', W'), of any float type or a memory map, is filled with each class's
    probability. `progress` is called with the number of output slices just finished.
    Raises ValueError where `options.keep` is not between 1 and the number of slices in a group."""
    planes = output_planes(model, scan, config, options, output_shape=output_shape, precision=precision)
    sink = Sink(output_shape, scan.timings, probabilities, progress)
    return fill(planes, model.decoder.num_classes, options, sink)


def output_planes(
    model: AfterSAM,
    scan: Scan,
    config: ModelConfig,
    options: PredictOptions,
    *,
    output_shape: tuple[int, int, int],
    precision: torch.dtype,
) -> Iterator[Plane]:
    """Yield the logits (K+1, H', W') of every slice of the output grid in order."""
    planes = stream_logits(model, scan, config, options, precision=precision)
    for plane in resample_stream(planes, scan.hu.shape[0], output_shape, scan.timings):
        yield plane._replace(logits=of_classes(plane.logits, model.decoder.num_classes))


def mean_planes(streams: Sequence[Iterator[Plane]], temperatures: Sequence[float]) -> Iterator[Plane]:
    """Yield planes of the logarithm of several models' mean probability, from one stream of planes per model.

    All streams are on one grid. The mean is in fp64, so that an ensemble of identical models gives the labels of one.
    Agreement is 1 - disagreement; the ensemble's is the mean agreement within the models times that among them."""
    for planes in zip(*streams, strict=True):
        pairs = zip(planes, temperatures, strict=True)
        probabilities = torch.stack([(plane.logits.double() / t).softmax(0) for plane, t in pairs])
        mean = probabilities.mean(0, keepdim=True)  # (1, K+1, H, W)
        within = [plane.disagreement for plane in planes if plane.disagreement is not None]
        disagreement = None
        if within:
            among = _divergence(mean, _entropy(probabilities).mean(0, keepdim=True), len(planes))[0]
            disagreement = 1 - (1 - torch.stack(within).mean(0)) * (1 - among)
        yield Plane(mean[0].log(), disagreement)


class Sink(NamedTuple):
    """Outputs of a scan besides its labels, as in `predict_volume`."""

    output_shape: tuple[int, int, int]
    timings: Timings
    probabilities: np.ndarray | None = None
    progress: Callable[[int], None] | None = None
    temperature: float = 1.0


def fill(planes: Iterator[Plane], num_classes: int, options: PredictOptions, sink: Sink) -> Prediction:
    """Labels of a stream of planes (K+1, H', W'), and the further results that `options` ask for."""
    labels = np.empty(sink.output_shape, dtype=label_dtype(num_classes - 1))
    agreed = np.empty(sink.output_shape, dtype=np.uint8) if options.confidence else None
    overlap = torch.zeros(3, num_classes, dtype=torch.float64, device="cpu")
    for z, plane in enumerate(planes):
        with sink.timings.stage("upsample"):
            if agreed is not None and plane.disagreement is not None:
                agreement = 255 * (1 - plane.disagreement[0])
                agreed[z] = agreement.round().to(torch.uint8).cpu().numpy()
            # twice as fast as argmax on a CPU
            found = plane.logits.max(0).indices
            labels[z] = found.to(torch.int16).cpu().numpy()
            if sink.probabilities is not None or options.expected_dsc:
                probabilities = (plane.logits / sink.temperature).softmax(0)
                if sink.probabilities is not None:
                    sink.probabilities[:, z] = probabilities.cpu().numpy()
                if options.expected_dsc:
                    overlap += _soft_overlap(probabilities, found).cpu()
        if sink.progress is not None:
            sink.progress(1)
    if not options.expected_dsc:
        return Prediction(labels, agreed)
    right, voxels, probable = overlap[:, 1:].numpy()
    expected = np.where(voxels > 0, 2 * right / np.maximum(voxels + probable, 1e-9), np.nan)
    return Prediction(labels, agreed, expected)


def _soft_overlap(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Sums (3, K+1) for the expected DSC of a plane's labels (H, W) with probabilities (K+1, H, W).

    For each class: its probability summed inside its label, the label's number of pixels, and its probability summed
    over the plane. The expected DSC is 2 · inside / (pixels + over the plane)."""
    classes, flat = len(probabilities), labels.flatten()
    inside = probabilities.gather(0, labels[None]).flatten().double()
    return torch.stack(
        [
            torch.bincount(flat, weights=inside, minlength=classes),
            torch.bincount(flat, minlength=classes).double(),
            probabilities.flatten(1).double().sum(1),
        ]
    )


@torch.inference_mode()
def stream_logits(
    model: AfterSAM,
    scan: Scan,
    config: ModelConfig,
    options: PredictOptions = DEFAULT,
    *,
    precision: torch.dtype = torch.float32,
) -> Iterator[Plane]:
    """Yield the logits (K+1, H, W) of every slice of the scan (D, H, W) in order, on the model's device.

    `slice_group` gives the slices of a group: beyond the ends the nearest slice is repeated. The logits of repeats are
    not used. With `options.confidence` the planes contain the disagreement of the groups too.
    Raises ValueError where `options.keep` is not between 1 and the number of slices in a group."""
    options.check(config.num_slices)
    if options.label_swap is not None:
        yield from _mirror_mean(model, scan, config, options, precision=precision)
        return
    if config.prompts == "none":
        scan = replace(scan, prompt_labels=None)
    model.eval()
    device = next(model.parameters()).device
    depth = len(scan.hu)
    plan = make_plan(depth, range(*body_slices(scan.hu)) if options.body else range(depth), config, options)
    tiling = Tiling.over(scan.hu.shape[1:], scan.box, config.image_size, device)
    ring: dict[int, SliceFeatures] = {}  # slice -> features of its windows
    votes: dict[int, Votes] = defaultdict(Votes)
    background = tiling.background(model.decoder.num_tokens, disagreement=options.confidence)
    done = 0  # slices yielded so far
    for batch in plan.batches:
        for d in [d for d in ring if d < batch.needed[0]]:
            del ring[d]
        with autocast(device, precision):
            new = [d for d in batch.needed if d not in ring]
            with scan.timings.stage("encode"):
                ring |= encode(model, scan, new, tiling, batch_size=options.batch_size)
            with scan.timings.stage("fuse"):
                fused = fuse(model, ring, batch.groups, plan.positions)
            with scan.timings.stage("decode"):
                targets = [group[p] for group in batch.groups for p in plan.positions]
                logits = decode(model, scan, fused, ring, targets, tiling)
                count_votes(votes, logits.unflatten(0, (len(batch.groups), -1)), batch, plan)
        for d in range(done, batch.finished):
            found = votes.pop(d, None)
            with scan.timings.stage("upsample"):
                plane = background if found is None or d not in plan.body else found.assemble(tiling)
            yield plane
        done = max(done, batch.finished)
    for _ in range(done, depth):
        yield background


def _mirror_mean(
    model: AfterSAM, scan: Scan, config: ModelConfig, options: PredictOptions, *, precision: torch.dtype
) -> Iterator[Plane]:
    """Yield the mean of `stream_logits` of the scan and of its mirror image (mirrored back), plane by plane."""
    swap = options.label_swap or {}
    once = replace(options, label_swap=None)
    straight = stream_logits(model, scan, config, once, precision=precision)
    turned = stream_logits(model, scan.mirrored(swap), config, once, precision=precision)
    for one, other in zip(straight, turned, strict=True):
        yield one.combine(other.mirrored(swap), lambda a, b: (a + b) / 2)


class Batch(NamedTuple):
    """Groups that are computed together."""

    centres: list[int]
    """The groups' centre slices, in rising order."""
    groups: list[list[int]]
    """The slices of each group."""
    needed: list[int]
    """All slices of the groups, in rising order."""
    finished: int
    """First slice to which a later batch can still add; all slices before it are finished after this batch."""


@dataclass(frozen=True)
class Plan:
    """The groups of a scan, in batches, and the slices of each group that are decoded and kept."""

    depth: int
    offsets: dict[int, int]
    """Decoded position in a group -> its distance from the centre, in slices."""
    kept: tuple[int, ...]
    """Positions in a group whose logits are kept."""
    body: range
    """Slices that are predicted. All others become background."""
    compare: bool
    """Whether to compute the disagreement of the groups that contain a slice."""
    batches: list[Batch]

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions in a group that are decoded."""
        return tuple(self.offsets)


def make_plan(depth: int, body: range, config: ModelConfig, options: PredictOptions) -> Plan:
    """The plan for the slices `body` of a scan of `depth` slices."""
    centres, kept = group_plan(depth, config, options)
    positions = range(config.num_slices) if options.confidence else kept
    offsets = {p: (p - config.num_slices // 2) * config.slice_stride for p in positions}
    centres = [c for c in centres if any(c + offset in body for offset in offsets.values())]
    # groups per batch, such that no more slices are decoded at once than encoded
    size = max(1, options.batch_size // len(positions))
    batches = []
    for first in range(0, len(centres), size):
        some, later = centres[first : first + size], centres[first + size :]
        groups = [slice_group(c, depth, config.num_slices, config.slice_stride).tolist() for c in some]
        needed = sorted({d for group in groups for d in group})
        finished = max(0, min(depth, later[0] + offsets[positions[0]])) if later else depth
        batches.append(Batch(some, groups, needed, finished))
    return Plan(depth, offsets, kept, body, options.confidence, batches)


def group_plan(depth: int, config: ModelConfig, options: PredictOptions) -> tuple[list[int], tuple[int, ...]]:
    """(centres of the groups in rising order, positions in a group whose slices are kept).

    At least one group keeps each slice. With `slice_stride` s, every s-th slice is treated as a scan of its own."""
    stride, keep, centre = config.slice_stride, options.keep, config.num_slices // 2
    centres = set()
    for start in range(min(stride, depth)):
        last = (depth - 1 - start) // stride
        centres |= {start + min(i + keep // 2, last) * stride for i in range(0, last + 1, keep)}
    first = centre - keep // 2
    positions = range(config.num_slices) if options.average else range(first, first + keep)
    return sorted(centres), tuple(positions)


def encode(
    model: AfterSAM, scan: Scan, slices: Sequence[int], tiling: Tiling, *, batch_size: int
) -> dict[int, SliceFeatures]:
    """{slice: features} of `slices`: embedding (windows, C, h, w) and skips of all windows of the slice."""
    device, count = tiling.seen.device, len(tiling.windows)
    found = {}
    for start in range(0, len(slices), batch_size):
        some = slices[start : start + batch_size]
        images = window_crops(
            scan.hu, some, tiling.windows, tiling.size, AIR_HU, stem_slices=model.stem_slices
        )
        stored = None
        if scan.stored is not None:
            levels = scan.stored.read(some, device)
            stored = SliceFeatures(levels[0], levels[1:])
        features = model.encode(images.to(device).float(), stored)
        for i, d in enumerate(some):
            part = slice(i * count, (i + 1) * count)
            found[d] = SliceFeatures(features.embedding[part], tuple(s[part] for s in features.skips))
    return found


def fuse(
    model: AfterSAM,
    features: Mapping[int, SliceFeatures],
    groups: Sequence[Sequence[int]],
    positions: tuple[int, ...],
) -> Tensor:
    """Fused embedding (groups, positions, windows, C, h, w) of the slices at `positions` in each group."""
    # (groups, windows, N, C, h, w): the model gets each window of a group as a separate group, and wants channels last
    rows = {d: features[d].embedding.movedim(1, -1) for group in groups for d in group}
    embedding = torch.stack([torch.stack([rows[d] for d in group], dim=1) for group in groups]).movedim(-1, 3)
    fused: Tensor = model.fuse(embedding.flatten(0, 1), query_index=positions)
    by_group: Tensor = fused.unflatten(0, embedding.shape[:2])
    return by_group.transpose(1, 2)


def decode(
    model: AfterSAM,
    scan: Scan,
    fused: Tensor,
    features: Mapping[int, SliceFeatures],
    targets: Sequence[int],
    tiling: Tiling,
) -> Tensor:
    """Logits (targets, windows, K+1, h, w) of the slices `targets`, ordered as in `fused` (groups, positions, ...)."""
    skips = tuple(torch.cat(level) for level in zip(*(features[d].skips for d in targets), strict=True))
    labels = None
    if scan.prompt_labels is not None:
        labels = window_crops(scan.prompt_labels, targets, tiling.windows, tiling.size, 0).to(fused.device)
    logits = model.decode(fused.flatten(0, 2), skips, labels).float()
    by_target: Tensor = logits.unflatten(0, (len(targets), -1))
    return by_target


def count_votes(votes: dict[int, Votes], logits: Tensor, batch: Batch, plan: Plan) -> None:
    """Add a batch's logits (groups, positions, windows, K+1, h, w) to the sums of their slices."""
    for centre, of_group in zip(batch.centres, logits, strict=True):
        for (position, offset), planes in zip(plan.offsets.items(), of_group, strict=True):
            if 0 <= centre + offset < plan.depth:  # not a repeat of the first or last slice
                votes[centre + offset].add(planes, position in plan.kept, plan.compare)


@dataclass
class Votes:
    """Sums of a slice's logits and probabilities over the groups computed so far."""

    logits: Tensor | float = 0.0  # (windows, K+1, h, w), sum over the groups that keep the slice
    kept: int = 0  # number of those groups
    probabilities: Tensor | float = 0.0  # (windows, K+1, h, w), sum over all groups that contain the slice
    entropy: Tensor | float = 0.0  # (windows, 1, h, w), sum of the entropies in those groups
    seen: int = 0  # number of those groups

    def add(self, logits: Tensor, keep: bool, compare: bool) -> None:
        """Add one group's logits (windows, K+1, h, w): with `keep` to the mean, with `compare` to the disagreement."""
        if keep:
            self.logits, self.kept = self.logits + logits, self.kept + 1
        if compare:
            probabilities = logits.softmax(1)
            self.probabilities = self.probabilities + probabilities
            self.entropy, self.seen = self.entropy + _entropy(probabilities), self.seen + 1

    def assemble(self, tiling: Tiling) -> Plane:
        """The plane of the mean logits, with the disagreement where groups were compared."""
        mean = torch.as_tensor(self.logits) / self.kept
        return tiling.assemble(mean, self.disagreement() if self.seen else None)

    def disagreement(self) -> Tensor:
        """Disagreement (windows, 1, h, w) in [0, 1]: Jensen–Shannon divergence of the groups, divided by its maximum.

        The divergence is the entropy of the mean minus the mean entropy. It is 0 where all groups give the same
        probabilities or only one group contains the slice, and 1 where each group is sure of a different class.
        Source: Lin, IEEE TIT 37 (1991)."""
        mean = torch.as_tensor(self.probabilities) / self.seen
        return _divergence(mean, torch.as_tensor(self.entropy) / self.seen, self.seen)


def _divergence(mean: Tensor, entropy: Tensor, count: int) -> Tensor:
    """Jensen–Shannon divergence (windows, 1, h, w) of `count` distributions, divided by its maximum.

    `mean` (windows, K+1, h, w) is the mean distribution, `entropy` (windows, 1, h, w) the mean entropy."""
    largest = math.log(max(2, min(count, mean.shape[1])))
    return ((_entropy(mean) - entropy) / largest).clamp(0, 1)


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of probabilities (windows, K+1, h, w) -> (windows, 1, h, w)."""
    terms: Tensor = torch.special.entr(probabilities)  # -p log p
    return terms.sum(1, keepdim=True)
