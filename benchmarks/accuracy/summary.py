"""The values of the accuracy table: means, intervals and differences of its rows, and what may not be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from aftersam.evaluation.statistics import (
    bootstrap_over_seeds,
    mean_of,
    mean_over_organs,
    number,
    paired,
    score_matrix,
)
from benchmarks.accuracy.places import gains
from benchmarks.accuracy.systems import SYSTEMS

BUDGET = ("max_minutes", "max_steps", "threads", "fold")  # limits that rows of an equal budget have in common
IDENTITY = (
    "config",
    "parameters",
    "precision",
    "spacing_mm",
    "limits",
)  # of a row, the same for all its seeds
FACTS = ("system", "title", "protocol", "note", "prompted", "parameters", "spacing_mm", "precision")
COSTS = ("minutes", "cpu_minutes", "steps", "peak_mib", "prediction_s", "prediction_peak_mib")
BUSY = 0.9  # least share of processor time in the minutes of one thread; on a quiet machine it is above 0.95
DIGITS = 4  # of a DSC, so that means and intervals of rows can be computed again from "dsc" in accuracy.json
Found = tuple[Mapping[str, Any], Mapping[str, Any]]  # a row.json and its metrics.json


def summarise(found: Sequence[Found], failed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Rows and metrics of every system and seed -> all that accuracy.json holds but the data set's name.

    A case's scores are averaged over seeds first; means are over cases, then organs; intervals are those of
    `bootstrap_over_seeds`. "to_best" is a row's paired difference to the best row: that of the highest mean among the
    rows of an equal budget without prompts. "to_ours" is the difference to the row of AFTer-SAM. Both are None for the
    row itself, and for all where there is none. "dsc" of a row is (seeds, cases, organs), "trained" has its seeds.
    Raises ValueError where rows differ in cases or organs, rows of an equal budget in the budget, or seeds of a row in
    what was trained."""
    budget, failed = _common_budget(found), dict(failed or {})
    _, first = found[0]
    organs, cases = list(first["organs"]), sorted(first["cases"])
    rows, scores, places = [], [], {}
    for _, group in groupby(sorted(found, key=_place), key=_place):
        seeds = sorted(group, key=lambda one: int(one[0]["seed"]))
        _check_seeds([row for row, _ in seeds])
        values = np.array([score_matrix(metrics["cases"], cases, organs) for _, metrics in seeds])
        scores.append(values.round(DIGITS))
        if all("places" in row and row["protocol"] == "equal budget" for row, _ in seeds):
            places[seeds[0][0]["system"]] = [row["places"] for row, _ in seeds]
        rows.append({**_scores(scores[-1], organs), **_others(seeds, scores[-1], cases, organs)})
    able = [i for i, row in enumerate(rows) if may_be_best(row)]
    best = max(able, key=lambda i: rows[i]["mean"] or 0.0, default=None)
    ours = next((i for i, row in enumerate(rows) if row["system"] == "aftersam"), None)
    for i, row in enumerate(rows):
        for key, other in (("to_best", best), ("to_ours", ours)):
            row[key] = None if other in (i, None) else _difference(scores[i], scores[other])
    return {
        "organs": organs,
        "cases": cases,
        "budget": budget,
        "environments": _distinct(row["environment"] for row, _ in found if "environment" in row),
        "rows": rows,
        "neighbours": gains(places, cases, organs),
        "not_run": _not_run(rows, failed),
        "failed": failed,
    }


def may_be_best(row: Mapping[str, Any]) -> bool:
    return row["protocol"] == "equal budget" and not row["prompted"]


def title(row: Mapping[str, Any]) -> str:
    return row["title"] + (" †" if row["prompted"] else "") + (" ‡" if row.get("slowed") else "")


def first_difference(one: Any, other: Any) -> tuple[str, str, str] | None:
    """The first key in which two nested dicts differ, as "outer.inner", and its two values as short text."""
    mine, theirs = _flat(one), _flat(other)
    for key in {**mine, **theirs}:
        if mine.get(key) != theirs.get(key):
            return key, f"{mine.get(key)!s:.60}", f"{theirs.get(key)!s:.60}"
    return None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".strip(".")).items()}


def _common_budget(found: Sequence[Found]) -> dict[str, Any] | None:
    """The limits of the rows of an equal budget, after a check that rows can be compared at all."""
    if not found:
        raise ValueError("there is no finished row to make a table of; name --systems or --predictions")
    budget, training = None, {}
    for row, metrics in found:
        for what in ("cases", "organs"):
            other = set(metrics[what]) ^ set(found[0][1][what])
            if other:
                raise ValueError(f"{row['title']} and {found[0][0]['title']} differ in {what}: {min(other)}")
        if "training" in row:
            training[tuple(row["training"])] = _folder(row)
        if len(training) > 1:
            raise ValueError(f"{' and '.join(training.values())} were trained on different scans")
        if row["protocol"] == "equal budget":
            own = {key: row["limits"][key] for key in BUDGET}
            budget = budget or own
            if own != budget:
                raise ValueError(f"{row['title']} was trained with {own}, another row with {budget}")
    return budget


