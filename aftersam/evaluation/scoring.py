"""Scores of a folder of masks against a folder of references: organs, cases, means, differences of two systems."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from aftersam.config import Millimetres, checked
from aftersam.data.dataset import label_names
from aftersam.data.volume import Volume, read_labels
from aftersam.errors import SAID, counted, naming, one_line, plain_console, sentence, tell
from aftersam.evaluation.metrics import Convention, OrganScore, score_organ
from aftersam.evaluation.statistics import (
    bootstrap_interval,
    mean_of,
    mean_over_organs,
    number,
    paired,
    shown,
    span,
)
from aftersam.files import CONFIDENCE, by_case, read_json, scans_in

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RELIABLE_CASES = 10  # below it, a bootstrap over cases says little


@dataclass(frozen=True)
class ScoringOptions:
    """What `evaluate`'s flags of these names say."""

    nsd_tolerance_mm: Millimetres = 3.0
    convention: Convention = "nnunet"
    label_names: Path | None = None


class _Always(TypedDict):
    mean_dsc: float | None
    mean_dsc_interval: list[float] | None
    interval_reliable: bool
    num_cases: int
    convention: Convention
    nsd_tolerance_mm: float
    version: str
    organs: dict[str, dict[str, Any]]
    cases: dict[str, dict[str, dict[str, Any]]]
    problems: dict[str, str]
    prompted: str | None


class Metrics(_Always, total=False):
    """What metrics.json holds: scores by organ over the cases, and by case and organ.

    `mean_dsc` is the mean over organs of the mean over cases; by the convention monai, whose DiceMetric reduces so, the
    mean over cases of the mean over organs. `problems` are cases that could not be scored, and why. `prompted` is box,
    point or points where the masks were made with prompts from labels. `paired` holds differences to another system."""

    paired: dict[str, Any]


DEFAULTS = ScoringOptions()
Scores = dict[str, OrganScore]  # of one case, by organ


def score_folder(
    predictions: Path,
    labels: Path,
    options: ScoringOptions = DEFAULTS,
    *,
    against: Path | None = None,
    quiet: bool = False,
) -> Metrics:
    """Score every reference in the folder `labels` by its mask in `predictions`, and by that in `against` if given.

    A case whose mask is missing, unreadable or on another grid is a problem, reported on stderr, and not a score.
    `quiet` leaves the progress bar and advice out. Raises ValueError where nothing can be scored."""
    from rich.progress import track

    checked(options)
    references = masks_in(labels)
    systems = [(folder, masks_in(folder)) for folder in (predictions, against) if folder is not None]
    names = label_names_near(options.label_names, labels, predictions)
    console = plain_console(stderr=True)
    hidden = quiet or not console.is_terminal
    scores: dict[str, list[Scores]] = {}  # case -> of each system
    spacings, problems = [], {}
    for case, path in track(references.items(), "scoring", console=console, transient=True, disable=hidden):
        try:
            found = [_matching(masks, case, folder) for folder, masks in systems]
            truth = read_labels(path)
            scores[case] = [_score_case(mask, truth, names, options) for mask in found]
        except SAID as error:
            problems[case] = sentence(error)
            tell(console, f"aftersam.evaluate: {sentence(error)}")
            continue
        spacings.append(max(truth.spacing_mm))
        if not quiet:
            _advise(console, spacings, options.nsd_tolerance_mm)
    if not scores:
        raise ValueError(f"no case of {labels} could be scored with the masks in {predictions}")
    ours, *others = ({case: each[i] for case, each in scores.items()} for i in range(len(systems)))
    metrics = _summary(ours, problems, prompted(predictions), options)
    if others:
        metrics["paired"] = {"against": str(against), **_paired(ours, others[0])}
    return metrics


def _advise(console: Console, spacings: Sequence[float], tolerance_mm: float) -> None:
    """Say once, at the first scan that it is true of, that the tolerance is below the distance of its slices."""
    *before, last = (spacing > tolerance_mm for spacing in spacings)
    if last and not any(before):
        console.print(
            f"the NSD tolerance of {tolerance_mm:g} mm is below the voxel spacing of {spacings[-1]:g} mm: "
            "a shift of one slice then counts as a miss"
        )


def label_names_near(explicit: Path | None, *folders: Path) -> dict[int, str]:
    """Label names from `explicit`, or from a dataset.json or a mask's JSON in or above the folders; {} if none.

    Both forms are read: nnU-Net's {"name": value} and the Decathlon's {"value": "name"}. Raises ValueError where
    `explicit` has neither."""
    if explicit is not None:
        return label_names(read_json(explicit), explicit)
    candidates = [home / "dataset.json" for folder in folders for home in (folder, folder.parent)]
    candidates += [path for folder in folders for path in sorted(folder.glob("*.json"))]
    for path in candidates:
        with contextlib.suppress(*SAID):
            return label_names(read_json(path), path)
    return {}


def prompted(masks: Path) -> str | None:
    """The kind of prompts that any mask of a folder was made with, by the JSON that predict leaves beside it."""
    for path in sorted(masks.glob("*.json")):
        try:
            found = read_json(path).get("prompted")
        except (OSError, ValueError, AttributeError):
            continue
        if found:
            return str(found)
    return None


