"""SAM's relative-position terms: both backends against the equation in fp64, and what torch asks of an op.

The error may be at most 2× (gradients 3×) that of the torch backend in the same dtype, or one rounding."""

import copy
from functools import partial

import pytest
import torch

from axial_fusion import reference, sam, select_backend
from axial_fusion.gpu.common import INTERPRETED
from axial_fusion.ops.rel_terms import rel_terms
from axial_fusion.registry import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if not INTERPRETED:
    DTYPES.append(torch.bfloat16)  # the interpreter's bf16 dot is broken
FLOOR = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}

pytestmark = pytest.mark.usefixtures("nan_memory")

GRIDS = {  # T, (h, w), M, D, the side of a window or 0
    "one token": (1, (1, 1), 1, 1, 0),
    "14 by 1": (2, (14, 1), 3, 32, 0),
    "1 by 16": (1, (1, 16), 2, 64, 0),
    "5 by 25": (2, (5, 25), 2, 80, 0),
    "64 by 3": (1, (64, 3), 1, 64, 0),
    "2 by 70": (1, (2, 70), 2, 20, 0),
    "6 by 4, D 128": (1, (6, 4), 2, 128, 0),
    "windows of 14 on 16 by 25": (1, (16, 25), 3, 64, 14),
    "windows of 14 on 5 by 4": (2, (5, 4), 12, 80, 14),
    "windows of 3 on 7 by 2": (2, (7, 2), 2, 32, 3),
    "windows of 1 on 2 by 3": (1, (2, 3), 1, 48, 1),
    "windows of 70 on 2 by 71": (1, (2, 71), 1, 16, 70),
}
VIEWS = {  # of random values (T, h, w, 3, M, D)
    "q of a joint projection": lambda x: x[..., 0, :, :],
    "heads before the grid": lambda x: x[..., 1, :, :].permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4),
    "rows and columns swapped": lambda x: x[..., 2, :, :].transpose(1, 2),
    "every other channel": lambda x: x[..., 0, :, ::2],
    "one query again and again": lambda x: x[:1, :1, :1, 0].expand(2, 5, 7, -1, -1),
}  # fmt: skip


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def inputs(batch, grid, heads, dim, window, dtype=torch.float32):
    """q as a view of a joint projection, and the tables."""
    torch.manual_seed(0)
    q = draw(batch, *grid, 3, heads, dim, dtype=dtype)[..., 0, :, :].detach().requires_grad_()
    return [q, *(draw(2 * (window or side) - 1, dim, dtype=dtype) for side in grid)]


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def results(function, given, grads):
    """Both terms, and the gradients of q and of the tables."""
    terms = function(*given)
    grads = [g.to(t.dtype) for g, t in zip(grads, terms, strict=True)]
    return [*terms, *torch.autograd.grad(terms, given, grads)]


def check(given, windowed):
    """The Triton backend beside the torch backend, against the equation in fp64."""
    exact = [t.detach().double().requires_grad_() for t in given]
    grads = [torch.randn_like(t, dtype=torch.float32) for t in rel_terms(*given, windowed=windowed)]
    truth = results(partial(reference.rel_terms, windowed=windowed), exact, grads)
    ours, plain = (
        results(partial(rel_terms, windowed=windowed, backend=b), given, grads) for b in ("triton", "torch")
    )
    for i, (mine, theirs, true) in enumerate(zip(ours, plain, truth, strict=True)):
        assert mine.dtype == theirs.dtype == given[0].dtype
        assert mine.shape == theirs.shape == true.shape
        assert i > 1 or mine.is_contiguous()
        assert error(mine, true) <= max((3 if i > 1 else 2) * error(theirs, true), FLOOR[mine.dtype]), i


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GRIDS.values(), ids=GRIDS)
def test_matches_the_equation(shape, dtype):
    check(inputs(*shape, dtype=dtype), windowed=bool(shape[-1]))


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strided_q_and_tables(view, windowed):
    torch.manual_seed(0)
    q = view(torch.randn(2, 5, 7, 3, 2, 32, device=DEVICE)).detach().requires_grad_()
    tables = [
        torch.randn(q.shape[-1], 2 * side - 1, device=DEVICE).t().requires_grad_() for side in q.shape[1:3]
    ]
    check([q, *tables], windowed)


