"""A folder with one DICOM CT series in, Hounsfield units on its grid out. Needs the extra `dicom`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aftersam.errors import naming

if TYPE_CHECKING:
    import nibabel as nib

UNEVEN_MM = 0.1  # by which a slice may lie off the even grid: archives round positions to it
SAME_MM = 1e-3  # two slices closer than this lie at one position
INSTALL = "pip install 'aftersam[dicom]'"
CT_CLASSES = (  # CT Image, Enhanced CT Image, Legacy Converted Enhanced CT Image
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
)
NOT_HU = ("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT")  # RescaleType, DICOM PS3.3 C.11.1.1.2
FUNCTIONAL_GROUPS = {  # where a multi-frame file keeps what a single slice has at its top
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
}


class Slice(NamedTuple):
    """One slice of a series: where its pixels are stored, and what places and scales them."""

    path: Path
    header: Any  # pydicom's Dataset of the file, without pixels
    frame: int  # in the file
    shape: tuple[int, int]  # rows, columns
    spacing_mm: np.ndarray  # (2,) between rows, between columns
    orientation: np.ndarray  # (2, 3) unit vectors along a row and along a column, LPS
    position: np.ndarray  # (3,) of the first pixel, LPS mm
    thickness_mm: float | None
    slope: float
    intercept: float


def read_series(folder: Path) -> nib.Nifti1Image:
    """The CT series in `folder` in HU, slices sorted along their normal, with its affine in RAS mm.

    int16 where every slice scales to integers, else float32. Raises ValueError as `find_series` does, and on a slice
    whose pixels are truncated, damaged or compressed in a way that no installed decoder reads."""
    import nibabel as nib

    slices, affine = find_series(folder)
    whole = all(v.is_integer() for s in slices for v in (s.slope, s.intercept))
    stack = None
    for z, (one, plane) in enumerate(zip(slices, _planes(slices), strict=True)):
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


def find_series(folder: Path) -> tuple[list[Slice], np.ndarray]:
    """The slices of the CT series in `folder`, sorted along their normal, and the affine (x, y, z) -> RAS mm.

    Files that are no slices, and copies of a slice, are left out with a warning.
    Source: DICOM PS3.3 C.7.6.2.1.1. Raises ValueError where there is no CT series or more than one, where a file
    is damaged or lacks an attribute, where slices are missing or differ in size or direction, and where pydicom is
    not installed."""
    headers, left_out = _headers(folder)
    series = {text_of(path, header, "SeriesInstanceUID") for path, header in headers}
    if len(series) > 1:
        raise ValueError(
            f"{folder} holds slices of {len(series)} DICOM series; put each into a folder of its own"
        )
    slices = [one for path, header in headers for one in _slices(path, header)]
    _check_alike(slices)
    normal = np.cross(*slices[0].orientation)
    slices.sort(key=lambda s: float(normal @ s.position))
    slices, copies = _without_copies(slices)
    if left_out := left_out | copies:
        some = ", ".join(f"{name} ({why})" for name, why in list(left_out.items())[:5])
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        warnings.warn(f"{folder}: left out what is no slice of the series: {some}{more}", stacklevel=2)
    return slices, np.diag([-1.0, -1.0, 1.0, 1.0]) @ _affine(folder, slices, normal)


def read_file(path: Path, *, pixels: bool = True) -> Any:
    """pydicom's Dataset of a file, which may lack DICOM's preamble; None where it does not start like DICOM.

    Raises ValueError that names the file where it is truncated or damaged."""
    import pydicom

    with naming(path):
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=not pixels)
        except pydicom.errors.InvalidDicomError:
            with path.open("rb") as file:
                start = file.read(4)
            if len(start) < 4 or start[0] not in (2, 8) or start[1] or start[3]:  # groups 0002 and 0008
                return None
            dataset = pydicom.dcmread(path, stop_before_pixels=not pixels, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            implicit, little = dataset.original_encoding
            order = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else order
        return dataset


def text_of(path: Path, header: Any, name: str) -> str:
    """The value of an attribute that holds one text or UID. Raises ValueError where it is missing or empty."""
    with naming(path):
        if value := str(header.get(name) or ""):
            return value
        raise ValueError(f"{path} has no {name}, which a slice of a CT series needs")


def _headers(folder: Path) -> tuple[list[tuple[Path, Any]], dict[str, str]]:
    """Every CT image in `folder` with its header, and why the other files are left out, by name."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise ValueError(f"{folder} is a folder; reading DICOM needs pydicom: {INSTALL}") from None

    found, foreign, left_out = [], [], dict[str, str]()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        header = read_file(path, pixels=False)
        if header is None:
            foreign.append(path)
            continue
        with naming(path):
            why = _why_no_slice(path, header)
        if why is None:
            found.append((path, header))
        else:
            left_out[path.name] = why
    if not found:
        raise ValueError(_nothing_found(folder, left_out))
    shapes = {_shape_of(path) for path, _ in found}
    for path in foreign:
        if path.suffix.lower() in (".dcm", ".dicom", ".ima") or _shape_of(path) in shapes:
            raise ValueError(f"{path} is truncated or damaged: it is named like a slice, but is not DICOM")
        left_out[path.name] = "not DICOM"
    return found, left_out


