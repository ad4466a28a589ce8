"""Preprocessed scans on disk, memory-mapped: made once, shared by workers and runs.

A folder a scan, named after the case and a hash of the files' contents, the spacing and this file's version,
so that a changed scan, label or setting is never mistaken for another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aftersam.config import DataConfig
from aftersam.data.dataset import Case, Dataset, median_spacing
from aftersam.data.intensities import check_intensities
from aftersam.data.transforms import preprocess, resample
from aftersam.data.volume import Volume, read_image, read_labels
from aftersam.files import renamed_folder

VERSION = 1  # of what is stored and how it is computed; a change makes every cache anew


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed scan. Arrays are opened when asked for, so that an object is small and can be sent to workers."""

    id: str
    folder: Path
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    box: tuple[int, int, int, int]
    """Of the body in the plane: top, bottom, left, right in pixels, ends excluded."""

    @property
    def hu(self) -> np.ndarray:
        """(D, H, W) int16 HU, read-only memory map."""
        return self._load("hu")

    @property
    def labels(self) -> np.ndarray:
        """(D, H, W) uint8 or int16, read-only memory map."""
        return self._load("labels")

    @property
    def foreground(self) -> np.ndarray:
        """(R, 6) int32: a class, a slice that has it, and its box there (top, bottom, left, right)."""
        return self._load("foreground")

    def _load(self, name: str) -> np.ndarray:
        array: np.ndarray = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return array


def cache_cases(
    dataset: Dataset,
    ids: Iterable[str],
    config: DataConfig,
    folder: Path,
    *,
    training: Sequence[str],
    trusted: bool = False,
) -> dict[str, CachedCase]:
    """Preprocess the cases `ids` of `dataset` into `folder`, or find them there: {id: CachedCase}.

    The spacing "median" is that of the cases `training`. `trusted` intensities are not judged. Raises ValueError, or
    OSError where the folder cannot be written, naming the scan; what was finished before is kept."""
    from rich.console import Console
    from rich.progress import track

    cases = {case.id: case for case in dataset.cases}
    spacing: tuple[float, float, float] | None
    if config.spacing_mm == "median":
        spacing = median_spacing([cases[i] for i in training])
    else:
        spacing = None if config.spacing_mm == "native" else config.spacing_mm
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [cases[i] for i in ids]
    console = Console(stderr=True)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(
            lambda case: cache_case(case, dataset.labels, spacing, folder, trusted=trusted), wanted
        )
        done = track(
            found,
            "preprocessing",
            total=len(wanted),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        try:
            return {case.id: case for case in done}
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first bad scan ends the work
            raise


def cache_case(
    case: Case,
    names: dict[int, str],
    spacing_mm: tuple[float, float, float] | None,
    folder: Path,
    *,
    trusted: bool = False,
) -> CachedCase:
    """One labelled case, preprocessed to `spacing_mm` (None: its own), from `folder` or into it.

    `names` are the labels that may occur. Raises ValueError on bad files, no label, or an empty or foreign one."""
    if case.label is None:
        raise ValueError(f"{case.image} has no label to train on")
    digest = hashlib.blake2b(f"{VERSION} {spacing_mm} {sorted(names)}".encode(), digest_size=10)
    for path in (case.image, case.label):
        _feed(digest, path)
    home = folder / f"{case.id}-{digest.hexdigest()}"
    if not home.is_dir():
        image = read_image(case.image)
        check_intensities(image, trusted=trusted)
        labels = read_labels(case.label, like=image)
        check_labels(labels, names)
        _write(home, case.id, image, labels, spacing_mm)
    facts = json.loads((home / "case.json").read_text())
    return CachedCase(case.id, home, tuple(facts["shape"]), tuple(facts["spacing_mm"]), tuple(facts["box"]))


def check_labels(labels: Volume, names: dict[int, str]) -> list[int]:
    """The label values that occur, without background. Raises ValueError where there are none, or foreign ones."""
    present = [value for value in np.unique(labels.array).tolist() if value]
    foreign = [value for value in present if value not in names]
    if foreign:
        known = ", ".join(f"{v} {n}" for v, n in sorted(names.items()))
        raise ValueError(f"{labels.name} has the label {foreign[0]}, but the data set has {known}")
    if not present:
        raise ValueError(f"{labels.name} is empty: no voxel is labelled")
    return present


def foreground_rows(labels: np.ndarray) -> np.ndarray:
    """(R, 6) int32 rows (class, slice, top, bottom, left, right) of every class in every slice of (D, H, W)."""
    from scipy.ndimage import find_objects

    rows = []
    for d, plane in enumerate(labels):
        for value, found in enumerate(find_objects(plane), start=1):
            if found is not None:
                vertical, horizontal = found
                rows.append((value, d, vertical.start, vertical.stop, horizontal.start, horizontal.stop))
    return np.array(rows, dtype=np.int32).reshape(-1, 6)


def _write(
    home: Path, case: str, image: Volume, labels: Volume, spacing_mm: tuple[float, float, float] | None
) -> None:
    """Preprocess one case into the folder `home`, which appears only when complete."""
    ready = preprocess(image, spacing_mm)
    label = resample(labels.array, image.spacing_mm, ready.spacing_mm, labels=True)
    with renamed_folder(home) as temporary:
        np.save(temporary / "hu.npy", np.ascontiguousarray(ready.array))
        np.save(temporary / "labels.npy", np.ascontiguousarray(label))
        np.save(temporary / "foreground.npy", foreground_rows(label))
        facts = {"id": case, "shape": label.shape, "spacing_mm": ready.spacing_mm, "box": ready.box}
        (temporary / "case.json").write_text(json.dumps(facts))


def _feed(digest: hashlib.blake2b, path: Path) -> None:
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
