"""What a prediction is asked for: which scans there are, and where the mask of each goes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

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
    """(scan, mask) pairs, and whether the input `source` is a folder of scans.

    Raises ValueError where there is no scan, where a mask exists, and where one would replace a scan, another mask or
    what is `also_read`."""
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    refuse_input(output, [source, *also_read])
    scans = scans_in(source) if source.is_dir() else []
    if scans:
        if output.name.lower().endswith((*NIFTI, DICOM)) or output.is_file():
            number = "1 scan" if len(scans) == 1 else f"{len(scans)} scans"
            raise ValueError(f"{source} is a folder of {number}, so --output must be a folder")
        refuse_format(output)
        named = sorted(p for p in source.iterdir() if not p.name.startswith("."))
        if others := [p for p in named if p.name.lower().endswith(OTHER_IMAGES)]:
            warnings.warn(
                f"{others[0]} and all else in {source} that is no .nii.gz or .nii is not read; convert it",
                stacklevel=2,
            )
        return masks_of(scans, output), True
    mask = output
    if mask.suffix == DICOM and not source.is_dir():
        raise ValueError(f"{mask} would be a DICOM segmentation, but {source} is no folder of a DICOM series")
    if not is_nifti(mask) and mask.suffix != DICOM:
        refuse_format(mask)
        mask = mask / f"{case_id(source)}.nii.gz"
    refuse_input(mask, [source, *also_read])
    if source.is_dir() and (mask.suffix != DICOM or mask.exists()):
        refuse_input(mask.parent, [source])  # the next prediction would take a NIfTI mask for the scan
    if mask.exists() and not overwrite:
        raise ValueError(f"{mask} exists; --overwrite replaces it")
    return [(source, mask)], False


def refuse_format(folder: Path) -> None:
    """Raise ValueError where the new folder `folder` has a name that asks for a file of a format we do not write."""
    if not folder.is_dir() and folder.name.lower().endswith(OTHER_FILES):
        raise ValueError(
            f"--output {folder} ends in {folder.suffix}, but a mask is written as .nii.gz, .nii or, for a DICOM "
            "series, .dcm; make the folder first if it is to be one"
        )


def prompt_file(labels: Path, scan: Path, case: str = "") -> Path:
    """The label of `scan`: `labels` itself, or the file with the name of the case or of the scan in that folder."""
    if not labels.is_dir():
        return labels
    if case and (same := labels / f"{case}.nii.gz").exists():
        return same
    found = by_case(scans_in(labels)).get(case_id(scan))
    if found is None:
        raise ValueError(f"{labels} has no label {case_id(scan)}.nii.gz to draw the prompts of {scan} from")
    return found


def beside(mask: Path, ending: str) -> Path:
    """The file of the same case with another ending."""
    return mask.with_name(case_name(mask) + ending)


def kept_labels(wanted: str | None, labels: dict[int, str]) -> dict[int, str]:
    """The labels by value that the comma-separated `wanted` names; all of them for None."""
    if wanted is None:
        return labels
    import difflib

    values = {name: value for value, name in labels.items()}
    kept = {}
    for name in (part.strip() for part in wanted.split(",")):
        if name not in values:
            close = difflib.get_close_matches(name, values, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"the model has no label {name!r}{hint} It has {', '.join(values)}")
        kept[values[name]] = name
    return kept
