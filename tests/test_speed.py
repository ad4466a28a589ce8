"""Every provider of the speed benchmarks computes what it says, with the FLOPs that it says."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aftersam.model.build import build_aftersam, build_image_encoder
from axial_fusion import reference
from bench_cases import SMALL, SQUARE
from benchmarks import harness
from benchmarks.__main__ import SUBJECTS
from benchmarks.harness import measure
from benchmarks.speed import axial_attention, fusion, image_encoder, predict, rel_pos, train_step
from benchmarks.speed import window as windowed
from benchmarks.speed.fusion import OURS

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_every_subject_has_one_provider_of_ours_and_a_rival():
    for name, cases in SUBJECTS.items():
        facts, _, providers = next(iter(cases(torch.device("cpu"), torch.float32)))
        roles = [p.role for p in providers.values()]
        assert facts["subject"].replace(" ", "_") == name
        assert roles.count("ours") == 1, name
        assert "rival" in roles, name


def test_rivals_that_are_absent_are_named():
    shape = axial_attention.Shape(1, 2, 3, 1, 16)
    found = axial_attention.providers(shape, torch.device("cpu"))
    absent = {name: p.missing for name, p in found.items() if p.call is None}
    assert absent["FlexAttention"] == "no gradient on a CPU"
    assert {"varlen", "xformers"} <= absent.keys()


def test_every_provider_of_the_fusion_is_right():
    tensors = fusion.inputs(SMALL, torch.float32, torch.device("cpu"))
    records = measure(SQUARE, tensors, fusion.providers(SMALL), budget_s=0.01)
    assert [(r["provider"], r["status"]) for r in records] == [
        (name, "ok") for name in ("naive 3D", "SDPA 3D", "SDPA factorised", OURS)
    ]


def test_the_reference_holds_a_part_of_the_scores_and_gives_the_same(monkeypatch):
    """The fp64 equations against softmax over whole rows by torch, on their own path."""
    x, *weights = fusion.inputs(SMALL, torch.float64, torch.device("cpu"))
    expected = fusion.joint_attention(x, *weights, heads=2, attend=F.scaled_dot_product_attention)
    found = fusion.reference_joint(x, *weights, heads=2)
    torch.testing.assert_close(found, expected)
    whole = harness.peak_bytes(lambda: fusion.reference_joint(x, *weights, heads=2))
    monkeypatch.setattr(fusion, "SCORES_HELD", 2 * 2 * 27 * 5)  # five of 27 queries, of two heads and groups
    torch.testing.assert_close(fusion.reference_joint(x, *weights, heads=2), expected)
    assert harness.peak_bytes(lambda: fusion.reference_joint(x, *weights, heads=2)) < whole


@pytest.mark.parametrize("name", ["naive 3D", "SDPA factorised"])
def test_flops_are_those_that_torch_counts(name):
    provider = fusion.providers(SMALL)[name]
    tensors = fusion.inputs(SMALL, torch.float32, torch.device("cpu"))
    # The counter knows the products of the math path, not the fused kernel of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        provider.call(*tensors)
    assert counter.get_total_flops() == provider.flops


def test_encoder_flops_are_those_that_torch_counts():
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        encoder = build_image_encoder("vit_b", image_size=320)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, 320, 320))
    assert counter.get_total_flops() == image_encoder.flops("vit_b", 320)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_provider_of_the_encoder_is_right(dtype):
    shape = image_encoder.Shape("vit_b", 48, 2)
    found = image_encoder.providers(shape, torch.device("cpu"), dtype)
    gate = harness.Gate([torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)).to(dtype)])
    for name, provider in found.items():
        assert (provider.call is None) == (name == "FlexAttention")
        if provider.call is not None:
            assert gate.check(provider)["status"] == "ok", name
    image_encoder.encoder.cache_clear()
    image_encoder.weights.cache_clear()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [0, 3])
def test_every_form_of_relative_positions_is_right(window):
    """FlexAttention too, forward alone and not fused, as a CPU has it."""
    torch.manual_seed(0)
    if window:
        inputs = [
            torch.randn(1, 5, 4, 3, 2, 16),
            torch.randn(96),
            *(torch.randn(1, 5, 4, 2, 3) for _ in "hw"),
        ]
        expected = reference.window_attention(*inputs, window=window)
    else:
        inputs = [*torch.randn(3, 1, 16, 2, 16), torch.randn(1, 2, 4, 16), torch.randn(1, 2, 16, 4)]
        expected = reference.rel_pos_attention(*inputs, grid=(4, 4))
    for attend in rel_pos.ATTEND.values():
        y = windowed.padded(*inputs, window=window, attend=attend) if window else attend(*inputs)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ["lora", "frozen"])
def test_every_form_of_a_training_step_is_right(encoder):
    """In fp32, loss and gradient; what is timed in bf16 is the same function to its rounding."""
    # in the wide stem a ReLU lies so near its kink that rounding decides a gradient
    sizes = {"image_size": 64, "num_slices": 3, "num_blocks": 1, "stem": "slim"}
    config = dataclasses.replace(train_step.SMALL, encoder=encoder, **sizes)
    _, inputs, found = train_step.case("small", config, torch.device("cpu"), torch.bfloat16)
    gate = harness.Gate(inputs)
    for name, provider in found.items():
        assert gate.check(provider)["status"] == "ok", name
        loss = provider.call(*inputs)
        assert loss != provider.checked(*inputs), "autocast is not on"
        assert loss.item() == pytest.approx(provider.checked(*inputs).item(), rel=1e-2)
    assert inputs[1].numel() == sum(
        p.numel() for p in build_aftersam(config, train_step.CLASSES).parameters() if p.requires_grad
    )


def test_the_flops_of_prediction_are_those_that_running_it_takes():
    shape = predict.Shape("tiny", 7, 3, 48)
    hu = 300 * torch.randn(7, 48, 48, generator=torch.Generator().manual_seed(0))
    found, counted = [], []
    for call in (predict.stream, predict.loop):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            found.append(call(hu, shape))
        counted.append(counter.get_total_flops())
    assert counted == pytest.approx(predict.flops(shape), rel=1e-3)  # positions are made once a batch
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0].double(), predict.exact(hu.double(), shape), rtol=1e-4, atol=1e-4)
