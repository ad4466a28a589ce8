"""A DICOM segmentation of the series that a scan came from. Needs the extra `dicom`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from aftersam.data.dicom import find_series
from aftersam.data.dicom_file import INSTALL, Slice, text_of
from aftersam.errors import naming

LONGEST_NAME = 64  # characters of the value representation LO, DICOM PS3.5 6.2
MAY_BE_EMPTY = {  # type 2 attributes of patient and study, which anonymised files often lack
    "PatientID": "LO",
    "PatientName": "PN",
    "PatientBirthDate": "DA",
    "PatientSex": "CS",
    "AccessionNumber": "SH",
    "StudyID": "SH",
    "StudyDate": "DA",
    "StudyTime": "TM",
    "ReferringPhysicianName": "PN",
}


def check_segmentation(folder: Path, names: dict[int, str]) -> None:
    """Raises ValueError where `write_segmentation` could not write `names` for the series in `folder`.

    A segmentation with one voxel an organ is made in memory and dropped: what highdicom refuses is known before
    anything is computed."""
    for name in names.values():
        if not name.strip() or len(name) > LONGEST_NAME or "\\" in name or not name.isprintable():
            raise ValueError(
                f"the organ {name!r} cannot be a DICOM segment: its name must have 1 to {LONGEST_NAME} characters "
                "and no backslash; leave it out with --labels, or name a .nii.gz"
            )
    slices = find_series(folder).slices
    labels = np.zeros((len(slices), *slices[0].shape), np.uint16)
    labels.reshape(-1)[: len(names)] = sorted(names)[: labels.size]
    with naming(folder, "can have no DICOM segmentation"):
        _segmentation(slices, labels, names).save_as(io.BytesIO())


def write_segmentation(path: Path, labels: np.ndarray, folder: Path, names: dict[int, str]) -> None:
    """Write labels (x, y, z), in the voxel order of `read_series(folder)`, as a DICOM segmentation of that series.

    One binary segment an organ that has voxels, under its name. Raises ValueError where highdicom is not installed,
    the series has gone or changed, or no organ was found: the standard has no empty segmentation."""
    slices = find_series(folder).slices
    labels = labels.T  # (z, y, x): one frame a slice, rows y
    if labels.shape != (len(slices), *slices[0].shape):
        raise ValueError(
            f"{folder} has changed: its slices no longer have the shape of the scan that was read"
        )
    found = {int(value) for plane in labels for value in np.unique(plane)}
    if not found & set(names):
        raise ValueError(f"{folder}: no organ was found, and DICOM has no empty segmentation")
    with naming(folder, "can have no DICOM segmentation"):
        segmentation = _segmentation(slices, labels, {v: n for v, n in names.items() if v in found})
    segmentation.save_as(path)


def _segmentation(slices: list[Slice], labels: np.ndarray, names: dict[int, str]) -> Any:
    """highdicom's Segmentation of labels (z, y, x) on `slices`, with a segment for each of `names`, by value."""
    try:
        import highdicom as hd
        from pydicom.sr.codedict import codes
    except ImportError:
        raise ValueError(f"a DICOM segmentation needs highdicom: {INSTALL}; or name a .nii.gz") from None
    from aftersam import __version__

    values = sorted(names)
    numbers = np.zeros(max(int(labels.max()), *values) + 1, np.uint8 if len(values) < 256 else np.uint16)
    numbers[values] = np.arange(1, len(values) + 1)
    sources = _sources(slices)
    if len(sources) == 1 and len(slices) > 1:  # highdicom wants the frames in the order of the file
        labels = labels[np.argsort([s.frame for s in slices])]
    algorithm = hd.AlgorithmIdentificationSequence(
        name="AFTer-SAM", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    return hd.seg.Segmentation(
        source_images=sources,
        pixel_array=numbers[labels],
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=names[value],
                segmented_property_category=codes.SCT.AnatomicalStructure,
                segmented_property_type=codes.SCT.Organ,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
            for number, value in enumerate(values, start=1)
        ],
        series_instance_uid=hd.UID(),
        series_number=100,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="AFTer-SAM",
        manufacturer_model_name="AFTer-SAM",
        software_versions=__version__,
        device_serial_number="0",
    )


def _sources(slices: list[Slice]) -> list[Any]:
    """The headers of the series' files with what highdicom asks of them: one direction, thickness, empty type 2."""
    from pydicom.dataset import Dataset
    from pydicom.valuerep import DSfloat

    first = slices[0]
    step_mm = float(np.linalg.norm(slices[-1].position - first.position)) / max(len(slices) - 1, 1)
    measures, direction = Dataset(), Dataset()
    measures.PixelSpacing = [DSfloat(float(v), auto_format=True) for v in first.spacing_mm]
    measures.SliceThickness = DSfloat(first.thickness_mm or step_mm, auto_format=True)
    direction.ImageOrientationPatient = [
        DSfloat(float(v), auto_format=True) for v in first.orientation.ravel()
    ]
    headers = {s.path: s.header for s in slices}
    known = dict[str, Path]()
    for path, header in headers.items():
        for name in ("SOPClassUID", "StudyInstanceUID", "FrameOfReferenceUID"):
            text_of(path, header, name)
        if (other := known.setdefault(text_of(path, header, "SOPInstanceUID"), path)) != path:
            raise ValueError(
                f"{path} and {other.name} have one SOPInstanceUID, so a segmentation cannot tell them apart"
            )
        if "PerFrameFunctionalGroupsSequence" in header:
            shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
            shared[0].PixelMeasuresSequence, shared[0].PlaneOrientationSequence = [measures], [direction]
            header.SharedFunctionalGroupsSequence = shared
        else:
            header.update(measures)
            header.update(direction)
    first.header.SpecificCharacterSet = (
        "ISO_IR 192"  # UTF-8: the segmentation takes it over, for names in any script
    )
    for name, kind in MAY_BE_EMPTY.items():
        if not _valid(first.header.get(name), name, kind):
            setattr(first.header, name, None)
    return list(headers.values())


def _valid(value: Any, name: str, kind: str) -> bool:
    """Whether a patient's or study's attribute may be copied into a segmentation as it is."""
    from pydicom import config
    from pydicom.valuerep import validate_value

    if name == "PatientSex":
        return value in ("M", "F", "O")
    try:
        validate_value(kind, value, config.RAISE)
    except (TypeError, ValueError):
        return False
    return value is not None
