"""LayerNorm and LoRA QKV as one op: every engine against the reference in fp64.

The error may be at most 2× (gradients 3×) that of plain torch in the same dtype, with a floor of one rounding."""

import pytest
import torch
from torch import nn

from axial_fusion import LoRA, lora_qkv, reference
from axial_fusion.gpu.common import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if not INTERPRETED:
    DTYPES.append(torch.bfloat16)  # the interpreter's bf16 dot is broken
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.usefixtures("nan_memory")


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype).requires_grad_()


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def doubled(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def results(function, tensors, grad):
    y = function(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, grad.to(y.dtype))]


def qkv_parts(channels, rank, dtype, beta=True):
    tensors = [draw(channels), draw(channels, scale=0.1) if beta else None]
    tensors += [
        draw(3 * channels, channels, dtype=dtype, scale=channels**-0.5),
        draw(3 * channels, dtype=dtype),
    ]
    if rank:
        for _ in "qv":
            tensors += [draw(rank, channels, scale=channels**-0.5), draw(channels, rank)]
    return tensors


def qkv_reference(x, gamma, beta, weight, bias, *lora):
    z = reference.layer_norm(x, gamma, beta, 1e-6)
    c = x.shape[-1]
    pairs = (lora[:2], (), lora[2:]) if lora else ((), (), ())
    parts = zip(weight.split(c), bias.split(c), pairs, strict=True)
    return torch.cat([reference.lora_linear(z, w, v, *ab, scaling=0.5) for w, v, ab in parts], -1)


@pytest.mark.parametrize("backend", ["augmented", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lead", "channels", "rank"), [((5,), 16, 1), ((2, 7), 37, 3), ((70,), 48, 16), ((3,), 32, 0)]
)
def test_matches_the_reference(lead, channels, rank, dtype, backend):
    torch.manual_seed(0)
    x, parts = draw(*lead, channels, dtype=dtype), qkv_parts(channels, rank, dtype)

    def ours(x, gamma, beta, weight, bias, *lora):
        pairs = [LoRA(*lora[:2], 0.5), LoRA(*lora[2:], 0.5)] if lora else [None, None]
        return lora_qkv(x, gamma, beta, weight, bias, *pairs, backend=backend)

    def plain(x, gamma, beta, weight, bias, *lora):
        z = nn.functional.layer_norm(x.float(), x.shape[-1:], gamma, beta, 1e-6).to(dtype)
        y = nn.functional.linear(z, weight, bias)
        if not lora:
            return y
        a_q, b_q, a_v, b_v = (t.to(dtype) for t in lora)
        zero = y.new_zeros(*y.shape[:-1], channels)
        return y + 0.5 * torch.cat([z @ a_q.T @ b_q.T, zero, z @ a_v.T @ b_v.T], -1)

    grad = torch.randn(*lead, 3 * channels, device=DEVICE).to(dtype)
    tensors = [x, *parts]
    exact = results(qkv_reference, doubled(tensors), grad.double())
    for i, (mine, theirs, truth) in enumerate(
        zip(results(ours, tensors, grad), results(plain, tensors, grad), exact, strict=True)
    ):
        assert error(mine, truth) <= max((3 if i else 2) * error(theirs, truth), FLOOR[dtype]), f"result {i}"


@pytest.mark.parametrize("backend", ["augmented", "triton"])
def test_takes_strided_rows_no_rows_and_autocast(backend):
    torch.manual_seed(0)
    parts = qkv_parts(20, 3, torch.float32)
    lora = (LoRA(*parts[4:6], 0.5), LoRA(*parts[6:], 0.5))

    def run(x):
        return lora_qkv(x, *parts[:4], *lora, backend=backend)

    base = torch.randn(6, 5, 40, device=DEVICE)
    for x in (base[::2, :, ::2].transpose(0, 1), base[::2, 0, :20], base[:0, :, :20]):
        x = x.detach().requires_grad_()
        exact = results(qkv_reference, doubled([x, *parts]), torch.ones(*x.shape[:-1], 60, device=DEVICE))
        found = results(lambda x, *_: run(x), [x, *parts], torch.ones(*x.shape[:-1], 60, device=DEVICE))
        for mine, truth in zip(found, exact, strict=True):
            torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4)
    x = base[0, :, :20].detach().requires_grad_()
    with torch.autocast(DEVICE, torch.float16):
        y = run(x)
    assert y.dtype == torch.float16
    assert error(y, qkv_reference(*doubled([x, *parts]))) < 3e-3
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), [x, *parts]))


@pytest.mark.parametrize("backend", ["augmented", "triton"])
def test_opcheck_large_means_and_what_is_saved(backend):
    torch.manual_seed(0)
    parts = qkv_parts(32, 4, torch.float32)
    x = (200 + torch.randn(9, 32, device=DEVICE)).requires_grad_()
    lora = (LoRA(*parts[4:6], 0.5), LoRA(*parts[6:], 0.5))
    known = {t.data_ptr() for t in [x, *parts]}
    foreign = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: foreign.append(t.shape) if t.data_ptr() not in known else None or t, lambda t: t
    ):
        y = lora_qkv(x, *parts[:4], *lora, backend=backend)
    assert not foreign
    assert (
        error(y, qkv_reference(*doubled([x, *parts]))) < 1e-4
    )  # x itself carries 200 · 2⁻²⁴ of its deviation
    torch.library.opcheck(
        torch.ops.axial_fusion.lora_qkv.default, (x, *parts[:4], *parts[4:], 0.5, 0.5, 1e-6, backend),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    op = torch.compile(
        lambda x: lora_qkv(x, *parts[:4], *lora, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )  # fmt: skip
    for rows in (3, 8):
        torch.testing.assert_close(op(x.detach()[:rows]), y[:rows], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_v": None}, "come together"),
        ({"lora_v": LoRA(torch.zeros(2, 8), torch.zeros(8, 2))}, r"lora_v must be a \(r, C\).*r = 1"),
        ({"lora_q": LoRA(torch.zeros(1, 8), torch.zeros(9, 1))}, "lora_q must be"),
        ({"weight": torch.zeros(16, 8)}, r"weight \(3C, C\)"),
        ({"x": torch.zeros(3, 9)}, r"x must be \(..., C\)"),
        ({"norm_weight": torch.ones(9)}, "weight must be|norm_weight must be"),
        ({"bias": torch.zeros(8)}, "bias must be"),
        ({"backend": "fused"}, "backend is 'fused'"),
        ({"x": torch.zeros(3, 8).int()}, "x must be floating point, found int32"),
        ({"bias": torch.zeros(24, device="meta")}, "x is on cpu but one of its weights on meta"),
        ({"lora_q": LoRA(torch.zeros(1, 8), torch.zeros(8, 1), torch.ones(()))}, "scaling is a tensor"),
    ],
    ids=str,
)
def test_mistakes_are_named(change, message):
    lora = LoRA(torch.zeros(1, 8), torch.zeros(8, 1))
    arguments = {"x": torch.zeros(3, 8), "norm_weight": torch.ones(8), "norm_bias": None,
                 "weight": torch.zeros(24, 8), "lora_q": lora, "lora_v": lora}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lora_qkv(**(arguments | change))
