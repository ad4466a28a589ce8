"""The masks by which conventions are shown to differ."""

import nibabel as nib
import numpy as np

from benchmarks.accuracy import conventions


def test_the_mishaps_of_the_conventions_and_half_the_resolution():
    array = np.zeros((8, 6, 4), np.uint8)
    array[2:4, 2:4], array[4:6, :2] = conventions.HEART, conventions.TRACHEA
    image = nib.Nifti1Image(array, np.diag([-2.0, -2.0, 5.0, 1.0]))
    for case, there in enumerate([({2}, {2}), ({2}, {2, 6}), ({2, 6}, {6}), ({2, 6}, {2, 6})]):
        pair = conventions.mishaps(case, image)
        assert tuple(set(np.unique(p.dataobj)) - {0} for p in pair) == there
    half = conventions.halved(image)
    assert half.shape == (4, 3, 4)
    np.testing.assert_array_equal(half.dataobj, array[::2, ::2])
    centre = half.affine @ [1, 1, 0, 1]
    np.testing.assert_allclose(centre, image.affine @ [2.5, 2.5, 0, 1])
