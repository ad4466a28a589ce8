"""The rivals of the accuracy table: patches, the loop that trains them, and the networks of slice groups."""

import dataclasses

import numpy as np
import pytest
import torch

from aftersam.config import preset
from aftersam.data.cache import cache_cases
from aftersam.data.dataset import find_dataset
from aftersam.model.build import build_image_encoder
from aftersam.model.mask_decoder import BACKGROUND_LEAD
from aftersam.training.losses import segmentation_loss
from benchmarks.accuracy.rivals.patch_training import (
    fit,
    lead_background,
    patches,
    random_patch,
    segment_by_patches,
    with_sound_gradients,
)
from benchmarks.accuracy.rivals.slice_groups import AdaptedBlock, build_after_unet, build_msa, group_loss
from benchmarks.accuracy.systems import SYSTEMS
from toy_scans import write_scans

TINY = preset("tiny")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("rivals") / "scans")


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.kind == "patch"])
def test_every_network_of_patches_builds_and_is_about_as_large_as_ours(name):
    system = SYSTEMS[name]
    if system.missing():
        pytest.skip(system.missing())
    network = system.build(4).eval()
    assert 2e6 < sum(p.numel() for p in network.parameters()) < 7e6
    side = max(system.multiple, 16)
    image = torch.randn(1, 1, 2 * side, side, side)
    with torch.inference_mode():
        logits = network(image)
        led = lead_background(network, 4)(image)
    assert logits.shape == (1, 4, 2 * side, side, side)
    torch.testing.assert_close(led[:, 0], logits[:, 0] + BACKGROUND_LEAD)
    assert torch.equal(led[:, 1:], logits[:, 1:])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bfloat16_gradients_of_shallow_convolutions_read_no_foreign_memory(depth):
    convolution = torch.nn.Conv3d(32, 32, 3, padding=1, bias=False)
    names = list(convolution.state_dict())
    network = with_sound_gradients(torch.nn.Sequential(convolution))[0]
    assert list(network.state_dict()) == names
    image, gradient = torch.randn(2, 2, 32, depth, 4, 4)
    (exact,) = torch.autograd.grad(network(image), network.weight, gradient)
    for _ in range(8):
        scraps = [torch.full((1 << size,), 1e30) for size in range(8, 21)]
        del scraps  # so that memory which nobody writes is large
        with torch.autocast("cpu", torch.bfloat16):
            result = network(image)
        (found,) = torch.autograd.grad(result, network.weight, gradient.to(result.dtype))
        assert (found - exact).norm() < 0.01 * exact.norm()


def cached(scans, tmp_path):
    return list(
        cache_cases(find_dataset(scans), ["case0", "case1"], TINY.data, tmp_path, training=["case0"]).values()
    )


def test_patches_are_parts_of_the_scan_with_air_beyond_it(scans, tmp_path):
    scan = cached(scans, tmp_path)[0]
    depth = scan.shape[0]
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(20):
        hu, labels = random_patch(scan, (depth + 4, 24, 24), rng)
        assert hu.shape == labels.shape == (depth + 4, 24, 24)
        assert (hu[:2] == -1000).all()
        assert (hu[-2:] == -1000).all()
        assert not labels[:2].any()
        inner = hu[2:-2]
        places = np.lib.stride_tricks.sliding_window_view(scan.hu[0], (24, 24))
        assert (places == inner[0]).all((-2, -1)).any()
        held += bool(labels.any())
    assert held >= 13


def test_the_patch_loop_learns_and_repeats_itself(scans, tmp_path):
    config = dataclasses.replace(TINY.train, max_steps=30, learning_rate=0.1)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        network = torch.nn.Conv3d(1, 7, 1)
        losses = []

        def loss(model, batch, losses=losses):
            value = torch.nn.functional.cross_entropy(model(batch["image"]), batch["labels"][:, 0])
            losses.append(value.item())
            return value

        source = patches(cached(scans, tmp_path), (8, 16, 16), config)
        spent = fit(network, source, loss, config, device=CPU, precision=torch.float32)
        assert spent.steps == 30
        assert spent.peak_mib > 10
        found.append((losses, network.weight.detach().clone()))
    assert np.mean(found[0][0][-5:]) < np.mean(found[0][0][:5]) - 0.2
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_running_statistics_are_averaged_as_the_weights_are(monkeypatch):
    config = dataclasses.replace(TINY.train, max_steps=3, average=0.9)
    network, after, step = torch.nn.BatchNorm1d(1), [], torch.optim.AdamW.step

    def state():
        return [t.detach().clone() for t in (network.weight, network.running_mean, network.running_var)]

    def noted(self, *args, **more):
        step(self, *args, **more)
        after.append(state())

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    inputs = iter([{"x": torch.randn(8, 1) + i} for i in range(3)])
    fit(network, inputs, lambda model, batch: (model(batch["x"]) - 3).square().mean(), config,
        device=CPU, precision=torch.float32)  # fmt: skip
    for kept, (first, second, third) in zip(state(), zip(*after, strict=True), strict=True):
        share = 1 / 3 / 0.9  # of a step in the time constant
        torch.testing.assert_close(kept, torch.lerp(torch.lerp(first, second, 0.5), third, share))
    assert not torch.equal(network.running_mean, after[-1][1])


