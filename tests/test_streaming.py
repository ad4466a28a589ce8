"""Streaming inference equals the plain loop: every group encoded anew, whole volumes in memory."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from aftersam.config import preset
from aftersam.data.slice_group import crop, slice_group
from aftersam.model.build import build_aftersam
from aftersam.streaming import predict_labels, resample_stream, stream_logits, window_starts


def tiny_model(**changes):
    """A random tiny model whose fusion is not the identity, and its configuration."""
    torch.manual_seed(0)
    changes = {"image_size": 48, "num_slices": 3, "fusion_init": "xavier", **changes}
    config = dataclasses.replace(preset("tiny").model, **changes)
    return build_aftersam(config, num_classes=4).eval(), config


@torch.no_grad()
def plain_loop(model, hu, config):
    """Each group through the whole model on its own, logits of the centre: (D, K+1, S, S)."""
    planes = []
    for d in range(len(hu)):
        group = hu[slice_group(d, len(hu), config.num_slices, config.slice_stride)]
        logits = model(torch.from_numpy(group)[None].float())[0, config.num_slices // 2]
        planes.append(F.interpolate(logits[None], size=hu.shape[1:], mode="bilinear", align_corners=False)[0])
    return torch.stack(planes)


@pytest.mark.parametrize(
    ("changes", "depth"),
    [
        ({}, 7),
        ({"num_slices": 4, "slice_stride": 2}, 9),
        ({"num_slices": 1}, 3),
        ({"attention": "none"}, 4),
        ({"output_stride": 2}, 4),
        ({}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_streaming_equals_the_plain_loop(changes, depth, batch_size):
    model, config = tiny_model(**changes)
    hu = np.random.default_rng(0).integers(-1000, 1000, (depth, 48, 48)).astype(np.int16)
    ours = torch.stack(list(stream_logits(model, hu, config, box=(0, 48, 0, 48), batch_size=batch_size)))
    torch.testing.assert_close(ours, plain_loop(model, hu, config), rtol=1e-4, atol=1e-4)


def test_each_slice_is_encoded_once():
    model, config = tiny_model(num_slices=5)
    seen = []
    encode = model.encode
    model.encode = lambda hu: seen.append(len(hu)) or encode(hu)
    hu = np.zeros((11, 48, 48), np.int16)
    assert len(list(stream_logits(model, hu, config, box=(0, 48, 0, 48), batch_size=4))) == 11
    assert sum(seen) == 11


@pytest.mark.parametrize("output", [(5, 20, 24), (12, 40, 33), (1, 7, 7), (7, 10, 12)], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_resampling_a_stream_equals_resampling_the_volume(depth, output):
    volume = torch.randn(3, depth, 10, 12, dtype=torch.double)
    whole = F.interpolate(volume[None], size=output, mode="trilinear", align_corners=False)[0]
    planes = torch.stack(list(resample_stream(iter(volume.unbind(1)), depth, output)), dim=1)
    torch.testing.assert_close(planes, whole)


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


def test_tiles_of_a_large_plane_agree_with_the_single_window_where_alone():
    model, config = tiny_model()
    hu = np.random.default_rng(1).integers(-1000, 1000, (2, 48, 100)).astype(np.int16)
    tiled = torch.stack(list(stream_logits(model, hu, config, box=(0, 48, 0, 100))))
    assert tiled.shape == (2, 4, 48, 100)
    left = torch.stack(list(stream_logits(model, hu[:, :, :48], config, box=(0, 48, 0, 48))))
    second = window_starts(100, 0, 100, 48)[1]
    torch.testing.assert_close(tiled[..., :second], left[..., :second], rtol=1e-4, atol=1e-4)


def test_outside_the_body_window_is_background():
    model, config = tiny_model()
    labels = predict_labels(
        model, np.zeros((2, 60, 90), np.int16), config, box=(0, 40, 0, 40), output_shape=(2, 60, 90)
    )
    assert labels.dtype == np.uint8
    assert (labels[:, 48:] == 0).all()
    assert (labels[:, :, 48:] == 0).all()
