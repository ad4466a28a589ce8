"""Pairs of scan and mask file for a prediction on local files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from aftersam.errors import counted
from aftersam.files import (
    DICOM,
    NIFTI,
    OTHER_IMAGES,
    by_case,
    case_id,
    case_name,
    is_nifti,
    masks_of,
    refuse_input,
    scans_in,
)

OTHER_FILES = (
    *OTHER_IMAGES,
    *(".gz", ".h5", ".hdr", ".jp2", ".jpg", ".json", ".npy", ".npz", ".png", ".stl", ".tif", ".tiff"),
)


def jobs_of(
    source: Path, output: Path, *, also_read: Sequence[Path] = (), overwrite: bool = False
) -> tuple[list[tuple[Path, Path]], bool]:
    """([(scan, mask), ...], whether `source` is a folder of scans).

    Raises ValueError where there is no scan, where the mask of a single scan exists, and where a mask would replace a
    scan, another mask or a file in `also_read`."""
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    refuse_input(output, [source, *also_read])
    scans = scans_in(source) if source.is_dir() else []
    if scans:
        if output.name.lower().endswith((*NIFTI, DICOM)) or output.is_file():
            raise ValueError(
                f"{source} is a folder of {counted(len(scans), 'scan')}, so --output must be a folder"
            )
        refuse_format(output)
        named = sorted(p for p in source.iterdir() if not p.name.startswith("."))
        if others := [p for p in named if p.name.lower().endswith(OTHER_IMAGES)]:
            warnings.warn(
                f"{others[0]} is not read, nor is any other file in {source} that is not .nii.gz or .nii; "
                "convert them to NIfTI",
                stacklevel=2,
            )
        return masks_of(scans, output), True
    mask = output
    if mask.suffix == DICOM and not source.is_dir():
        raise ValueError(
            f"{mask} would be a DICOM segmentation, but {source} is not a folder of a DICOM series"
        )
    if not is_nifti(mask) and mask.suffix != DICOM:
        refuse_format(mask)
        mask = mask / f"{case_id(source)}.nii.gz"
    refuse_input(mask, [source, *also_read])
    if source.is_dir() and (mask.suffix != DICOM or mask.exists()):
        refuse_input(mask.parent, [source])  # a mask beside the scan would be read as a scan the next time
    if mask.exists() and not overwrite:
        raise ValueError(f"{mask} exists; --overwrite replaces it")
    return [(source, mask)], False


def refuse_format(folder: Path) -> None:
    """Raise ValueError where the name of the new folder `folder` has the ending of a file format."""
    if not folder.is_dir() and folder.name.lower().endswith(OTHER_FILES):
        raise ValueError(
            f"--output {folder} ends in {folder.suffix}, but a mask is written as .nii.gz, .nii or, for a DICOM "
            "series, .dcm; if it is meant to be a folder, create it first"
        )


def prompt_file(labels: Path, scan: Path, case: str = "") -> Path:
    """The label file of `scan`: `labels` itself, or the file in that folder named like the case or the scan."""
    if not labels.is_dir():
        return labels
    if case and (same := labels / f"{case}.nii.gz").exists():
        return same
    found = by_case(scans_in(labels)).get(case_id(scan))
    if found is None:
        raise ValueError(f"{labels} has no label {case_id(scan)}.nii.gz to draw the prompts of {scan} from")
    return found


def beside(mask: Path, ending: str) -> Path:
    """The file beside `mask` of the same case with another ending."""
    return mask.with_name(case_name(mask) + ending)


def kept_labels(wanted: str | None, labels: dict[int, str]) -> dict[int, str]:
    """{value: name} of the labels in the comma-separated `wanted`; all labels for None.

    Raises ValueError on a name that the model does not have."""
    if wanted is None:
        return labels
    import difflib

    values = {name: value for value, name in labels.items()}
    kept = {}
    for name in (part.strip() for part in wanted.split(",")):
        if name not in values:
            close = difflib.get_close_matches(name, values, n=1)
            hint = f"did you mean {close[0]!r}? It has" if close else "it has"
            raise ValueError(f"the model has no label {name!r}; {hint} {', '.join(values)}")
        kept[values[name]] = name
    return kept