def test_a_row_without_a_limit_and_a_loss_that_is_not_finite_are_refused():
    config = dataclasses.replace(TINY.train, max_steps=None)
    with pytest.raises(ValueError, match="--max-minutes"):
        fit(torch.nn.Linear(1, 1), iter([]), group_loss, config, device=CPU, precision=torch.float32)
    config = dataclasses.replace(config, max_steps=3)
    with pytest.raises(FloatingPointError, match="step 1"):
        fit(torch.nn.Linear(1, 1), iter([{}]), lambda model, _: model.weight.sum() * float("nan"), config,
            device=CPU, precision=torch.float32)  # fmt: skip


def test_patches_slide_over_a_scan_and_their_logits_return_to_its_grid():
    """A network that is a threshold: its labels on a grid of twice the size are the threshold of the interpolation."""

    class Threshold(torch.nn.Module):
        def forward(self, x):
            return torch.cat([torch.zeros_like(x), 20 * (x - 0.5)], 1)

    hu = np.random.default_rng(0).integers(-200, 400, (9, 20, 22)).astype(np.int16)
    labels = segment_by_patches(Threshold(), hu, (8, 8, 8), (9, 40, 44), device=CPU, precision=torch.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(hu)[None].float(), (40, 44), mode="bilinear")[0]
    sure = (smooth - 100).abs() > 1
    assert ((torch.from_numpy(labels) == 1) == (smooth > 100))[sure].all()


def group_model(build):
    torch.manual_seed(0)
    model = dataclasses.replace(
        TINY.model, image_size=48, **({"prompts": "point"} if build is build_msa else {})
    )
    return build(model, 4).eval()


def test_after_unet_looks_at_the_neighbouring_slices():
    network = group_model(build_after_unet)
    hu = torch.randn(1, 3, 48, 48) * 100
    other = hu.clone()
    other[:, 0] += 300
    with torch.inference_mode():
        one, two = (network(x, query_index=(1,)) for x in (hu, other))
    assert one.shape == (1, 1, 4, 48, 48)
    assert (one - two).abs().max() > 1e-3


def test_networks_of_slice_groups_go_by_the_loss_of_the_preset():
    network = group_model(build_after_unet)
    batch = {"hu": torch.randn(1, 3, 48, 48) * 100, "labels": torch.zeros(1, 3, 48, 48, dtype=torch.long)}
    batch["labels"][..., 10:20, 10:20] = 1
    keys = {"dice": "all", "ce_foreground_weight": 3.0, "ce_hardest": 0.2}
    with torch.inference_mode():
        expected = segmentation_loss(network(batch["hu"]), batch["labels"], **keys).total
        assert group_loss(network, batch, config=dataclasses.replace(TINY.train, **keys)) == expected
        assert group_loss(network, batch, config=TINY.train) != expected


def test_an_adapter_starts_as_the_block_that_it_adapts():
    encoder = build_image_encoder("tiny", image_size=48)
    x = torch.randn(2, 6, 6, 128)
    for block in encoder.blocks:
        torch.testing.assert_close(AdaptedBlock(block, 128)(x), block(x))


def test_msa_gives_each_organ_the_lead_over_background_of_its_own_prompt():
    network = group_model(build_msa)
    labels = torch.zeros(1, 1, 48, 48, dtype=torch.long)
    labels[..., 10:20, 10:20], labels[..., 30:40, 5:9] = 1, 3
    hu = torch.randn(1, 1, 48, 48) * 100
    with torch.inference_mode():
        logits = network(hu, labels=labels)
        network.decoder.organ = 3
        alone = network(hu, labels=labels)
    assert logits.shape == (1, 1, 4, 48, 48)
    assert not logits[:, :, 0].any()
    torch.testing.assert_close(logits[:, :, 3], alone[:, :, 1] - alone[:, :, 0])
    network.decoder.organ = None
    assert group_loss(network, {"hu": hu, "labels": labels}, config=TINY.train).isfinite()
    assert network.decoder.organ is None
