"""Which slices and pixels a model looks at: groups are clamped at the ends, windows cover the body."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aftersam.data.windows import crop, slice_group, window_starts


@settings(deadline=None)
@given(length=st.integers(1, 400), size=st.integers(8, 128), data=st.data())
def test_windows_cover_the_extent(length, size, data):
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    firsts = window_starts(length, start, stop, size)
    covered = np.zeros(length, bool)
    for first in firsts:
        covered[max(first, 0) : max(first + size, 0)] = True
    assert covered[start:stop].all()
    assert len(firsts) == 1 or all(b - a <= size * 3 / 4 + 1 for a, b in itertools.pairwise(firsts))
    if length >= size and len(firsts) == 1:
        assert 0 <= firsts[0] <= length - size  # real pixels rather than padding where there are enough


def test_crop_pads_with_air():
    plane = np.arange(12, dtype=np.int16).reshape(3, 4)
    (out,) = crop(np.stack([plane - 50, plane]), [1], (-1, 2), 4, -1000)
    assert out.shape == (4, 4)
    assert (out[0] == -1000).all()
    assert (out[1:, :2] == plane[:, 2:]).all()
    assert (out[:, 2:] == -1000).all()


@settings(deadline=None)
@given(depth=st.integers(1, 60), num=st.integers(1, 12), stride=st.integers(1, 4), data=st.data())
def test_groups_are_centred_and_clamped(depth, num, stride, data):
    centre = data.draw(st.integers(0, depth - 1))
    group = slice_group(centre, depth, num, stride)
    assert len(group) == num
    assert group[num // 2] == centre
    assert (np.diff(group) >= 0).all()
    expected = [min(max(centre + stride * (i - num // 2), 0), depth - 1) for i in range(num)]
    assert group.tolist() == expected


def test_even_groups_keep_index_half():
    assert slice_group(5, 20, 4).tolist() == [3, 4, 5, 6]
    assert slice_group(5, 20, 9).tolist() == list(range(1, 10))
    assert slice_group(0, 3, 5).tolist() == [0, 0, 0, 1, 2]
