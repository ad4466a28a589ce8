"""The axial half as one op, interpreted on a CPU or run on a GPU, against the equations in fp64.

The error may be at most 2× (gradients 3×) that of plain torch in the same dtype, with a floor of one rounding."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from axial_fusion import AttentionWeights, LoRA, axial_fusion_attention, reference, select_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)  # the interpreter's bf16 dot is broken
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.usefixtures("nan_memory")

# B, N, P, C, M, rank, query_index, norm, bias
CASES = {
    "paper": (1, 9, 8, 64, 2, 4, None, True, True),
    "centre of an odd grid": (2, 9, 7, 48, 3, 3, (4,), True, True),
    "one slice, one position": (1, 1, 1, 16, 1, 1, None, True, True),
    "every other slice, backwards": (1, 7, 5, 80, 1, 0, (6, 4, 2, 0), True, True),
    "no norm, no bias": (1, 3, 5, 32, 2, 16, None, False, False),
    "16 slices, D 24": (1, 16, 3, 72, 3, 33, None, True, True),
    "33 slices": (1, 33, 2, 16, 1, 4, None, True, False),
    "D 96": (1, 5, 3, 96, 1, 2, (2,), True, True),
}


def weights(channels, rank, norm, bias, dtype):
    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, device=DEVICE)).to(dtype).requires_grad_()

    s = channels**-0.5
    lora = [
        LoRA(draw(rank, channels, scale=s), draw(channels, rank, scale=0.3), 0.5) if rank else None
        for _ in "qv"
    ]
    return AttentionWeights(
        draw(3 * channels, channels, scale=s), draw(3 * channels, scale=0.1) if bias else None,
        draw(channels, channels, scale=s), draw(channels, scale=0.1) if bias else None,
        draw(channels) if norm else None, draw(channels, scale=0.1) if norm else None, *lora,
    )  # fmt: skip


def leaves(w):
    flat = [t for part in w if part is not None for t in (part[:2] if isinstance(part, LoRA) else [part])]
    return [t for t in flat if t.requires_grad]


def wide(w):
    def double(t):
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    return AttentionWeights(
        *(double(t) for t in w[:6]),
        *(None if p is None else LoRA(double(p.a), double(p.b), p.scaling) for p in w[6:]),
    )


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check(x, w, dtype, **options):
    x.requires_grad_()
    exact_x, exact_w = x.detach().double().requires_grad_(), wide(w)
    truth = reference.axial_fusion_attention(exact_x, exact_w, None, **options)
    grad = torch.randn(truth.shape, device=DEVICE).to(dtype)
    exact = [truth, *torch.autograd.grad(truth, [exact_x, *leaves(exact_w)], grad.double())]
    found = {}
    for backend in ("triton", "torch"):
        y = axial_fusion_attention(x, w, None, backend=backend, **options)
        assert y.dtype == x.dtype
        found[backend] = [y, *torch.autograd.grad(y, [x, *leaves(w)], grad.to(y.dtype))]
    for i, (ours, plain, right) in enumerate(zip(found["triton"], found["torch"], exact, strict=True)):
        allowed = max((3 if i else 2) * error(plain, right), FLOOR[dtype])
        assert error(ours, right) <= allowed, f"result {i}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_equations(case, dtype):
    batch, slices, positions, channels, heads, rank, index, norm, bias = case
    torch.manual_seed(0)
    w = weights(channels, rank, norm, bias, dtype)
    x = torch.randn(batch, slices, positions, channels, device=DEVICE).to(dtype)
    check(x, w, dtype, num_heads=heads, query_index=index)
    if index is None:
        check(x, w, dtype, num_heads=heads, residual=False)


def test_rows_of_a_large_mean():
    """Where a norm folded into the weights would subtract large numbers from each other."""
    torch.manual_seed(0)
    x = 300 + torch.randn(1, 5, 6, 32, device=DEVICE)
    check(x, weights(32, 4, True, True, torch.float32), torch.float32, num_heads=2)


def test_strided_x_is_read_in_place_and_a_cat_gives_a_foreign_gradient():
    torch.manual_seed(0)
    base = torch.randn(1, 5, 12, 48, device=DEVICE)
    x = base[:, :, ::2, :32].transpose(1, 2)  # (1, 6, 5, 32): slices and positions swapped
    w = weights(32, 4, True, True, torch.float32)
    check(x.detach(), w, torch.float32, num_heads=2)
    x = x.detach().requires_grad_()
    found = []
    for backend in ("triton", "torch"):
        y = axial_fusion_attention(x, w, None, num_heads=2, backend=backend)
        total = (torch.cat([y, y], -1) * torch.arange(64.0, device=DEVICE)).square().sum()
        found.append(torch.autograd.grad(total, [x, w.qkv_weight]))
    for ours, plain in zip(*found, strict=True):
        assert error(ours, plain.double()) < 1e-5


@pytest.mark.parametrize("frozen", ["base", "lora", "all"])
def test_frozen_weights_cost_no_gradient(frozen):
    torch.manual_seed(0)
    w = weights(32, 4, True, True, torch.float32)
    for t in leaves(w):
        is_lora = any(t is part for lora in w[6:] for part in lora[:2])
        t.requires_grad_(frozen != "all" and is_lora != (frozen == "lora"))
    x = torch.randn(1, 3, 5, 32, device=DEVICE)
    check(x, w, torch.float32, num_heads=2)
    y = axial_fusion_attention(x.detach().requires_grad_(), w, None, num_heads=2, backend="triton")
    y.sum().backward()
    assert all(
        (t.grad is not None) == t.requires_grad for t in [*w[:6], *(p for lora in w[6:] for p in lora[:2])]
    )


def test_saves_x_and_weights_alone():
    torch.manual_seed(0)
    w = weights(64, 4, True, True, torch.float32)
    x = torch.randn(2, 9, 30, 64, device=DEVICE, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in [x, *leaves(w)]}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    bytes_saved = {}
    for backend in ("triton", "torch"):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = axial_fusion_attention(x, w, None, num_heads=2, backend=backend)
        bytes_saved[backend] = sum(kept.values())
        del y
    assert bytes_saved["triton"] == 0
    assert bytes_saved["torch"] > 4 * x.numel() * x.element_size()


def test_autocast_keeps_the_norm_and_lora_in_fp32():
    torch.manual_seed(0)
    w = weights(32, 4, True, True, torch.float32)
    x = torch.randn(1, 3, 6, 32, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("triton", "torch"):
        with torch.autocast(DEVICE, dtype=torch.float16):
            y = axial_fusion_attention(x, w, None, num_heads=2, backend=backend)
        assert y.dtype == torch.float32
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *leaves(w)])])
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype == torch.float32
        if plain.norm() > 1e-3:
            assert error(ours, plain.double()) < 2e-2


def test_checkpointing_of_either_kind_gives_the_same_gradients():
    torch.manual_seed(0)
    w = weights(32, 4, True, True, torch.float32)
    x = torch.randn(1, 3, 6, 32, device=DEVICE, requires_grad=True)

    def run(x, *flat):
        parts = AttentionWeights(*flat[:6], LoRA(flat[6], flat[7], 0.5), LoRA(flat[8], flat[9], 0.5))
        return axial_fusion_attention(x, parts, None, num_heads=2, backend="triton")

    flat = [*w[:6], *(t for lora in w[6:] for t in lora[:2])]
    expected = torch.autograd.grad(run(x, *flat).square().sum(), [x, *flat])
    for reentrant in (False, True):
        y = checkpoint(run, x, *flat, use_reentrant=reentrant)
        y.square().sum().backward()
        for t, right in zip([x, *flat], expected, strict=True):
            torch.testing.assert_close(t.grad, right)
            t.grad = None


def test_opcheck_and_one_graph_for_any_size():
    torch.manual_seed(0)
    w = weights(32, 2, True, True, torch.float32)
    x = torch.randn(1, 3, 5, 32, device=DEVICE, requires_grad=True)
    flat = [*w[:6], *(t for lora in w[6:] for t in lora[:2])]
    torch.library.opcheck(
        torch.ops.axial_fusion.axial_half,
        (x, *flat, 0.5, 0.5, 2, [1, 1, 1], True, 1e-6),
        rtol=1e-4,
        atol=1e-5,
    )
    op = torch.compile(
        lambda x: axial_fusion_attention(x, w, None, num_heads=2, backend="triton"),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for shape in ((1, 3, 5, 32), (2, 4, 7, 32)):
        x = torch.randn(shape, device=DEVICE)
        torch.testing.assert_close(
            op(x), axial_fusion_attention(x, w, None, num_heads=2), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("shape", [(0, 3, 5, 32), (1, 3, 0, 32)], ids=str)
def test_empty(shape):
    w = weights(32, 2, True, True, torch.float32)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    y = axial_fusion_attention(x, w, None, num_heads=2, backend="triton")
    assert y.shape == shape
    y.sum().backward()
    assert all((t.grad == 0).all() for t in leaves(w))


def test_what_it_cannot_do_is_refused_by_name():
    w = weights(32, 4, True, True, torch.float32)
    x = torch.randn(1, 4, 5, 32, device=DEVICE)
    two_ranks = w._replace(lora_v=LoRA(torch.zeros(2, 32, device=DEVICE), torch.zeros(32, 2, device=DEVICE)))
    wide_head, large = weights(192, 0, True, True, torch.float32), torch.zeros(1, 2, 2, 192, device=DEVICE)
    options = {"num_heads": 2, "backend": "triton"}
    with pytest.raises(ValueError, match="equal distances"):
        axial_fusion_attention(x, w, None, query_index=(0, 1, 3), **options)
    with pytest.raises(ValueError, match="dropout"):
        axial_fusion_attention(x, w, None, dropout_p=0.1, **options)
    with pytest.raises(ValueError, match="LoRA ranks"):
        axial_fusion_attention(x, two_ranks, None, **options)
    with pytest.raises(ValueError, match="head dim 192"):
        axial_fusion_attention(large, wide_head, None, num_heads=1, backend="triton")
    assert select_backend("axial_fusion_attention", x).backend == (
        "composed" if DEVICE == "cuda" else "torch"
    )
