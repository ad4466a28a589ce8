"""Embedding cache: the image encoder's features of each scan on disk, so that a scan is encoded only once.

Each scan has a folder. Its name is a hash of everything that its content depends on: the encoder's weights, the
precision, the HU windows, the pixels and the position of the windows. After a change of any of them the name is new, so
stale features are never read. SAM's features take 2 MB a slice at 1024 px, in fp16."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from aftersam.data.stored_features import StoredScan
from aftersam.data.transforms import Box
from aftersam.data.volume import AIR_HU
from aftersam.data.windows import plane_windows, window_crops
from aftersam.device import autocast
from aftersam.errors import SAID, naming
from aftersam.files import remove_leftovers, renamed_folder
from aftersam.model.aftersam import AfterSAM

VERSION = 1  # of the format and the computation; increase it to invalidate every folder


class Embeddings:
    """Features of any scan: read from `folder`, or computed by the encoder of `model` and stored there.

    The encoder computes in `precision`. Its weights are hashed once, here, and must not change afterwards."""

    def __init__(self, folder: Path, model: AfterSAM, *, image_size: int, precision: torch.dtype) -> None:
        self.folder = folder
        remove_leftovers(folder)
        self.model = model
        self.size = image_size
        self.precision = precision
        self._key = hashlib.blake2b(digest_size=16)
        hu_windows = [tuple(map(float, window)) for window in model.hu_windows]
        self._key.update(f"{VERSION} {precision} {image_size} {hu_windows} {model.normalisation}".encode())
        for name, value in model.encoder.state_dict().items():
            self._key.update(name.encode())
            self._key.update(value.detach().cpu().contiguous().numpy().data)

    def of(
        self,
        hu: np.ndarray,
        box: Box,
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] | None = None,
    ) -> StoredScan:
        """Stored features of hu (D, H, W) at the model's spacing; a scan without them is encoded first.

        Raises OSError where the folder cannot be written."""
        home = self._home(hu, box)
        if not _whole(home, len(hu)):
            shutil.rmtree(home, ignore_errors=True)
            self._encode(home, hu, plane_windows(hu.shape[1:], box, self.size), batch_size, progress)
        return StoredScan(home)

    def _home(self, hu: np.ndarray, box: Box) -> Path:
        digest = self._key.copy()
        digest.update(f"{hu.shape} {hu.dtype} {plane_windows(hu.shape[1:], box, self.size)}".encode())
        for plane in hu:  # slice by slice, so that a memory map is never loaded whole
            digest.update(np.ascontiguousarray(plane).data)
        return self.folder / digest.hexdigest()

    @torch.inference_mode()
    def _encode(
        self,
        home: Path,
        hu: np.ndarray,
        windows: list[tuple[int, int]],
        batch_size: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        """Write the features of `hu` to the folder `home`, which gets its name only when it is complete."""
        device = next(self.model.parameters()).device
        files: list[BinaryIO] = []
        with renamed_folder(home) as temporary, contextlib.ExitStack() as opened:
            for start in range(0, len(hu), batch_size):
                some = range(start, min(start + batch_size, len(hu)))
                images = window_crops(
                    hu, some, windows, self.size, AIR_HU, stem_slices=self.model.stem_slices
                )
                with autocast(device, self.precision):
                    features = self.model.encoder(self.model.image(images.to(device).float()))
                levels = [
                    level.unflatten(0, (-1, len(windows))).half().cpu().numpy()
                    for level in (features.embedding, *features.skips)
                ]
                if not files:
                    files = [
                        opened.enter_context((temporary / f"{i}.npy").open("wb")) for i in range(len(levels))
                    ]
                    for file, level in zip(files, levels, strict=True):
                        shape = (len(hu), *level.shape[1:])
                        facts = {"descr": level.dtype.str, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, facts)
                for file, level in zip(files, levels, strict=True):
                    file.write(np.ascontiguousarray(level).data)
                if progress is not None:
                    progress(len(some))


def _whole(home: Path, depth: int) -> bool:
    """Whether the folder `home` holds features of `depth` slices, each file as long as its header says."""
    try:
        with naming(home):
            levels = [np.lib.format.open_memmap(path, mode="r") for path in home.glob("*.npy")]
    except SAID:
        return False
    return bool(levels) and all(len(level) == depth for level in levels)
