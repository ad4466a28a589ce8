"""Inputs of a prediction besides the model: a scan at the model's spacing, and the options."""

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
    """(D, H, W) in Hounsfield units. May be a memory map."""
    box: Box
    """In-plane bounding box of the body: top, bottom, left, right in pixels, ends excluded."""
    prompt_labels: np.ndarray | None = None
    """(D, H, W) labels from which a model with prompts draws its prompts. Other models ignore them."""
    stored: StoredScan | None = None
    """Encoder features of `hu`. With them `hu` is not encoded."""
    timings: Timings = field(default_factory=Timings)
    """Collects the seconds of each stage."""

    def mirrored(self, label_swap: dict[int, int]) -> Scan:
        """The scan with left and right exchanged, also in the prompt labels, without stored features."""
        top, bottom, left, right = self.box
        width = self.hu.shape[2]
        labels = self.prompt_labels
        if labels is not None:
            labels = swap_labels(labels[..., ::-1], label_swap)
        box = (top, bottom, width - right, width - left)
        return replace(self, hu=self.hu[..., ::-1], box=box, prompt_labels=labels, stored=None)


@dataclass(frozen=True)
class PredictOptions:
    """Options of the sliding groups. The defaults are the paper's: one group per slice, of which the centre is kept."""

    keep: Small = 1
    """Middle slices kept of each group, and the distance between groups in slices."""
    average: bool = False
    """Average over groups: a slice's logits are the mean of all groups that contain it."""
    label_swap: dict[int, int] | None = None
    """Average with the logits of the mirrored scan. Maps each label to the label of the other side."""
    body: bool = False
    """Skip the slices at both ends that show no body; they become background."""
    confidence: bool = False
    """Measure the agreement of the groups that contain a slice. Every group then decodes all its slices."""
    expected_dsc: bool = False
    """Estimate the DSC of each organ from the probabilities."""
    batch_size: Count = 8
    """Slices encoded or decoded at once. A smaller number needs less memory."""

    def check(self, num_slices: int) -> None:
        """Raise ValueError where a number is out of bounds, or `keep` is above the `num_slices` of a group."""
        if not 1 <= self.keep <= num_slices:
            raise ValueError(
                f"--keep is {self.keep}, but must be 1 to {num_slices}, the number of slices in the model's groups"
            )
        checked(self)
