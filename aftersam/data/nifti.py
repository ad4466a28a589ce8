"""NIfTI files opened for reading: the header is checked before memory is taken, and gzip's checksum is verified."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aftersam.errors import naming
from aftersam.files import is_nifti

if TYPE_CHECKING:
    import nibabel as nib

MM = {1: 1e3, 3: 1e-3}  # of a metre and a micrometre, NIfTI's codes; all others are read as mm
GZIP_RATIO = 1032  # no gzip stream expands further
QUATERNION = ("quatern_b", "quatern_c", "quatern_d")
_SILENT = logging.Logger("nibabel", logging.CRITICAL + 1)  # it reports each header that it mends


@contextlib.contextmanager
def opened(path: Path, *, whole: bool = True, told: bool = True) -> Iterator[nib.Nifti1Image]:
    """The file's image with its voxels still on disk; errors in the block name the file.

    `whole` says that the block reads all voxels, so that a gzip file's checksum is verified at its end. `told` warns
    which of two transforms is used where they disagree. Raises ValueError on anything but a readable 3D volume."""
    import nibabel as nib

    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is not a file")
    if not is_nifti(path):
        raise ValueError(f"{path} is not a NIfTI file (.nii or .nii.gz)")
    with naming(path), nib.openers.ImageOpener(str(path), "rb") as file:
        header = _read_header(file, path)
        with np.errstate(all="ignore"):  # what is no grid is refused where the image is used
            _settle_transforms(header, str(path), told=told)
            kind: Any = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
            voxels = nib.arrayproxy.ArrayProxy(file, header)
            header["vox_offset"] = header.single_vox_offset  # of what is written with this header
            affine = header.get_best_affine()
            if not np.isfinite(affine).all():
                raise ValueError(f"{path} has an affine with NaN or infinite entries")
            image = kind(voxels, affine, header)
        yield image
        if whole and path.name.lower().endswith(".gz"):
            while file.read(1 << 20):
                pass


def check_shape(shape: tuple[int, ...], name: str) -> None:
    """Raise ValueError unless `shape` is that of one volume."""
    sizes = " × ".join(map(str, shape))
    if len(shape) < 3:
        raise ValueError(f"{name} is {len(shape)}D ({sizes}); a volume needs three axes")
    if any(n != 1 for n in shape[3:]):
        raise ValueError(f"{name} is {len(shape)}D ({sizes}); give a file of one volume")
    if min(shape) < 1:
        raise ValueError(f"{name} has no voxels ({sizes})")


def check_spacing(spacing: Any, name: str) -> None:
    """Raise ValueError unless every voxel size is a number above 0."""
    if not all(np.isfinite(s) and s > 0 for s in np.abs(spacing)):
        found = " × ".join(f"{float(s):g}" for s in spacing)
        raise ValueError(f"{name} has a voxel spacing of {found} mm; every one must be above 0")


@np.errstate(all="ignore")
def is_grid(affine: np.ndarray) -> bool:
    """Whether affine (4, 4) is finite and its three axes point in three directions."""
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(columns)) >= 1e-3)


def corners(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """(8, 3) positions of the outermost voxels of a grid, in the affine's unit."""
    ends = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in shape[:3]), 1]
    return np.asarray((ends @ affine.T)[:, :3])


def mm_per_unit(header: nib.Nifti1Header) -> float:
    """Millimetres per unit of length of a header."""
    return MM.get(int(header["xyzt_units"]) & 7, 1.0)


def _read_header(file: Any, path: Path) -> nib.Nifti1Header:
    """The header at the start of `file`. A spacing of zero is refused; nibabel would silently replace it."""
    import nibabel as nib

    size = file.read(4)
    versions = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    kinds = [versions.get(int.from_bytes(size, order)) for order in ("little", "big")]
    kind: Any = kinds[0] or kinds[1]
    if kind is None:
        raise ValueError(f"{path} is not a NIfTI file: its header does not start like one")
    header: nib.Nifti1Header = kind(size + file.read(kind.template_dtype.itemsize - len(size)), check=False)
    if not header["magic"].item().startswith(b"n+"):
        raise ValueError(f"{path} is not one whole NIfTI file; convert a .hdr and .img pair to .nii.gz")
    shape = header.get_data_shape()
    check_shape(shape, str(path))
    check_spacing(header["pixdim"][1:4], str(path))
    header.check_fix(logger=_SILENT)
    needed = header.get_data_offset() + math.prod(shape) * header.get_data_dtype().itemsize
    ratio = GZIP_RATIO if path.name.lower().endswith(".gz") else 1
    if needed > (there := os.path.getsize(path)) * ratio:
        raise ValueError(f"{path} is truncated: its header promises {needed} bytes, the file has {there}")
    return header


def _settle_transforms(header: nib.Nifti1Header, name: str, *, told: bool) -> None:
    """Change a header so that `get_best_affine` gives the transform to use."""
    turn = np.array([header[key] for key in QUATERNION], float)
    if 1 < (norm := float(np.linalg.norm(turn))) < 1.01:  # rounded when it was written
        for key, value in zip(QUATERNION, turn / norm, strict=True):
            header[key] = value * (1 - 1e-7)
    sform, qform = header.get_sform() if header["sform_code"] > 0 else None, None
    if header["qform_code"] > 0:
        with contextlib.suppress(ValueError):  # of a quaternion that turns nothing
            qform = header.get_qform()
    said = None
    if sform is None and qform is None:
        said = "has neither sform nor qform; its axes are taken to point left, to the front and up"
    elif sform is not None and qform is not None and is_grid(qform):
        shape = header.get_data_shape()
        if not is_grid(sform):
            header["sform_code"] = 0
            said = "has an sform that is no grid; its qform is used"
        elif (off := _apart(shape, sform, qform)) > 0.5 * np.linalg.norm(sform[:3, :3], axis=0).min():
            said = f"has an sform and a qform that differ by up to {off:.3g} mm; the sform is used"
    if said and told:
        warnings.warn(f"{name} {said}", stacklevel=4)


def _apart(shape: tuple[int, ...], one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(corners(shape, one) - corners(shape, other), axis=1).max())
