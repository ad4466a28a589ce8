"""A folder with one DICOM CT series in, a DICOM segmentation of it out. Needs the extra `dicom`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import nibabel as nib

UNEVEN_MM = 0.01  # by which distances between slices may differ
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_series(folder: Path) -> nib.Nifti1Image:
    """The series in `folder` in HU, slices sorted along their normal, with its affine in RAS mm.

    Source: DICOM PS3.3 C.7.6.2.1.1. Raises ValueError where there is no series or more than one, where slices are
    missing or differ in size or direction, and where pydicom is not installed."""
    import nibabel as nib

    slices, step = _sorted_slices(folder)
    first = slices[0]
    along_row, along_column = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    row_mm, column_mm = (float(v) for v in first.PixelSpacing)  # between rows, between columns
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_mm
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = step
    affine[:3, 3] = first.ImagePositionPatient
    planes = [
        s.pixel_array.T * float(s.get("RescaleSlope", 1)) + float(s.get("RescaleIntercept", 0))
        for s in slices
    ]
    array = np.stack(planes, axis=-1)  # (x, y, z)
    whole = np.array_equal(array, np.rint(array)) and np.abs(array).max() < 2**15
    image = nib.Nifti1Image(array.astype(np.int16 if whole else np.float32), LPS_TO_RAS @ affine)
    image.header.set_xyzt_units("mm")
    return image


def write_segmentation(path: Path, labels: np.ndarray, folder: Path, names: dict[int, str]) -> None:
    """Write labels (x, y, z), in the voxel order of `read_series(folder)`, as a DICOM segmentation of that series.

    One binary segment an organ that has voxels, under its name. Raises ValueError where highdicom is not installed,
    the series has gone or changed, or no organ was found: the standard has no empty segmentation."""
    try:
        import highdicom as hd
        from pydicom.sr.codedict import codes
    except ImportError:
        raise ValueError(
            "a DICOM segmentation needs highdicom: pip install 'aftersam[dicom]'; or name a .nii.gz"
        ) from None
    from aftersam import __version__

    slices, _ = _sorted_slices(folder)
    frames = np.ascontiguousarray(labels.T)  # (z, y, x): one frame a slice, rows y
    found = [value for value in sorted(names) if (frames == value).any()]
    if not found:
        raise ValueError(f"{folder}: no organ was found, and DICOM has no empty segmentation")
    algorithm = hd.AlgorithmIdentificationSequence(
        name="AFTer-SAM", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    numbered = np.zeros_like(frames)  # segments are numbered from 1 without gaps
    descriptions = []
    for number, value in enumerate(found, start=1):
        numbered[frames == value] = number
        descriptions.append(
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=names[value],
                segmented_property_category=codes.SCT.AnatomicalStructure,
                segmented_property_type=codes.SCT.Organ,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
        )
    segmentation = hd.seg.Segmentation(
        source_images=slices,
        pixel_array=numbered,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=hd.UID(),
        series_number=100,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="AFTer-SAM",
        manufacturer_model_name="AFTer-SAM",
        software_versions=__version__,
        device_serial_number="0",
    )
    segmentation.save_as(path)


def _sorted_slices(folder: Path) -> tuple[list[Any], np.ndarray]:
    """The series' slices along their normal, and the step (3,) in LPS mm between two. Raises as `read_series` does."""
    try:
        import pydicom
    except ImportError:
        raise ValueError(
            f"{folder} is a folder; reading DICOM needs pydicom: pip install 'aftersam[dicom]'"
        ) from None

    slices = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        try:
            slices.append(pydicom.dcmread(path))
        except pydicom.errors.InvalidDicomError:
            continue  # what else lies in such folders: DICOMDIR, notes, pictures
    slices = [s for s in slices if "ImagePositionPatient" in s and "PixelData" in s]
    if not slices:
        raise ValueError(f"{folder} holds no scan: neither NIfTI files nor slices of a DICOM series")
    if len(series := {str(s.SeriesInstanceUID) for s in slices}) > 1:
        raise ValueError(
            f"{folder} holds slices of {len(series)} DICOM series; put each into a folder of its own"
        )
    first = slices[0]
    for other in slices[1:]:
        for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
            if not np.allclose(other[name].value, first[name].value, atol=1e-4):
                raise ValueError(
                    f"{folder} has slices that differ in {name}: {first[name].value}, {other[name].value}"
                )
    along_row, along_column = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    slices.sort(key=lambda s: float(np.dot(normal, np.array(s.ImagePositionPatient, float))))
    positions = np.array([s.ImagePositionPatient for s in slices], float)
    return slices, _step(folder, slices, positions, normal)


def _step(folder: Path, slices: list[Any], positions: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """The vector (3,) in LPS mm from one slice to the next; ValueError where it is not one for all."""
    if len(slices) == 1:
        return normal * float(slices[0].get("SliceThickness") or 1.0)
    steps = np.diff(positions, axis=0)
    distances = steps @ normal
    typical = float(np.median(distances))
    if typical <= UNEVEN_MM:
        raise ValueError(f"{folder} has several slices at one position")
    off = np.flatnonzero(np.abs(distances - typical) > UNEVEN_MM)
    if len(off):
        raise ValueError(
            f"{folder} has a missing or misplaced slice: slices {off[0]} and {off[0] + 1} lie "
            f"{distances[off[0]]:.3g} mm apart, the others {typical:.3g} mm"
        )
    return (positions[-1] - positions[0]) / (len(slices) - 1)
