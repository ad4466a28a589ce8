"""Organs that are one connected piece, found in labels and kept to in masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from aftersam.inference.postprocess import TOUCHING, drop_small_parts, one_piece


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


def test_only_small_parts_are_dropped_and_only_of_the_organs_named():
    kept = [
        (1, (0, 0, 0), (2, 4, 4)),
        (1, (0, 15, 0), (2, 19, 1)),
        (2, (0, 8, 0), (0, 10, 2)),
        (2, (4, 8, 0), (4, 8, 0)),
    ]
    labels = blocks(*kept, (1, (5, 15, 15), (5, 16, 16)))  # 75, 30 and 4 voxels of 1, 9 and 1 of 2
    drop_small_parts(labels, (1, 3))
    np.testing.assert_array_equal(labels, blocks(*kept))


@given(arrays.arrays(np.uint8, (4, 5, 6), elements=st.integers(0, 3)))
def test_what_is_kept_was_there_before_and_is_not_small(labels):
    before = labels.copy()
    drop_small_parts(labels, (1, 3))
    assert ((labels == before) | (labels == 0)).all()
    np.testing.assert_array_equal(labels == 2, before == 2)
    for value in (1, 3):
        parts, count = ndimage.label(before == value, TOUCHING)
        sizes = [int((parts == i).sum()) for i in range(1, count + 1)]
        for i, size in enumerate(sizes, start=1):
            assert (labels[parts == i] == (value if size >= 0.2 * max(sizes) else 0)).all()


@given(arrays.arrays(np.int16, (7, 5, 6), elements=st.sampled_from([0, 0, 1, 300])), st.integers(1, 90))
def test_parts_that_cross_slabs_are_one(labels, at_once):
    whole, slabs = labels.copy(), labels.copy()
    drop_small_parts(whole, (1, 300))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aftersam.inference.postprocess.AT_ONCE", at_once)
        drop_small_parts(slabs, (1, 300))
        pieces = one_piece([labels], (1, 300))
    np.testing.assert_array_equal(slabs, whole)
    assert pieces == one_piece([labels], (1, 300))
