"""The image encoder's features of a scan on disk, read by training and by prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aftersam.errors import naming


@dataclass(frozen=True)
class StoredScan:
    """The encoder's features of one scan. Files are opened when they are read, so that the object can be sent to
    workers."""

    folder: Path

    def read(
        self, slices: Sequence[int], device: torch.device | None = None, *, window: int | None = None
    ) -> tuple[Tensor, ...]:
        """Features of `slices` in fp32, embedding first, then skips: of one window, or of all windows side by side."""
        levels = []
        for path in sorted(self.folder.glob("*.npy")):
            with naming(path):
                array = np.lib.format.open_memmap(path, mode="r")  # (D, windows, C, h, w)
            chosen = array[slices] if window is None else array[slices, window, None]
            levels.append(torch.from_numpy(chosen).to(device).float().flatten(0, 1))
        return tuple(levels)
