"""Which scan gives which mask, and what the files beside a mask are called."""

from __future__ import annotations

from pathlib import Path

from aftersam.files import NIFTI

DICOM = ".dcm"


def find_jobs(scans: Path, output: Path, *, overwrite: bool) -> tuple[list[tuple[Path, Path]], bool]:
    """(scan, mask) pairs of the file or folder `scans`, and whether it is a folder of scans. Raises ValueError."""
    if not scans.exists():
        raise ValueError(f"{scans} does not exist")
    found = []
    if scans.is_dir():
        found = sorted(p for p in scans.iterdir() if p.name.endswith(NIFTI))
    if found:
        if output.name.endswith((*NIFTI, DICOM)) or output.is_file():
            raise ValueError(f"{scans} is a folder of {len(found)} scans, so --output must be a folder")
        return [(scan, output / f"{case_of(scan)}.nii.gz") for scan in found], True
    mask = output
    if mask.suffix == DICOM and not scans.is_dir():
        raise ValueError(f"{mask} would be a DICOM segmentation, but {scans} is no folder of a DICOM series")
    if not mask.name.endswith((*NIFTI, DICOM)):
        mask = mask / f"{case_of(scans)}.nii.gz"
    if mask.exists() and not overwrite:
        raise ValueError(f"{mask} exists; --overwrite replaces it")
    return [(scans, mask)], False


def prompt_file(labels: Path, scan: Path) -> Path:
    """The label of `scan`: `labels` itself, or the file with the scan's name in that folder."""
    if not labels.is_dir():
        return labels
    found = [p for ending in NIFTI if (p := labels / (case_of(scan) + ending)).exists()]
    if not found:
        raise ValueError(f"{labels} has no label {case_of(scan)}.nii.gz to draw the prompts of {scan} from")
    return found[0]


def case_of(scan: Path) -> str:
    """The case's name: without the file ending and nnU-Net's channel number."""
    name = scan.name
    for ending in (*NIFTI, DICOM):
        name = name.removesuffix(ending)
    return name.removesuffix("_0000")


def beside(mask: Path, ending: str) -> Path:
    """The file of the same case with another ending."""
    return mask.with_name(case_of(mask) + ending)


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
