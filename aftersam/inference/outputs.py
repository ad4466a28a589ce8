"""Writes a scan's mask and the files beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aftersam.errors import counted, one_line
from aftersam.files import CONFIDENCE, DICOM, renamed, write_json
from aftersam.inference.jobs import beside

if TYPE_CHECKING:
    import numpy as np

    from aftersam.inference.arguments import PredictArgs
    from aftersam.inference.cohort import Entry
    from aftersam.inference.segmenter import Prepared
    from aftersam.inference.sliding import Prediction


@dataclass(frozen=True)
class Job:
    """A scan that was read and is not yet written."""

    scan: Path
    mask: Path
    prepared: Prepared
    facts: dict[str, str]  # for the JSON beside the mask
    began: float
    entry: Entry
    checksum: str | None  # SHA-256 of the scan; None without a manifest
    shown: str  # the mask's path or URL, as printed
    finishing: Callable[[dict[int, int], Path], None] = lambda voxels, temporary: None
    """Called after all else is written, with the number of voxels of each label and the mask's temporary file."""


def write_outputs(args: PredictArgs, names: dict[int, str], job: Job, found: Prediction) -> str:
    """Write the mask of one scan with the labels `names`, and the files beside it that `args` ask for.

    The mask gets its name last: a scan with a mask is finished. Returns the text to print. Raises OSError where a file
    cannot be written."""
    labels, volume, mask = found.labels, job.prepared.volume, job.mask
    timings = job.prepared.scan.timings
    mask.parent.mkdir(parents=True, exist_ok=True)
    with renamed(mask) as temporary:
        with timings.stage("write"):
            voxels = _keep(labels, names)
            # the largest file first: if the disk is full, no other file has been written
            _write_mask(names, job, found, temporary)
            _write_extras(args, names, job, found)
        if args.timings:
            write_json(beside(mask, ".timings.json"), timings.summary())
        job.finishing(voxels, temporary)
    organs = ", ".join(name for value, name in sorted(names.items()) if value in voxels) or "nothing"
    slices, seconds = counted(volume.array.shape[0], "slice"), time.monotonic() - job.began
    line = f"{one_line(job.shown)}: {organs}; {slices} in {seconds:.1f} s"
    return f"{line}\n{timings.line()}" if args.timings else line


def _keep(labels: np.ndarray, names: dict[int, str]) -> dict[int, int]:
    """Set labels (D, H, W) that are not in `names` to background, in place. Returns {label: voxels} of the others.

    Works plane by plane, since a temporary array as large as the scan would dominate the memory."""
    import numpy as np

    voxels: dict[int, int] = {}
    for plane in labels:
        counts = np.bincount(plane.ravel())
        values = set(np.flatnonzero(counts).tolist()) - {0}
        if foreign := values - names.keys():
            plane[np.isin(plane, list(foreign))] = 0
        for value in values & names.keys():
            voxels[value] = voxels.get(value, 0) + int(counts[value])
    return voxels


def _write_extras(args: PredictArgs, names: dict[int, str], job: Job, found: Prediction) -> None:
    """Write the files beside the mask that `args` ask for: preview, statistics, confidence."""
    import numpy as np

    from aftersam.data.volume import write_confidence
    from aftersam.evaluation.metrics import organ_statistics

    labels, volume, mask = found.labels, job.prepared.volume, job.mask
    if args.preview:
        from aftersam.evaluation.figures import overlay_png

        overlay_png(
            beside(mask, ".png"),
            volume.array,
            labels,
            volume.spacing_mm,
            names,
            title=job.scan.name,
        )
    if args.statistics:
        voxel_mm3 = abs(float(np.linalg.det(volume.affine[:3, :3])))
        statistics = organ_statistics(labels, volume.array, names, voxel_mm3=voxel_mm3)
        write_json(beside(mask, ".statistics.json"), statistics)
    if found.confidence is not None:
        write_confidence(beside(mask, CONFIDENCE), found.confidence, volume)


def _write_mask(names: dict[int, str], job: Job, found: Prediction, path: Path) -> None:
    """Write the mask to the file `path`: as a DICOM segmentation, or as NIfTI with a JSON of its names beside it."""
    import numpy as np

    from aftersam.data.volume import label_names_json, to_nifti
    from aftersam.evaluation.review import KEY
    from aftersam.evaluation.statistics import number

    if job.mask.suffix == DICOM:
        from aftersam.data.dicom_segmentation import write_segmentation

        on_grid = np.asarray(to_nifti(found.labels, job.prepared.volume).dataobj)
        write_segmentation(path, on_grid, job.scan, names)
        return
    to_nifti(found.labels, job.prepared.volume, names).to_filename(path)
    expected = found.expected_dsc
    review = {} if expected is None else {KEY: {name: number(expected[v - 1]) for v, name in names.items()}}
    write_json(beside(job.mask, ".json"), {**label_names_json(names), **job.facts, **review})
