"""Statistics of scores, on matrices whose means can be said by hand."""

import math

import numpy as np
import pytest

from aftersam.evaluation.statistics import mean_over_organs, number, paired, score_matrix


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


def test_json_has_no_number_for_what_is_not_finite():
    assert [number(value) for value in (1 / 3, math.nan, math.inf)] == [0.333333, None, None]
