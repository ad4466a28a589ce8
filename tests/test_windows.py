"""Which slices and pixels a model looks at: slice groups, clamped at the ends."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aftersam.data.windows import slice_group


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
