"""Layers that parts of the model share."""

import pytest
import torch
from torch.nn import functional as F

from aftersam.model.layers import ConvStem, GroupNorm, SpreadGroupNorm, normalise


def test_windows_become_sams_normalised_channels():
    hu = torch.tensor([[-2000.0, -160.0, 40.0, 240.0, 3000.0]])
    image = normalise(hu, ((-160, 240), (-160, 240), (-160, 240)))
    expected = (torch.tensor([0, 0, 0.5, 1, 1]) * 255 - 123.675) / 58.395
    torch.testing.assert_close(image[0, 0], expected)
    assert image.shape == (3, 1, 5)
    torch.testing.assert_close(normalise(hu, ((-160, 240),)), image)
    unit = normalise(hu, ((-160, 240),), unit=True)  # MedSAM's weights were trained on [0, 1]
    torch.testing.assert_close(unit[2, 0], torch.tensor([0, 0, 0.5, 1, 1]))
    with pytest.raises(ValueError, match="1 or 3"):
        normalise(hu, ((0, 1), (0, 1)))


def test_a_stem_alone_gives_skips():
    stem = ConvStem(3, channels=(4, 8, 16))
    assert stem.skip_channels == (4, 8, 16)
    assert [tuple(s.shape) for s in stem(torch.zeros(2, 3, 16, 24))] == [
        (2, 4, 16, 24),
        (2, 8, 8, 12),
        (2, 16, 4, 6),
    ]


@pytest.mark.parametrize("shape", [(3, 6, 5, 7), (1, 4, 1, 2), (2, 6, 33, 64)])
@pytest.mark.parametrize("dense", [True, False])
def test_a_spread_group_norm_is_torchs(shape, dense):
    torch.manual_seed(0)
    x = 3 * torch.randn(shape, dtype=torch.float64) + 50  # far from 0, where a difference of squares is lost
    x = x if dense else x.to(memory_format=torch.channels_last)
    grad = torch.randn(shape, dtype=torch.float64)
    weight, bias = (
        torch.randn(2, shape[1], dtype=torch.float64) if dense else torch.randn(shape[1], 2).double().t()
    )
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    exact = F.group_norm(x, 2, weight, bias, 1e-5)
    expected = torch.autograd.grad(exact, inputs, grad)
    found = SpreadGroupNorm.apply(x, weight, bias, 2, 1e-5)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, grad), expected)
    low = [t.detach().float() for t in inputs]
    torch.testing.assert_close(SpreadGroupNorm.apply(*low, 2, 1e-5).double(), exact, rtol=1e-4, atol=1e-4)
    (only,) = torch.autograd.grad(
        SpreadGroupNorm.apply(x.detach(), weight, bias.detach(), 2, 1e-5), weight, grad
    )
    torch.testing.assert_close(only, expected[1])


@pytest.mark.gpu
def test_a_group_norm_under_autocast_is_in_fp32():
    torch.manual_seed(0)
    norm = GroupNorm(4, 32).cuda()
    x = torch.randn(3, 32, 256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        found, exact = norm(x), F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)
    assert found.dtype == exact.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(found)
    (left,), (right,) = (torch.autograd.grad(y, x, grad) for y in (found, exact))
    torch.testing.assert_close(left, right, rtol=1e-2, atol=1e-3)
