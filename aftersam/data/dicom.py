"""A folder with one DICOM CT series in, Hounsfield units on its grid out. Needs the extra `dicom`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aftersam.data.dicom_file import (
    INSTALL,
    Slice,
    read_file,
    slices_of,
    stored_pixels,
    text_of,
    why_no_slice,
)
from aftersam.errors import naming

if TYPE_CHECKING:
    import nibabel as nib

UNEVEN_MM = 0.1  # by which a slice may lie off the even grid: archives round positions to it
SAME_MM = 1e-3  # two slices closer than this lie at one position


class Series(NamedTuple):
    """A CT series whose pixels are still on disk."""

    slices: list[Slice]  # sorted along their normal
    affine: np.ndarray  # (4, 4) voxel (x, y, z) -> RAS mm
    left_out: dict[str, str]  # why other files of the folder are no slices, or copies of one, by name


def read_series(folder: Path, series: str | None = None) -> nib.Nifti1Image:
    """The CT series in `folder` in HU, slices sorted along their normal, with its affine in RAS mm.

    int16 where every slice scales to integers, else float32. What is left out is told in a warning. Raises ValueError
    as `find_series` does, and on a slice whose pixels are truncated or damaged."""
    import nibabel as nib

    slices, affine, left_out = find_series(folder, series)
    if left_out:
        some = ", ".join(f"{name} ({why})" for name, why in list(left_out.items())[:5])
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        warnings.warn(f"{folder}: left out what is no slice of the series: {some}{more}", stacklevel=2)
    whole = all(v.is_integer() for s in slices for v in (s.slope, s.intercept))
    stack = None
    for z, (one, plane) in enumerate(zip(slices, stored_pixels(slices), strict=True)):
        if stack is None:  # after the first slice is decoded: a damaged header asks for no memory
            kind = np.int16 if whole and plane.dtype.kind in "iu" else np.float32
            stack = np.empty((len(slices), *one.shape), kind)
        if stack.dtype == plane.dtype and (one.slope, one.intercept) == (1, 0):
            stack[z] = plane
            continue
        hu = plane.astype(np.float64) * one.slope + one.intercept
        stack[z] = hu if stack.dtype.kind == "f" else np.clip(hu, -(2**15), 2**15 - 1)
    assert stack is not None
    image = nib.Nifti1Image(stack.T, affine)  # (x, y, z)
    image.header.set_xyzt_units("mm")
    return image


def series_in(folder: Path) -> dict[str, str | None]:
    """What each DICOM series in `folder` is instead of a CT series, by SeriesInstanceUID; None for a CT series.

    Raises ValueError on a file that is damaged, and where pydicom is not installed."""
    found: dict[str, str | None] = {}
    for path, header in _dicom_files(folder):
        if header is None:
            continue
        with naming(path):
            uid = text_of(path, header, "SeriesInstanceUID")
            why = why_no_slice(path, header)
        found[uid] = why and found.get(uid, why)
    return found


def find_series(folder: Path, wanted: str | None = None) -> Series:
    """The CT series in `folder`, or the one `wanted` of several; its pixels are still on disk.

    Source: DICOM PS3.3 C.7.6.2.1.1. Raises ValueError where there is no CT series or more than one, where a file
    is damaged, lacks an attribute or is compressed in a way that no installed decoder reads, where slices are missing
    or differ in size or direction, and where pydicom is not installed."""
    headers, left_out = _headers(folder, wanted)
    series = {text_of(path, header, "SeriesInstanceUID") for path, header in headers}
    if len(series) > 1:
        raise ValueError(
            f"{folder} holds slices of {len(series)} DICOM series; put each into a folder of its own, or give "
            "the folder with --recursive"
        )
    slices = [one for path, header in headers for one in slices_of(path, header)]
    _check_alike(slices)
    normal = np.cross(*slices[0].orientation)
    slices.sort(key=lambda s: float(normal @ s.position))
    slices, copies = _without_copies(slices)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ _affine(folder, slices, normal)
    return Series(slices, affine, left_out | copies)


def _dicom_files(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Every file in `folder` with its header, None for one that is not DICOM."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise ValueError(f"{folder} is a folder; reading DICOM needs pydicom: {INSTALL}") from None
    for path in sorted(p for p in folder.iterdir() if not (p.is_dir() or p.name.startswith("."))):
        yield path, read_file(path, pixels=False) if path.is_file() else None  # a link to nothing, a pipe


def _headers(folder: Path, wanted: str | None = None) -> tuple[list[tuple[Path, Any]], dict[str, str]]:
    """Every CT image in `folder` with its header, and why the other files are left out, by name."""
    found, foreign, left_out = [], [], dict[str, str]()
    for path, header in _dicom_files(folder):
        if header is None:
            foreign.append(path)
            continue
        if wanted is not None and header.get("SeriesInstanceUID") != wanted:
            continue
        with naming(path):
            why = why_no_slice(path, header)
        if why is None:
            found.append((path, header))
        else:
            left_out[path.name] = why
    shapes = {_shape_of(path) for path, _ in found}
    for path in foreign:
        if path.suffix.lower() in (".dcm", ".dicom", ".ima") or _shape_of(path) in shapes:
            raise ValueError(f"{path} is truncated or damaged: it is named like a slice, but is not DICOM")
    if not found:
        raise ValueError(_nothing_found(folder, left_out))
    return found, left_out | {path.name: "not DICOM" for path in foreign}


def _shape_of(path: Path) -> str:
    """File name with numbers alike: all slices of most series have one."""
    return re.sub(r"\d+", "0", path.name)


def _nothing_found(folder: Path, left_out: dict[str, str]) -> str:
    if left_out:
        kinds = ", ".join(sorted(set(left_out.values())))
        return f"{folder} holds DICOM, but no slices of a CT series: {kinds}"
    inside = next((p.parent for p in folder.rglob("*") if p.is_file() and p.parent != folder), None)
    hint = f"; name a folder inside it, such as {inside}" if inside else ""
    return f"{folder} holds no scan: neither NIfTI files nor slices of a DICOM series{hint}"


def _check_alike(slices: list[Slice]) -> None:
    """Raises ValueError where a slice differs from the first in size, spacing or direction."""
    first = slices[0]
    for other in slices[1:]:
        for name, a, b in (
            ("Rows × Columns", first.shape, other.shape),
            ("PixelSpacing", first.spacing_mm, other.spacing_mm),
            ("ImageOrientationPatient", first.orientation, other.orientation),
        ):
            if not np.allclose(a, b, atol=1e-4):
                found = [np.round(v, 4).ravel().tolist() for v in (a, b)]
                raise ValueError(
                    f"{other.path} and {first.path.name} differ in {name} ({found[1]}, {found[0]}); slices of one "
                    "series must not"
                )


def _without_copies(slices: list[Slice]) -> tuple[list[Slice], dict[str, str]]:
    """Sorted slices without those that repeat another's position and pixels, and which ones these are, by name.

    Raises ValueError where two slices at one position differ."""
    kept, copies = slices[:1], dict[str, str]()
    for one in slices[1:]:
        last = kept[-1]
        if np.abs(one.position - last.position).max() > SAME_MM:
            kept.append(one)
            continue
        plane, again = stored_pixels([last, one])
        if not np.array_equal(plane, again):
            raise ValueError(
                f"{one.path} and {last.path.name} lie at one position, but differ; a series has one slice a position"
            )
        copies[one.path.name] = f"a copy of {last.path.name}"
    return kept, copies


def _affine(folder: Path, slices: list[Slice], normal: np.ndarray) -> np.ndarray:
    """The affine (x, y, z) -> LPS mm of sorted slices; ValueError where they do not lie on an even grid."""
    positions = np.array([s.position for s in slices])
    rows_mm, columns_mm = slices[0].spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = slices[0].orientation[0] * columns_mm
    affine[:3, 1] = slices[0].orientation[1] * rows_mm
    affine[:3, 2], affine[:3, 3] = _line(folder, slices, positions, normal)
    return affine


def _line(
    folder: Path, slices: list[Slice], positions: np.ndarray, normal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The step (3,) from one slice to the next, and the first position: the least-squares line of the positions."""
    if len(slices) == 1:
        thickness = slices[0].thickness_mm
        if thickness is None or thickness <= 0:
            raise ValueError(f"{slices[0].path} is the only slice and has no SliceThickness above 0 mm")
        return normal * thickness, positions[0]
    distances = np.diff(positions, axis=0) @ normal
    typical = float(np.median(distances))
    away = np.abs(distances - typical)
    if away.max() > max(typical / 2, UNEVEN_MM):
        a, b = slices[int(away.argmax())], slices[int(away.argmax()) + 1]
        raise ValueError(
            f"{folder} has a missing or misplaced slice: {a.path.name} and {b.path.name} lie "
            f"{distances[away.argmax()]:.3g} mm apart, the others {typical:.3g} mm"
        )
    index = np.arange(len(slices)) - (len(slices) - 1) / 2
    step = index @ positions / (index @ index)
    first = positions.mean(axis=0) + index[0] * step
    off = np.abs(positions - first - np.arange(len(slices))[:, None] * step).max(axis=1)
    if off.max() > UNEVEN_MM:
        raise ValueError(
            f"{folder} has slices at uneven distances: {slices[int(off.argmax())].path.name} lies {off.max():.3g} mm "
            f"off the even grid of {np.linalg.norm(step):.3g} mm"
        )
    return step, first
