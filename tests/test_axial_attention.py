"""The Triton kernels of axial attention, interpreted on a CPU or run on a GPU, against the reference in fp64.

The error may be at most 2× (gradients 3×) that of torch in the same dtype, with a floor of one rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axial_fusion import axial_attention, reference, select_backend
from axial_fusion.cpu import compiled
from axial_fusion.gpu import axial_attention as launchers
from axial_fusion.gpu import tiles
from axial_fusion.gpu.common import INTERPRETED
from axial_fusion.gpu.tiles import Key, Tile
from axial_fusion.registry import OPS
from drawn import FEW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if not INTERPRETED:
    DTYPES.append(torch.bfloat16)  # the interpreter's bf16 dot is broken
BUILT = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))
FLOOR = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}

BACKENDS = ["triton", "torch", "registered", "reference", pytest.param("cpu", marks=BUILT)]

pytestmark = pytest.mark.usefixtures("nan_memory")

SHAPES = {  # B, Nq, N, P, M, D
    "one of everything": (1, 1, 1, 1, 1, 16),
    "paper": (1, 9, 9, 16, 2, 32),
    "centre query": (2, 1, 9, 10, 2, 32),
    "odd head dim": (1, 3, 3, 23, 2, 24),
    "80": (1, 5, 5, 14, 1, 80),
    "80, several tiles": (1, 9, 9, 11, 1, 80),
    "96": (1, 9, 9, 8, 1, 96),
    "3 heads": (2, 9, 9, 3, 3, 32),
    "8 heads": (1, 9, 9, 5, 8, 32),
    "12 heads, 3 positions a tile": (1, 5, 5, 7, 12, 24),
    "2 heads of 20 slices": (1, 20, 20, 2, 2, 32),
    "128": (1, 4, 4, 17, 1, 128),
    "16 slices": (1, 16, 16, 7, 1, 32),
    "33 slices": (2, 33, 33, 2, 1, 16),
    "64 slices": (1, 64, 64, 1, 2, 16),
    "more queries than keys": (1, 8, 3, 9, 1, 32),
}


def inputs(shape, dtype, packed=False):
    torch.manual_seed(0)
    batch, queries, slices, positions, heads, dim = shape
    if packed:
        qkv = torch.randn(batch, slices, positions, 3, heads, dim, device=DEVICE).to(dtype)
        return [t.detach().requires_grad_() for t in qkv.unbind(3)]
    sizes = [(batch, n, positions, heads, dim) for n in (queries, slices, slices)]
    return [torch.randn(size, device=DEVICE).to(dtype).requires_grad_() for size in sizes]


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check(tensors, dtype, **options):
    grad = torch.randn(tensors[0].shape, device=DEVICE).to(dtype)

    def run(values, backend):
        y = axial_attention(*values, backend=backend, **options)
        return y, torch.autograd.grad(y, values, grad.to(y.dtype))

    ours, ours_grads = run(tensors, "triton")
    plain, plain_grads = run(tensors, "torch")
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = reference.axial_attention(*wide, **options)
    exact_grads = torch.autograd.grad(exact, wide, grad.double())
    assert ours.dtype == dtype
    assert error(ours, exact) <= max(2 * error(plain, exact), FLOOR[dtype])
    for name, mine, theirs, truth in zip("qkv", ours_grads, plain_grads, exact_grads, strict=True):
        if truth.norm() > 1e-9:
            assert error(mine, truth) <= max(3 * error(theirs, truth), 3 * FLOOR[dtype]), (
                f"gradient of {name}"
            )
        else:
            assert mine.double().norm() < 1e-3, f"gradient of {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_the_reference(shape, dtype):
    check(inputs(shape, dtype), dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 0]], ids=["all", "lengths"])
@pytest.mark.parametrize("queries", [5, 2])
def test_masks(causal, lengths, queries):
    options = {"causal": causal}
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths, device=DEVICE)
    check(inputs((2, queries, 5, 13, 2, 16), torch.float32), torch.float32, **options)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scale_of_any_sign(scale):
    check(inputs((1, 9, 9, 5, 8, 16), torch.float16), torch.float16, scale=scale)


def test_strided_lengths():
    lengths = torch.tensor([4, 9, 0, 9, 2, 9], device=DEVICE)[::2]
    check(inputs((3, 5, 5, 4, 8, 16), torch.float16), torch.float16, lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 48])
@pytest.mark.parametrize(
    "tile",
    [Tile(16, 4, 1, 8), Tile(16, 4, 1, 4), Tile(32, 4, 1, 2), Tile(16, 1), Tile(32, 2), Tile(64, 2)],
    ids=str,
)
def test_every_tile(tile, head_dim, dtype, monkeypatch):
    for op in ("axial_attention", "axial_attention_backward"):
        arch = tiles.arch(torch.empty(0, device=DEVICE).device)
        monkeypatch.setitem(tiles.MEASURED, Key(op, arch, dtype, 9, head_dim), tile)
    check(inputs((1, 9, 9, 8, 8, head_dim), dtype), dtype)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(("slices", "heads", "head_dim"), [(9, 8, 32), (16, 8, 32), (9, 3, 32), (12, 2, 64)])
def test_what_is_not_finite_stays_in_its_position(slices, heads, head_dim, value):
    """Forward and gradients of every other position are bit for bit what they were."""
    shape = (1, slices, slices, 5, heads, head_dim)
    grad = torch.ones(1, slices, 5, heads, head_dim, device=DEVICE, dtype=torch.float16)

    def run(spoiled):
        tensors = inputs(shape, torch.float16)
        with torch.no_grad():
            for tensor in tensors if spoiled else ():
                tensor[:, slices // 2, 2] = value
        y = axial_attention(*tensors, backend="triton")
        return [t[:, :, [0, 1, 3, 4]] for t in (y, *torch.autograd.grad(y, tensors, grad))]

    clean, spoiled = run(False), run(True)
    assert all(t.isfinite().all() for t in clean)
    assert all(torch.equal(a, b) for a, b in zip(clean, spoiled, strict=True))


def unchanged(before, after):
    """The same bits on a GPU. The interpreter's products are NumPy's, whose order of sums depends on their shapes."""
    if DEVICE == "cuda" or not before.numel():
        return torch.equal(before, after)
    rounding = 4 * torch.finfo(before.dtype).eps * before.abs().max()
    return bool(((before - after).abs() <= rounding).all())  # not so for a NaN


def with_gradients(backend, tensors, **options):
    """y and the gradients of q, k and v, of q, k, v and dY."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    if backend == "registered":
        y = OPS.axial_attention(*leaves, options["lengths"], 0.25, options["causal"], "torch")
    elif backend == "reference":
        y = reference.axial_attention(*leaves, scale=0.25, **options)
    else:
        y = axial_attention(*leaves, scale=0.25, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, tensors[3])]


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@settings(FEW, max_examples=12)
@given(st.data())
def test_what_is_not_finite_reaches_what_sees_it_alone(backend, data):
    """A row of q, k, v or dY changes its own position, and of that no query or key that does not see it."""
    draw = data.draw
    slices, queries = draw(st.sampled_from([1, 2, 3, 5, 9])), draw(st.sampled_from([1, 2, 4, 9]))
    heads, dim = 2, draw(st.sampled_from([16, 24, 96]))
    causal, length = draw(st.booleans()), draw(st.sampled_from([slices, slices, slices // 2]))
    options = {"causal": causal, "lengths": None}
    if length < slices or draw(st.booleans()):
        options["lengths"] = torch.tensor([length], device=DEVICE)
    tensors = [t.detach() for t in inputs((1, queries, slices, 5, heads, dim), torch.float32)]
    tensors.append(torch.randn(tensors[0].shape, device=DEVICE))
    clean = with_gradients(backend, tensors, **options)

    which, position = draw(st.integers(0, 2 if backend == "torch" else 3)), draw(st.integers(0, 4))
    row, head = draw(st.integers(0, tensors[which].shape[1] - 1)), draw(st.integers(0, heads - 1))
    tensors[which][:, row, position, head] = draw(st.sampled_from([torch.inf, -torch.inf, torch.nan]))
    spoiled = with_gradients(backend, tensors, **options)

    query, key = torch.arange(queries)[:, None], torch.arange(slices)
    visible = (key < length) & ((key <= query + slices - queries) | (not causal))
    blind = visible.sum(1) == 0
    # Queries whose result may change, and keys: those of one of these queries.
    reached = visible[:, row] if which in (1, 2) else (query[:, 0] == row) & ~blind
    keys = visible[reached].any(0)
    for name, before, after, rows in zip("yqkv", clean, spoiled, (reached, reached, keys, keys), strict=True):
        changed = torch.zeros(before.shape, dtype=torch.bool, device=DEVICE)
        changed[:, rows.nonzero()[:, 0], position, head] = True
        assert before.isfinite().all()
        if backend == "triton":
            assert unchanged(before[~changed], after[~changed]), f"{name} of what does not see it"
        else:
            torch.testing.assert_close(before[~changed], after[~changed])
        if name == "y" and which < 3:
            assert not after[:, reached, position, head].isfinite().any()


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("slices", [3, 9, 20])
def test_keys_past_the_length_may_hold_anything(slices, value, backend):
    """Forward and gradients are bit for bit those without it, and 0 for those keys."""
    tensors = inputs((3, slices, slices, 5, 2, 16), torch.float32)
    lengths = torch.tensor([1, slices, slices // 2], device=DEVICE)
    grad = torch.randn(tensors[0].shape, device=DEVICE)

    def run():
        if backend == "registered":
            y = OPS.axial_attention(*tensors, lengths, 0.25, False, "torch")
        elif backend == "reference":
            y = reference.axial_attention(*tensors, lengths=lengths)
        else:
            y = axial_attention(*tensors, lengths=lengths, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, tensors, grad)]

    clean = run()
    with torch.no_grad():
        for tensor in tensors[1:]:
            tensor[0, 1:] = value
            tensor[2, slices // 2 :] = value
    spoiled = run()
    assert all(t.isfinite().all() for t in clean)
    assert all(torch.equal(a, b) for a, b in zip(clean, spoiled, strict=True))
    assert (spoiled[2][0, 1:] == 0).all()
    assert (spoiled[3][0, 1:] == 0).all()


def test_packed_and_strided_inputs_are_read_in_place():
    check(inputs((2, 5, 5, 13, 2, 32), torch.float32, packed=True), torch.float32)
    torch.manual_seed(0)
    q = torch.randn(2, 9, 13, 2, 32, device=DEVICE)[:, ::2].flip(2)[..., ::2, :]
    check([q.detach().requires_grad_() for _ in range(3)], torch.float32)


def test_gradient_of_a_concatenation():
    """`cat` hands the backward a gradient that is a view with foreign strides."""
    tensors = inputs((1, 3, 3, 9, 2, 16), torch.float32)
    results = []
    for backend in ("triton", "torch"):
        y = axial_attention(*tensors, backend=backend)
        joined = torch.cat([y, y], -1) * torch.arange(32.0, device=DEVICE)
        results.append(torch.autograd.grad(joined.square().sum(), tensors))
    for mine, theirs in zip(*results, strict=True):
        assert error(mine, theirs.double()) < 1e-5


@pytest.mark.parametrize("shape", [(0, 3, 3, 4, 2, 16), (1, 3, 3, 0, 2, 16), (1, 3, 0, 4, 2, 16)], ids=str)
def test_empty_tensors(shape):
    tensors = inputs(shape, torch.float32)
    y = axial_attention(*tensors, backend="triton")
    assert y.shape == tensors[0].shape
    assert (y == 0).all()
    y.sum().backward()
    assert all((t.grad == 0).all() for t in tensors)


@pytest.mark.gpu
def test_more_positions_than_a_grid_axis_holds():
    q, k, v = inputs((1, 1, 1, 65_537, 1, 16), torch.float16)
    torch.testing.assert_close(axial_attention(q, k, v, backend="triton"), v)


def test_positions_lie_on_the_grids_first_axis_which_alone_holds_them(monkeypatch):
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **keywords: None

    for name in ("axial_attention_fwd_kernel", "axial_attention_bwd_kernel"):
        monkeypatch.setattr(launchers, name, Recorded())
    q = torch.zeros(1, 1, 1, 1, 16, dtype=torch.float16).expand(1, 1, 70_000 * 64, 1, 16)
    launchers.launch_forward(q, q, q, None, 0.25, False)
    launchers.launch_backward(q, q, q, q, None, 0.25, False)
    assert len(grids) == 2
    for first, *rest in grids:
        assert first > 65_535
        assert all(size <= 65_535 for size in rest)


def test_values_are_the_same_every_time():
    tensors = inputs((1, 9, 9, 30, 2, 32), torch.float16)
    runs = []
    for _ in range(2):
        y = axial_attention(*tensors, backend="triton")
        runs.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 65, 65, 2, 1, 16), "65 slices"), ((1, 2, 2, 2, 1, 160), "head dim 160")],
    ids=str,
)
def test_what_the_kernel_cannot_do_is_refused_when_named_and_told_otherwise(shape, message):
    tensors = inputs(shape, torch.float32)
    with pytest.raises(ValueError, match=message):
        axial_attention(*tensors, backend="triton")
    assert select_backend("axial_attention", *tensors).backend != "triton"
    torch.testing.assert_close(
        axial_attention(*tensors), reference.axial_attention(*tensors), rtol=1e-4, atol=1e-5
    )


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    q = torch.randn(1, 9, 262_144 * 4, 8, 32, device="cuda", dtype=torch.bfloat16)
    y = axial_attention(q, q, q, backend="triton")
    part = slice(-100, None)
    expected = reference.axial_attention(*(q[:, :, part].float() for _ in range(3)))
    torch.testing.assert_close(y[:, :, part].float(), expected, rtol=2e-2, atol=2e-2)
