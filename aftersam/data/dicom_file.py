"""One DICOM file: whether it is a CT image, the slices it holds, and their attributes and pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aftersam.errors import counted, naming

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


def why_no_slice(path: Path, header: Any) -> str | None:
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


def slices_of(path: Path, header: Any) -> Iterator[Slice]:
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
                f"{path} has {counted(frames, 'frame')}, but PerFrameFunctionalGroupsSequence places {len(groups)}"
            )
        shared = _items(header, "SharedFunctionalGroupsSequence")
        for frame, group in enumerate(groups):
            yield _slice(path, header, frame, [group, *shared[:1], header])


def stored_pixels(slices: Sequence[Slice]) -> Iterator[np.ndarray]:
    """The stored pixels (rows, columns) of each slice. Raises ValueError that names a damaged file."""
    from pydicom.pixels import pixel_array

    path: Path | None = None
    dataset: Any = None
    for one in slices:
        if one.path != path:
            path, dataset = one.path, read_file(one.path)
        if dataset is None:
            raise ValueError(f"{path} has changed while its series was read")
        with naming(one.path):
            _check_stream(dataset, one)
            plane: np.ndarray = pixel_array(dataset, index=one.frame)
            if plane.shape != one.shape:
                raise ValueError(f"{one.path} is truncated or damaged: its pixels are {plane.shape}")
        yield plane


def text_of(path: Path, header: Any, name: str) -> str:
    """The value of an attribute that holds one text or UID. Raises ValueError where it is missing or empty."""
    with naming(path):
        if value := str(header.get(name) or ""):
            return value
        raise ValueError(f"{path} has no {name}, which a slice of a CT series needs")


def _check_pixels(path: Path, header: Any) -> None:
    """Raises ValueError on colour, and on compression that no installed decoder reads."""
    from pydicom.pixels import get_decoder

    colours = text_of(path, header, "PhotometricInterpretation")
    samples = int(_numbers(path, [header], "SamplesPerPixel", 1)[0])
    if samples != 1 or not colours.startswith("MONOCHROME"):
        each = counted(samples, "sample")
        raise ValueError(f"{path} is a colour image ({colours}, {each} a pixel), not a CT slice")
    if "ModalityLUTSequence" in header:
        raise ValueError(f"{path} has a ModalityLUTSequence; RescaleSlope and RescaleIntercept are needed")
    syntax = _syntax(header)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ValueError(
            f"{path} has the transfer syntax {syntax.name}, which pydicom cannot decode"
        ) from None
    if not decoder.is_available:
        raise ValueError(
            f"{path} is compressed as {syntax.name}; reading it needs python-gdcm or pylibjpeg: {INSTALL}"
        )


def _syntax(dataset: Any) -> Any:
    """The transfer syntax as pydicom's UID, of whatever type a damaged file has it."""
    from pydicom.uid import UID

    return UID(str(dataset.file_meta.TransferSyntaxUID))


def _slice(path: Path, header: Any, frame: int, holders: Sequence[Any]) -> Slice:
    """The slice whose attributes stand in the first of `holders` that has them."""
    kind = str(_found(holders, "RescaleType") or "")
    if kind.upper() in NOT_HU:
        raise ValueError(f"{path} has the RescaleType {kind}; the type HU is needed")
    scale, names = [1.0, 0.0], ("RescaleSlope", "RescaleIntercept")
    if any(_found(holders, name) is not None for name in names):  # one alone, or an empty one, is a mistake
        scale = [float(_numbers(path, holders, name, 1)[0]) for name in names]
    if scale[0] == 0:
        raise ValueError(f"{path} has the RescaleSlope 0; a slope other than 0 is needed")
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
    needs = counted(count, "number is", "numbers are")
    has = (
        f"no {name}"
        if value is None
        else f"an empty {name}"
        if str(value) in ("", "[]")
        else f"{name} {value}"
    )
    raise ValueError(f"{path} has {has}; {needs} needed")


def _check_stream(dataset: Any, one: Slice) -> None:
    """Raises ValueError on a JPEG stream without its end, which some decoders fill up in silence."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    syntax = _syntax(dataset)
    if not syntax.is_encapsulated or syntax == RLELossless or "PixelData" not in dataset:
        return
    frames = int(dataset.get("NumberOfFrames") or 1)
    stream = get_frame(dataset.PixelData, one.frame, number_of_frames=frames)
    if not stream.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError(f"{one.path} is truncated or damaged: its compressed pixels have no end")
