"""Augmentation: sides swap with their labels, one field moves all slices of a group."""

import numpy as np

from aftersam.config import DataConfig
from aftersam.data.augment import augment


def test_mirroring_swaps_the_sides():
    images = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    labels = np.zeros((1, 4, 6), np.int64)
    labels[0, 1, 0], labels[0, 2, 5] = 4, 5
    config = DataConfig(augmentation=("mirror",), augmentation_probability=1.0)
    flipped, swapped = augment(images, labels, np.random.default_rng(0), config, {4: 5, 5: 4})
    assert np.array_equal(flipped, images[..., ::-1])
    assert swapped[0, 1, 5] == 5
    assert swapped[0, 2, 0] == 4


def test_one_elastic_field_serves_the_whole_group():
    images = np.tile(np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32), (3, 1, 1))
    labels = np.tile((images[:1] > 1).astype(np.int64), (3, 1, 1))
    config = DataConfig(augmentation=("elastic",), augmentation_probability=1.0)
    moved, moved_labels = augment(images, labels, np.random.default_rng(0), config, {})
    assert not np.allclose(moved, images)
    assert np.array_equal(moved[0], moved[2])
    assert np.array_equal(moved_labels[0], moved_labels[2])
