"""CT volumes and label maps between disk and memory: the only file that knows axis order.

In memory axes are (d, h, w): d rises towards the head, h towards the back, w towards the patient's left. Axes
are flipped and permuted to get there, never resampled, so an oblique scan stays oblique and a mask leaves on
the very grid that its scan came with. World coordinates are NIfTI's: mm, RAS."""

from __future__ import annotations

import contextlib
import gzip
import json
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aftersam.files import case_name, is_nifti, renamed, reserve, write_json

if TYPE_CHECKING:
    import nibabel as nib

AIR_HU = -1000
CANONICAL = ("S", "P", "L")  # where the indices d, h and w of an array rise to
LARGEST_LABEL = 32767  # that a mask holds, in int16
SAME_GRID = 0.1  # of a voxel: how far a label's corners may lie from its image's


class Grid(NamedTuple):
    """What a file's grid was, so that a mask can be given back on it."""

    header: nib.Nifti1Header
    affine: np.ndarray  # (4, 4) voxel (x, y, z) of the file -> mm
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


def read_image(path: Path | str) -> Volume:
    """Read a NIfTI file, or a folder that holds one DICOM series, as Hounsfield units in int16 or float32.

    NaN and infinite voxels become air, counted in a warning. Raises ValueError on a file that is missing,
    truncated or not NIfTI, on 2D or true 4D data, and on a spacing or an affine that is no grid."""
    path = Path(path)
    if path.is_dir():
        from aftersam.data.dicom import read_series

        return from_nifti(read_series(path), name=str(path))
    with _reading(path):
        return from_nifti(_open(path), name=str(path))


def read_labels(path: Path | str, like: Volume | None = None) -> Volume:
    """Read a label map as uint8, or int16 where it has values above 255.

    With `like`, the label must lie on that volume's grid; its voxel order may differ.
    Raises ValueError like `read_image`, on values that are not integers from 0 up, and on another grid."""
    path = Path(path)
    with _reading(path):
        return labels_from_nifti(_open(path), like, name=str(path))


def labels_from_nifti(
    image: nib.spatialimages.SpatialImage, like: Volume | None = None, *, name: str | None = None
) -> Volume:
    """The label map of a nibabel image, as `read_labels` gives it; `name` is what errors call it."""
    name = name or image.get_filename() or "the label image"
    _check_shape(image.shape, name)
    raw, slope, inter = _stored(image)
    if raw.dtype.kind == "f" or (slope, inter) != (1.0, 0.0):
        values = raw.astype(np.float64) * slope + inter
        with np.errstate(invalid="ignore"):
            whole = np.where(np.isfinite(values), np.rint(values), 0)
        if not np.array_equal(whole, values):
            bad = float(values[values != whole][0])
            raise ValueError(f"{name} has the value {bad:g}; labels must be integers")
        raw = whole.astype(np.int64)
    low, high = (int(raw.min()), int(raw.max())) if raw.size else (0, 0)
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
    _check_shape(image.shape, name)
    raw, slope, inter = _stored(image)
    return _canonical(_hounsfield(raw, slope, inter, name), image, name)


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
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind(array, like.grid.affine, header)


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
    with _reading(path):
        image = _open(path)
    empty = np.broadcast_to(np.uint8(0), image.shape)
    volume = _canonical(empty, image, str(path))
    d, h, w = volume.array.shape
    return (d, h, w), volume.spacing_mm


