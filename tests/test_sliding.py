"""Streaming inference equals the plain loop: every group encoded anew, whole volumes in memory."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from aftersam.config import preset
from aftersam.data.transforms import body_slices
from aftersam.data.windows import crop, window_starts
from aftersam.inference.reference import sliding_disagreement, sliding_logits, whole_model
from aftersam.inference.segmenter import compile_steps
from aftersam.inference.sliding import (
    Sliding,
    Votes,
    group_plan,
    mirror_logits,
    predict_volume,
    resample_stream,
    stream_logits,
)
from aftersam.model.build import build_aftersam


def tiny_model(**changes):
    """A random tiny model whose fusion is not the identity, and its configuration."""
    torch.manual_seed(0)
    changes = {"image_size": 48, "num_slices": 3, "fusion_init": "xavier", **changes}
    config = dataclasses.replace(preset("tiny").model, **changes)
    model = build_aftersam(config, num_classes=4).eval()
    torch.nn.init.zeros_(model.decoder.class_bias)  # its lead for background would leave nothing to compare
    return model, config


def plain_loop(model, hu, config, **kept):
    return sliding_logits(whole_model(model, hu, config), hu.shape, config, **kept)


@pytest.mark.parametrize(
    ("changes", "depth"),
    [
        ({}, 7),
        ({"num_slices": 4, "slice_stride": 2}, 9),
        ({"num_slices": 1}, 3),
        ({"attention": "none"}, 4),
        ({"output_stride": 2}, 4),
        ({"stem_slices": 3, "slice_stride": 2}, 7),
        ({"stem_slices": 5, "attention": "none"}, 2),
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


def test_masks_in_bf16_are_those_of_the_plain_loop():
    """Wherever a class leads by more than rounding: random logits, unlike a trained model's, are often nearly tied."""
    model, config = tiny_model(num_slices=5)
    hu = np.random.default_rng(0).integers(-1000, 1000, (9, 48, 48)).astype(np.int16)
    ours = stream_logits(model, hu, config, box=(0, 48, 0, 48), precision=torch.bfloat16)
    ours = torch.stack(list(ours))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = plain_loop(model, hu, config).float()
    assert (ours - plain).norm() < 1e-2 * plain.norm()
    first, second = plain.topk(2, dim=1).values.unbind(1)
    led = first - second > 2**-6 * plain.abs().amax()
    assert led.float().mean() > 0.5
    assert (ours.argmax(1) == plain.argmax(1))[led].float().mean() >= 0.999


def test_each_slice_is_encoded_once():
    model, config = tiny_model(num_slices=5)
    seen = []
    encode = model.encode
    model.encode = lambda hu, stored: seen.append(len(hu)) or encode(hu, stored)
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
    labels = predict_volume(
        model, np.zeros((2, 60, 90), np.int16), config, box=(0, 40, 0, 40), output_shape=(2, 60, 90)
    )
    assert labels.dtype == np.uint8
    assert (labels[:, 48:] == 0).all()
    assert (labels[:, :, 48:] == 0).all()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("sliding", "changes", "depth", "centres", "positions"),
    [
        (Sliding(keep=3), {"num_slices": 5}, 9, [1, 4, 7], (1, 2, 3)),
        (Sliding(keep=3), {"num_slices": 5}, 7, [1, 4, 6], (1, 2, 3)),
        (Sliding(keep=4), {"num_slices": 4}, 9, [2, 6, 8], (0, 1, 2, 3)),
        (Sliding(keep=2), {"num_slices": 3, "slice_stride": 2}, 8, [2, 3, 6, 7], (0, 1)),
        (Sliding(average=True), {"num_slices": 5}, 8, range(8), range(5)),
        (Sliding(average=True), {"num_slices": 3, "slice_stride": 2}, 6, range(6), range(3)),
        (Sliding(average=True, keep=2), {"num_slices": 5}, 6, [1, 3, 5], range(5)),
        (Sliding(average=True), {"num_slices": 5}, 1, [0], range(5)),
    ],
    ids=str,
)
def test_kept_and_averaged_slices_equal_the_plain_loop(
    sliding, changes, depth, centres, positions, batch_size
):
    model, config = tiny_model(**changes)
    hu = np.random.default_rng(0).integers(-1000, 1000, (depth, 48, 48)).astype(np.int16)
    options = {"box": (0, 48, 0, 48), "batch_size": batch_size}
    ours = torch.stack(list(stream_logits(model, hu, config, sliding=sliding, **options)))
    assert group_plan(depth, config, sliding) == (list(centres), tuple(positions))
    plain = plain_loop(model, hu, config, centres=centres, positions=positions)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(depth=st.integers(1, 40), size=st.integers(1, 9), stride=st.integers(1, 3), data=st.data())
