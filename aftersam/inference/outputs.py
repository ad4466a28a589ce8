"""What prediction leaves of a scan: its mask, and the files beside it that are wanted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aftersam.files import remove_leftovers, renamed, write_json
from aftersam.inference.jobs import DICOM, beside, case_of

if TYPE_CHECKING:
    import numpy as np

    from aftersam.inference.pipeline import PredictArgs
    from aftersam.inference.segmenter import Prepared
    from aftersam.inference.sliding import Prediction


@dataclass(frozen=True)
class Job:
    """A scan between reading and writing."""

    scan: Path
    mask: Path
    prepared: Prepared
    facts: dict[str, str]  # for the JSON beside the mask
    began: float


def write_outputs(args: PredictArgs, names: dict[int, str], job: Job, found: Prediction) -> str:
    """Write the mask of one scan with the labels `names`, after all that lies beside it: a mask is a finished scan.

    Returns what to tell the user. Raises OSError where a file cannot be written."""
    import numpy as np

    labels, volume, mask = found.labels, job.prepared.volume, job.mask
    timings = job.prepared.scan.timings
    mask.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(mask.parent, case_of(mask))
    with timings.stage("write"):
        labels[~np.isin(labels, list(names))] = 0
        _write_extras(args, names, job, found)
        _write_mask(names, job, labels)
    organs = ", ".join(names[v] for v in sorted(set(np.unique(labels)) & set(names))) or "nothing"
    line = f"{mask}: {organs}; {volume.array.shape[0]} slices in {time.monotonic() - job.began:.1f} s"
    if args.timings:
        write_json(beside(mask, ".timings.json"), timings.summary())
        line += f"\n{timings.line()}"
    return line


def _write_extras(args: PredictArgs, names: dict[int, str], job: Job, found: Prediction) -> None:
    """What lies beside the mask, as far as it is wanted: preview, statistics, confidence."""
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
        write_confidence(beside(mask, ".confidence.nii.gz"), found.confidence, volume)


def _write_mask(names: dict[int, str], job: Job, labels: np.ndarray) -> None:
    """The mask itself, as NIfTI or as a DICOM segmentation of the series."""
    import numpy as np

    from aftersam.data.volume import to_nifti, write_labels

    volume, mask = job.prepared.volume, job.mask
    if mask.suffix != DICOM:
        write_labels(mask, labels, volume, names, job.facts)
        return
    from aftersam.data.dicom_segmentation import write_segmentation

    with renamed(mask) as temporary:
        on_grid = np.asarray(to_nifti(labels, volume).dataobj)
        write_segmentation(temporary, on_grid, job.scan, names)
