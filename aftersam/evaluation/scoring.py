"""Scores of a folder of masks against a folder of references: organs, cases, means, differences of two systems."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aftersam.evaluation.metrics import Convention, OrganScore, score_organ
from aftersam.evaluation.statistics import bootstrap_interval, mean_of, mean_over_organs, number, paired
from aftersam.files import NIFTI, case_id, write_json

if TYPE_CHECKING:
    from rich.table import Table

RELIABLE_CASES = 10  # below it, a bootstrap over cases says little


def evaluate(
    predictions: Path,
    labels: Path,
    *,
    output: Path | None = None,
    against: Path | None = None,
    nsd_tolerance_mm: float = 3.0,
    convention: Convention = "nnunet",
    label_names: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score every reference in the folder `labels` by its mask in `predictions` and print a table.

    Returns, and writes to `output`, a dictionary with `mean_dsc` (the mean over organs of the mean over cases; by the
    convention monai, whose DiceMetric reduces so, the mean over cases of the mean over organs),
    `organs`, `cases`, `problems` (cases that could not be scored), `prompted` (box or points where the masks were made
    with prompts from labels, else null) and, with `against`, `paired`. A case whose mask is
    missing, unreadable or on another grid is a problem, not a score. Raises ValueError where nothing can be scored."""
    from rich.console import Console
    from rich.progress import track

    if not nsd_tolerance_mm > 0:
        raise ValueError(f"nsd_tolerance_mm is {nsd_tolerance_mm}, but must be above 0")
    references = masks_in(labels)
    ours = masks_in(predictions)
    theirs = None if against is None else masks_in(against)
    names = label_names_near(label_names, labels, predictions)
    console = Console(stderr=True)
    scores: dict[str, dict[str, OrganScore]] = {}
    other: dict[str, dict[str, OrganScore]] = {}
    problems: dict[str, str] = {}
    warned = False
    for case, path in track(
        references.items(),
        "scoring",
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    ):
        try:
            found, spacing = _score_case(
                _matching(ours, case, predictions), path, names, nsd_tolerance_mm, convention
            )
            if theirs is not None and against is not None:
                mask = _matching(theirs, case, against)
                other[case], _ = _score_case(mask, path, names, nsd_tolerance_mm, convention)
            scores[case] = found
        except (ValueError, OSError) as error:
            problems[case] = str(error)
            console.print(f"aftersam.evaluate: {error}", soft_wrap=True, markup=False, highlight=False)
            continue
        if max(spacing) > nsd_tolerance_mm and not warned and not quiet:
            warned = True
            console.print(
                f"the NSD tolerance of {nsd_tolerance_mm:g} mm is below the voxel spacing of {max(spacing):g} mm: "
                "a shift of one slice then counts as a miss"
            )
    if not scores:
        raise ValueError(f"no case of {labels} could be scored with the masks in {predictions}")
    metrics = _summary(scores, problems, nsd_tolerance_mm, convention)
    metrics["prompted"] = prompted(predictions)
    if theirs is not None:
        metrics["paired"] = {"against": str(against), **_paired(scores, other)}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, metrics)
    if not quiet:
        Console().print(table(metrics))
    return metrics


def label_names_near(explicit: Path | None, *folders: Path) -> dict[int, str]:
    """Label names from `explicit`, or from a dataset.json or a mask's JSON in or above the folders; {} if none.

    Both forms are read: nnU-Net's {"name": value} and the Decathlon's {"value": "name"}."""
    candidates = [explicit] if explicit is not None else []
    if explicit is None:
        for folder in folders:
            candidates += [folder / "dataset.json", folder.parent / "dataset.json"]
        candidates += [path for folder in folders for path in sorted(folder.glob("*.json"))]
    for path in candidates:
        if explicit is None and not path.is_file():
            continue
        try:
            labels = json.loads(path.read_text())["labels"]
            pairs = (
                {int(k): str(v) for k, v in labels.items()}
                if _values_first(labels)
                else {int(v): k for k, v in labels.items()}
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError):
            if explicit is not None:
                raise ValueError(f'{path} has no readable map of label names under "labels"') from None
            continue
        return {value: name for value, name in sorted(pairs.items()) if value}
    return {}


def prompted(masks: Path) -> str | None:
    """The kind of prompts that any mask of a folder was made with, by the JSON that predict leaves beside it."""
    for path in sorted(masks.glob("*.json")):
        try:
            found = json.loads(path.read_text()).get("prompted")
        except (OSError, ValueError, AttributeError):
            continue
        if found:
            return str(found)
    return None


def _values_first(labels: Mapping[str, Any]) -> bool:
    return all(str(key).isdigit() for key in labels)


def _score_case(
    mask: Path, reference: Path, names: Mapping[int, str], tolerance_mm: float, convention: Convention
) -> tuple[dict[str, OrganScore], tuple[float, float, float]]:
    """Scores of every organ of one case, and the spacing in mm."""
    from aftersam.data.volume import read_labels

    truth = read_labels(reference)
    found = read_labels(mask, like=truth)
    values = sorted(set(np.unique(truth.array).tolist()) | set(np.unique(found.array).tolist()) | set(names))
    foreign = [v for v in values if v and names and v not in names]
    if foreign:
        culprit = mask if np.any(found.array == foreign[0]) else reference
        known = ", ".join(f"{v} {n}" for v, n in names.items())
        raise ValueError(f"{culprit} has the label {foreign[0]}, but the label names are {known}")
    scores = {
        names.get(v, f"label {v}"): score_organ(
            found.array == v,
            truth.array == v,
            truth.spacing_mm,
            tolerance_mm=tolerance_mm,
            convention=convention,
        )
        for v in values
        if v
    }
    return scores, truth.spacing_mm


