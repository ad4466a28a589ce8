"""The dense product without a gradient: the linear layer's, whoever computes it."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from axial_fusion.ops.dense_linear import dense_linear


@pytest.mark.parametrize(("lead", "bias"), [((4, 3), True), ((7,), False), ((), True), ((0, 5), True)])
def test_the_dense_product_is_the_linear_layer_whoever_computes_it(lead, bias):
    x, weight, b = torch.randn(*lead, 20), torch.randn(28, 20), torch.randn(28) if bias else None
    exact = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    y = dense_linear(x, weight, b)
    assert y.shape == exact.shape
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    strided = dense_linear(x.mT.contiguous().mT if x.dim() > 1 else x, weight.t().contiguous().t(), b)
    torch.testing.assert_close(strided.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_dense_product_under_autograd_autocast_transforms_modes_and_compile():
    x, weight, bias = torch.randn(6, 20), torch.randn(28, 20), torch.randn(28)
    exact = x @ weight.t() + bias
    leaf = weight.clone().requires_grad_()
    dense_linear(x, leaf, bias).sum().backward()
    torch.testing.assert_close(leaf.grad, x.sum(0).expand(28, -1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dense_linear(x, weight, bias).dtype == torch.bfloat16
    torch.testing.assert_close(torch.vmap(dense_linear, (0, None, None))(x, weight, bias), exact)
    gradient = torch.func.grad(lambda x: dense_linear(x, weight, bias).sum())(x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(6, -1))
    compiled = torch.compile(dense_linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight, bias), exact)
    assert dense_linear(x.half(), weight.half(), bias.half()).dtype == torch.float16
    with FlopCounterMode(display=False) as counter:
        dense_linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 6 * 20 * 28
