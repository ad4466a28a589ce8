"""CT volumes and label maps between disk and memory: the only file that knows axis order.

In memory axes are (d, h, w): d rises towards the head, h towards the back, w towards the patient's left. Axes
are flipped and permuted to get there, never resampled, so an oblique scan stays oblique and a mask leaves on
the very grid that its scan came with. World coordinates are NIfTI's: mm, RAS."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aftersam.data.nifti import check_shape, check_spacing, corners, is_grid, mm_per_unit, opened
from aftersam.errors import counted, naming
from aftersam.files import case_name, is_nifti, renamed, reserve, write_json

if TYPE_CHECKING:
    import nibabel as nib

AIR_HU = -1000
CANONICAL = ("S", "P", "L")  # where the indices d, h and w of an array rise to
LARGEST_LABEL = 32767  # that a mask holds, in int16
SAME_GRID = 0.1  # of a voxel: how far a label's corners may lie from its image's
ROUNDED = 1e-3  # how far a label's value may lie from the integer that it is
LONGEST_MM = 3000.0  # of an axis: no scanner's table moves further


class Grid(NamedTuple):
    """What a file's grid was, so that a mask can be given back on it."""

    header: nib.Nifti1Header
    affine: np.ndarray  # (4, 4) voxel (x, y, z) of the file -> the header's unit of length
    shape: tuple[int, ...]  # of the file; a 4D file with one volume keeps its trailing 1
    orientation: np.ndarray  # (3, 2) nibabel orientation of the file's axes


