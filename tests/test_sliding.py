"""Streaming inference equals the naive reference; each of its steps does what it says."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aftersam.config import preset
from aftersam.data.transforms import body_slices
from aftersam.data.windows import window_starts
from aftersam.inference.inputs import PredictOptions, Scan
from aftersam.inference.planes import Plane, Tiling
from aftersam.inference.reference import naive_planes
from aftersam.inference.segmenter import compile_steps
from aftersam.inference.sliding import (
    Votes,
    count_votes,
    decode,
    encode,
    fuse,
    group_plan,
    make_plan,
    predict_volume,
    stream_logits,
)
from aftersam.model.build import build_aftersam

WHOLE = (0, 48, 0, 48)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def stacked(planes):
    """The logits (D, K+1, H, W) of a stream of planes, and the disagreement (D, 1, H, W) or None."""
    planes = list(planes)
    looked = planes[0].disagreement is not None
    assert all((plane.disagreement is not None) == looked for plane in planes)
    return Plane(
        torch.stack([plane.logits for plane in planes]),
        torch.stack([plane.disagreement for plane in planes]) if looked else None,
    )


def assert_planes_close(ours, expected):
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert (ours.disagreement is None) == (expected.disagreement is None)
    if ours.disagreement is not None:
        torch.testing.assert_close(ours.disagreement, expected.disagreement, rtol=1e-3, atol=1e-5)


def tiny_model(**changes):
    """A random tiny model whose fusion is not the identity, and its configuration."""
    torch.manual_seed(0)
    changes = {"image_size": 48, "num_slices": 3, "fusion_init": "xavier", **changes}
    config = dataclasses.replace(preset("tiny").model, **changes)
    model = build_aftersam(config, num_classes=4).eval()
    torch.nn.init.zeros_(model.decoder.class_bias)  # its lead for background would leave nothing to compare
    return model, config


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
def test_streaming_equals_the_naive_reference(changes, depth, batch_size):
    model, config = tiny_model(**changes)
    scan = Scan(noise(depth, 48, 48), WHOLE)
    ours = stacked(stream_logits(model, scan, config, PredictOptions(batch_size=batch_size)))
    assert_planes_close(ours, stacked(naive_planes(model, scan, config)))


@pytest.mark.parametrize(
    "options",
    [
        PredictOptions(confidence=True),
        PredictOptions(average=True, label_swap={1: 2, 2: 1}),
        PredictOptions(keep=2, label_swap={1: 2, 2: 1}, confidence=True, batch_size=3),
        PredictOptions(average=True, confidence=True, body=True),
    ],
    ids=str,
)
def test_options_together_and_tiles_equal_the_naive_reference(options):
    model, config = tiny_model(slice_stride=2)
    hu = noise(11, 60, 100)
    hu[:3] = hu[9:] = -1000
    scan = Scan(hu, (4, 50, 0, 90))
    ours = stacked(stream_logits(model, scan, config, options))
    assert_planes_close(ours, stacked(naive_planes(model, scan, config, options)))


def test_prompts_are_drawn_from_the_labels_of_the_slices_that_are_decoded():
    model, config = tiny_model(prompts="box")
    labels = np.zeros((5, 48, 48), np.uint8)
    for d in range(5):
        labels[d, 4 : 20 + 5 * d, 6:30], labels[d, 30:40, 5 * d : 5 * d + 9] = 1, 2
    scan = Scan(noise(5, 48, 48), WHOLE, labels)
    options = PredictOptions(keep=2)
    ours = stacked(stream_logits(model, scan, config, options))
    assert_planes_close(ours, stacked(naive_planes(model, scan, config, options)))
    turned = dataclasses.replace(scan, prompt_labels=labels[::-1].copy())
    assert not torch.equal(ours.logits, stacked(stream_logits(model, turned, config, options)).logits)


def test_masks_in_bf16_are_those_of_the_naive_reference():
    """Wherever a class leads by more than rounding: random logits, unlike a trained model's, are often nearly tied."""
    model, config = tiny_model(num_slices=5)
    scan = Scan(noise(9, 48, 48), WHOLE)
    ours = stacked(stream_logits(model, scan, config, precision=torch.bfloat16)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = stacked(naive_planes(model, scan, config)).logits
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
    scan = Scan(np.zeros((11, 48, 48), np.int16), WHOLE)
    assert len(list(stream_logits(model, scan, config, PredictOptions(batch_size=4)))) == 11
    assert sum(seen) == 11


def test_tiles_of_a_large_plane_agree_with_the_single_window_where_alone():
    model, config = tiny_model()
    hu = noise(2, 48, 100, seed=1)
    tiled = stacked(stream_logits(model, Scan(hu, (0, 48, 0, 100)), config)).logits
    assert tiled.shape == (2, 4, 48, 100)
    left = stacked(stream_logits(model, Scan(hu[:, :, :48], WHOLE), config)).logits
    second = window_starts(100, 0, 100, 48)[1]
    torch.testing.assert_close(tiled[..., :second], left[..., :second], rtol=1e-4, atol=1e-4)


def test_outside_the_body_window_is_background():
    model, config = tiny_model()
    scan = Scan(np.zeros((2, 60, 90), np.int16), (0, 40, 0, 40))
    labels = predict_volume(model, scan, config, output_shape=(2, 60, 90)).labels
    assert labels.dtype == np.uint8
    assert (labels[:, 48:] == 0).all()
    assert (labels[:, :, 48:] == 0).all()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("options", "changes", "depth", "centres", "positions"),
    [
        (PredictOptions(keep=3), {"num_slices": 5}, 9, [1, 4, 7], (1, 2, 3)),
        (PredictOptions(keep=3), {"num_slices": 5}, 7, [1, 4, 6], (1, 2, 3)),
        (PredictOptions(keep=4), {"num_slices": 4}, 9, [2, 6, 8], (0, 1, 2, 3)),
        (PredictOptions(keep=2), {"num_slices": 3, "slice_stride": 2}, 8, [2, 3, 6, 7], (0, 1)),
        (PredictOptions(average=True), {"num_slices": 5}, 8, range(8), range(5)),
        (PredictOptions(average=True), {"num_slices": 3, "slice_stride": 2}, 6, range(6), range(3)),
        (PredictOptions(average=True, keep=2), {"num_slices": 5}, 6, [1, 3, 5], range(5)),
        (PredictOptions(average=True), {"num_slices": 5}, 1, [0], range(5)),
    ],
    ids=str,
)
def test_kept_and_averaged_slices_equal_the_naive_reference(
    options, changes, depth, centres, positions, batch_size
):
    model, config = tiny_model(**changes)
    scan = Scan(noise(depth, 48, 48), WHOLE)
    assert group_plan(depth, config, options) == (list(centres), tuple(positions))
    options = dataclasses.replace(options, batch_size=batch_size)
    ours = stacked(stream_logits(model, scan, config, options))
    assert_planes_close(ours, stacked(naive_planes(model, scan, config, options)))