def _check_seeds(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless the rows are one system, trained in the same way from other seeds."""
    for row in rows[1:]:
        one, other = ({key: r.get(key) for key in IDENTITY} for r in (rows[0], row))
        for identity in (one, other):  # auto and cpu may be the same device
            identity["limits"] = {k: v for k, v in (identity["limits"] or {}).items() if k != "device"}
        if differs := first_difference(one, other):
            key, mine, theirs = differs
            raise ValueError(
                f"{_folder(rows[0])} and {_folder(row)} cannot be averaged: {key} is {mine} in one and {theirs} in the "
                "other; delete one, or train into another --output"
            )


def _folder(row: Mapping[str, Any]) -> str:
    return f"rows/{row['system']}-seed-{row['seed']}"


def _place(found: Found) -> tuple[bool, int, str, str]:
    """Sort key of a row: equal budgets first, then the paper's order; the same for all seeds of a system."""
    row = found[0]
    names = [{name, system.title.lower()} for name, system in SYSTEMS.items()]
    own = {row["system"], row["title"].lower()}
    place = next((i for i, known in enumerate(names) if known & own), len(names))
    return row["protocol"] != "equal budget", place, row["title"], row["system"]


def _scores(values: np.ndarray, organs: Sequence[str]) -> dict[str, Any]:
    matrix = _over_seeds(values)
    return {
        "mean": number(mean_over_organs(matrix)),
        "interval": bootstrap_over_seeds(values),
        "organs": {organ: number(mean_of(matrix[:, i])) for i, organ in enumerate(organs)},
        "dsc": [[[number(dsc) for dsc in case] for case in seed] for seed in values],
    }


def _over_seeds(values: np.ndarray) -> np.ndarray:
    """(seeds, cases, organs) -> (cases, organs)"""
    means: np.ndarray = np.apply_along_axis(mean_of, 0, values)
    return means


def _difference(values: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    found = paired(_over_seeds(values) - _over_seeds(others))
    return {**found, "interval": bootstrap_over_seeds(values, others)}


def _others(
    seeds: Sequence[Found], values: np.ndarray, cases: Sequence[str], organs: Sequence[str]
) -> dict[str, Any]:
    """Facts of a row, the deviation of DSC over seeds, means over seeds of other scores and of costs."""
    means = [number(mean_over_organs(seed)) or 0.0 for seed in values]
    consistency = [score_matrix(metrics["cases"], cases, organs, "ice") for _, metrics in seeds]
    summaries = [organ for _, metrics in seeds for organ in metrics["organs"].values()]
    return {
        **{key: seeds[0][0].get(key) for key in FACTS},
        "seeds": len(seeds),
        "trained": [_trained(row) for row, _ in seeds],
        "slowed": any(_slowed(row) for row, _ in seeds),
        "seed_deviation": number(float(np.std(means, ddof=1))) if len(means) > 1 else None,
        "ice": number(mean_of(_float(number(mean_over_organs(seed))) for seed in consistency)),
        "hd95_mm_penalised": number(mean_of(_float(organ["hd95_mm_penalised"]) for organ in summaries)),
        "missed": sum(organ["missed"] for organ in summaries) / len(seeds),
        **{key: number(mean_of(_float(row.get(key)) for row, _ in seeds)) for key in COSTS},
    }


def _trained(row: Mapping[str, Any]) -> dict[str, Any]:
    """Which code trained a seed, and when; the values of masks made elsewhere are None."""
    known = row.get("environment", {})
    return {
        "seed": row["seed"],
        **{key: known.get(key) for key in ("commit", "dirty", "date")},
        "minutes": row.get("minutes"),
    }


def _slowed(row: Mapping[str, Any]) -> bool:
    """Whether a row with a limit in minutes, trained by one thread of a CPU, had less than BUSY of its processor time.

    On a GPU, and with several threads, a processor waits on a quiet machine too."""
    limits, on_gpu = row.get("limits", {}), row.get("environment", {}).get("kind") == "gpu"
    if on_gpu or not row.get("cpu_minutes") or not limits.get("max_minutes") or limits["threads"] != 1:
        return False
    return bool(row["cpu_minutes"] < BUSY * row["minutes"])


def _not_run(rows: Sequence[Mapping[str, Any]], failed: Mapping[str, str]) -> dict[str, str]:
    """Titles of the systems without a row, and why. `failed` has titles, or titles with a seed."""
    there = {name for row in rows for name in (row["system"], row["title"].lower())}
    there |= {name.partition(", seed ")[0].lower() for name in failed}
    return {
        system.title: system.missing() or "no finished row in this folder"
        for name, system in SYSTEMS.items()
        if not there & {name, system.title.lower()}
    }


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _distinct(environments: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Environments without their dates, each once."""
    plain = [{key: value for key, value in e.items() if key != "date"} for e in environments]
    return [e for i, e in enumerate(plain) if e not in plain[:i]]