@dataclass(frozen=True)
class Volume:
    """array (D, H, W) in canonical axes, affine (4, 4) from its index (d, h, w) to RAS mm, the file's grid."""

    array: np.ndarray
    affine: np.ndarray
    grid: Grid
    name: str

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size (d, h, w)."""
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return d, h, w


def label_dtype(largest: int) -> type[np.uint8] | type[np.int16]:
    """What labels up to the value `largest` are held and written in."""
    return np.uint8 if largest < 256 else np.int16


def read_image(path: Path | str, *, series: str | None = None) -> Volume:
    """Read a NIfTI file, or a folder that holds one DICOM series, as Hounsfield units in int16 or float32.

    `series` is the SeriesInstanceUID of one of several series in the folder.

    NaN and infinite voxels become air, counted in a warning. Raises ValueError on a file that is missing,
    truncated or not NIfTI, on 2D or true 4D data, and on a spacing or an affine that is no grid."""
    path = Path(path)
    if path.is_dir():
        from aftersam.data.dicom import read_series

        with naming(path):
            return from_nifti(read_series(path, series), name=str(path))
    with opened(path) as image:
        return from_nifti(image, name=str(path))


def read_labels(path: Path | str, like: Volume | None = None) -> Volume:
    """Read a label map as uint8, or int16 where it has values above 255.

    With `like`, the label must lie on that volume's grid; its voxel order may differ.
    Raises ValueError like `read_image`, on values that are not integers from 0 up, and on another grid."""
    path = Path(path)
    with opened(path, told=False) as image:
        return labels_from_nifti(image, like, name=str(path))


def labels_from_nifti(
    image: nib.spatialimages.SpatialImage, like: Volume | None = None, *, name: str | None = None
) -> Volume:
    """The label map of a nibabel image, as `read_labels` gives it; `name` is what errors call it."""
    name = name or image.get_filename() or "the label image"
    check_shape(image.shape, name)
    raw, slope, inter = _stored(image, name)
    if raw.dtype.kind == "f" or (slope, inter) != (1.0, 0.0):
        with np.errstate(all="ignore"):
            values = raw.astype(np.float64) * slope + inter
            raw = np.rint(values)
            off = ~(np.abs(values - raw) <= ROUNDED)  # NaN and infinite ones too
        if off.any():
            raise ValueError(f"{name} has the value {values[off][0]:g}; labels must be integers")
    low, high = int(raw.min()), int(raw.max())
    if low < 0 or high > LARGEST_LABEL:
        raise ValueError(
            f"{name} has the value {low if low < 0 else high}; labels must lie between 0 and {LARGEST_LABEL}"
        )
    labels = _canonical(raw.astype(label_dtype(high)), image, name)
    if like is not None:
        _check_same_grid(labels, like)
    return labels


def from_nifti(image: nib.spatialimages.SpatialImage, *, name: str | None = None) -> Volume:
    """The Volume of a nibabel image, as `read_image` gives it; `name` is what errors call it."""
    name = name or image.get_filename() or "the image"
    check_shape(image.shape, name)
    raw, slope, inter = _stored(image, name)
    return _canonical(_hounsfield(raw, slope, inter, name), image, name)


def image_of(array: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """A nibabel image of array (x, y, z) of any integer or float type, of which NIfTI has not all."""
    import nibabel as nib

    array = np.asarray(array)
    if array.dtype.kind not in "iufb":
        raise ValueError(f"the array has the type {array.dtype}, but integers or floats are needed")
    if array.dtype.kind in "fb":
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.uint8, copy=False)
    return nib.Nifti1Image(array, affine, dtype=array.dtype)


def to_nifti(labels: np.ndarray, like: Volume, names: dict[int, str] | None = None) -> nib.Nifti1Image:
    """Labels (D, H, W) in `like`'s canonical axes as an image on the grid of the file it came from.

    Its voxels are uint8, or int16 where a label or a value of `names` is above 255. The label names go into a header
    extension as JSON. Raises ValueError on another shape, on values below 0 and on values above 32767."""
    import nibabel as nib

    if labels.shape != like.array.shape:
        raise ValueError(f"labels have the shape {labels.shape}, but {like.name} has {like.array.shape}")
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if low < 0 or high > LARGEST_LABEL:
        found = low if low < 0 else high
        raise ValueError(f"labels for {like.name} have the value {found}; a mask holds 0 to {LARGEST_LABEL}")
    dtype = label_dtype(max(high, *(names or {}), 0))
    back = nib.orientations.ornt_transform(_canonical_orientation(), like.grid.orientation)
    array = (
        nib.orientations.apply_orientation(labels, back).astype(dtype, copy=False).reshape(like.grid.shape)
    )
    header = like.grid.header.copy()
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the scan's display window would hide the labels
    header["descrip"] = b""
    header.extensions.clear()
    if names is not None:
        text = json.dumps(label_names_json(names))
        header.extensions.append(nib.nifti1.Nifti1Extension("comment", text.encode()))
    kind: Any = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image: nib.Nifti1Image = kind(array, like.grid.affine, header)
    return image


def write_labels(
    path: Path | str,
    labels: np.ndarray,
    like: Volume,
    names: dict[int, str] | None = None,
    facts: dict[str, str] | None = None,
) -> None:
    """Write labels (D, H, W) as the NIfTI file `path` on `like`'s grid, and the names and `facts` as JSON beside it.

    Both appear under their names only when complete. Raises ValueError on a name that is not NIfTI's or labels
    of another shape, OSError where the file cannot be written."""
    path = Path(path)
    if not is_nifti(path):
        raise ValueError(f"{path} must end in .nii or .nii.gz to be written")
    image = to_nifti(labels, like, names)
    if names is not None:  # the mask last: where it is, all is there
        write_json(path.with_name(case_name(path) + ".json"), {**label_names_json(names), **(facts or {})})
    with renamed(path) as temporary:
        image.to_filename(temporary)  # gz at nibabel's level 1: 9 takes 18 times as long


def write_confidence(path: Path, confidence: np.ndarray, like: Volume) -> None:
    """Write `confidence` (D, H, W) uint8 as the NIfTI file `path` on `like`'s grid, where it reads as 0 to 1.

    Raises ValueError on another shape, OSError where the file cannot be written."""
    image = to_nifti(confidence, like)
    image.header.set_slope_inter(1 / 255, 0)
    with renamed(path) as temporary:
        image.to_filename(temporary)


@contextlib.contextmanager
def open_probabilities(path: Path, like: Volume, num_classes: int) -> Iterator[np.ndarray]:
    """A float16 array (num_classes, D, H, W) in canonical axes to fill: the file `path`, never whole in memory.

    numpy.load gives (num_classes, x, y, z) in the voxel order of the file that `like` came from. It appears under
    its name only when complete. Raises OSError where it cannot be written."""
    import nibabel as nib

    with renamed(path) as temporary:
        shape = (num_classes, *like.grid.shape[:3])
        array = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.float16, shape=shape, fortran_order=True
        )
        reserve(temporary)
        change = nib.orientations.ornt_transform(like.grid.orientation, _canonical_orientation())
        yield np.moveaxis(nib.orientations.apply_orientation(np.moveaxis(array, 0, -1), change), -1, 0)
        array.flush()


def read_grid(path: Path | str) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Shape (D, H, W) and spacing_mm (d, h, w) of a NIfTI file from its header alone. Raises ValueError."""
    path = Path(path)
    with opened(path, whole=False, told=False) as image:
        volume = _canonical(np.broadcast_to(np.uint8(0), image.shape), image, str(path))
    d, h, w = volume.array.shape
    return (d, h, w), volume.spacing_mm