def _score_case(mask: Path, truth: Volume, names: Mapping[int, str], options: ScoringOptions) -> Scores:
    """Scores of every organ of one case. Raises ValueError on a label that `names` does not have."""
    found = read_labels(mask, like=truth)
    values = sorted(set(np.unique(truth.array).tolist()) | set(np.unique(found.array).tolist()) | set(names))
    foreign = [v for v in values if v and names and v not in names]
    if foreign:
        culprit = mask if np.any(found.array == foreign[0]) else truth.name
        known = ", ".join(f"{v} {n}" for v, n in names.items())
        raise ValueError(f"{culprit} has the label {foreign[0]}, but the label names are {known}")
    with naming(mask, "could not be scored"):
        return {
            names.get(v, f"label {v}"): score_organ(
                found.array == v,
                truth.array == v,
                truth.spacing_mm,
                tolerance_mm=options.nsd_tolerance_mm,
                convention=options.convention,
            )
            for v in values
            if v
        }


def _summary(
    scores: Mapping[str, Scores],
    problems: Mapping[str, str],
    prompts: str | None,
    options: ScoringOptions,
) -> Metrics:
    from aftersam import __version__

    organs = list(dict.fromkeys(name for case in scores.values() for name in case))
    nsd_key = f"nsd_{options.nsd_tolerance_mm:g}mm"
    matrix = np.array([[_value(scores[c].get(o), "dsc") for o in organs] for c in scores])  # (cases, organs)
    averaged = matrix
    if options.convention == "monai":  # monai/metrics/utils.py, do_metric_reduction "mean": over organs first
        averaged = np.array([[mean_of(case)] for case in matrix])
    return {
        "mean_dsc": number(mean_over_organs(averaged)),
        "mean_dsc_interval": bootstrap_interval(averaged),
        "interval_reliable": len(scores) >= RELIABLE_CASES,
        "num_cases": len(scores),
        "convention": options.convention,
        "nsd_tolerance_mm": options.nsd_tolerance_mm,
        "version": __version__,
        "organs": {
            organ: _organ([found[organ] for found in scores.values() if organ in found], column, nsd_key)
            for organ, column in zip(organs, matrix.T, strict=True)
        },
        "cases": {
            case: {organ: _case_json(score, nsd_key) for organ, score in found.items()}
            for case, found in scores.items()
        },
        "problems": dict(problems),
        "prompted": prompts,
    }


def _organ(rows: Sequence[OrganScore], dsc: np.ndarray, nsd_key: str) -> dict[str, Any]:
    """An organ's scores over the cases that have it; `dsc` (cases,) is NaN where it is not defined."""
    hd95 = np.array([row.hd95_mm for row in rows])
    penalised = [row.diagonal_mm if math.isinf(row.hd95_mm) else row.hd95_mm for row in rows]
    return {
        "dsc": number(mean_of(dsc)),
        "dsc_interval": bootstrap_interval(dsc[:, None]),
        "dsc_std": number(float(np.nanstd(dsc)) if np.isfinite(dsc).any() else math.nan),
        "hd95_mm": number(mean_of(hd95[np.isfinite(hd95)])),
        "hd95_mm_penalised": number(mean_of(penalised)),
        "hd95_infinite": int(np.isinf(hd95).sum()),
        nsd_key: number(mean_of([row.nsd for row in rows])),
        "ice": number(mean_of([row.ice for row in rows])),
        "gaps": int(sum(row.gaps for row in rows)),
        "undefined": int(np.isnan(dsc).sum()),
        "missed": sum(row.reference_voxels > 0 and row.predicted_voxels == 0 for row in rows),
    }


def _paired(ours: Mapping[str, Scores], theirs: Mapping[str, Scores]) -> dict[str, Any]:
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


def table(metrics: Metrics) -> Table:
    """The scores of every organ, for people."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    nsd_key = f"nsd_{metrics['nsd_tolerance_mm']:g}mm"
    mark = f", prompted by a {metrics['prompted']} from each label" if metrics["prompted"] else ""
    grid = Table(
        title=Text(one_line(f"{counted(metrics['num_cases'], 'case')}{mark}")),
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
            Text(one_line(organ)), shown(row["dsc"]), span(row["dsc_interval"]), shown(row["hd95_mm"], 1),
            str(row["missed"]), shown(row[nsd_key]), shown(row["ice"]), str(row["gaps"]),
        )  # fmt: skip
    grid.add_section()
    grid.add_row("mean", shown(metrics["mean_dsc"]), span(metrics["mean_dsc_interval"]))
    if not metrics["interval_reliable"]:
        grid.caption = f"intervals over {counted(metrics['num_cases'], 'case')} are unreliable"
    if "paired" in metrics:
        mean = metrics["paired"]["mean"]
        grid.add_row("mean against the other", shown(mean["dsc_difference"]), span(mean["interval"]))
    return grid


def masks_in(folder: Path) -> dict[str, Path]:
    """{case: file} of a folder, by name without NIfTI's ending and nnU-Net's channel number.

    Maps of confidence beside masks are left out."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = by_case(path for path in scans_in(folder) if not path.name.endswith(CONFIDENCE))
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
