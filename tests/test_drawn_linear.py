"""The linear ops by property: any layout, dtype, class and set of gradients gives what the reference gives in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from axial_fusion import LoRA, lora_linear, lora_qkv, reference
from axial_fusion.ops import dense_linear as dense
from axial_fusion.ops.dense_linear import dense_linear
from axial_fusion.ops.row_norm import row_norm
from drawn import FEW, MANY, asked, exact, tensors

TOL = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 0.15}
SIZES = st.integers(0, 20)
LEADS = st.lists(st.integers(0, 4), max_size=3)


class Marked(torch.Tensor):
    """A subclass that changes nothing."""


@st.composite
def dtypes(draw, backend):
    """The dtype of x and the base weights; the interpreter has no bf16 product."""
    return draw(st.sampled_from([d for d in TOL if backend != "triton" or d != torch.bfloat16]))


def assert_same(ours, theirs, given, tol, grad):
    """One result and its gradients, ours against fp64; the error is of the norm, with a floor of one rounding."""
    mine, truth = ours(*given), theirs(*(leaves := exact(*given)))
    pairs = [(mine, truth)]
    wanted = [(t, e) for t, e in zip(given, leaves, strict=True) if t is not None and t.requires_grad]
    assert mine.requires_grad == bool(wanted)
    if wanted:
        inputs, truths = zip(*wanted, strict=True)
        found = torch.autograd.grad(mine, inputs, grad.to(mine.dtype))
        pairs += zip(found, torch.autograd.grad(truth, truths, grad.double()), strict=True)
        for tensor, gradient in zip(inputs, found, strict=True):
            assert gradient.dtype == tensor.dtype
    for value, expected in pairs:
        assert value.shape == expected.shape
        assert (value.double() - expected).norm() <= tol * (1 + expected.norm())


def drawn_linear(data):
    """One call of lora_linear on any engine."""
    backend = data.draw(st.sampled_from(["auto", "torch", "augmented", "triton"]))
    dtype = data.draw(dtypes(backend))
    lead, k, n, rank = (data.draw(s) for s in (LEADS, SIZES, SIZES, st.integers(0, 5)))
    x, weight, bias = (
        data.draw(tensors(shape, dtype, scale))
        for shape, scale in (((*lead, k), 1), ((n, k), 0.3), ((n,), 1))
    )
    bias = data.draw(st.sampled_from([bias, None]))
    a = b = None
    if rank:
        dtype = data.draw(st.sampled_from([dtype, torch.float32]))
        a, b = data.draw(tensors((rank, k), dtype, 0.3)), data.draw(tensors((n, rank), dtype, 0.3))
    leaves = data.draw(asked(x, weight, bias, a, b))
    marked = data.draw(st.sampled_from([None, None, 0, 1]))
    options = {"scaling": data.draw(st.sampled_from([1.0, 0.5, -2.0, 0.0]))}
    seed, mask = data.draw(st.integers(0, 2**40)), {}
    if rank and data.draw(st.booleans()):
        options["dropout_p"] = 0.3
        torch.manual_seed(seed)
        mask["seed"] = torch.randint(2**62, ())  # the first that the op draws

    def ours(*given):
        torch.manual_seed(seed)
        given = list(given)
        if marked is not None:
            given[marked] = given[marked].as_subclass(Marked)
        return lora_linear(*given, **options, backend=backend)

    grad = data.draw(tensors((*lead, n), x.dtype))
    assert_same(ours, lambda *t: reference.lora_linear(*t, **options, **mask), leaves, TOL[x.dtype], grad)


def drawn_qkv(data):
    """One call of lora_qkv on any engine."""
    backend = data.draw(st.sampled_from(["auto", "augmented", "triton", "torch"]))
    dtype = data.draw(dtypes(backend))
    lead, c, rank = data.draw(LEADS), data.draw(st.integers(1, 20)), data.draw(st.integers(0, 5))
    narrow = data.draw(st.sampled_from([dtype, torch.float32]))  # of norm and LoRA
    shapes = [
        ((*lead, c), dtype, 1),
        ((c,), narrow, 1),
        ((c,), narrow, 1),
        ((3 * c, c), dtype, 0.3),
        ((3 * c,), dtype, 1),
    ]
    if rank:
        shapes += 2 * [((rank, c), narrow, 0.3), ((c, rank), narrow, 0.3)]
    leaves = data.draw(asked(*(data.draw(tensors(*shape)) for shape in shapes)))
    eps = 0.1  # rows that are constant, expanded, must not divide by next to nothing

    def ours(x, gamma, beta, weight, bias, *lora):
        pairs = [LoRA(*lora[:2], 0.5), LoRA(*lora[2:], 0.5)] if lora else [None, None]
        return lora_qkv(x, gamma, beta, weight, bias, *pairs, eps=eps, backend=backend)

    def theirs(x, gamma, beta, weight, bias, *lora):
        z = reference.layer_norm(x, gamma, beta, eps)
        pairs = (lora[:2], (), lora[2:]) if lora else ((), (), ())
        parts = zip(weight.split(c), bias.split(c), pairs, strict=True)
        return torch.cat([reference.lora_linear(z, w, v, *ab, scaling=0.5) for w, v, ab in parts], -1)

    grad = data.draw(tensors((*lead, 3 * c), dtype))
    assert_same(ours, theirs, leaves, TOL[dtype], grad)


def drawn_norm(data):
    """One call of row_norm on either engine."""
    backend, narrow = data.draw(st.sampled_from(["torch", "triton"])), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(list(TOL)))
    lead, c = data.draw(LEADS), data.draw(st.integers(1, 20))
    of_weights = torch.float32 if narrow else dtype
    leaves = data.draw(asked(
        data.draw(tensors((*lead, c), dtype)), *(data.draw(tensors((c,), of_weights)) for _ in range(2))
    ))  # fmt: skip
    grad = data.draw(tensors((*lead, c), dtype))
    assert_same(
        lambda *t: row_norm(*t, eps=0.1, backend=backend),
        lambda *t: reference.layer_norm(*t, 0.1),
        leaves,
        TOL[dtype],
        grad,
    )


def drawn_dense(data):
    """One dense product, with and without autograd."""
    lead, k, n = data.draw(LEADS), data.draw(SIZES), data.draw(SIZES)
    given = [data.draw(tensors(shape)) for shape in ((*lead, k), (n, k), (n,))]
    leaves = data.draw(asked(*given))
    grad = data.draw(tensors((*lead, n)))
    assert_same(dense_linear, nn.functional.linear, leaves, TOL[torch.float32], grad)


CASES = pytest.mark.parametrize(
    "case", [drawn_linear, drawn_qkv, drawn_norm, drawn_dense], ids=lambda f: f.__name__
)
pytestmark = pytest.mark.usefixtures("nan_memory", "small_onednn")


@pytest.fixture
def small_onednn(monkeypatch):
    """oneDNN's products for inputs of any size."""
    monkeypatch.setattr(dense, "FEWEST_PRODUCTS", 1)
    monkeypatch.setattr(dense, "FEWEST_OF_WEIGHT", 1)


@CASES
def test_fifty_drawn_calls(case):
    FEW(given(st.data())(case))()


@pytest.mark.slow
@pytest.mark.drawn
@CASES
def test_a_thousand_drawn_calls(case):
    MANY(given(st.data())(case))()
