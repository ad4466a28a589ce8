"""Statistics of scores: means, bootstrap intervals over cases, tables of means and paired tests over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

DRAWS = 10_000
Scores = Mapping[str, Mapping[str, Mapping[str, Any]]]  # case -> organ -> score, as in metrics.json


def bootstrap_interval(matrix: np.ndarray) -> list[float] | None:
    """95 % percentile bootstrap over cases (rows) of the mean over organs (columns); seeded. None without scores."""
    if not np.isfinite(matrix).any():
        return None
    draws = np.random.default_rng(0).integers(len(matrix), size=(DRAWS, len(matrix)))
    known = np.isfinite(matrix)
    sums = np.where(known, matrix, 0.0)[draws].sum(1)  # (draws, organs)
    counts = known[draws].sum(1)
    per_organ = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    some = np.isfinite(per_organ).any(1)
    means = np.nanmean(per_organ[some], axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return [round(float(low), 6), round(float(high), 6)]


def mean_of(values: Iterable[float]) -> float:
    """Mean of the finite values, NaN without any."""
    finite = [float(v) for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def mean_over_organs(matrix: np.ndarray) -> float:
    """(cases, organs) -> the mean over organs of the mean over cases, NaN without any score."""
    return mean_of([mean_of(column) for column in matrix.T])


def number(value: float) -> float | None:
    """`value` for JSON, which has neither NaN nor infinity: None then, with a count beside it."""
    return round(float(value), 6) if math.isfinite(value) else None


def paired(difference: np.ndarray) -> dict[str, Any]:
    """Paired differences of a score (cases, organs): mean, its interval, numbers of cases above and below 0."""
    per_case = np.array([mean_of(case) for case in difference])
    return {
        "mean": number(mean_over_organs(difference)),
        "interval": bootstrap_interval(difference),
        "won": int((per_case > 0).sum()),
        "lost": int((per_case < 0).sum()),
    }


def score_matrix(scores: Scores, cases: Sequence[str], organs: Sequence[str], key: str = "dsc") -> np.ndarray:
    """The score `key` of every case and organ (cases, organs), NaN where it is not defined."""
    found = [[scores[case].get(organ, {}).get(key) for organ in organs] for case in cases]
    return np.array([[math.nan if value is None else float(value) for value in row] for row in found])


def summarise(columns: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
    """Scores of each column, one a seed, to mean DSC, its deviation over seeds, and p-values.

    A case's score is first averaged over seeds; the two-sided Wilcoxon test then pairs cases with the last column."""
    from scipy.stats import wilcoxon

    first = next(iter(columns.values()))[0]
    cases = sorted(first)
    organs = [*next(iter(first.values())), "Average"]

    def matrix(seeds: Sequence[Scores]) -> np.ndarray:
        values = np.array([score_matrix(seed, cases, organs[:-1]) for seed in seeds])
        return np.concatenate(
            [values, np.nanmean(values, -1, keepdims=True)], -1
        )  # (seeds, cases, organs + 1)

    values = {column: matrix(seeds) for column, seeds in columns.items()}
    *_, last = values
    table: dict[str, Any] = {
        "cases": len(cases),
        "seeds": len(values[last]),
        "against": last,
        "columns": {},
        "tests": {},
    }
    for column, found in values.items():
        means = np.nanmean(found, axis=1)  # (seeds, organs + 1)
        deviation = means.std(0, ddof=1) if len(means) > 1 else np.zeros(means.shape[1])
        table["columns"][column] = {
            organ: {"mean": float(m), "std": float(s)}
            for organ, m, s in zip(organs, means.mean(0), deviation, strict=True)
        }
        if column == last:
            continue
        tests = {}
        for i, organ in enumerate(organs):
            ours, theirs = (np.nanmean(values[c][..., i], axis=0) for c in (last, column))
            difference = (ours - theirs)[np.isfinite(ours - theirs)]
            tests[organ] = float(wilcoxon(difference).pvalue) if np.any(difference) else 1.0
        table["tests"][column] = tests
    return table