def _shape_of(path: Path) -> str:
    """File name with numbers alike: all slices of most series have one."""
    return re.sub(r"\d+", "0", path.name)


def _why_no_slice(path: Path, header: Any) -> str | None:
    """What a DICOM file is instead of a slice of a CT series; None where it is a slice."""
    import pydicom

    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or ""
    modality = str(header.get("Modality") or "")
    if kind in CT_CLASSES:
        if modality not in ("CT", ""):
            raise ValueError(f"{path} has the Modality {modality}; only CT can be read")
    elif modality != "CT":
        name: str = pydicom.uid.UID(kind).name
        if not modality and name == kind:  # empty, or no kind that DICOM knows
            raise ValueError(
                f"{path} is truncated or damaged: it has neither Modality nor a known SOPClassUID"
            )
        return modality or name
    elif kind and "ImagePositionPatient" not in header and "NumberOfFrames" not in header:
        return pydicom.uid.UID(kind).name  # a screenshot, raw data
    return "localizer" if "LOCALIZER" in str(header.get("ImageType")) else None


def _nothing_found(folder: Path, left_out: dict[str, str]) -> str:
    if left_out:
        kinds = ", ".join(sorted(set(left_out.values())))
        return f"{folder} holds DICOM, but no slices of a CT series: {kinds}"
    inside = sorted({p.parent for p in folder.rglob("*") if p.is_file() and p.parent != folder})
    hint = f"; name a folder inside it, such as {inside[0]}" if inside else ""
    return f"{folder} holds no scan: neither NIfTI files nor slices of a DICOM series{hint}"


def _slices(path: Path, header: Any) -> Iterator[Slice]:
    """The slices that one file holds: one, or the frames of a multi-frame file."""
    from pydicom.dataset import Dataset

    with naming(path):
        _check_pixels(path, header)
        frames = 1
        if "NumberOfFrames" in header:
            frames = int(_numbers(path, [header], "NumberOfFrames", 1)[0])
        groups = _items(header, "PerFrameFunctionalGroupsSequence")
        if frames == 1 and not groups:
            groups = [Dataset()]
        if len(groups) != frames:
            raise ValueError(
                f"{path} has {frames} frames, but PerFrameFunctionalGroupsSequence places {len(groups)}"
            )
        shared = _items(header, "SharedFunctionalGroupsSequence")
        for frame, group in enumerate(groups):
            yield _slice(path, header, frame, [group, *shared[:1], header])


def _check_pixels(path: Path, header: Any) -> None:
    """Raises ValueError on colour, and on compression that no installed decoder reads."""
    from pydicom.pixels import get_decoder

    colours = text_of(path, header, "PhotometricInterpretation")
    samples = int(_numbers(path, [header], "SamplesPerPixel", 1)[0])
    if samples != 1 or not colours.startswith("MONOCHROME"):
        raise ValueError(f"{path} is a colour image ({colours}, {samples} samples a pixel), not a CT slice")
    if "ModalityLUTSequence" in header:
        raise ValueError(f"{path} has a ModalityLUTSequence; RescaleSlope and RescaleIntercept are needed")
    syntax = header.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ValueError(
            f"{path} has the transfer syntax {syntax.name}, which pydicom cannot decode"
        ) from None
    if not decoder.is_available:
        needs = " or ".join(decoder.missing_dependencies)
        raise ValueError(f"{path} is compressed as {syntax.name}; a decoder is missing ({needs}): {INSTALL}")


