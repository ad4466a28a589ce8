"""Training groups: a random group of neighbouring slices of each cached scan, cropped and augmented."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from aftersam.config import DataConfig, ModelConfig
from aftersam.data.augment import augment
from aftersam.data.cache import CachedCase
from aftersam.data.volume import AIR_HU
from aftersam.data.windows import adjacent, crop, nearest_window, plane_windows, slice_group, window_start

if TYPE_CHECKING:
    from aftersam.data.stored_features import StoredScan


class SliceGroups(Dataset[dict[str, torch.Tensor | str]]):
    """One random group of each cached scan an epoch, cropped about the body and augmented.

    An item is a pure function of (seed, epoch, case id), so that every process, worker and resumed run gets the
    same. Index by (epoch, case), as a sampler does, or by the case alone within `set_epoch`'s epoch. With persistent
    workers the sampler must name the epoch, because workers hold copies of this object. `label_swap` pairs the left
    and right labels that the mirror augmentation exchanges. `stored` holds the encoder's features of prediction's
    windows by case; items then contain them."""

    def __init__(
        self,
        cached: Sequence[CachedCase],
        *,
        model: ModelConfig,
        data: DataConfig,
        seed: int,
        label_swap: dict[int, int],
        stored: dict[str, StoredScan] | None = None,
    ) -> None:
        if not cached:
            raise ValueError("there is no scan to train on")
        self.cached = list(cached)
        self.model = model
        self.data = data
        self.seed = seed
        self.label_swap = label_swap
        self.stored = stored
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of items that are indexed by their case alone."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.cached)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, torch.Tensor | str]:
        """{"hu": (N, S, S) float32, "labels": (N, S, S) int64, "case": its id}, and "embedding" (N, C, h, w) if stored.

        With `stem_slices` s above 1, "hu" is (N, s, S, S): each slice with its adjacent slices."""
        epoch, case = index if isinstance(index, tuple) else (self.epoch, index)
        scan = self.cached[case]
        generator = np.random.default_rng((self.seed, epoch, zlib.crc32(scan.id.encode())))
        centre, target = self._centre(scan, generator)
        depth, *plane = scan.shape
        size = self.model.image_size
        index = 0
        if self.data.crops == "prediction":
            windows = plane_windows(plane, scan.box, size)
            index = nearest_window(windows, size, target) if target else int(generator.integers(len(windows)))
            first: Sequence[int] = windows[index]
        else:
            top, bottom, left, right = scan.box
            spans = [((top, bottom), target[:2]), ((left, right), target[2:])]
            first = [
                window_start(length, *span, size, generator, inside)
                for length, (span, inside) in zip(plane, spans, strict=True)
            ]
        group = slice_group(centre, depth, self.model.num_slices, self.model.slice_stride)
        near = adjacent(group, depth, self.model.stem_slices)
        hu = crop(scan.hu, near.flatten(), first, size, AIR_HU).astype(np.float32)
        labels = crop(scan.labels, group, first, size, 0)
        if labels.view(f"u{labels.itemsize}").max() > scan.foreground[:, 0].max(initial=0):
            raise ValueError(
                f"{scan.folder} is damaged: its labels and foreground differ; delete this folder"
            )
        labels = labels.astype(np.int64)
        hu, labels = augment(hu, labels, generator, self.data, self.label_swap)
        embedding = {}
        if self.stored is not None:
            embedding = {"embedding": self.stored[scan.id].read(group.tolist(), window=index)[0]}
        hu = hu.reshape(*near.shape, size, size)
        return {"hu": torch.from_numpy(hu), "labels": torch.from_numpy(labels), "case": scan.id, **embedding}

    def _centre(self, scan: CachedCase, generator: np.random.Generator) -> tuple[int, tuple[int, ...]]:
        """The centre slice, and the pixels (top, bottom, left, right) that the window should contain, if any.

        A foreground draw takes a random class of the scan, then one of its slices; other draws are uniform over
        slices."""
        rows = scan.foreground
        if not len(rows) or generator.random() >= self.data.foreground_sampling:
            return int(generator.integers(scan.shape[0])), ()
        rows = rows[rows[:, 0] == generator.choice(np.unique(rows[:, 0]))]
        _, centre, *target = generator.choice(rows).tolist()
        return centre, tuple(target)
