"""Statistics of scores: means, bootstrap intervals over cases, tables of means and paired tests over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

DRAWS = 10_000
Scores = Mapping[str, Mapping[str, Mapping[str, Any]]]  # case -> organ -> score, as in metrics.json


def bootstrap_interval(matrix: np.ndarray) -> list[float] | None:
    """95 % percentile bootstrap over cases (rows) of the mean over organs (columns); seeded. None without scores."""
    return _interval(matrix[None])


def bootstrap_over_seeds(values: np.ndarray, others: np.ndarray | None = None) -> list[float] | None:
    """`bootstrap_interval` of the mean over seeds of scores (seeds, cases, organs), or of its difference to `others`.

    Each draw takes cases with replacement. Of scores with several seeds, each draw takes seeds with replacement too,
    of the two independently. The intervals of one seed are those of `bootstrap_interval`."""
    rng = np.random.default_rng(1)
    drawn = _means_of_drawn_seeds(values, rng)
    return _interval(drawn if others is None else drawn - _means_of_drawn_seeds(others, rng))


def _means_of_drawn_seeds(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(seeds, cases, organs) -> (draws, cases, organs), the mean over seeds in each draw; one draw of one seed."""
    seeds = len(values)
    if seeds == 1:
        return values
    times = rng.multinomial(seeds, [1 / seeds] * seeds, size=DRAWS)  # that each seed is drawn
    known = np.isfinite(values)
    counts = np.tensordot(times, known.astype(int), 1)
    sums = np.tensordot(times, np.where(known, values, 0.0), 1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _interval(values: np.ndarray) -> list[float] | None:
    """95 % interval over draws of cases; values (draws, cases, organs), or (1, cases, organs) for all draws."""
    if not np.isfinite(values).any():
        return None
    cases = values.shape[1]
    draws = np.random.default_rng(0).integers(cases, size=(DRAWS, cases))
    drawn = np.take_along_axis(values, draws[:, :, None], axis=1)  # (draws, cases, organs)
    known = np.isfinite(drawn)
    sums = np.where(known, drawn, 0.0).sum(1)  # (draws, organs)
    counts = known.sum(1)
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
    """`value` for JSON: None where it is NaN or infinite, which JSON cannot hold."""
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


class AblationTable(TypedDict):
    """What tables.json holds of a table: DSC of columns (variants), each with one training a seed."""

    cases: int
    seeds: int
    against: str
    """The last column, which the others are tested against."""
    columns: dict[str, dict[str, dict[str, float]]]
    """Column -> organ -> mean over cases and seeds, std over seeds; Average is over the organs."""
    tests: dict[str, dict[str, float]]
    """Column -> organ -> p of the two-sided Wilcoxon test over cases, a case's score being its mean over seeds."""
    prompted: dict[str, str]
    """Columns whose models are told where the organs are, and by which prompts."""


def summarise(columns: Mapping[str, Sequence[Scores]], prompted: Mapping[str, str]) -> AblationTable:
    """Table of means, deviations and p-values from the scores of each column, one training a seed."""
    first = next(iter(columns.values()))[0]
    cases, organs = sorted(first), [*next(iter(first.values())), "Average"]
    values = {column: _scores(seeds, cases, organs[:-1]) for column, seeds in columns.items()}
    *others, last = values
    return {
        "cases": len(cases),
        "seeds": len(values[last]),
        "against": last,
        "columns": {column: _over_cases(found, organs) for column, found in values.items()},
        "tests": {column: _tests(values[last], values[column], organs) for column in others},
        "prompted": dict(prompted),
    }


def _scores(seeds: Sequence[Scores], cases: Sequence[str], organs: Sequence[str]) -> np.ndarray:
    """DSC (seeds, cases, organs + 1), the last the mean over organs."""
    values = np.array([score_matrix(seed, cases, organs) for seed in seeds])
    return np.concatenate([values, np.nanmean(values, -1, keepdims=True)], -1)


def _over_cases(scores: np.ndarray, organs: Sequence[str]) -> dict[str, dict[str, float]]:
    means = np.nanmean(scores, axis=1)  # (seeds, organs + 1)
    deviation = means.std(0, ddof=1) if len(means) > 1 else np.zeros(means.shape[1])
    return {
        organ: {"mean": float(m), "std": float(s)}
        for organ, m, s in zip(organs, means.mean(0), deviation, strict=True)
    }


def _tests(scores: np.ndarray, others: np.ndarray, organs: Sequence[str]) -> dict[str, float]:
    from scipy.stats import wilcoxon

    tests = {}
    for i, organ in enumerate(organs):
        ours, theirs = (np.nanmean(found[..., i], axis=0) for found in (scores, others))
        difference = (ours - theirs)[np.isfinite(ours - theirs)]
        tests[organ] = float(wilcoxon(difference).pvalue) if np.any(difference) else 1.0
    return tests


def shown(value: float | None, digits: int = 3) -> str:
    """`value` for people; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def span(interval: Sequence[float] | None) -> str:
    """An interval for people; a dash where there is none."""
    return "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}"
