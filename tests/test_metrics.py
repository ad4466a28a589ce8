"""Metrics on hand-made masks with anisotropic spacing: numbers worked out on paper."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aftersam.evaluation.metrics import dice, gaps, hd95_mm, inter_slice_consistency_error, nsd, score_organ

SPACING = (5.0, 2.0, 1.0)  # mm, (d, h, w)


def box(shape, *spans):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*span) for span in spans)] = True
    return mask


CUBE = box((12, 20, 30), (3, 8), (5, 12), (8, 20))
EMPTY = np.zeros_like(CUBE)


def test_dice_by_hand():
    shifted = np.roll(CUBE, 3, axis=2)  # 12 columns, 9 shared
    assert dice(CUBE, CUBE) == 1
    assert dice(shifted, CUBE) == pytest.approx(2 * 9 / 24)


@pytest.mark.parametrize(
    ("convention", "one_empty", "reference_empty", "both_empty"),
    [("nnunet", 0.0, 0.0, math.nan), ("monai", 0.0, math.nan, math.nan), ("transunet", 0.0, 1.0, 0.0)],
)
def test_empty_masks_by_convention(convention, one_empty, reference_empty, both_empty):
    np.testing.assert_equal(dice(EMPTY, CUBE, convention=convention), one_empty)
    np.testing.assert_equal(dice(CUBE, EMPTY, convention=convention), reference_empty)
    np.testing.assert_equal(dice(EMPTY, EMPTY, convention=convention), both_empty)


@pytest.mark.parametrize(
    ("convention", "one_empty", "both_empty"),
    [("nnunet", math.inf, math.nan), ("monai", math.nan, math.nan), ("transunet", 0.0, 0.0)],
)
def test_the_distance_to_nothing_by_convention(convention, one_empty, both_empty):
    for pair in ((EMPTY, CUBE), (CUBE, EMPTY)):
        np.testing.assert_equal(hd95_mm(*pair, SPACING, convention=convention), one_empty)
    np.testing.assert_equal(hd95_mm(EMPTY, EMPTY, SPACING, convention=convention), both_empty)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_two_voxels_are_their_distance_apart_in_mm(axis):
    one, other = np.zeros((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
    one[4, 4, 4] = True
    at = [4, 4, 4]
    at[axis] += 3
    other[tuple(at)] = True
    assert hd95_mm(one, other, SPACING) == pytest.approx(3 * SPACING[axis], rel=1e-5)


def test_hd95_is_the_larger_direction_not_the_pooled_one():
    """A far island is a tenth of the prediction's surface: one direction sees it, the other does not."""
    reference = box((1, 40, 60), (0, 1), (10, 11), (0, 40))
    prediction = reference.copy()
    prediction[0, 30, 0:10] = True
    spacing = (1.0, 1.0, 1.0)
    assert hd95_mm(prediction, reference, spacing) == pytest.approx(20)
    assert hd95_mm(reference, prediction, spacing) == pytest.approx(20)
    assert hd95_mm(reference, reference, spacing) == 0
    # MedPy's: 50 distances of the prediction, ten of them 20 and more, beside the 40 zeros of the reference
    assert hd95_mm(prediction, reference, spacing, convention="transunet") == pytest.approx(20)
    prediction[0, 30, 4:10] = False  # four among 84: the percentile falls between the far and the near ones
    assert hd95_mm(prediction, reference, spacing) == pytest.approx(20)
    assert hd95_mm(prediction, reference, spacing, convention="transunet") == 0


def test_surface_scores_of_empty_masks():
    assert hd95_mm(EMPTY, CUBE, SPACING) == math.inf
    assert hd95_mm(CUBE, EMPTY, SPACING) == math.inf
    assert math.isnan(hd95_mm(EMPTY, EMPTY, SPACING))
    assert nsd(EMPTY, CUBE, SPACING, tolerance_mm=3) == 0
    assert math.isnan(nsd(EMPTY, EMPTY, SPACING, tolerance_mm=3))


def test_nsd_follows_the_tolerance_and_the_spacing():
    shifted = np.roll(CUBE, 1, axis=0)  # by 5 mm: its two faces across d move, the sides stay on the surface
    assert nsd(CUBE, CUBE, SPACING, tolerance_mm=0.1) == 1
    tight, wide = (nsd(shifted, CUBE, SPACING, tolerance_mm=t) for t in (4.5, 5.5))
    assert tight < wide == pytest.approx(1, abs=1e-6)
    in_plane = np.roll(CUBE, 1, axis=2)  # by 1 mm
    assert nsd(in_plane, CUBE, SPACING, tolerance_mm=1.1) == pytest.approx(1, abs=1e-6)
    assert nsd(in_plane, CUBE, SPACING, tolerance_mm=0.5) < 0.9


def test_consistency_error_and_gaps_by_hand():
    reference = box((6, 8, 8), (1, 5), (2, 6), (2, 6))
    assert inter_slice_consistency_error(reference, reference) == 0
    broken = reference.copy()
    broken[3] = (
        False  # pairs (0,1) 0, (1,2) 1, (2,3) and (3,4) 0 instead of 1, (4,5) 0: two of five are off by 1
    )
    assert inter_slice_consistency_error(broken, reference) == pytest.approx(2 / 5)
    assert gaps(broken) == 1
    assert gaps(reference) == 0
    assert math.isnan(inter_slice_consistency_error(np.zeros_like(reference), np.zeros_like(reference)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.integers(-2, 2))
def test_scores_are_symmetric_and_do_not_change_with_the_surroundings(seed, shift):
    rng = np.random.default_rng(seed)
    one = np.zeros((6, 12, 12), bool)
    one[1:5, 3:9, 3:9] = rng.random((4, 6, 6)) < 0.7
    other = np.roll(one, shift, axis=1)
    assert dice(one, other) == dice(other, one)
    assert hd95_mm(one, other, SPACING) == pytest.approx(hd95_mm(other, one, SPACING))
    padded = [np.pad(m, 5) for m in (one, other)]
    assert hd95_mm(*padded, SPACING) == pytest.approx(hd95_mm(one, other, SPACING))
    assert nsd(*padded, SPACING, tolerance_mm=2) == pytest.approx(nsd(one, other, SPACING, tolerance_mm=2))


def test_score_organ_counts_and_measures_the_image():
    score = score_organ(EMPTY, CUBE, SPACING)
    assert (score.predicted_voxels, score.reference_voxels) == (0, int(CUBE.sum()))
    assert score.diagonal_mm == pytest.approx(math.dist((0, 0, 0), (60, 40, 30)))
    with pytest.raises(ValueError, match="same"):
        score_organ(EMPTY[1:], CUBE, SPACING)