def _check_same_grid(labels: Volume, image: Volume) -> None:
    if labels.array.shape != image.array.shape:
        shapes = [" × ".join(map(str, v.grid.shape)) for v in (labels, image)]
        raise ValueError(f"{labels.name} has {shapes[0]} voxels, but its image {image.name} has {shapes[1]}")
    shape = image.array.shape
    off = np.linalg.norm(corners(shape, labels.affine) - corners(shape, image.affine), axis=1).max()
    if off > SAME_GRID * min(image.spacing_mm):
        raise ValueError(
            f"{labels.name} lies up to {off:.2f} mm off the grid of its image {image.name}; "
            f"both need the same affine, so resample one of them"
        )


def _stored(image: nib.spatialimages.SpatialImage, name: str) -> tuple[np.ndarray, float, float]:
    """Voxels as stored, (x, y, z), in native byte order, with the slope and intercept still to be applied."""
    import nibabel as nib

    data: Any = image.dataobj
    if data.dtype.kind not in "iufb":
        raise ValueError(f"{name} stores {data.dtype} voxels, but integers or floats are needed")
    if nib.is_proxy(data):
        raw, slope, inter = data.get_unscaled(), float(data.slope), float(data.inter)
    else:
        raw, slope, inter = np.asarray(data), 1.0, 0.0
    raw = raw.reshape(raw.shape[:3])
    return raw.astype(raw.dtype.newbyteorder("="), copy=False), slope, inter


def _hounsfield(raw: np.ndarray, slope: float, inter: float, name: str) -> np.ndarray:
    """Scaled voxels, within int16's range: int16 where they are integers, else float32; air for what is no number."""
    if raw.dtype == np.int16 and (slope, inter) == (1.0, 0.0):
        return raw  # maybe a memory map: a huge scan is read where it is used
    integral = raw.dtype.kind in "iub" and slope.is_integer() and inter.is_integer()
    out = np.empty_like(raw, dtype=np.int16 if integral else np.float32, subok=False)
    limits = np.iinfo(np.int16)
    bad = 0
    for z in range(raw.shape[2]):  # one plane at a time: float64 for a plane, not for the scan
        with np.errstate(all="ignore"):
            plane = raw[..., z].astype(np.float64) * slope + inter
        if not integral:
            wrong = ~np.isfinite(plane)
            bad += int(wrong.sum())
            plane[wrong] = AIR_HU
        out[..., z] = np.clip(plane, limits.min, limits.max)
    if bad:
        what = counted(bad, "voxel that is", "voxels that are")
        warnings.warn(f"{name} has {what} NaN or infinite, set to air ({AIR_HU} HU)", stacklevel=4)
    return out


def _canonical_orientation() -> np.ndarray:
    import nibabel as nib

    orientation: np.ndarray = nib.orientations.axcodes2ornt(CANONICAL)
    return orientation


@np.errstate(over="ignore")  # of an affine that is refused
def _canonical(array: np.ndarray, image: nib.spatialimages.SpatialImage, name: str) -> Volume:
    """(x, y, z) voxels of `image` as a Volume: axes permuted and flipped, affine to match."""
    import nibabel as nib

    if not isinstance(image.header, nib.Nifti1Header):  # another format in memory: its affine is what counts
        image = nib.Nifti1Image.from_image(image)
    if image.affine is None or not np.isfinite(image.affine).all():
        raise ValueError(f"{name} has an affine with NaN or infinite entries")
    affine = np.diag([*[mm_per_unit(image.header)] * 3, 1.0]) @ image.affine  # type: ignore[arg-type]  # nibabel's header has no type
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    check_spacing(spacing, name)
    if not is_grid(affine):
        raise ValueError(f"{name} has a singular affine: two of its axes point the same way")
    if (length := float((spacing * array.shape[:3]).max())) > LONGEST_MM:
        raise ValueError(
            f"{name} is {length / 1000:.3g} m long by its voxel spacing of "
            f"{' × '.join(f'{s:.4g}' for s in spacing)} mm; an axis may have {LONGEST_MM / 1000:g} m"
        )
    array = array.reshape(array.shape[:3])
    orientation = nib.io_orientation(affine)
    change = nib.orientations.ornt_transform(orientation, _canonical_orientation())
    canonical = affine @ nib.orientations.inv_ornt_aff(change, array.shape)
    array = nib.orientations.apply_orientation(array, change)
    grid = Grid(image.header, image.affine, image.shape, orientation)  # type: ignore[arg-type]  # nibabel's header has no type
    return Volume(array, canonical, grid, name)


def label_names_json(names: dict[int, str]) -> dict[str, dict[str, int]]:
    """What a mask's JSON says of its labels."""
    return {"labels": {"background": 0, **{name: value for value, name in sorted(names.items())}}}