@settings(deadline=None)
@given(depth=st.integers(1, 40), size=st.integers(1, 9), stride=st.integers(1, 3), data=st.data())
def test_every_slice_is_kept(depth, size, stride, data):
    config = dataclasses.replace(preset("tiny").model, num_slices=size, slice_stride=stride)
    options = PredictOptions(keep=data.draw(st.integers(1, size)), average=data.draw(st.booleans()))
    centres, positions = group_plan(depth, config, options)
    kept = {c + (p - size // 2) * stride for c in centres for p in positions}
    assert set(range(depth)) <= kept
    assert centres == sorted(set(centres))
    assert 0 <= centres[0] <= centres[-1] < depth


@pytest.mark.parametrize("keep", [0, 4])
def test_refuses_to_keep_what_a_group_has_not(keep):
    model, config = tiny_model()
    scan = Scan(np.zeros((3, 48, 48), np.int16), WHOLE)
    with pytest.raises(ValueError, match=f"keep is {keep}"):
        next(stream_logits(model, scan, config, PredictOptions(keep)))


def test_mirroring_is_the_mean_with_the_mirrored_scan():
    model, config = tiny_model()
    hu = noise(3, 60, 72, seed=2)
    swap = {1: 2, 2: 1}
    scan = Scan(hu, (4, 50, 0, 60))
    straight = stacked(stream_logits(model, scan, config)).logits
    turned = Scan(np.ascontiguousarray(hu[..., ::-1]), (4, 50, 12, 72))
    turned = stacked(stream_logits(model, turned, config)).logits
    expected = (straight + turned[:, [0, 2, 1, 3]].flip(-1)) / 2
    both = stacked(stream_logits(model, scan, config, PredictOptions(label_swap=swap))).logits
    torch.testing.assert_close(both, expected)


@pytest.mark.parametrize("depth", [7, 1])
@pytest.mark.parametrize(
    "options", [PredictOptions(), PredictOptions(average=True), PredictOptions(keep=2)], ids=str
)
def test_disagreement_is_the_divergence_of_the_groups(options, depth):
    model, config = tiny_model(slice_stride=2)
    for parameter in model.decoder.output_hypernetworks_mlps.parameters():
        parameter.data *= 3  # random logits hardly differ between groups
    scan = Scan(noise(depth, 48, 48, seed=4), WHOLE)
    options = dataclasses.replace(options, batch_size=5)
    plain = stacked(stream_logits(model, scan, config, options))
    looking = dataclasses.replace(options, confidence=True)
    both = stacked(stream_logits(model, scan, config, looking))
    assert_planes_close(Plane(both.logits), plain)
    expected = stacked(naive_planes(model, scan, config, looking))
    assert_planes_close(both, expected)
    if options.keep == 1:
        assert (expected.disagreement.max() > 1e-3) == (depth > 1)


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
    "options",
    [
        PredictOptions(),
        PredictOptions(keep=2),
        PredictOptions(average=True),
        PredictOptions(confidence=True),
    ],
    ids=str,
)
def test_slices_of_air_at_the_ends_are_background_and_change_nothing_else(options):
    model, config = tiny_model(num_slices=5)
    hu = np.full((16, 48, 48), -1000, np.int16)
    hu[6:10, 8:40, 8:40] = np.random.default_rng(5).integers(-100, 300, (4, 32, 32))
    scan = Scan(hu, WHOLE)
    assert body_slices(hu) == (5, 11)
    options = dataclasses.replace(options, batch_size=3)
    whole = stacked(stream_logits(model, scan, config, options))
    seen = []
    encode = model.encode
    model.encode = lambda hu, stored: seen.append(len(hu)) or encode(hu, stored)
    body = dataclasses.replace(options, body=True)
    ours = stacked(stream_logits(model, scan, config, body))
    assert sum(seen) < 16
    assert ours.logits.shape == whole.logits.shape
    for part, other in zip(ours, whole, strict=True):
        assert (part is None) == (other is None)
        if part is not None:
            torch.testing.assert_close(part[5:11], other[5:11], rtol=1e-4, atol=1e-4)
    assert (torch.cat([ours.logits[:5], ours.logits[11:]]).argmax(1) == 0).all()
    hu[:] = -1000
    assert body_slices(hu) == (0, 0)
    empty = stacked(stream_logits(model, scan, config, body))
    assert len(empty.logits) == 16
    assert (empty.logits.argmax(1) == 0).all()


def test_confidence_comes_with_the_same_labels():
    model, config = tiny_model()
    scan = Scan(noise(4, 48, 48, seed=6), WHOLE)
    found = predict_volume(model, scan, config, PredictOptions(confidence=True), output_shape=(6, 30, 40))
    plain = predict_volume(model, scan, config, output_shape=(6, 30, 40))
    assert np.array_equal(found.labels, plain.labels)
    assert plain.confidence is None
    assert found.confidence.shape == (6, 30, 40)
    assert found.confidence.dtype == np.uint8
    assert 200 < found.confidence.min() <= found.confidence.max() <= 255


def test_a_plan_names_every_group_once_and_finishes_slices_in_order():
    _, config = tiny_model()
    plan = make_plan(7, range(7), config, PredictOptions(batch_size=3))
    assert (plan.kept, plan.positions, plan.offsets, plan.compare) == ((1,), (1,), {1: 0}, False)
    assert [batch.centres for batch in plan.batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert plan.batches[0].groups == [[0, 0, 1], [0, 1, 2], [1, 2, 3]]
    assert [batch.needed for batch in plan.batches] == [[0, 1, 2, 3], [2, 3, 4, 5, 6], [5, 6]]
    assert [batch.finished for batch in plan.batches] == [3, 6, 7]
    looking = make_plan(7, range(7), config, PredictOptions(confidence=True, batch_size=6))
    assert (looking.kept, looking.offsets, looking.compare) == ((1,), {0: -1, 1: 0, 2: 1}, True)
    assert [batch.finished for batch in looking.batches] == [
        1,
        3,
        5,
        7,
    ]  # the next group sees one below its centre


def test_a_plan_leaves_out_groups_beside_the_body():
    _, config = tiny_model()
    plan = make_plan(9, range(3, 5), config, PredictOptions(average=True, batch_size=30))
    assert [batch.centres for batch in plan.batches] == [[2, 3, 4, 5]]
    assert make_plan(9, range(0), config, PredictOptions()).batches == []


@torch.inference_mode()
def test_steps_from_slices_to_votes():
    """Two windows a slice: each step gives what the model gives for that window's pixels alone."""
    model, config = tiny_model()
    hu = noise(5, 48, 80)
    scan = Scan(hu, (0, 48, 0, 80))
    tiling = Tiling.over((48, 80), scan.box, 48, torch.device("cpu"))
    assert len(tiling.windows) == 2
    plan = make_plan(5, range(5), config, PredictOptions(keep=2, batch_size=4))
    batch = plan.batches[0]
    features = encode(model, scan, batch.needed, tiling, batch_size=2)
    assert list(features) == batch.needed
    fused = fuse(model, features, batch.groups, plan.positions)
    assert fused.shape[:3] == (len(batch.groups), 2, 2)
    targets = [group[p] for group in batch.groups for p in plan.positions]
    logits = decode(model, scan, fused, features, targets, tiling)
    logits = logits.unflatten(0, (len(batch.groups), 2))
    for w, (top, left) in enumerate(tiling.windows):
        pixels = torch.from_numpy(hu[:, top : top + 48, left : left + 48]).float()
        for d in batch.needed:
            alone = model.encode(pixels[d, None])
            torch.testing.assert_close(features[d].embedding[w], alone.embedding[0], rtol=1e-4, atol=1e-4)
        for g, group in enumerate(batch.groups):
            expected = model(pixels[group][None])[0, list(plan.positions)]
            torch.testing.assert_close(logits[g, :, w], expected, rtol=1e-4, atol=1e-4)
    votes = {d: Votes() for d in range(5)}
    count_votes(votes, logits, batch, plan)
    own = [c + offset for c in batch.centres for offset in plan.offsets.values() if 0 <= c + offset < 5]
    assert {d: vote.kept for d, vote in votes.items()} == {d: own.count(d) for d in range(5)}


def test_compiled_steps_give_the_same_logits():
    """In one graph each; inductor turns these graphs into code, in minutes on a CPU."""
    model, config = tiny_model(num_blocks=1)
    scan, options = Scan(noise(5, 48, 48, seed=7), WHOLE), PredictOptions(batch_size=2)
    plain = stacked(stream_logits(model, scan, config, options))
    compile_steps(model, backend="aot_eager")
    assert_planes_close(stacked(stream_logits(model, scan, config, options)), plain)


def test_probabilities_belong_to_the_labels():
    model, config = tiny_model()
    scan = Scan(noise(3, 48, 48, seed=3), WHOLE)
    probabilities = np.zeros((4, 5, 30, 40), np.float32)
    options = {"output_shape": (5, 30, 40), "probabilities": probabilities}
    labels = predict_volume(model, scan, config, **options).labels
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
    assert np.array_equal(probabilities.argmax(0), labels)
