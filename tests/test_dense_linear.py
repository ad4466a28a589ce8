"""The dense product and its gradients: the linear layer's, whoever computes them."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from axial_fusion.ops import dense_linear as dense
from axial_fusion.ops.dense_linear import dense_linear, dense_product


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


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN's products for inputs of any size, where this torch has them."""
    monkeypatch.setattr(dense, "FEWEST_PRODUCTS", 1)
    monkeypatch.setattr(dense, "FEWEST_OF_WEIGHT", 1)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch was built without oneDNN")


def leaves(*needs, lead=(3, 5)):
    torch.manual_seed(0)
    values = torch.randn(*lead, 20), torch.randn(28, 20), torch.randn(28)
    return [value.requires_grad_(need) for value, need in zip(values, needs, strict=True)]


@pytest.mark.parametrize(
    "needs",
    [
        (True, True, True),
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, True, True),
    ],
)
@pytest.mark.parametrize("lead", [(3, 5), (7,), ()])
def test_gradients_are_those_in_double_precision(onednn, needs, lead):
    given = leaves(*needs, lead=lead)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    y, exact = dense_linear(*given), nn.functional.linear(*wide)
    assert type(y.grad_fn).__name__ == "_ProductBackward"
    for grad in (torch.randn(y.shape), torch.ones(()).expand(y.shape), torch.randn(*lead, 56)[..., ::2]):
        wanted = [i for i, need in enumerate(needs) if need]
        found = torch.autograd.grad(y, [given[i] for i in wanted], grad, retain_graph=True)
        right = torch.autograd.grad(exact, [wide[i] for i in wanted], grad.double(), retain_graph=True)
        for a, b in zip(found, right, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradients_are_differentiated_again_and_batched(onednn):
    given = leaves(True, True, True)
    plain = nn.functional.linear(*given)
    grad = torch.randn(plain.shape, requires_grad=True)
    for products in (dense_linear, nn.functional.linear):
        found = torch.autograd.grad(products(*given).square(), given, grad, create_graph=True)
        again = torch.autograd.grad(sum(t.square().sum() for t in found), (*given, grad))
        if products is dense_linear:
            ours = again
    for a, b in zip(ours, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    grads = torch.randn(4, *plain.shape)
    batched = torch.autograd.grad(dense_linear(*given), given, grads, is_grads_batched=True)
    for i in range(4):
        for a, b in zip(batched, torch.autograd.grad(dense_linear(*given), given, grads[i]), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_what_is_traced_holds_no_product_of_onednn(onednn):
    given = leaves(False, False, False)
    traced = torch.jit.trace(lambda x: dense_linear(x, *given[1:]), given[:1])
    assert "mkldnn" not in str(traced.graph)
    torch.testing.assert_close(traced(given[0]), nn.functional.linear(*given))


@pytest.mark.parametrize("least", [2**22, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_product_of_pairs_takes_any_strides(monkeypatch, least, batch):
    monkeypatch.setattr(dense, "FEWEST_PRODUCTS", least)
    x, y = torch.randn(batch, 33, 20), torch.randn(batch, 28, 20)
    exact = torch.einsum("bmk,bnk->bmn", x.double(), y.double())
    for left, right in ((x, y), (x.mT.contiguous().mT, y), (x, y.mT.contiguous().mT)):
        torch.testing.assert_close(dense_product(left, right).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense_product(x.double(), y.double()), exact)
    with FlopCounterMode(display=False) as counter:
        dense_product(x, y)
    assert counter.get_total_flops() == 2 * batch * 33 * 28 * 20