def test_the_equation_counts_positions_in_windows():
    q, table_h, table_w = (t.detach() for t in inputs(1, (5, 4), 2, 8, 3))
    rel_h, rel_w = reference.rel_terms(q, table_h, table_w, windowed=True)
    for h, w, k in ((0, 0, 0), (4, 1, 2), (3, 3, 0), (2, 2, 1)):
        torch.testing.assert_close(rel_h[0, h, w, :, k], q[0, h, w] @ table_h[h % 3 - k + 2])
        torch.testing.assert_close(rel_w[0, h, w, :, k], q[0, h, w] @ table_w[w % 3 - k + 2])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("windowed", [False, True])
def test_no_images_and_no_channels(backend, windowed):
    for shape in ((0, (2, 3), 2, 16, 3), (2, (2, 3), 2, 0, 3)):
        given = inputs(*shape)
        terms = rel_terms(*given, windowed=windowed, backend=backend)
        assert not any(t.any() for t in terms)
        grads = torch.autograd.grad(sum(t.sum() for t in terms), given)
        assert [g.shape for g in grads] == [t.shape for t in given]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_casts_and_gradients_keep_the_dtype_of_the_weights(backend):
    given = inputs(1, (3, 4), 2, 16, 0)
    half = [given[0].detach().half().requires_grad_(), *given[1:]]
    for tensors in (given, half):
        with torch.autocast(DEVICE, torch.float16):
            terms = rel_terms(*tensors, backend=backend)
        assert all(t.dtype == torch.float16 for t in terms)
        for mine, true in zip(terms, reference.rel_terms(*(t.double() for t in tensors)), strict=True):
            assert error(mine, true) < 2e-3
        grads = torch.autograd.grad(sum(t.float().square().sum() for t in terms), tensors)
        assert [g.dtype for g in grads] == [t.dtype for t in tensors]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_what_is_asked_for_is_computed(wanted):
    given = inputs(1, (3, 4), 2, 16, 0)
    whole = torch.autograd.grad(sum(t.sin().sum() for t in rel_terms(*given, backend="triton")), given)
    for i, tensor in enumerate(given):
        tensor.requires_grad_(i in wanted)
    sum(t.sin().sum() for t in rel_terms(*given, backend="triton")).backward()
    for i, (tensor, expected) in enumerate(zip(given, whole, strict=True)):
        assert torch.equal(tensor.grad, expected) if i in wanted else tensor.grad is None


