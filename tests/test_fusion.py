"""The op against the paper's equations in fp64, with gradients; its properties; what torch asks of an op."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from axial_fusion import (
    AttentionWeights,
    LoRA,
    axial_attention,
    axial_fusion_attention,
    lora_linear,
    reference,
    rel_pos_attention,
    select_backend,
    slice_attention,
    window_attention,
)
from axial_fusion.cpu import biased_attention
from axial_fusion.dispatch import select_halves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def half(channels, dtype=torch.float64, rank=0, norm=True, bias=True):
    """Random weights of one attention; everything asks for a gradient."""

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, dtype=dtype)).requires_grad_()

    s = channels**-0.5
    lora = [LoRA(draw(rank, channels, scale=s), draw(channels, rank, scale=0.3), 0.5) if rank else None] * 2
    return AttentionWeights(
        draw(3 * channels, channels, scale=s),
        draw(3 * channels, scale=0.1) if bias else None,
        draw(channels, channels, scale=s),
        draw(channels, scale=0.1) if bias else None,
        draw(channels) if norm else None,
        draw(channels, scale=0.1) if norm else None,
        *lora,
    )


def tensors(*weights):
    flat = []
    for w in weights:
        for part in w or ():
            flat += [t for t in (part[:2] if isinstance(part, LoRA) else [part]) if t is not None]
    return list(dict.fromkeys(flat))


def equations(x, inter, intra, heads, index=None):
    """The paper's section 3.4 written token by token: no reshape that the op could share a mistake with."""

    def attend(z, w, across):
        batch, slices, positions, channels = z.shape
        size = channels // heads
        mean, var = z.mean(-1, keepdim=True), z.var(-1, keepdim=True, unbiased=False)
        y = (z - mean) / (var + 1e-6).sqrt() * w.norm_weight + w.norm_bias
        weight_q, weight_k, weight_v = w.qkv_weight.chunk(3)
        bias_q, bias_k, bias_v = w.qkv_bias.chunk(3)
        if w.lora_q is not None:
            weight_q = weight_q + w.lora_q.scaling * w.lora_q.b @ w.lora_q.a
            weight_v = weight_v + w.lora_v.scaling * w.lora_v.b @ w.lora_v.a
        q, k, v = y @ weight_q.T + bias_q, y @ weight_k.T + bias_k, y @ weight_v.T + bias_v
        rows = []
        for n in range(slices):
            for p in range(positions):
                joined = []
                for a in range(heads):
                    part = slice(a * size, (a + 1) * size)
                    keys = k[:, :, p, part] if across else k[:, n, :, part]
                    values = v[:, :, p, part] if across else v[:, n, :, part]
                    alpha = torch.softmax((keys @ q[:, n, p, part, None])[..., 0] / math.sqrt(size), -1)
                    joined.append((alpha[..., None] * values).sum(1))
                rows.append(torch.cat(joined, -1))
        o = torch.stack(rows, 1).view(batch, slices, positions, channels)
        return o @ w.out_weight.T + w.out_bias

    z = x + attend(x, inter, across=True)
    y = z + attend(z, intra, across=False)
    return y if index is None else y[:, index]


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 3, 5, 12), (1, 4, 7, 16)], ids=str)
def test_the_op_is_the_papers_equations_with_gradients(shape, rank):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    inter, intra = half(shape[-1], rank=rank), half(shape[-1], rank=rank)
    ours = axial_fusion_attention(x, inter, intra, num_heads=2)
    theirs = equations(x, inter, intra, 2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    grad, inputs = torch.randn_like(ours), [x, *tensors(inter, intra)]
    for mine, paper in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, paper, rtol=0, atol=1e-9)