def _summary(
    scores: Mapping[str, Mapping[str, OrganScore]],
    problems: Mapping[str, str],
    tolerance_mm: float,
    convention: Convention,
) -> dict[str, Any]:
    from aftersam import __version__

    organs = list(dict.fromkeys(name for case in scores.values() for name in case))
    nsd_key = f"nsd_{tolerance_mm:g}mm"
    matrix = np.array([[_value(scores[c].get(o), "dsc") for o in organs] for c in scores])  # (cases, organs)
    averaged = matrix
    if convention == "monai":  # monai/metrics/utils.py, do_metric_reduction "mean": over organs first
        averaged = np.array([[mean_of(case)] for case in matrix])
    summary: dict[str, Any] = {
        "mean_dsc": number(mean_over_organs(averaged)),
        "mean_dsc_interval": bootstrap_interval(averaged),
        "interval_reliable": len(scores) >= RELIABLE_CASES,
        "num_cases": len(scores),
        "convention": convention,
        "nsd_tolerance_mm": tolerance_mm,
        "version": __version__,
        "organs": {},
        "cases": {
            case: {organ: _case_json(score, nsd_key) for organ, score in found.items()}
            for case, found in scores.items()
        },
        "problems": dict(problems),
    }
    for column, organ in enumerate(organs):
        rows = [found[organ] for found in scores.values() if organ in found]
        hd95 = np.array([row.hd95_mm for row in rows])
        penalised = [row.diagonal_mm if math.isinf(row.hd95_mm) else row.hd95_mm for row in rows]
        summary["organs"][organ] = {
            "dsc": number(mean_of(matrix[:, column])),
            "dsc_interval": bootstrap_interval(matrix[:, [column]]),
            "dsc_std": number(
                float(np.nanstd(matrix[:, column])) if np.isfinite(matrix[:, column]).any() else math.nan
            ),
            "hd95_mm": number(mean_of(hd95[np.isfinite(hd95)])),
            "hd95_mm_penalised": number(mean_of(penalised)),
            "hd95_infinite": int(np.isinf(hd95).sum()),
            nsd_key: number(mean_of([row.nsd for row in rows])),
            "ice": number(mean_of([row.ice for row in rows])),
            "gaps": int(sum(row.gaps for row in rows)),
            "undefined": int(np.isnan(matrix[:, column]).sum()),
            "missed": sum(row.reference_voxels > 0 and row.predicted_voxels == 0 for row in rows),
        }
    return summary


def _paired(
    ours: Mapping[str, Mapping[str, OrganScore]], theirs: Mapping[str, Mapping[str, OrganScore]]
) -> dict[str, Any]:
    """Differences of DSC, ours minus theirs, over the cases that both have: mean, interval, cases won."""
    organs = list(dict.fromkeys(name for case in ours.values() for name in case))
    cases = [case for case in ours if case in theirs]
    difference = np.array(
        [[_value(ours[c].get(o), "dsc") - _value(theirs[c].get(o), "dsc") for o in organs] for c in cases]
    )

    def describe(columns: np.ndarray) -> dict[str, Any]:
        found = paired(columns)
        return {"dsc_difference": found.pop("mean"), **found}

    return {
        "num_cases": len(cases),
        "mean": describe(difference),
        "organs": {organ: describe(difference[:, [i]]) for i, organ in enumerate(organs)},
    }


def table(metrics: Mapping[str, Any]) -> Table:
    """The per-organ table of a result of `evaluate`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    nsd_key = f"nsd_{metrics['nsd_tolerance_mm']:g}mm"
    mark = f", prompted by a {metrics['prompted']} from each label" if metrics["prompted"] else ""
    grid = Table(
        title=f"{metrics['num_cases']} cases{mark}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    grid.add_column("organ", no_wrap=True)
    for heading in ("DSC", "95 % interval", "HD95 mm", "missed", nsd_key.replace("_", " "), "ICE", "gaps"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for organ, row in metrics["organs"].items():
        grid.add_row(
            organ, _text(row["dsc"]), _span(row["dsc_interval"]), _text(row["hd95_mm"], 1), str(row["missed"]),
            _text(row[nsd_key]), _text(row["ice"]), str(row["gaps"]),
        )  # fmt: skip
    grid.add_section()
    grid.add_row("mean", _text(metrics["mean_dsc"]), _span(metrics["mean_dsc_interval"]))
    if not metrics["interval_reliable"]:
        grid.caption = f"intervals over {metrics['num_cases']} cases are unreliable"
    if "paired" in metrics:
        mean = metrics["paired"]["mean"]
        grid.add_row("mean against the other", _text(mean["dsc_difference"]), _span(mean["interval"]))
    return grid


def masks_in(folder: Path) -> dict[str, Path]:
    """{case: file} of a folder, by name without NIfTI's ending and nnU-Net's channel number."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(NIFTI) and not path.name.startswith("."):
            found[case_id(path)] = path
    if not found:
        raise ValueError(f"{folder} holds no mask that ends in .nii.gz or .nii")
    return found


def _matching(masks: Mapping[str, Path], case: str, folder: Path) -> Path:
    if case not in masks:
        raise ValueError(f"{folder} has no mask for the case {case}")
    return masks[case]


def _case_json(score: OrganScore, nsd_key: str) -> dict[str, Any]:
    values = dataclasses.asdict(score)
    values[nsd_key] = values.pop("nsd")
    return {key: number(value) if isinstance(value, float) else value for key, value in values.items()}


def _value(score: OrganScore | None, key: str) -> float:
    return math.nan if score is None else float(getattr(score, key))


def _text(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _span(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}"
