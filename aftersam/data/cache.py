"""Preprocessed scans on disk, memory-mapped: made once, shared by workers and runs.

Each scan has a folder, named after the case and a hash of the files' contents, the spacing and this file's version.
A changed scan, label or setting therefore gets a folder of its own."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aftersam.config import DataConfig, from_dict
from aftersam.data.dataset import Case, Dataset, median_spacing
from aftersam.data.intensities import check_intensities
from aftersam.data.transforms import preprocess, resample
from aftersam.data.volume import Volume, read_image, read_labels
from aftersam.errors import SAID, naming, plain_console
from aftersam.files import read_json, remove_leftovers, renamed_folder

VERSION = 2  # of what is stored and how it is computed; a change makes every cache anew


@dataclass(frozen=True)
class CaseFacts:
    """What case.json says of a preprocessed scan."""

    id: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    box: tuple[int, int, int, int]
    """Of the body in the plane: top, bottom, left, right in pixels, ends excluded."""


@dataclass(frozen=True)
class CachedCase(CaseFacts):
    """A preprocessed scan. Arrays are opened when they are read, so that the object is small enough to send to
    workers."""

    folder: Path

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
        array: np.ndarray = np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="r")
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

    The spacing "median" is that of the cases `training`. `trusted` skips the check of intensities. Raises
    ValueError, or OSError where the folder cannot be written, naming the scan; scans finished before are kept."""
    from rich.progress import track

    cases = {case.id: case for case in dataset.cases}
    spacing: tuple[float, float, float] | None
    if config.spacing_mm == "median":
        spacing = median_spacing([cases[i] for i in training])
    else:
        spacing = None if config.spacing_mm == "native" else config.spacing_mm
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    wanted = [cases[i] for i in ids]
    console = plain_console(stderr=True)
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
    """One labelled case at `spacing_mm` (None: the scan's own), read from `folder` or preprocessed into it.

    `names` are the labels that may occur. Raises ValueError on bad files, on a missing or empty label, and on a
    label value without a name."""
    if case.label is None:
        raise ValueError(f"{case.image} has no label to train on")
    digest = hashlib.blake2b(f"{VERSION} {spacing_mm} {sorted(names)}".encode(), digest_size=10)
    for path in (case.image, case.label):
        _feed(digest, path)
    home = folder / f"{case.id}-{digest.hexdigest()}"
    if not _is_whole(home, names):
        image = read_image(case.image)
        check_intensities(image, trusted=trusted)
        labels = read_labels(case.label, like=image)
        check_labels(labels, names)
        _write(home, case.id, image, labels, spacing_mm, names)
    return _open(home, names)


def check_labels(labels: Volume, names: dict[int, str]) -> list[int]:
    """The label values that occur, without background. Raises ValueError where there is none, or one without a name."""
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


def _open(home: Path, names: Collection[int]) -> CachedCase:
    """The scan in the folder `home`. Raises ValueError where one of its files is damaged or cut short."""
    with naming(home):
        facts = from_dict(CaseFacts, read_json(home / "case.json"), where=str(home / "case.json"))
        case = CachedCase(**vars(facts), folder=home)
        depth, height, width = case.shape
        rows, (top, bottom, left, right) = case.foreground, case.box
        if (
            case.id != home.name.rpartition("-")[0]
            or (case.hu.shape, case.hu.dtype.name) != (case.shape, "int16")
            or (case.labels.shape, case.labels.dtype.name)
            not in {(case.shape, n) for n in ("uint8", "int16")}
            or not (0 <= top < bottom <= height and 0 <= left < right <= width)
            or not all(0 < mm < math.inf for mm in case.spacing_mm)
            or (rows.shape[1:], rows.dtype.name) != ((6,), "int32")
            or not np.isin(rows[:, 0], list(names)).all()
            or (rows < 0).any()
            or (rows[:, 1:] >= (depth, height, height + 1, width, width + 1)).any()
            or (rows[:, [2, 4]] >= rows[:, [3, 5]]).any()
        ):
            raise ValueError("its files do not fit each other")
    return case


def _is_whole(home: Path, names: Collection[int]) -> bool:
    try:
        _open(home, names)
    except SAID:
        return False
    return True


def _write(
    home: Path,
    case: str,
    image: Volume,
    labels: Volume,
    spacing_mm: tuple[float, float, float] | None,
    names: Collection[int],
) -> None:
    """Preprocess one case into the folder `home`, which appears only when complete, in place of a damaged one."""
    ready = preprocess(image, spacing_mm)
    label = resample(labels.array, image.spacing_mm, ready.spacing_mm, labels=True)
    with renamed_folder(home) as temporary:
        arrays = {"hu": ready.array, "labels": label, "foreground": foreground_rows(label)}
        for name, array in arrays.items():
            _save(temporary / f"{name}.npy", np.ascontiguousarray(array))
        facts = {"id": case, "shape": label.shape, "spacing_mm": ready.spacing_mm, "box": ready.box}
        (temporary / "case.json").write_text(json.dumps(facts))
        if os.path.lexists(home) and not _is_whole(home, names):
            os.rename(home, temporary.with_name("damaged"))


def _save(path: Path, array: np.ndarray) -> None:
    """Write `array` as NumPy's format; a full disk raises the system's own error, which np.save hides."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def _feed(digest: hashlib.blake2b, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    with naming(path), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