@pytest.mark.parametrize("windowed", [False, True])
def test_second_derivatives(windowed):
    given, found = inputs(1, (3, 4), 2, 16, 0), []
    for function in (partial(rel_terms, backend="triton"), reference.rel_terms):
        terms = function(*given, windowed=windowed)
        first = torch.autograd.grad(sum(t.sin().sum() for t in terms), given, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), given))
    for mine, true in zip(*found, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("windowed", [False, True])
def test_opcheck_compile_and_what_is_saved(windowed):
    given = inputs(1, (3, 4), 2, 16, 3)
    torch.library.opcheck(torch.ops.axial_fusion.rel_terms.default, (*given, windowed))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rel_terms(*given, windowed=windowed, backend="triton")
    assert set(kept) == {t.data_ptr() for t in given}
    function = partial(rel_terms, windowed=windowed, backend="triton")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in ((3, 4), (5, 9)):
        tensors = inputs(2, grid, 2, 16, 0)
        for mine, true in zip(compiled(*tensors), function(*tensors), strict=True):
            assert torch.equal(mine, true)


def test_transforms_meta_tensors_the_choice_and_mistakes():
    q, table_h, table_w = (t.detach() for t in inputs(2, (3, 4), 2, 16, 0))
    expected = rel_terms(q, table_h, table_w, backend="torch")
    mapped = torch.func.vmap(lambda x: rel_terms(x[None], table_h, table_w))(q)
    for mine, true in zip(mapped, expected, strict=True):
        torch.testing.assert_close(mine[:, 0], true)
    meta = rel_terms(*(t.to("meta") for t in (q, table_h, table_w)))
    assert [t.shape for t in meta] == [t.shape for t in expected]
    chosen = select_backend("rel_terms", q, table_h, table_w)
    assert chosen.backend == ("triton" if DEVICE == "cuda" else "torch")
    for given, said in (
        ((q, table_h[1:], table_w), r"table_h must be \(2·keys − 1, D\), found an even number of rows, 4"),
        ((q, table_h, table_w[:, 1:]), r"table_w must be \(F, D\) with D = 16, found shape \(7, 15\)"),
        ((q, table_h, table_w.double()), "table_w is float64 but q is float32"),
        ((q[0], table_h, table_w), r"q must be \(T, h, w, M, D\), found shape"),
    ):
        with pytest.raises(ValueError, match=said):
            rel_terms(*given)
    wide = [torch.zeros(*t.shape[:-1], 144, device=DEVICE) for t in (q, table_h, table_w)]
    with pytest.raises(ValueError, match="head dim 144 is above 128"):
        rel_terms(*wide, backend="triton")


def attention(heads, dim, grid, window=0):
    """SAM's attention with every weight drawn."""
    torch.manual_seed(0)
    channels = heads * dim
    tables = (torch.nn.Parameter(0.3 * torch.randn(2 * (window or side) - 1, dim)) for side in grid)
    layers = (torch.nn.Linear(channels, 3 * channels), torch.nn.Linear(channels, channels))
    return sam.SamAttention(*layers, *tables, num_heads=heads, window=window).to(DEVICE)


def with_backend(backend, monkeypatch, layer, x):
    """y of the layer, and the gradients of x and of its weights, by this backend."""
    monkeypatch.setattr(sam, "rel_terms", partial(rel_terms, backend=backend))
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("window", [0, 3, 14])
@pytest.mark.parametrize("grid", [(6, 5), (4, 4)], ids=str)  # its tables are of 6 by 5
def test_sams_attention_is_the_same_with_and_without_the_kernel(grid, window, monkeypatch):
    layer, x = attention(2, 16, (6, 5), window), torch.randn(2, *grid, 32, device=DEVICE)
    for mine, theirs in zip(
        *(with_backend(b, monkeypatch, layer, x) for b in ("triton", "torch")), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 14])
@pytest.mark.parametrize("dim", [64, 80])
def test_sams_attention_in_bf16_compiled_and_in_a_graph(dim, window, monkeypatch):
    grid = (64, 64)
    layer, x = attention(12, dim, grid, window), torch.randn(2, *grid, 12 * dim, device=DEVICE)
    truth = with_backend("torch", monkeypatch, copy.deepcopy(layer).double(), x.double())
    layer, x = layer.bfloat16(), x.bfloat16()
    plain = with_backend("torch", monkeypatch, layer, x)
    for mine, theirs, true in zip(with_backend("triton", monkeypatch, layer, x), plain, truth, strict=True):
        assert error(mine, true) <= max(1.5 * error(theirs, true), FLOOR[torch.bfloat16])
    monkeypatch.setattr(sam, "rel_terms", rel_terms)  # as it is chosen
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected, rtol=2e-2, atol=2e-2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("windowed", [False, True])
def test_more_elements_than_32_bits_count(windowed):
    qkv = torch.zeros(240, 64, 64, 3, 12, 64, device=DEVICE, dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    qkv[-1].normal_()
    q = qkv[..., 2, :, :]
    tables = [torch.randn(27 if windowed else 127, 64, device=DEVICE, dtype=torch.bfloat16) for _ in "hw"]
    last = rel_terms(q[-1:], *tables, windowed=windowed, backend="torch")
    for mine, true in zip(OPS.rel_terms(q, *tables, windowed), last, strict=True):
        torch.testing.assert_close(mine[-1:], true, rtol=1e-2, atol=1e-1)
        assert not mine[:-1].any()
