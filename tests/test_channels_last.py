"""What a CPU computes with channels last: compiled group norm, doubled sizes, and a model whose convolutions lie so."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from aftersam.config import preset
from aftersam.model.build import build_aftersam
from aftersam.model.layers import CompiledGroupNorm, DoubleSize, GroupNorm, put_channels_last
from axial_fusion.cpu import compiled

TOL = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # relative L2
BUILT = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))
LEVELS = range(1 + (0 if compiled.missing() else compiled._level()))  # instruction sets that this machine has
SHAPES = {  # T, C, h, w, groups
    "stem": (3, 16, 24, 20, 2),
    "decoder": (2, 48, 9, 9, 6),
    "a tile and a rest": (2, 24, 7, 5, 3),
    "odd channels": (2, 7, 5, 3, 1),
    "prime": (1, 13, 11, 1, 13),
    "few pixels": (2, 96, 1, 1, 12),
    "many pixels": (1, 8, 96, 95, 1),
    "wide": (1, 320, 4, 3, 40),
}


def last(*shape, dtype=torch.float32, scale=1.0, shift=0.0):
    x = (scale * torch.randn(shape) + shift).to(dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def close(found, exact, tol, what):
    found, exact = found.detach(), exact.detach()
    assert found.isfinite().all(), what
    error = (found.double() - exact).norm() / exact.norm().clamp_min(1e-9)
    assert error < tol, (what, float(error))


def check(shape, dtype, *, added, relu, shift=3.0, tol=None):
    """Group norm, forward and gradients, against fp64; the ReLU lets through what it let through."""
    torch.manual_seed(0)
    *sizes, groups = shape
    x = last(*sizes, dtype=dtype, scale=2.0, shift=shift)
    more = last(*sizes, dtype=dtype) if added else None
    norm = GroupNorm(groups, sizes[1], relu=relu)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    inputs = [t for t in (x, norm.weight, norm.bias, more) if t is not None]
    y = CompiledGroupNorm.apply(x, more, norm.weight, norm.bias, groups, norm.eps, relu)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, dy)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = F.group_norm(wide[0], groups, wide[1], wide[2], norm.eps)
    if added:
        exact = exact + wide[3]
    if relu:
        exact = torch.where(y.detach() > 0, exact, 0.0)
    expected = torch.autograd.grad(exact, wide, dy.double())
    if sizes[2] * sizes[3] * sizes[1] // groups == 1:  # one number: normalised to 0, with a gradient of 0
        found, expected = found[1:], expected[1:]
    for name, one, truth in zip(("y", *"xwba"), (y, *found), (exact, *expected), strict=False):
        close(one, truth, tol or TOL[dtype], name)
    assert y.is_contiguous(memory_format=torch.channels_last)


@BUILT
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_group_norm_is_that_of_fp64(monkeypatch, level, shape):
    monkeypatch.setattr(compiled, "_level", lambda: level)
    for dtype, added, relu in itertools.product(TOL, (False, True), (False, True)):
        check(shape, dtype, added=added, relu=relu)


@BUILT
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_do_not_change_a_bit(threads):
    before = torch.get_num_threads()
    x, norm = last(9, 16, 64, 64), GroupNorm(2, 16, relu=True)
    try:
        alone, dx = both(x, norm)
        torch.set_num_threads(threads)
        assert all(map(torch.equal, both(x, norm), (alone, dx)))
    finally:
        torch.set_num_threads(before)


def both(x, norm):
    torch.manual_seed(1)
    y = norm(x)
    return y.detach(), torch.autograd.grad(y, x, torch.randn_like(y))[0]


@BUILT
def test_far_from_zero_only_the_digits_of_the_mean_are_lost():
    tol = 2 * 300 / 2 * 2**-24  # mean over deviation, rounded: a difference of squares would lose it squared
    check((2, 16, 40, 40, 2), torch.float32, added=False, relu=False, shift=300.0, tol=tol)


@BUILT
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_group(bad):
    x, norm = last(3, 16, 8, 8).detach(), GroupNorm(2, 16, relu=True)
    clean = norm(x)
    x[1, 3, 2, 2] = bad
    y = norm(x)
    assert y[1, :8].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert torch.equal(y[1, 8:], clean[1, 8:])


@BUILT
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_image_is_the_bias(value):
    norm = GroupNorm(2, 16)
    nn.init.normal_(norm.bias)
    x = torch.full((2, 16, 6, 6), value).to(memory_format=torch.channels_last)
    torch.testing.assert_close(norm(x), norm.bias.detach()[:, None, None].expand_as(x))


def test_other_tensors_take_torchs_norm(monkeypatch):
    norm, x = GroupNorm(2, 16), last(2, 16, 6, 6)
    expected = F.group_norm(x, 2, norm.weight, norm.bias, norm.eps)
    monkeypatch.setattr(compiled, "norm_forward", None)  # which nobody may call below
    torch.testing.assert_close(norm(x.contiguous()), expected)
    torch.testing.assert_close(norm.double()(x.double()), expected.double())
    norm.float()
    slope = torch.func.grad(lambda t: norm(t).square().sum())(x.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(expected.square().sum(), x)[0])
    monkeypatch.setattr(compiled, "missing", lambda: "not built")
    torch.testing.assert_close(norm(x), expected)


@BUILT
def test_a_second_derivative_is_refused():
    x, norm = last(2, 16, 6, 6), GroupNorm(2, 16)
    (dx,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_doubled_size_is_the_transposed_convolution(dtype):
    torch.manual_seed(0)
    layer = DoubleSize(24, 10).to(dtype)
    put_channels_last(layer)
    x = last(3, 24, 5, 7, dtype=dtype)
    inputs = [x, layer.weight, layer.bias]
    y, exact = layer(x), F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(y, exact)
    assert y.is_contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(exact, inputs, dy))
    torch.testing.assert_close(layer(x, output_size=[11, 15]).shape, torch.Size([3, 10, 11, 15]))


def test_a_model_with_channels_last_is_the_same_model():
    torch.manual_seed(0)
    model = build_aftersam(preset("small").model, 5)
    for parameter in model.parameters():  # of a step, where no branch is zero any more
        nn.init.normal_(parameter, std=0.05)
    hu = 300 * torch.randn(1, 5, 3, 96, 96)
    before = gradients(model, hu)
    names = [*model.state_dict()]
    put_channels_last(model)
    assert [*model.state_dict()] == names
    stem = model.encoder.stem.levels[0][0].weight
    assert stem.is_contiguous(memory_format=torch.channels_last)
    assert not stem.is_contiguous()
    for (name, one), other in zip(gradients(model, hu).items(), before.values(), strict=True):
        close(one, other.double(), 2e-3, name)


def test_without_compiled_kernels_a_model_is_trained_as_it_is(monkeypatch):
    monkeypatch.setattr(compiled, "missing", lambda: "not built")
    layer = DoubleSize(8, 4)
    put_channels_last(layer, trained=True)
    assert layer.weight.is_contiguous()
    put_channels_last(layer)
    assert not layer.weight.is_contiguous()


def gradients(model, hu):
    logits = model(hu)
    model.zero_grad()
    logits.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}
