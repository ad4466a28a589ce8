"""Organs that are one connected piece, found in labels and kept to in masks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from aftersam.components import TOUCHING, keep_largest, one_piece


def blocks(*organs, shape=(6, 20, 20)):
    """Labels (D, H, W) with a box of each (value, first corner, last corner)."""
    labels = np.zeros(shape, np.uint8)
    for value, first, last in organs:
        labels[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))] = value
    return labels


def test_an_organ_in_two_parts_is_not_one_piece_and_one_that_touches_by_a_corner_is():
    apart = blocks((1, (0, 0, 0), (1, 1, 1)), (1, (4, 9, 9), (5, 10, 10)))
    corner = blocks((2, (0, 0, 0), (1, 1, 1)), (2, (2, 2, 2), (3, 3, 3)))
    whole = blocks((1, (0, 0, 0), (2, 5, 5)), (2, (3, 9, 9), (3, 9, 9)))
    assert one_piece([whole, corner], (1, 2)) == [1, 2]
    assert one_piece([whole, apart, corner], (1, 2)) == [2]


def test_a_stray_voxel_of_the_labelling_does_not_make_two_pieces():
    stray = blocks((1, (0, 0, 0), (2, 6, 6)), (1, (5, 15, 15), (5, 15, 15)))
    assert one_piece([stray], (1,)) == [1]


def test_an_organ_that_no_label_has_is_not_called_one_piece():
    assert one_piece([blocks((1, (0, 0, 0), (1, 1, 1)))], (1, 2)) == [1]
    assert one_piece([], (1, 2)) == []


def test_only_the_largest_part_is_kept_and_only_of_the_organs_named():
    labels = blocks(
        (1, (0, 0, 0), (2, 4, 4)), (1, (5, 15, 15), (5, 16, 16)),
        (2, (0, 10, 0), (0, 12, 2)), (2, (4, 10, 0), (4, 10, 0)),
    )  # fmt: skip
    keep_largest(labels, (1, 3))
    expected = blocks((1, (0, 0, 0), (2, 4, 4)), (2, (0, 10, 0), (0, 12, 2)), (2, (4, 10, 0), (4, 10, 0)))
    np.testing.assert_array_equal(labels, expected)


@given(arrays.arrays(np.uint8, (4, 5, 6), elements=st.integers(0, 3)))
def test_what_is_kept_is_one_part_and_was_there_before(labels):
    before = labels.copy()
    keep_largest(labels, (1, 3))
    assert ((labels == before) | (labels == 0)).all()
    np.testing.assert_array_equal(labels == 2, before == 2)
    for value in (1, 3):
        sizes = np.bincount(ndimage.label(before == value, TOUCHING)[0].ravel())[1:]
        assert (labels == value).sum() == sizes.max(initial=0)
        assert ndimage.label(labels == value, TOUCHING)[1] == min(1, len(sizes))
