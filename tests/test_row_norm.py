"""LayerNorm of rows: both engines against the equation in fp64, gradients of any strides, what torch asks of an op.

The error may be at most 2× (gradients 3×) that of torch's layer_norm in the same dtypes, or one rounding."""

import sys

import pytest
import torch
from torch.nn import functional as F

from axial_fusion import reference, select_backend
from axial_fusion.row_norm import column_sums, launch_column_sums, row_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
VIEWS = {
    "contiguous": lambda x: x,
    "a range of slices": lambda x: x[:, 1:],
    "slices and positions swapped": lambda x: x.transpose(1, 2),
    "one row again and again": lambda x: x[:1, :1, :1].expand(2, 3, 5, -1),
    "every other channel": lambda x: x[..., ::2],
    "two axes": lambda x: x[0, 0],
    "one row": lambda x: x[1, 2, 3],
}

pytestmark = pytest.mark.usefixtures("nan_memory")
op = sys.modules["axial_fusion.row_norm"]


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def doubled(given):
    return [None if t is None else t.detach().double().requires_grad_() for t in given]


def results(function, given, grad):
    z = function(*given)
    return [z, *torch.autograd.grad(z, [t for t in given if t is not None], grad.to(z.dtype))]


def held_to_layer_norm(given, grad, dtype):
    """Our Triton engine's z and gradients against fp64, beside those of F.layer_norm."""
    exact = results(lambda *t: reference.layer_norm(*t, 1e-6), doubled(given), grad.double())
    ours = results(lambda *t: row_norm(*t, dtype=dtype, backend="triton"), given, grad)
    plain = results(lambda *t: row_norm(*t, dtype=dtype, backend="torch"), given, grad)
    for i, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.dtype == theirs.dtype
        assert mine.shape == truth.shape
        if not truth.any():  # dx of one channel is 0: rounding of the gradient, times 1/σ = 1000, is left
            assert mine.abs().max() <= 1e3 * FLOOR[torch.float32] * max(1.0, grad.abs().max().item()), (
                f"result {i}"
            )
            continue
        assert error(mine, truth) <= max((3 if i else 2) * error(theirs, truth), FLOOR[dtype]), f"result {i}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 37, 48, 256, 768, 1280, 4096])
def test_matches_the_equation(channels, dtype):
    torch.manual_seed(0)
    beta = None if channels == 48 else draw(channels)
    given = [draw(2, 19, channels, dtype=dtype), draw(channels), beta]
    held_to_layer_norm(given, torch.randn(2, 19, channels, device=DEVICE).to(dtype), dtype)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strided_x_weights_and_gradients(view):
    torch.manual_seed(0)
    base = torch.randn(2, 3, 5, 40, device=DEVICE)
    x = view(base).detach().requires_grad_()
    channels = x.shape[-1]
    weights = torch.randn(channels, 2, device=DEVICE)
    given = [x, weights[:, 0].requires_grad_(), weights[:, 1].requires_grad_()]
    wide = torch.randn(*x.shape[:-1], 2 * channels, device=DEVICE)  # the gradient that a cat would send
    for grad in (wide[..., :channels], wide[..., ::2], torch.ones(channels, device=DEVICE).expand(x.shape)):
        held_to_layer_norm(given, grad, torch.float32)


def test_many_programs_add_up_and_give_the_same_bits_every_time(monkeypatch):
    monkeypatch.setattr(op, "PROGRAMS", 3)
    torch.manual_seed(0)
    given, grad = [draw(150, 256), draw(256), draw(256)], torch.randn(150, 256, device=DEVICE)
    held_to_layer_norm(given, grad, torch.float32)
    first, again = (results(lambda *t: row_norm(*t, backend="triton"), given, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_large_mean_costs_no_precision():
    torch.manual_seed(0)
    given = [(200 + torch.randn(9, 64, device=DEVICE)).requires_grad_(), draw(64), draw(64)]
    held_to_layer_norm(given, torch.randn(9, 64, device=DEVICE), torch.float32)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_only_what_is_asked_for_is_computed(wanted):
    torch.manual_seed(0)
    given, grad = [draw(9, 32), draw(32), draw(32)], torch.randn(9, 32, device=DEVICE)
    everything = results(lambda *t: row_norm(*t, backend="triton"), given, grad)[1:]
    for i, tensor in enumerate(given):
        tensor.requires_grad_(i in wanted)
    row_norm(*given, backend="triton").backward(grad)
    for i, (tensor, expected) in enumerate(zip(given, everything, strict=True)):
        assert torch.equal(tensor.grad, expected) if i in wanted else tensor.grad is None


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_rows_autocast_and_a_dtype_that_is_asked_for(backend):
    given = [draw(0, 3, 20), draw(20), draw(20)]
    z = row_norm(*given, backend=backend)
    assert z.shape == (0, 3, 20)
    assert not any(g.any() for g in torch.autograd.grad(z.sum(), given))
    given[0] = draw(4, 20)
    with torch.autocast(DEVICE, torch.bfloat16):
        z = row_norm(*given, backend=backend)
    assert z.dtype == torch.bfloat16
    assert error(z, reference.layer_norm(*doubled(given), 1e-6)) < FLOOR[torch.bfloat16]
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(z.float().square().sum(), given))
    assert row_norm(*given, dtype=torch.float16, backend=backend).dtype == torch.float16
    assert row_norm(given[0].half(), *given[1:], backend=backend).dtype == torch.float16


def test_opcheck_compile_and_what_is_saved():
    torch.manual_seed(0)
    given = [draw(2, 5, 20), draw(20), draw(20)]
    for bias in (given[2], None):
        torch.library.opcheck(
            torch.ops.axial_fusion.row_norm.default, (*given[:2], bias, 1e-6, torch.float32)
        )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        row_norm(*given, backend="triton")
    known = {t.data_ptr() for t in given}
    assert sum(t.numel() for t in kept if t.data_ptr() not in known) == 2 * 10
    compiled = torch.compile(
        lambda x: row_norm(x, *given[1:], backend="triton"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 8):
        x = torch.randn(rows, 20, device=DEVICE)
        torch.testing.assert_close(compiled(x), F.layer_norm(x, (20,), *given[1:], 1e-6))


@pytest.mark.parametrize("rows", [1, 19, 3000])
def test_column_sums(rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 300, device=DEVICE)
    assert error(launch_column_sums(x[:, :200]).sum(0), x[:, :200].double().sum(0)) < 1e-6
    assert column_sums(x.half()).dtype == torch.float16


def test_the_choice_and_mistakes_are_told():
    x, weight = torch.zeros(3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    assert select_backend("row_norm", x, weight).backend == ("triton" if DEVICE == "cuda" else "torch")
    with pytest.raises(ValueError, match="5000 channels are above 4096"):
        select_backend("row_norm", torch.zeros(3, 5000, device=DEVICE), backend="triton")
    with pytest.raises(ValueError, match="its weights are float64"):
        row_norm(x, weight.double(), backend="triton")
    with pytest.raises(ValueError, match=r"weight must be \(C,\) = \(8,\), found shape \(9,\)"):
        row_norm(x, torch.ones(9, device=DEVICE))
    z = torch.func.vmap(lambda x: row_norm(x, weight.cpu()))(x.cpu())
    assert z.shape == x.shape
    with pytest.raises(ValueError, match="forward-mode"):
        torch.func.vmap(lambda x: row_norm(x, weight, backend="triton"))(x)