def _slice(path: Path, header: Any, frame: int, holders: Sequence[Any]) -> Slice:
    """The slice whose attributes stand in the first of `holders` that has them."""
    kind = str(_found(holders, "RescaleType") or "")
    if kind.upper() in NOT_HU:
        raise ValueError(f"{path} has the RescaleType {kind}; HU are needed")
    scale, names = [1.0, 0.0], ("RescaleSlope", "RescaleIntercept")
    if any(_found(holders, name) is not None for name in names):  # one alone, or an empty one, is a mistake
        scale = [float(_numbers(path, holders, name, 1)[0]) for name in names]
    if scale[0] == 0:
        raise ValueError(f"{path} has the RescaleSlope 0; HU need another")
    rows, columns = (int(_numbers(path, [header], name, 1)[0]) for name in ("Rows", "Columns"))
    spacing = _numbers(path, holders, "PixelSpacing", 2)
    if not (spacing > 0).all():
        raise ValueError(f"{path} has the PixelSpacing {spacing.tolist()}; both must be above 0")
    orientation = _numbers(path, holders, "ImageOrientationPatient", 6).reshape(2, 3)
    if np.abs(orientation @ orientation.T - np.eye(2)).max() > 0.01:
        raise ValueError(
            f"{path} has the ImageOrientationPatient {orientation.ravel().tolist()}; two unit vectors at a right "
            "angle are needed"
        )
    orientation /= np.linalg.norm(orientation, axis=1, keepdims=True)
    thickness = None
    if _found(holders, "SliceThickness"):
        thickness = float(_numbers(path, holders, "SliceThickness", 1)[0])
    position = _numbers(path, holders, "ImagePositionPatient", 3)
    return Slice(path, header, frame, (rows, columns), spacing, orientation, position, thickness, *scale)


def _items(dataset: Any, name: str) -> list[Any]:
    """The datasets of a sequence, none where it is missing or no sequence."""
    from pydicom.sequence import Sequence as Items

    value = dataset.get(name)
    return list(value) if isinstance(value, Items) else []


def _found(holders: Sequence[Any], name: str) -> Any:
    """The attribute's value in the first of `holders` that has it, in a functional group or at the top; else None.

    An empty value is ""."""
    for holder in holders:
        group = _items(holder, FUNCTIONAL_GROUPS[name])[:1] if name in FUNCTIONAL_GROUPS else []
        for place in (*group, holder):
            if name in place:
                value = place[name].value
                return "" if value is None else value
    return None


def _numbers(path: Path, holders: Sequence[Any], name: str, count: int) -> np.ndarray:
    """The `count` finite numbers of an attribute. Raises ValueError where it is missing, empty or something else."""
    value = _found(holders, name)
    try:
        numbers = np.atleast_1d(np.array(value, dtype=np.float64))
        if value is not None and numbers.shape == (count,) and np.isfinite(numbers).all():
            return numbers
    except (TypeError, ValueError):
        pass
    needs = "a number is" if count == 1 else f"{count} numbers are"
    has = (
        f"no {name}"
        if value is None
        else f"an empty {name}"
        if str(value) in ("", "[]")
        else f"{name} {value}"
    )
    raise ValueError(f"{path} has {has}; {needs} needed")


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
        plane, again = _planes([last, one])
        if not np.array_equal(plane, again):
            raise ValueError(
                f"{one.path} and {last.path.name} lie at one position, but differ; a series has one slice a position"
            )
        copies[one.path.name] = f"a copy of {last.path.name}"
    return kept, copies


def _planes(slices: Sequence[Slice]) -> Iterator[np.ndarray]:
    """The stored pixels (rows, columns) of each slice. Raises ValueError that names a damaged file."""
    from pydicom.pixels import pixel_array

    path: Path | None = None
    dataset: Any = None
    for one in slices:
        if one.path != path:
            path, dataset = one.path, read_file(one.path)
        with naming(one.path):
            plane: np.ndarray = pixel_array(dataset, index=one.frame)
            if plane.shape != one.shape:
                raise ValueError(f"{one.path} is truncated or damaged: its pixels are {plane.shape}")
        yield plane


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
