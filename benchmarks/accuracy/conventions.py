"""What conventions do to a score: the figure and the table of docs/explanation/conventions.md.

    python -m benchmarks.accuracy.conventions

Six phantoms and one set of masks, scored three times by aftersam.evaluate, and once more after references and masks
were resampled to half the resolution in the plane, as in pipelines that validate at the resolution of their network.
The masks are the references shifted by one voxel, with three errors that the conventions score differently."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from aftersam.data.phantom import HEART, TRACHEA, write_dataset
from aftersam.data.transforms import resample
from aftersam.evaluation.metrics import Convention
from aftersam.evaluation.scoring import ScoringOptions, score_folder
from aftersam.evaluation.statistics import mean_of
from aftersam.evaluation.tables import markdown_table
from benchmarks.machine import ROOT
from benchmarks.page import write_sections

NAMES: tuple[Convention, ...] = ("nnunet", "monai", "transunet")
COARSE = "nnunet, half the resolution"


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """{convention: {"dsc", "hd95_mm"}} of the same masks, made in `folder`."""
    write_dataset(folder / "scans", cases=6, seed=0)
    labels, masks = folder / "scans" / "labelsTr", folder / "masks"
    masks.mkdir()
    for i, path in enumerate(sorted(labels.glob("*.nii.gz"))):
        truth, mask = mishaps(i, nib.load(path))
        nib.save(truth, path)
        nib.save(mask, masks / path.name)
    found: dict[str, dict[str, float]] = {
        name: _means(score_folder(masks, labels, ScoringOptions(convention=name), quiet=True))
        for name in NAMES
    }
    for kind in (labels, masks):
        (folder / "half" / kind.name).mkdir(parents=True)
        for path in sorted(kind.glob("*.nii.gz")):
            nib.save(halved(nib.load(path)), folder / "half" / kind.name / path.name)
    shutil.copy(labels.parent / "dataset.json", folder / "half")
    half = score_folder(folder / "half" / "masks", folder / "half" / "labelsTr", quiet=True)
    return {**found, COARSE: _means(half)}


def mishaps(case: int, reference: Any) -> tuple[Any, Any]:
    """(reference, mask) of case number `case`: 0 has no heart in either, 1 a heart in the mask alone, 2 no trachea in
    the mask."""
    truth = np.asarray(reference.dataobj).copy()
    if case == 0:
        truth[truth == HEART] = 0
    mask = np.roll(truth, 1, axis=0)
    if case == 1:
        truth[truth == HEART] = 0
    if case == 2:
        mask[mask == TRACHEA] = 0
    return tuple(nib.Nifti1Image(array, reference.affine) for array in (truth, mask))  # type: ignore[return-value]  # a tuple of two


def halved(image: Any) -> Any:
    """A label image at twice the voxel size in x and y, over the same extent."""
    array = np.asarray(image.dataobj).transpose(2, 1, 0)  # (D, H, W)
    small = resample(array, (1.0, 1.0, 1.0), (1.0, 2.0, 2.0), labels=True)
    affine = image.affine @ np.diag([2.0, 2.0, 1.0, 1.0])
    affine[:3, 3] = image.affine[:3, 3] + image.affine[:3, :3] @ np.array([0.5, 0.5, 0.0])
    return nib.Nifti1Image(small.transpose(2, 1, 0), affine)


def _means(metrics: Mapping[str, Any]) -> dict[str, float]:
    distances = [organ["hd95_mm_penalised"] for organ in metrics["organs"].values()]
    return {"dsc": metrics["mean_dsc"], "hd95_mm": mean_of(d for d in distances if d is not None)}


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, form, heading in (
        (left, "dsc", "{:.3f}", "mean DSC"),
        (right, "hd95_mm", "{:.1f}", "mean HD95, mm"),
    ):
        values = [scores[key] for scores in found.values()]
        bars = axes.barh(list(found), values, color=["#b3262e", "#5b7fa6", "#5b7fa6", "#d08a2e"], height=0.6)
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
        axes.set(title=heading, xlim=(0, 1.2 * max(values)))
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def table(found: dict[str, dict[str, float]]) -> str:
    rows = [[name, f"{s['dsc']:.3f}", f"{s['hd95_mm']:.1f}"] for name, s in found.items()]
    return markdown_table([["the same masks by", "mean DSC", "mean HD95, mm"], *rows])


def main(docs: Path = ROOT / "docs" / "explanation") -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    draw(found, docs / "conventions.png")
    write_sections(docs / "conventions.md", [table(found)], "conventions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