def _open(path: Path) -> nib.Nifti1Image:
    """A NIfTI file with its voxels still on disk. nibabel mends a spacing of zero as it loads, we refuse it."""
    import nibabel as nib

    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not is_nifti(path):
        raise ValueError(f"{path} is not a NIfTI file (.nii or .nii.gz)")
    with nib.openers.ImageOpener(str(path), "rb") as file:
        size = file.read(4)
        file.seek(0)
        versions = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
        kinds = [versions.get(int.from_bytes(size, order)) for order in ("little", "big")]
        kind = kinds[0] or kinds[1]
        if kind is None:
            raise ValueError(f"{path} is not a NIfTI file: its header does not start like one")
        header = kind.from_fileobj(file, check=False)
    shape = header.get_data_shape()
    _check_shape(shape, str(path))
    _check_spacing(header["pixdim"][1:4], str(path))
    image: Any = nib.load(path)
    return image


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what nibabel, gzip and the operating system raise on a bad file into one sentence that names it."""
    import nibabel as nib

    try:
        yield
    except (gzip.BadGzipFile, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError) as error:
        raise ValueError(f"{path} is not a readable NIfTI file: {_first_line(error)}") from error
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged: {_first_line(error)}") from error
    except PermissionError as error:
        raise ValueError(f"{path} may not be read: {error.strerror}") from error
    except (OSError, MemoryError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is truncated or damaged: {_first_line(error)}") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is truncated or damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    sizes = " × ".join(map(str, shape))
    if len(shape) < 3:
        raise ValueError(f"{name} is {len(shape)}D ({sizes}); a volume needs three axes")
    if any(n != 1 for n in shape[3:]):
        raise ValueError(f"{name} is {len(shape)}D ({sizes}); only one volume a file can be used")
    if 0 in shape:
        raise ValueError(f"{name} has no voxels ({sizes})")


def _check_spacing(spacing: Any, name: str) -> None:
    if not all(np.isfinite(s) and s > 0 for s in np.abs(spacing)):
        found = " × ".join(f"{float(s):g}" for s in spacing)
        raise ValueError(f"{name} has a voxel spacing of {found} mm; every one must be above 0")


def _check_same_grid(labels: Volume, image: Volume) -> None:
    if labels.array.shape != image.array.shape:
        shapes = [" × ".join(map(str, v.grid.shape)) for v in (labels, image)]
        raise ValueError(f"{labels.name} has {shapes[0]} voxels, but its image {image.name} has {shapes[1]}")
    corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in image.array.shape), 1]
    off = np.linalg.norm((corners @ (labels.affine - image.affine).T)[:, :3], axis=1).max()
    if off > SAME_GRID * min(image.spacing_mm):
        raise ValueError(
            f"{labels.name} lies up to {off:.2f} mm off the grid of its image {image.name}; "
            f"both need the same affine, so resample one of them"
        )


def _stored(image: nib.spatialimages.SpatialImage) -> tuple[np.ndarray, float, float]:
    """Voxels as stored, (x, y, z), in native byte order, with the slope and intercept still to be applied."""
    import nibabel as nib

    if nib.is_proxy(image.dataobj):
        proxy: Any = image.dataobj
        raw, slope, inter = proxy.get_unscaled(), float(proxy.slope), float(proxy.inter)
    else:
        raw, slope, inter = np.asarray(image.dataobj), 1.0, 0.0
    if raw.dtype.kind not in "iufb":
        name = image.get_filename() or "the image"
        raise ValueError(f"{name} stores {raw.dtype} voxels, but integers or floats are needed")
    raw = raw.reshape(raw.shape[:3])
    return raw.astype(raw.dtype.newbyteorder("="), copy=False), slope, inter


def _hounsfield(raw: np.ndarray, slope: float, inter: float, name: str) -> np.ndarray:
    """Scaled voxels: int16 where they are integers, else float32, air in place of what is no number."""
    if raw.dtype == np.int16 and (slope, inter) == (1.0, 0.0):
        return raw  # maybe a memory map: a huge scan is read where it is used
    integral = raw.dtype.kind in "iub" and slope.is_integer() and inter.is_integer()
    out = np.empty_like(raw, dtype=np.int16 if integral else np.float32, subok=False)
    limits = np.iinfo(np.int16)
    bad = 0
    for z in range(raw.shape[2]):  # one plane at a time: float64 for a plane, not for the scan
        plane = raw[..., z].astype(np.float64) * slope + inter
        if integral:
            plane = np.clip(plane, limits.min, limits.max)
        else:
            wrong = ~np.isfinite(plane)
            bad += int(wrong.sum())
            plane[wrong] = AIR_HU
        out[..., z] = plane
    if bad:
        what = "1 voxel that is" if bad == 1 else f"{bad} voxels that are"
        warnings.warn(f"{name} has {what} NaN or infinite, set to air ({AIR_HU} HU)", stacklevel=4)
    return out


def _canonical_orientation() -> np.ndarray:
    import nibabel as nib

    orientation: np.ndarray = nib.orientations.axcodes2ornt(CANONICAL)
    return orientation


def _canonical(array: np.ndarray, image: nib.spatialimages.SpatialImage, name: str) -> Volume:
    """(x, y, z) voxels of `image` as a Volume: axes permuted and flipped, affine to match."""
    import nibabel as nib

    if not isinstance(image.header, nib.Nifti1Header):  # another format in memory: its affine is what counts
        image = nib.Nifti1Image.from_image(image)
    affine = image.affine
    if affine is None or not np.isfinite(affine).all():
        raise ValueError(f"{name} has an affine with NaN or infinite entries")
    columns = affine[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    _check_spacing(spacing, name)
    if abs(np.linalg.det(columns / spacing)) < 1e-3:
        raise ValueError(f"{name} has a singular affine: two of its axes point the same way")
    array = array.reshape(array.shape[:3])
    orientation = nib.io_orientation(affine)
    change = nib.orientations.ornt_transform(orientation, _canonical_orientation())
    canonical = affine @ nib.orientations.inv_ornt_aff(change, array.shape)
    array = nib.orientations.apply_orientation(array, change)
    grid = Grid(image.header, affine, image.shape, orientation)  # type: ignore[arg-type]  # see above
    return Volume(array, canonical, grid, name)


def label_names_json(names: dict[int, str]) -> dict[str, dict[str, int]]:
    """What a mask's JSON says of its labels."""
    return {"labels": {"background": 0, **{name: value for value, name in sorted(names.items())}}}
