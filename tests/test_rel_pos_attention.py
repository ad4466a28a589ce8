"""The Triton kernels of SAM's attention, interpreted on a CPU or run on a GPU, against the reference in fp64.

The error may be at most 2× (gradients 3×) that of torch in the same dtype, with a floor of one rounding."""

import pytest
import torch

from axial_fusion import reference, rel_pos_attention, select_backend, window_attention
from axial_fusion.cpu.biased_attention import attend_blocks
from axial_fusion.gpu import tiles
from axial_fusion.gpu.common import INTERPRETED
from axial_fusion.registry import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if not INTERPRETED:
    DTYPES.append(torch.bfloat16)  # the interpreter's bf16 dot is broken
FLOOR = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}

pytestmark = pytest.mark.usefixtures("nan_memory")

GRIDS = {  # B, M, D, (H', W')
    "one token": (1, 1, 16, (1, 1)),
    "5 by 7": (2, 2, 32, (5, 7)),
    "16 by 16": (1, 1, 64, (16, 16)),
    "20 by 20": (1, 1, 32, (20, 20)),
    "wide": (1, 2, 24, (2, 33)),
    "tall": (1, 1, 128, (33, 3)),
}
WINDOWS = {  # B, M, D, (H', W'), window
    "14 on 16 by 20": (1, 1, 80, (16, 20), 14),
    "3 on 5 by 4": (2, 2, 32, (5, 4), 3),
    "4 on 8 by 4": (1, 1, 16, (8, 4), 4),
    "1 on 2 by 3": (1, 1, 16, (2, 3), 1),
}
# The tiles of half precision: widths of 16, 32, 64 and 128 keys, each whole (nothing is masked) and not, at D in one
# part and in two.
HALF_GRIDS = {  # B, M, D, (H', W')
    "64 wide, whole, D 64": (1, 2, 64, (2, 64)),
    "64 wide, whole, D 80": (2, 1, 80, (2, 64)),
    "64 wide, whole, D 96": (1, 1, 96, (2, 64)),
    "64 wide, odd, D 80": (1, 1, 80, (3, 50)),
    "32 wide, whole, D 64": (2, 1, 64, (4, 32)),
    "32 wide, whole, D 80": (1, 1, 80, (4, 32)),
    "20 wide, odd, D 48": (1, 2, 48, (5, 20)),
    "20 wide, odd, D 96": (1, 1, 96, (5, 20)),
    "16 wide, whole, D 80": (1, 1, 80, (8, 16)),
    "14 wide, odd, D 64": (1, 1, 64, (5, 14)),
    "100 wide, D 80": (1, 1, 80, (2, 100)),
}
HALF_WINDOWS = {  # B, M, D, (H', W'), window
    "14 on 5 by 16, D 64": (1, 2, 64, (5, 16), 14),
    "14 on 15 by 4, D 96": (1, 1, 96, (15, 4), 14),
    "20 on 6 by 21, D 64": (1, 1, 64, (6, 21), 20),
    "20 on 21 by 5, D 80": (1, 1, 80, (21, 5), 20),
    "33 on 3 by 34, D 24": (1, 1, 24, (3, 34), 33),
}


def draw(*shape, dtype, scale=1.0):
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()


def grid_inputs(batch, heads, dim, grid, dtype):
    torch.manual_seed(0)
    height, width = grid
    tokens = height * width
    q, k, v = (draw(batch, tokens, heads, dim, dtype=dtype) for _ in "qkv")
    rel_h = draw(batch, heads, height, tokens, dtype=dtype)
    return [q, k, v, rel_h, draw(batch, heads, tokens, width, dtype=dtype)]


