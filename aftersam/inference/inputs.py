"""What prediction takes beside a model: a scan at the model's spacing, and the options."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from aftersam.config import Count, Small, checked
from aftersam.data.augment import swap_labels
from aftersam.data.stored_features import StoredScan
from aftersam.data.transforms import Box
from aftersam.inference.timings import Timings


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan at the model's spacing."""

    hu: np.ndarray
    """(D, H, W) in Hounsfield units; a file's memory map will do."""
    box: Box
    """The body's bounding box in the plane: top, bottom, left, right in pixels, ends excluded."""
    prompt_labels: np.ndarray | None = None
    """(D, H, W) labels that a model with prompts draws its prompts from; other models ignore them."""
    stored: StoredScan | None = None
    """Encoder features of this very `hu`, which is then not encoded again."""
    timings: Timings = field(default_factory=Timings)
    """Where each stage adds its seconds."""

    def mirrored(self, label_swap: dict[int, int]) -> Scan:
        """The scan with left and right exchanged, also in the labels; its features are not stored."""
        top, bottom, left, right = self.box
        width = self.hu.shape[2]
        labels = self.prompt_labels
        if labels is not None:
            labels = swap_labels(labels[..., ::-1], label_swap)
        box = (top, bottom, width - right, width - left)
        return replace(self, hu=self.hu[..., ::-1], box=box, prompt_labels=labels, stored=None)


@dataclass(frozen=True)
class PredictOptions:
    """How groups slide over a scan. The default is the paper's: a group about every slice, its centre kept."""

    keep: Small = 1
    """Middle slices kept of each group; groups are this many slices apart."""
    average: bool = False
    """Average over groups: a slice's logits are the mean of all groups that contain it."""
    label_swap: dict[int, int] | None = None
    """Average with the mirrored scan's logits. Each label maps to the label of the other side."""
    body: bool = False
    """Skip the slices at both ends that show no body: they are background."""
    confidence: bool = False
    """Measure how far the groups that contain a slice agree; every group then decodes all its slices."""
    expected_dsc: bool = False
    """Estimate the DSC of each organ from the probabilities."""
    batch_size: Count = 8
    """Slices encoded or decoded at once; less needs less memory."""

    def check(self, num_slices: int) -> None:
        """Raise ValueError on a number outside its bounds, and on a `keep` above the `num_slices` of a group."""
        if not 1 <= self.keep <= num_slices:
            raise ValueError(
                f"--keep is {self.keep}, but the model's groups have 1 to {num_slices} slices to keep"
            )
        checked(self)
