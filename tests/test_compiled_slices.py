"""The compiled attention within slices: values and gradients, strides, threads, and what looks on."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import test_compiled
from axial_fusion import axial_fusion_attention, reference, select_backend, slice_attention
from axial_fusion.cpu import compiled
from axial_fusion.reference import AttentionWeights
from test_compiled import BUILT, LEVELS, TOL, threads  # noqa: F401  a fixture

SHAPES = {  # B, N, P, M, D
    "one of everything": (1, 1, 1, 1, 1),
    "small": (1, 5, 144, 4, 32),
    "a tile": (1, 2, 32, 2, 32),
    "a tile and one": (2, 1, 33, 3, 32),
    "a key block": (1, 1, 128, 2, 64),
    "a key block and one": (1, 1, 129, 1, 24),
    "SAM": (1, 1, 300, 2, 80),
    "D 3": (1, 3, 17, 2, 3),
    "D 8": (2, 2, 31, 2, 8),
    "D 130": (1, 1, 47, 1, 130),
    "more keys than a cache": (1, 1, 1100, 1, 48),
}
pytestmark = [pytest.mark.usefixtures("nan_memory"), BUILT]


def inputs(shape, dtype=torch.float32, spread=1.0):
    """q, k, v of a packed projection that need gradients, and dY."""
    torch.manual_seed(0)
    batch, slices, positions, heads, dim = shape
    q, k, v = torch.randn(batch, slices, positions, 3, heads, dim).unbind(3)
    qkv = [t.to(dtype).requires_grad_() for t in (spread * q, k, v)]
    return qkv, torch.randn(shape).to(dtype)


results = partial(test_compiled.results, run=slice_attention)
check = partial(test_compiled.check, run=slice_attention, exactly=reference.slice_attention)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_the_reference(shape, dtype, level, monkeypatch):
    monkeypatch.setattr(compiled, "_level", lambda: level)
    check(*inputs(shape, dtype))
    check(*inputs(shape, dtype, spread=5.0))


@pytest.mark.parametrize("positions", [*range(1, 70), 127, 130, 255, 257])
def test_any_number_of_positions(positions):
    check(*inputs((1, 1, positions, 2, 8)))


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_scale(scale):
    check(*inputs((1, 2, 40, 2, 16)), scale=scale)


def test_memory_is_read_as_it_lies():
    (q, k, v), grad = inputs((2, 3, 40, 4, 24))
    views = [q.flip(2)[:, :, ::2], k[:, :, 3:23], v[:, :1, :20].expand(2, 3, 20, 4, 24)]
    views = [t.detach().requires_grad_() for t in views]
    check(views, grad[:, :, :20].transpose(2, 3).contiguous().transpose(2, 3))
    apart = [torch.randn(24, 2, 3, 20, 4).permute(1, 2, 3, 4, 0).requires_grad_() for _ in "qkv"]
    check(apart, torch.ones(()).expand(2, 3, 20, 4, 24))
    negative = [
        torch.randn(2, 3, 20, 4, 24, dtype=torch.complex64).conj().imag.requires_grad_() for _ in "qkv"
    ]
    check(negative, torch.randn(2, 3, 20, 4, 24))
    sizes, strides = (1, 1, 40, 2, 16), (0, 0, 4, 200, 1)
    check([torch.randn(400).as_strided(sizes, strides).requires_grad_() for _ in "qkv"], torch.randn(sizes))


@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 16), (1, 0, 4, 2, 16), (1, 3, 0, 2, 16)])
def test_empty_tensors(shape):
    qkv, grad = inputs(shape)
    assert [t.shape for t in results(qkv, grad, backend="cpu")] == [grad.shape] * 4


def test_the_same_bits_on_any_number_of_threads(threads):  # noqa: F811  the fixture
    qkv, grad = inputs((1, 2, 300, 3, 32))
    found = []
    for count in (1, 2, 8, 8):
        torch.set_num_threads(count)
        found.append(results(qkv, grad, backend="cpu"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_huge_finite_scores_are_weights(monkeypatch, level, dtype):
    monkeypatch.setattr(compiled, "_level", lambda: level)
    q = torch.full((1, 2, 40, 1, 32), 6e4, dtype=dtype)
    torch.testing.assert_close(slice_attention(q, q, q, backend="cpu"), q)
    torch.manual_seed(0)
    k = (1e5 * torch.randn(1, 2, 150, 2, 32)).requires_grad_()
    ours = results([k, k, k], torch.ones_like(k), backend="cpu")
    exact = reference.slice_attention(*[k.detach().double()] * 3)
    torch.testing.assert_close(ours[0], exact.float())
    assert all(t.isfinite().all() for t in ours)  # gradients are differences of numbers near 1e10


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_that_of_plain_torch_and_stays_in_its_head(value):
    qkv, grad = inputs((1, 3, 150, 2, 16))
    clean = results(qkv, grad, backend="cpu")
    for i in range(3):
        spoiled = [t.detach().clone() for t in qkv]
        spoiled[i][0, 1, 140, 1, 3] = value
        ours = results([t.requires_grad_() for t in spoiled], grad, backend="cpu")
        plain = results(spoiled, grad, backend="torch")
        for mine, other, before in zip(ours, plain, clean, strict=True):
            assert torch.equal(mine.isnan(), other.isnan())
            torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-4, atol=1e-4)
            rest = torch.ones(mine.shape, dtype=torch.bool)
            rest[:, 1, :, 1] = False
            assert torch.equal(mine[rest], before[rest])


def test_keys_that_no_query_sees_do_not_hide_those_after():
    """-inf scores in a whole block of keys, finite ones behind it."""
    (q, k, v), _ = inputs((1, 1, 300, 1, 8))
    q, k = q.detach().abs(), k.detach().clone()
    k[:, :, :256] = -torch.inf
    y = slice_attention(q, k, v, backend="cpu")
    exact = slice_attention(q[:, :, :44], k[:, :, 256:], v[:, :, 256:], backend="torch")
    torch.testing.assert_close(y[:, :, :44], exact)


def test_derivatives_of_derivatives_are_those_of_plain_torch():
    qkv, grad = inputs((1, 2, 5, 1, 4))

    def second(backend):
        y = slice_attention(*qkv, backend=backend)
        first = torch.autograd.grad(y, qkv, grad, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), qkv)

    for mine, plain in zip(second("cpu"), second("torch"), strict=True):
        torch.testing.assert_close(mine, plain)
    grads = torch.randn(5, *grad.shape)
    y = slice_attention(*qkv, backend="cpu")
    batched = torch.autograd.grad(y, qkv, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, qkv, g, retain_graph=True) for g in grads]
    for together, alone in zip(batched, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.filterwarnings("ignore")
def test_what_looks_on_sees_torchs_own_attention():
    qkv, grad = inputs((1, 2, 40, 2, 16))
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = slice_attention(*(torch.empty(t.shape) for t in qkv))
    assert (y.shape, type(y)) == (grad.shape, FakeTensor)
    traced = torch.jit.trace(lambda *t: slice_attention(*t, backend="cpu"), [t.detach() for t in qkv])
    other = [torch.randn_like(t) for t in qkv]
    torch.testing.assert_close(traced(*other), slice_attention(*other))
    exported = torch.export.export(Within(), tuple(t.detach() for t in qkv))
    assert "scaled_dot_product" in str(exported.graph)
    compiled_graph = torch.compile(Within(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled_graph(*qkv), slice_attention(*qkv))
    with pytest.raises(
        ValueError, match=r"backend .cpu. cannot run slice_attention here: it has no forward-mode"
    ):
        torch.func.vmap(lambda q: slice_attention(q, q, q, backend="cpu"))(torch.randn(2, 1, 1, 4, 1, 8))


class Within(torch.nn.Module):
    def forward(self, q, k, v):
        return slice_attention(q, k, v)


def test_auto_takes_it_wherever_it_runs(monkeypatch):
    for dtype in TOL:
        assert select_backend("slice_attention", *inputs((1, 1, 50, 2, 16), dtype)[0]).backend == "cpu"
    wide = [t.double() for t in inputs((1, 1, 50, 2, 16))[0]]
    assert select_backend("slice_attention", *wide).backend == "sdpa"
    with pytest.raises(ValueError, match="it needs float32, float16 or bfloat16, found float64"):
        slice_attention(*wide, backend="cpu")
    called = []
    run = compiled.slice_forward
    monkeypatch.setattr(compiled, "slice_forward", lambda *a: called.append(a) or run(*a))
    w = AttentionWeights(torch.randn(48, 16), None, torch.randn(16, 16), None, torch.ones(16), None)
    x = torch.randn(1, 70, 40, 16)  # more slices than the kernel across slices takes
    axial_fusion_attention(x, w, w, num_heads=2)
    assert len(called) == 1