def window_inputs(batch, heads, dim, grid, window, dtype):
    torch.manual_seed(0)
    qkv, bias = draw(batch, *grid, 3, heads, dim, dtype=dtype), draw(3 * heads * dim, dtype=dtype)
    return [qkv, bias, *(draw(batch, *grid, heads, window, dtype=dtype) for _ in "hw")]


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check(op, truth, tensors, **options):
    """y and every gradient of `op` on the Triton backend, as near to `truth` in fp64 as the torch backend's."""
    dtype = tensors[0].dtype
    y = op(*tensors, backend="triton", **options)
    grad = torch.randn(y.shape, device=DEVICE).to(dtype)
    grads = torch.autograd.grad(y, tensors, grad)
    missing = {"allow_unused": True, "materialize_grads": True}  # of the bias, where nothing is padded
    plain = op(*tensors, backend="torch", **options)
    plain_grads = torch.autograd.grad(plain, tensors, grad, **missing)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = truth(*wide, **options)
    exact_grads = torch.autograd.grad(exact, wide, grad.double(), **missing)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert error(y, exact) <= max(2 * error(plain, exact), FLOOR[dtype])
    for index, (mine, theirs, true) in enumerate(zip(grads, plain_grads, exact_grads, strict=True)):
        assert mine.shape == true.shape
        assert mine.dtype == dtype
        if true.norm() > 1e-9:
            bound = max(3 * error(theirs, true), 3 * FLOOR[dtype])
            assert error(mine, true) <= bound, f"gradient of input {index}"
        else:
            assert mine.double().norm() < 1e-2, f"gradient of input {index}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GRIDS.values(), ids=GRIDS)
def test_a_grid_matches_the_reference(shape, dtype):
    tensors = grid_inputs(*shape, dtype)
    check(rel_pos_attention, reference.rel_pos_attention, tensors, grid=shape[-1])


def test_a_row_of_keys_fills_a_tile():
    tensors = grid_inputs(1, 1, 16, (2, 65), torch.float16)
    check(rel_pos_attention, reference.rel_pos_attention, tensors, grid=(2, 65))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WINDOWS.values(), ids=WINDOWS)
def test_windows_match_the_reference(shape, dtype):
    tensors = window_inputs(*shape, dtype)
    check(window_attention, reference.window_attention, tensors, window=shape[-1])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", HALF_GRIDS.values(), ids=HALF_GRIDS)
def test_every_tile_of_a_grid(shape, dtype):
    tensors = grid_inputs(*shape, dtype)
    check(rel_pos_attention, reference.rel_pos_attention, tensors, grid=shape[-1])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", HALF_WINDOWS.values(), ids=HALF_WINDOWS)
def test_every_tile_of_windows(shape, dtype):
    tensors = window_inputs(*shape, dtype)
    check(window_attention, reference.window_attention, tensors, window=shape[-1])


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes its own tiles alone")
@pytest.mark.parametrize("arch", [80, 100])
def test_tiles_of_other_devices(arch, monkeypatch):
    monkeypatch.setattr(tiles, "arch", lambda device: arch)
    tensors = grid_inputs(1, 1, 80, (2, 64), torch.float16)
    check(rel_pos_attention, reference.rel_pos_attention, tensors, grid=(2, 64))
    tensors = window_inputs(1, 1, 64, (5, 16), 14, torch.float16)
    check(window_attention, reference.window_attention, tensors, window=14)


@pytest.mark.parametrize(("dtype", "grid"), [(torch.float32, (16, 8)), (torch.float16, (4, 64))], ids=str)
def test_rows_and_columns_of_keys_that_a_table_masks(dtype, grid):
    """-inf in rel_h or rel_w masks keys, those of the first tiles too."""
    q, k, v, rel_h, rel_w = (t.detach() for t in grid_inputs(1, 1, 16, grid, dtype))
    rel_h[:, :, : grid[0] - 2] = -torch.inf
    rel_w[..., 1::2] = -torch.inf
    tensors = [q, k, v, rel_h, rel_w]
    y = rel_pos_attention(*(t.requires_grad_() for t in tensors), grid=grid, backend="triton")
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = reference.rel_pos_attention(*wide, grid=grid)
    assert error(y, exact) < 2 * FLOOR[dtype]
    grads = zip(torch.autograd.grad(y.sum(), tensors), torch.autograd.grad(exact.sum(), wide), strict=True)
    assert all(error(mine, true) < 5 * FLOOR[dtype] for mine, true in grads)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
