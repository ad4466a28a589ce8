"""What prediction takes: a scan and its mirror image, options that a model can have."""

import numpy as np
import pytest

from aftersam.data.stored_features import StoredScan
from aftersam.inference.inputs import PredictOptions, Scan


def test_a_scan_mirrored_twice_is_itself_without_stored_features(tmp_path):
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, (3, 6, 8)).astype(np.int16)
    labels, swap = rng.integers(0, 4, hu.shape).astype(np.uint8), {1: 2, 2: 1}
    scan = Scan(hu, (1, 5, 0, 6), labels, StoredScan(tmp_path))
    turned = scan.mirrored(swap)
    assert np.array_equal(turned.hu, hu[..., ::-1])
    assert turned.box == (1, 5, 2, 8)
    assert np.array_equal(turned.prompt_labels == 2, labels[..., ::-1] == 1)
    assert turned.stored is None
    assert turned.timings is scan.timings
    again = turned.mirrored(swap)
    assert np.array_equal(again.hu, hu)
    assert again.box == scan.box
    assert np.array_equal(again.prompt_labels, labels)


def test_a_group_can_keep_from_one_to_all_of_its_slices():
    for keep in (1, 3):
        PredictOptions(keep=keep).check(3)
    for keep in (0, 4):
        with pytest.raises(ValueError, match=f"--keep is {keep}, but must be 1 to 3, the number of slices"):
            PredictOptions(keep=keep).check(3)