def test_every_slice_is_kept(depth, size, stride, data):
    config = dataclasses.replace(preset("tiny").model, num_slices=size, slice_stride=stride)
    sliding = Sliding(keep=data.draw(st.integers(1, size)), average=data.draw(st.booleans()))
    centres, positions = group_plan(depth, config, sliding)
    kept = {c + (p - size // 2) * stride for c in centres for p in positions}
    assert set(range(depth)) <= kept
    assert centres == sorted(set(centres))
    assert 0 <= centres[0] <= centres[-1] < depth


@pytest.mark.parametrize("keep", [0, 4])
def test_refuses_to_keep_what_a_group_has_not(keep):
    model, config = tiny_model()
    with pytest.raises(ValueError, match=f"keep is {keep}"):
        next(
            stream_logits(
                model, np.zeros((3, 48, 48), np.int16), config, box=(0, 48, 0, 48), sliding=Sliding(keep)
            )
        )


def test_mirroring_is_the_mean_with_the_mirrored_scan():
    model, config = tiny_model()
    hu = np.random.default_rng(2).integers(-1000, 1000, (3, 60, 72)).astype(np.int16)
    swap = {1: 2, 2: 1}
    straight = torch.stack(list(stream_logits(model, hu, config, box=(4, 50, 0, 60))))
    turned = np.ascontiguousarray(hu[..., ::-1])
    turned = torch.stack(list(stream_logits(model, turned, config, box=(4, 50, 12, 72))))
    expected = (straight + turned[:, [0, 2, 1, 3]].flip(-1)) / 2
    both = stream_logits(model, hu, config, box=(4, 50, 0, 60), sliding=Sliding(label_swap=swap))
    torch.testing.assert_close(torch.stack(list(both)), expected)
    plane = straight[0]
    assert torch.equal(mirror_logits(mirror_logits(plane, swap), swap), plane)
    assert not torch.equal(mirror_logits(plane, swap), plane.flip(-1))


@pytest.mark.parametrize("depth", [7, 1])
@pytest.mark.parametrize("sliding", [Sliding(), Sliding(average=True), Sliding(keep=2)], ids=str)
def test_disagreement_is_the_divergence_of_the_groups(sliding, depth):
    model, config = tiny_model(slice_stride=2)
    for parameter in model.decoder.output_hypernetworks_mlps.parameters():
        parameter.data *= 3  # random logits hardly differ between groups
    hu = np.random.default_rng(4).integers(-1000, 1000, (depth, 48, 48)).astype(np.int16)
    options = {"box": (0, 48, 0, 48), "batch_size": 5}
    plain = torch.stack(list(stream_logits(model, hu, config, sliding=sliding, **options)))
    looking = dataclasses.replace(sliding, disagreement=True)
    both = torch.stack(list(stream_logits(model, hu, config, sliding=looking, **options)))
    torch.testing.assert_close(both[:, :-1], plain, rtol=1e-4, atol=1e-4)
    if sliding.keep == 1:
        expected = sliding_disagreement(whole_model(model, hu, config), hu.shape, config)
        assert (expected.max() > 1e-3) == (depth > 1)
        torch.testing.assert_close(both[:, -1], expected, rtol=1e-3, atol=1e-5)


def test_groups_that_are_sure_of_different_classes_disagree_wholly():
    sure = 50 * torch.eye(3)[:, :, None, None]
    votes = Votes()
    for logits in sure:
        votes.add(logits[None], True, True)
    assert votes.disagreement().item() == pytest.approx(1)
    same = Votes()
    for _ in range(3):
        same.add(sure[:1], True, True)
    assert same.disagreement().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "sliding", [Sliding(), Sliding(keep=2), Sliding(average=True), Sliding(disagreement=True)], ids=str
)
def test_slices_of_air_at_the_ends_are_background_and_change_nothing_else(sliding):
    model, config = tiny_model(num_slices=5)
    hu = np.full((16, 48, 48), -1000, np.int16)
    hu[6:10, 8:40, 8:40] = np.random.default_rng(5).integers(-100, 300, (4, 32, 32))
    assert body_slices(hu) == (5, 11)
    options = {"box": (0, 48, 0, 48), "batch_size": 3}
    whole = torch.stack(list(stream_logits(model, hu, config, sliding=sliding, **options)))
    seen = []
    encode = model.encode
    model.encode = lambda hu, stored: seen.append(len(hu)) or encode(hu, stored)
    body = dataclasses.replace(sliding, body=True)
    ours = torch.stack(list(stream_logits(model, hu, config, sliding=body, **options)))
    assert sum(seen) < 16
    assert ours.shape == whole.shape
    torch.testing.assert_close(ours[5:11], whole[5:11], rtol=1e-4, atol=1e-4)
    outside = torch.cat([ours[:5], ours[11:]])
    assert (outside[:, :4].argmax(1) == 0).all()
    hu[:] = -1000
    assert body_slices(hu) == (0, 0)
    empty = list(stream_logits(model, hu, config, sliding=body, **options))
    assert len(empty) == 16
    assert all((plane[:4].argmax(0) == 0).all() for plane in empty)


def test_confidence_comes_with_the_same_labels():
    model, config = tiny_model()
    hu = np.random.default_rng(6).integers(-1000, 1000, (4, 48, 48)).astype(np.int16)
    confidence = np.zeros((6, 30, 40), np.uint8)
    options = {"box": (0, 48, 0, 48), "output_shape": (6, 30, 40)}
    labels = predict_volume(model, hu, config, confidence=confidence, **options)
    assert np.array_equal(labels, predict_volume(model, hu, config, **options))
    assert 200 < confidence.min() <= confidence.max() <= 255


def test_compiled_steps_give_the_same_logits():
    """In one graph each; inductor turns these graphs into code, in minutes on a CPU."""
    model, config = tiny_model(num_blocks=1)
    hu = np.random.default_rng(7).integers(-1000, 1000, (5, 48, 48)).astype(np.int16)
    plain = torch.stack(list(stream_logits(model, hu, config, box=(0, 48, 0, 48), batch_size=2)))
    compile_steps(model, backend="aot_eager")
    ours = torch.stack(list(stream_logits(model, hu, config, box=(0, 48, 0, 48), batch_size=2)))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_probabilities_belong_to_the_labels():
    model, config = tiny_model()
    hu = np.random.default_rng(3).integers(-1000, 1000, (3, 48, 48)).astype(np.int16)
    probabilities = np.zeros((4, 5, 30, 40), np.float32)
    labels = predict_volume(
        model, hu, config, box=(0, 48, 0, 48), output_shape=(5, 30, 40), probabilities=probabilities
    )
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
    assert np.array_equal(probabilities.argmax(0), labels)


PEAK = """
import dataclasses, sys
import numpy as np, torch
from aftersam.config import preset
from aftersam.model.build import build_aftersam
from aftersam.inference.sliding import predict_volume

def private_mib():  # what a memory-mapped scan does not count in
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

depth, classes = int(sys.argv[2]), int(sys.argv[3])
config = dataclasses.replace(preset("tiny").model, image_size=48, num_slices=3, num_blocks=1)
model = build_aftersam(config, num_classes=classes).eval()
hu = np.memmap(sys.argv[1], np.int16, "w+", shape=(depth, 512, 512))
before, peak = private_mib(), 0
def look(done):
    global peak
    peak = max(peak, private_mib())
labels = predict_volume(
    model, hu, config, box=(200, 248, 200, 248), output_shape=hu.shape, batch_size=4, progress=look
)
print(peak - before - labels.nbytes / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of private memory")
def test_memory_does_not_grow_with_depth(tmp_path):
    """Beside the labels: 512 × 512 × 1000 voxels of 20 classes, whose logits are 20 GiB, in a few planes of them."""
    peak = {}
    for depth in (50, 1000):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "scan"), str(depth), "20"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peak[depth] = float(done.stdout)
    plane_mib = 20 * 512 * 512 * 4 / 2**20
    assert peak[1000] < 12 * plane_mib, peak
    assert peak[1000] < peak[50] + 2 * plane_mib, peak
