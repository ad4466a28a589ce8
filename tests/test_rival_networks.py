"""TransUNet, Swin-Unet and CoTr: the size of the published form, any grid, gradients, and nnU-Net's voxel order."""

import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from aftersam.config import preset
from benchmarks.accuracy.rivals import nnunet
from benchmarks.accuracy.rivals.cotr import CoTr, build_cotr, centres
from benchmarks.accuracy.rivals.nnunet import spacing_mm
from benchmarks.accuracy.rivals.patch_training import with_sound_gradients
from benchmarks.accuracy.rivals.swin_unet import SwinUnet, build_swin_unet
from benchmarks.accuracy.rivals.transunet import TransUNet, build_transunet
from benchmarks.accuracy.systems import SYSTEMS

SMALL = preset("small").model


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("build", "published"),
    [
        # R50-ViT-B_16 of two classes at 224 pixels, counted in the authors' code
        (lambda: TransUNet(2, (14, 14)), 105.28e6),
        # tiny, nine classes; the output convolution of the authors' code has no bias
        (lambda: SwinUnet(9), 27.17e6),
        # as others counted it, with the three output convolutions of deep supervision
        (lambda: CoTr(14), 41.93e6),
    ],
    ids=["TransUNet", "Swin-Unet", "CoTr"],
)
def test_the_full_form_has_the_published_number_of_parameters(build, published):
    with torch.device("meta"):
        assert parameters(build()) == pytest.approx(published, rel=0.003)


def network_of(name):
    torch.manual_seed(0)
    if name == "cotr":
        return with_sound_gradients(build_cotr(4))  # as the rows train it
    return {"transunet": build_transunet, "swin_unet": build_swin_unet}[name](SMALL, 4).encoder.network


SHAPES = [
    ("transunet", (2, 3, 128, 128)),
    ("transunet", (1, 3, 50, 71)),
    ("swin_unet", (2, 3, 96, 96)),
    ("swin_unet", (1, 3, 50, 71)),
    ("cotr", (1, 1, 16, 32, 48)),
    ("cotr", (1, 1, 19, 37, 50)),
]


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
def test_logits_have_the_grid_of_the_input_and_every_parameter_a_gradient(name, shape):
    if SYSTEMS[name].missing():
        pytest.skip(SYSTEMS[name].missing())
    network = network_of(name)
    for parameter in network.parameters():
        if not parameter.any():  # what starts as zero keeps the gradient of others at zero
            torch.nn.init.normal_(parameter, std=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(shape))
    assert logits.shape == (shape[0], 4, *shape[2:])
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", ["transunet", "swin_unet"])
def test_2d_networks_segment_each_slice_alone_and_start_at_background(name):
    if SYSTEMS[name].missing():
        pytest.skip(SYSTEMS[name].missing())
    torch.manual_seed(0)
    model = SYSTEMS[name].build(SMALL, 4).eval()
    assert 2e6 < parameters(model) < 7e6
    hu = torch.randn(1, 3, 64, 64) * 100
    other = hu.clone()
    other[:, 0] += 300
    with torch.inference_mode():
        one, two = (model(x, query_index=(1,)) for x in (hu, other))
    assert one.shape == (1, 1, 4, 64, 64)
    torch.testing.assert_close(one, two)
    assert (one.argmax(2) == 0).float().mean() > 0.9


def test_transunet_interpolates_its_positions_to_another_grid():
    network = TransUNet(4, (8, 8), width=16, depths=(1, 1, 1), dim=12, num_layers=1, num_heads=2)
    with torch.no_grad():
        network.position.copy_(torch.linspace(0, 1, 8).expand(1, 12, 8, 8))
        features = torch.zeros(1, 12, 4, 6)
        network.blocks, network.norm = torch.nn.Identity(), torch.nn.Identity()
        positions = network._attend(features)[0, 0]
    assert positions.shape == (4, 6)
    assert (positions.diff(dim=1) > 0).all()
    torch.testing.assert_close(positions[0], positions[-1])


def test_an_offset_of_cotr_is_in_tokens_of_the_level_that_is_sampled():
    """One-hot weights on the first point of head 0, two tokens along w: the attention moves a level by two tokens."""
    shapes = [(3, 4, 8), (2, 3, 5)]
    attention = CoTr(2, widths=(4, 6, 6, 6), num_layers=1, points=1).layers[0].attention
    value = torch.randn(1, 3 * 4 * 8 + 2 * 3 * 5, 6)
    with torch.no_grad():
        for layer in (attention.value, attention.out):
            layer.weight.copy_(torch.eye(6))
            layer.bias.zero_()
        attention.offsets.bias.copy_(torch.tensor([2.0, 0, 0]).repeat(12))
        attention.weights.bias.copy_(torch.tensor([20.0, -20.0]).repeat(6))  # the first level alone
        where = torch.cat([centres(shape, value.device) for shape in shapes])
        moved = attention(torch.zeros_like(value), value, where, shapes)
    before, after = (x[:, : 3 * 4 * 8].view(3, 4, 8, 6) for x in (value, moved))
    torch.testing.assert_close(after[:, :, :-2], before[:, :, 2:])


def test_nnunets_voxel_size_is_given_in_the_order_of_the_scan():
    plans = {
        "configurations": {"2d": {"spacing": [1.0, 2.0]}, "3d_fullres": {"spacing": [5.0, 1.0, 2.0]}},
        "original_median_spacing_after_transp": [5.0, 1.0, 2.0],
        "transpose_backward": [1, 2, 0],  # the scan has its thick slices last
    }
    assert spacing_mm(plans, "3d_fullres") == spacing_mm(plans, "2d") == [1.0, 2.0, 5.0]


def test_nnunets_draws_are_functions_of_the_rows_seed(tmp_path, monkeypatch):
    """Its data loaders draw from numpy's global generator, its augmentation from those of numpy, torch and Python."""

    class Drawing:
        def __init__(self, *_):
            self.drawn = random.random(), np.random.random(), torch.rand(()).item()

    name = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    for i in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:i])
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    sys.modules[name].nnUNetTrainer = Drawing
    monkeypatch.setattr(nnunet, "read_json", lambda path: {})
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    threads = torch.get_num_threads()

    def drawn(seed):
        job = SimpleNamespace(
            seed=seed, home=tmp_path, device=torch.device("cpu"), dataset=SimpleNamespace(labels={1: "heart"}),
            limits=SimpleNamespace(threads=threads), system=SYSTEMS["nnunet_3d"],
            config=lambda: preset("small"),
        )  # fmt: skip
        return nnunet._trainer(job).drawn

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