@pytest.mark.parametrize("backend", ["triton", "torch", "registered"])
@pytest.mark.parametrize("grid", [(4, 4), (16, 8), (3, 5)], ids=str)
def test_a_query_without_keys_gives_0_in_evaluation_and_in_training(grid, backend):
    """And so do its gradients; other queries, some of their keys masked, are what they were."""
    tensors = [t.detach() for t in grid_inputs(1, 2, 16, grid, torch.float32)]
    tensors[3][:, :, :, 3] = -torch.inf  # a query sees no row
    tensors[4][:, 1, 5] = -torch.inf  # or no column
    tensors[3][:, :, 0, 7] = -torch.inf  # or not the first row
    leaves = [t.requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]

    def ours():
        if backend == "registered":
            return OPS.rel_pos_attention(*leaves, 0.25, "torch")[0]
        return rel_pos_attention(*leaves, grid=grid, backend=backend)

    exact = reference.rel_pos_attention(*wide, grid=grid)
    with torch.no_grad():
        evaluated = ours()
    y = ours()
    assert (y[:, 3] == 0).all()
    assert (y[:, 5, 1] == 0).all()
    assert max(error(y, exact), error(evaluated, exact)) < 1e-6
    grad = torch.randn(y.shape, device=DEVICE)
    found, expected = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(exact, wide, grad.double())
    for mine, truth in zip(found, expected, strict=True):
        assert truth.isfinite().all()
        assert error(mine, truth) < 2e-6
    assert (found[0][:, 3] == 0).all()


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(scale):
    tensors = grid_inputs(1, 1, 16, (5, 7), torch.float32)
    check(rel_pos_attention, reference.rel_pos_attention, tensors, grid=(5, 7), scale=scale)


def test_packed_and_strided_inputs_are_read_as_they_are():
    q, k, v, rel_h, rel_w = grid_inputs(2, 2, 32, (5, 7), torch.float32)
    packed = torch.stack([q, k, v], 2).detach().unbind(2)
    turned = [rel.detach().transpose(2, 3).contiguous().transpose(2, 3) for rel in (rel_h, rel_w)]
    strided = [k.detach().repeat(1, 1, 1, 2)[..., ::2], v.detach().flip(1)]
    for tensors in ([*packed, *turned], [q.detach(), *strided, *turned]):
        tensors = [t.requires_grad_() for t in tensors]
        check(rel_pos_attention, reference.rel_pos_attention, tensors, grid=(5, 7))
    spread = [rel.detach()[:1].expand_as(rel).requires_grad_() for rel in (rel_h, rel_w)]
    check(rel_pos_attention, reference.rel_pos_attention, [q, k, v, *spread], grid=(5, 7))
    qkv, *rest = window_inputs(2, 2, 16, (5, 4), 3, torch.float32)
    turned = qkv.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    check(window_attention, reference.window_attention, [turned, *rest], window=3)


def test_gradient_of_a_concatenation():
    """`cat` hands the backward a gradient that is a view with foreign strides."""
    tensors = grid_inputs(1, 2, 16, (5, 7), torch.float32)
    results = []
    for backend in ("triton", "torch"):
        y = rel_pos_attention(*tensors, grid=(5, 7), backend=backend)
        joined = torch.cat([y, y], -1) * torch.arange(32.0, device=DEVICE)
        results.append(torch.autograd.grad(joined.square().sum(), tensors))
    for mine, theirs in zip(*results, strict=True):
        assert error(mine, theirs.double()) < 1e-5


def test_a_softmax_of_large_scores_stays_finite():
    tensors = [(100 * t).detach().requires_grad_() for t in grid_inputs(1, 1, 16, (5, 7), torch.float32)]
    y = rel_pos_attention(*tensors, grid=(5, 7), backend="triton")
    assert error(y, reference.rel_pos_attention(*(t.double() for t in tensors), grid=(5, 7))) < 1e-5
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), tensors))


def test_empty_batches():
    tensors = grid_inputs(0, 2, 16, (5, 7), torch.float32)
    y = rel_pos_attention(*tensors, grid=(5, 7), backend="triton")
    y.sum().backward()
    assert y.shape == tensors[0].shape
    for size in [(0, 5, 4), (2, 0, 4)]:
        tensors = window_inputs(size[0], 2, 16, size[1:], 3, torch.float32)
        y = window_attention(*tensors, window=3, backend="triton")
        y.sum().backward()
        assert y.shape == (*size, 2, 16)
        assert (tensors[1].grad == 0).all()