@pytest.mark.parametrize("index", [[0], [2], [1, 2], [3, 0]], ids=str)
@pytest.mark.parametrize("parts", ["both", "axial", "slice"])
def test_query_index_computes_those_slices(index, parts):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    inter = half(8, rank=2) if parts != "slice" else None
    intra = half(8) if parts != "axial" else None
    whole = axial_fusion_attention(x, inter, intra, num_heads=4)
    some = axial_fusion_attention(x, inter, intra, num_heads=4, query_index=index)
    torch.testing.assert_close(some, whole[:, index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("parts", ["both", "axial", "slice"])
@pytest.mark.parametrize("norm", [True, False])
def test_variants_equal_the_reference(residual, parts, norm):
    torch.manual_seed(2)
    x = torch.randn(2, 3, 4, 5, 8)
    inter = half(8, torch.float32, norm=norm, bias=norm) if parts != "slice" else None
    intra = half(8, torch.float32, norm=norm, bias=norm) if parts != "axial" else None
    ours = axial_fusion_attention(x, inter, intra, num_heads=2, residual=residual)
    assert ours.shape == x.shape
    expected = reference.axial_fusion_attention(
        x.flatten(2, 3), inter, intra, num_heads=2, residual=residual
    ).view_as(x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_permuting_the_slices_permutes_the_result():
    x = torch.randn(1, 5, 6, 8, dtype=torch.float64)
    inter, intra = half(8), half(8)
    order = torch.randperm(5)
    y = axial_fusion_attention(x, inter, intra, num_heads=2)
    torch.testing.assert_close(axial_fusion_attention(x[:, order], inter, intra, num_heads=2), y[:, order])


def test_one_slice_attends_to_itself():
    q, k, v = torch.randn(3, 2, 1, 7, 2, 4).unbind(0)
    torch.testing.assert_close(axial_attention(q, k, v), v)


def test_zero_b_is_the_base_layer():
    """To rounding: with LoRA, q, k and v are three products; of one layer alone, to the bit."""
    x = torch.randn(2, 3, 5, 8)
    base = half(8, torch.float32)
    zero = LoRA(torch.randn(2, 8), torch.zeros(8, 2), 3.0)
    adapted = base._replace(lora_q=zero, lora_v=zero)
    torch.testing.assert_close(
        axial_fusion_attention(x, adapted, adapted, num_heads=2),
        axial_fusion_attention(x, base, base, num_heads=2),
        rtol=1e-5,
        atol=1e-6,
    )
    w = torch.randn(6, 8)
    assert torch.equal(lora_linear(x, w, None, zero.a, torch.zeros(6, 2)), lora_linear(x, w))


def test_gradcheck():
    torch.manual_seed(3)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    inter, intra = half(4, rank=1), half(4, rank=1)
    flat = tensors(inter, intra)

    def run(x, *_):
        return axial_fusion_attention(x, inter, intra, num_heads=2)

    assert torch.autograd.gradcheck(run, (x, *flat))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_residual_in_xs_dtype(dtype):
    torch.manual_seed(4)
    x = torch.randn(1, 3, 16, 16)
    inter, intra = half(16, torch.float32, rank=2), half(16, torch.float32, rank=2)
    exact = axial_fusion_attention(x, inter, intra, num_heads=2)
    with torch.autocast("cpu", dtype=dtype):
        y = axial_fusion_attention(x, inter, intra, num_heads=2)
    assert y.dtype == torch.float32
    assert (y - exact).norm() / (exact - x).norm() < 0.02
    y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in tensors(inter, intra))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_every_weight_its_gradient(reentrant):
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    inter, intra = half(8), half(8)
    flat = tensors(inter, intra)

    def run(x, *flat):
        return axial_fusion_attention(
            x, AttentionWeights(*flat[:6]), AttentionWeights(*flat[6:]), num_heads=2
        )

    expected = torch.autograd.grad(run(x, *flat).square().sum(), [x, *flat])
    checkpoint(run, x, *flat, use_reentrant=reentrant).square().sum().backward()
    for tensor, value in zip([x, *flat], expected, strict=True):
        torch.testing.assert_close(tensor.grad, value)


def test_compiles_whole_with_dynamic_sizes():
    torch._dynamo.reset()
    inter, intra = half(8, torch.float32, rank=2), half(8, torch.float32)

    def run(x):
        return axial_fusion_attention(x, inter, intra, num_heads=2)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(2, 3, 5, 8), (3, 4, 6, 8), (2, 5, 9, 8)]:
        x = torch.randn(*shape)
        torch.testing.assert_close(compiled(x), run(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("query_index", [None, [1], [2, 0]])
@pytest.mark.parametrize("rank", [0, 2])
def test_by_triton(rank, query_index):
    """Norm, LoRA projections and axial attention as on a GPU: forward and every gradient."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(9)
    slices = 3 if query_index is None else len(query_index)
    with torch.device(device):
        x, grad = torch.randn(2, 3, 5, 16, requires_grad=True), torch.randn(2, slices, 5, 16)
        inter, intra = (half(16, torch.float32, rank) for _ in "ab")
    given = [x, *tensors(inter, intra)]
    options = {"num_heads": 2, "query_index": query_index}
    ours = axial_fusion_attention(x, inter, intra, **options, backend="triton")
    theirs = reference.axial_fusion_attention(x, inter, intra, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(theirs, given, grad)
    for mine, truth in zip(torch.autograd.grad(ours, given, grad), expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)


def test_triton_takes_its_slice_kernel_where_the_head_fits_and_the_library_elsewhere():
    for channels, dtype, expected in ((32, torch.float16, {"triton"}), (32, torch.float32, {"sdpa", "cpu"})):
        with torch.device(DEVICE):
            x, weights = torch.zeros(1, 3, 128, channels, dtype=dtype), half(channels, dtype)
        _, within = select_halves(x, weights, weights, num_heads=2, queries=3, backend="triton")
        assert within.norm == "triton"
        assert within.attention in expected


def test_triton_is_refused_where_it_cannot_run():
    with torch.device(DEVICE):
        x, inter = torch.randn(1, 65, 2, 16), half(16, torch.float32, 0)
    with pytest.raises(ValueError, match="cannot run axial_fusion_attention here: 65 slices are above 64"):
        axial_fusion_attention(x, inter, None, num_heads=2, backend="triton")


@pytest.mark.parametrize("name", ["axial_attention", "rel_pos_attention", "window_attention"])
def test_opcheck(name):
    """Schema, fake tensors, autograd registration and AOT dispatch of each registered op."""
    torch.manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, requires_grad=True)

    heads = (5, 2, 8)
    arguments = {
        "axial_attention": (
            draw(2, 2, *heads),
            draw(2, 3, *heads),
            draw(2, 3, *heads),
            None,
            0.3,
            False,
            "torch",
        ),
        "rel_pos_attention": (
            *(draw(1, 6, 2, 4) for _ in "qkv"),
            draw(1, 2, 2, 6),
            draw(1, 2, 6, 3),
            0.5,
            "torch",
        ),
        "window_attention": (
            draw(1, 5, 4, 3, 2, 4),
            draw(24),
            *(draw(1, 5, 4, 2, 3) for _ in "hw"),
            3,
            0.5,
            "torch",
        ),
    }[name]
    op = getattr(torch.ops.axial_fusion, name)
    torch.library.opcheck(op.default, arguments)


@pytest.fixture(params=[1 << 22, 4000, 2000, 200, 1], ids=lambda most: f"blocks of {most}")
def blocks(request, monkeypatch):
    """Blocks of everything, of some batch elements, of some heads, of some queries, of one query."""
    monkeypatch.setattr(biased_attention, "_BLOCK", request.param)
    monkeypatch.setattr(biased_attention, "_QUERIES", 1)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("grid", [(5, 7), (4, 4)], ids=str)
def test_rel_pos_attention_equals_the_reference(grid):
    torch.manual_seed(6)
    height, width = grid
    count = height * width
    q, k, v = (torch.randn(2, count, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rel_h = torch.randn(2, 3, height, count, dtype=torch.float64, requires_grad=True)
    rel_w = torch.randn(2, 3, count, width, dtype=torch.float64, requires_grad=True)
    inputs = [q, k, v, rel_h, rel_w]
    ours = rel_pos_attention(*inputs, grid=grid)
    theirs = reference.rel_pos_attention(*inputs, grid=grid)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(rel_pos_attention(*inputs, grid=grid), theirs)
    op = torch.ops.axial_fusion.rel_pos_attention(*inputs, 8**-0.5, "torch")[0]
    grad = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, inputs, grad)
    for result in (ours, op):
        for mine, paper in zip(torch.autograd.grad(result, inputs, grad), expected, strict=True):
            torch.testing.assert_close(mine, paper)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("size", [(5, 7), (6, 6), (2, 3), (7, 4)], ids=str)
def test_window_attention_equals_the_reference_with_padded_keys(size):
    torch.manual_seed(7)
    qkv = torch.randn(2, *size, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(24, dtype=torch.float64, requires_grad=True)
    rel_h, rel_w = (torch.randn(2, *size, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = [qkv, bias, rel_h, rel_w]
    ours, theirs = window_attention(*inputs, window=3), reference.window_attention(*inputs, window=3)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(window_attention(*inputs, window=3), theirs)
    op = torch.ops.axial_fusion.window_attention(*inputs, 3, 0.5, "torch")[0]
    grad = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, inputs, grad, allow_unused=True, materialize_grads=True)
    for result in (ours, op):
        found = torch.autograd.grad(result, inputs, grad, allow_unused=True, materialize_grads=True)
        for mine, paper in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, paper)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k.update(x=torch.zeros(3, 4, 8)), "x must be"),
        (lambda k: k.update(num_heads=3), "num_heads is 3"),
        (lambda k: k.update(query_index=[3]), "query_index"),
        (lambda k: k.update(query_index=[]), "query_index"),
        (lambda k: k.update(inter=None, intra=None), "both None"),
        (lambda k: k.update(inter=half(4, torch.float32)), "inter.qkv_weight"),
        (lambda k: k.update(backend="cuda"), "backend is 'cuda'"),
    ],
    ids=["x", "heads", "index", "no index", "none", "weights", "backend"],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "x": torch.zeros(2, 3, 4, 8), "inter": half(8, torch.float32), "intra": half(8, torch.float32), "num_heads": 2,
    }  # fmt: skip
    change(arguments)
    with pytest.raises(ValueError, match=message):
        axial_fusion_attention(**arguments)


def test_a_named_backend_that_cannot_run_is_refused():
    q = torch.zeros(1, 3, 4, 2, 8)
    assert select_backend("axial_attention", q).backend == "torch"
    with pytest.raises(ValueError, match="flash"):
        slice_attention(q, q, q, backend="flash")
    with pytest.raises(ValueError, match="op is"):
        select_backend("attention", q)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "torch", "flex"])
def test_slice_attention_backends_agree(backend):
    q, k, v = torch.randn(3, 2, 3, 20, 2, 16).unbind(0)
    with torch.no_grad():
        y = slice_attention(q, k, v, backend=backend)
    torch.testing.assert_close(y, reference.slice_attention(q, k, v), rtol=1e-4, atol=1e-5)
