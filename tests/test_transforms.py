"""Resampling keeps extents, constants and ramps; the body is found beside a table."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aftersam.data.dataset import find_dataset
from aftersam.data.transforms import body_box, preprocess, resample
from aftersam.data.volume import read_image, read_labels

REAL = Path(__file__).parents[2] / "shared" / "data"


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    spacing=st.tuples(*[st.floats(0.5, 5)] * 3),
    new=st.tuples(*[st.floats(0.5, 5)] * 3),
)
def test_resampling_keeps_the_extent_and_constants(shape, spacing, new):
    out = resample(np.full(shape, 37, np.int16), spacing, new)
    assert (out == 37).all()
    for n, m, old, wanted in zip(out.shape, shape, spacing, new, strict=True):
        assert n == 1 or abs(n * wanted - m * old) <= wanted / 2 + 1e-3 * m
    labels = resample(
        np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8), spacing, new, labels=True
    )
    assert labels.shape == out.shape
    assert labels.max() < 4


def test_resampling_a_ramp_is_linear():
    ramp = np.arange(20, dtype=np.float32)[:, None, None] * np.ones((1, 3, 3), np.float32)
    fine = resample(ramp, (2.0, 1.0, 1.0), (1.0, 1.0, 1.0))[:, 0, 0]
    np.testing.assert_allclose(fine[2:-2], (np.arange(40) + 0.5)[2:-2] / 2 - 0.5, atol=1e-5)


def test_the_body_is_found_beside_a_table():
    array = np.full((4, 60, 80), -1000, np.int16)
    array[:, 20:45, 15:60] = 30
    array[:, 52, 5:75] = 200  # the table's shell
    top, bottom, left, right = body_box(array, margin=0)
    assert (top, left) == (20, 15)
    assert (bottom, right) == (45, 60)
    assert body_box(np.full((2, 6, 7), -1000, np.int16)) == (0, 6, 0, 7)


@pytest.mark.parametrize("name", ["OpenKBP7", "TSThoraxCTA", "TSExampleAbdomen"])
def test_real_scans_load_and_preprocess(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"needs the real CT set {name} beside the checkout")
    dataset = find_dataset(REAL / name)
    case = dataset.cases[0]
    image = read_image(case.image)
    labels = read_labels(case.label, like=image)
    assert set(np.unique(labels.array)) == {0, *dataset.labels}
    ready = preprocess(image, (2.5, 3.0, 3.0))
    assert ready.array.dtype == np.int16
    top, bottom, left, right = ready.box
    assert 0 <= top < bottom <= ready.array.shape[1]
    assert 0 <= left < right <= ready.array.shape[2]