def test_values_are_the_same_every_time():
    tensors = window_inputs(1, 2, 32, (16, 20), 14, torch.float16)
    runs = []
    for _ in range(2):
        y = window_attention(*tensors, window=14, backend="triton")
        runs.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck():
    ops = torch.ops.axial_fusion
    grid = grid_inputs(1, 1, 16, (2, 3), torch.float32)
    window = window_inputs(1, 1, 16, (2, 3), 2, torch.float32)
    torch.library.opcheck(ops.rel_pos_attention.default, (*grid, 0.5, "triton"))
    torch.library.opcheck(ops.window_attention.default, (*window, 2, 0.5, "triton"))
    with torch.no_grad():
        y, lse = ops.rel_pos_attention(*grid, 0.5, "triton")
        torch.library.opcheck(ops.rel_pos_attention_backward.default, (y, *grid, y, lse, 0.5, "triton"))
        y, lse = ops.window_attention(*window, 2, 0.5, "triton")
        torch.library.opcheck(ops.window_attention_backward.default, (y, *window, y, lse, 2, 0.5, "triton"))


@pytest.mark.parametrize(
    ("dim", "grid", "message"), [(160, (2, 2), "head dim 160"), (16, (1, 129), "129 columns")], ids=str
)
def test_what_the_kernel_cannot_do_is_refused_when_named_and_told_otherwise(dim, grid, message):
    tensors = grid_inputs(1, 1, dim, grid, torch.float32)
    with pytest.raises(ValueError, match=message):
        rel_pos_attention(*tensors, grid=grid, backend="triton")
    assert select_backend("rel_pos_attention", *tensors).backend == "torch"


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("size", [(4, 4), (4, 5)])
def test_a_bias_alone_has_a_gradient_whether_windows_are_padded_or_not(size, backend):
    bias = draw(96, dtype=torch.float32)
    qkv, rel = (torch.randn(1, *size, *rest, device=DEVICE) for rest in ((3, 2, 16), (2, 2)))
    y = window_attention(qkv, bias, rel, rel, window=2, backend=backend)
    (found,) = torch.autograd.grad(y.sum(), bias)
    assert bool(found.any()) == (size != (4, 4))


def test_bfloat16_has_a_second_derivative_on_a_cpu():
    def products(*given):
        y = rel_pos_attention(*given, grid=(4, 5), backend="torch")
        first = torch.autograd.grad(y.float().square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), given)

    shapes = (*[(1, 20, 2, 16)] * 3, (1, 2, 4, 20), (1, 2, 20, 5))
    given = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    for found, right in zip(
        products(*given), products(*(t.detach().double().requires_grad_() for t in given)), strict=True
    ):
        assert (found - right).norm() <= 5e-2 * right.norm()


def test_off_a_cpu_fused_attention_gets_a_bias_of_its_own_dtype(monkeypatch):
    """On a GPU it refuses an fp32 bias beside half-precision queries, or gives NaN; on a CPU it takes it."""
    seen = []

    def fused(q, k, v, *, attn_mask, scale):
        seen.append({t.dtype for t in (q, k, v, attn_mask)})
        return torch.empty_like(q)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    q = torch.empty(2, 6, 1, 8, device="meta", dtype=torch.bfloat16)
    rows, columns = (torch.empty(2, 1, 6, n, device="meta", dtype=torch.bfloat16) for n in (3, 2))
    y = attend_blocks(q, q, q, rows, columns, 1.0)
    assert seen == [{torch.float32}]
    assert (y.dtype, y.shape) == (q.dtype, q.shape)


@pytest.mark.parametrize("grid", [(23, 24), (3, 200)])
def test_many_keys_of_a_cpu_match_fp64_head_by_head(grid):
    tensors = [t.detach().cpu().requires_grad_() for t in grid_inputs(2, 2, 16, grid, torch.float32)]
    with torch.no_grad():
        tensors[3][1, 0, :, 5] = -torch.inf  # a query without a key
    y = rel_pos_attention(*tensors, grid=grid, backend="torch")
    grad = torch.randn_like(y)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = reference.rel_pos_attention(*wide, grid=grid)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    found, truth = torch.autograd.grad(y, tensors, grad), torch.autograd.grad(exact, wide, grad.double())
    for mine, true in zip(found, truth, strict=True):
        assert error(mine, true) < 3e-6
