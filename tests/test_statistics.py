"""Statistics of scores, on matrices whose means can be said by hand."""

import math

import numpy as np
import pytest

from aftersam.evaluation.statistics import (
    bootstrap_interval,
    bootstrap_over_seeds,
    mean_over_organs,
    number,
    paired,
    score_matrix,
)


def test_a_score_that_is_not_there_is_nan_and_counts_in_no_mean():
    scores = {"a": {"heart": {"dsc": 0.5}, "lung": {"dsc": None}}, "b": {"heart": {"dsc": 0.7}}}
    matrix = score_matrix(scores, ["a", "b"], ["heart", "lung"])
    np.testing.assert_array_equal(matrix, [[0.5, math.nan], [0.7, math.nan]])
    assert mean_over_organs(matrix) == pytest.approx(0.6)
    assert math.isnan(mean_over_organs(matrix[:, 1:]))


def test_paired_differences_are_means_over_organs_of_means_over_cases():
    found = paired(np.array([[0.2, -0.1], [0.4, math.nan], [-0.3, -0.1]]))
    assert found["mean"] == pytest.approx((0.1 - 0.1) / 2)
    assert (found["won"], found["lost"]) == (2, 1)
    low, high = found["interval"]
    assert -0.3 <= low < 0 < high <= 0.4


def test_one_seed_has_the_interval_of_its_cases_and_several_add_their_own_spread():
    rng = np.random.default_rng(0)
    cases, seeds = rng.normal(0.7, 0.05, (9, 3)), rng.normal(0, 0.1, (3, 1, 1))
    cases[2, 1] = math.nan
    assert bootstrap_over_seeds(cases[None]) == bootstrap_interval(cases)
    assert bootstrap_over_seeds(cases[None], cases[None] - 0.1) == [0.1, 0.1]  # the same cases in every draw
    assert bootstrap_over_seeds(np.full((2, 3, 1), math.nan)) is None
    equal = np.full((9, 1), 0.5) + seeds  # (3, 9, 1): no spread over cases
    means = np.sort(equal[:, 0, 0])
    assert bootstrap_over_seeds(equal) == pytest.approx([means[0], means[2]], abs=1e-6)  # one draw in 27 each
    low, high = bootstrap_over_seeds(equal, equal)  # seeds of the two are drawn independently
    assert low < -0.5 * (means[2] - means[0])
    assert high > 0.5 * (means[2] - means[0])


def test_json_has_no_number_for_what_is_not_finite():
    assert [number(value) for value in (1 / 3, math.nan, math.inf)] == [0.333333, None, None]
