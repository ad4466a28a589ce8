"""The Triton kernel of slice attention, interpreted on a CPU or run on a GPU, and the libraries' backends beside it.

Against the reference in fp64: the error may be at most 2× (gradients 3×) that of torch in the same dtype, with a
floor of one rounding."""

import threading

import pytest
import torch

from axial_fusion import dispatch, reference, select_backend, slice_attention
from axial_fusion.cpu import compiled
from axial_fusion.dispatch import FASTEST, SliceKey
from axial_fusion.gpu import tiles
from axial_fusion.gpu.common import INTERPRETED
from axial_fusion.gpu.slice_attention import launch_forward
from axial_fusion.ops import slice_attention as op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16]
if not INTERPRETED:
    DTYPES.append(torch.bfloat16)  # the interpreter's bf16 dot is broken
FLOOR = {torch.float16: 5e-4, torch.bfloat16: 4e-3}

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.filterwarnings("ignore:.*defaults to a non-deterministic algorithm"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # NaN and overflow in the interpreter
]


@pytest.fixture(params=["pointers", "TMA"])
def loads(request, monkeypatch):
    """Run the test with each way of loading keys and values: a GPU decides itself, the interpreter does as told."""
    if DEVICE == "cuda":
        if (request.param == "TMA") != (tiles.arch(torch.device("cuda")) == 90):
            pytest.skip("this GPU loads in the other way")
    elif request.param == "TMA":
        monkeypatch.setattr(tiles, "arch", lambda device: 90)


def draw(*shape, dtype=torch.float16, scale=1.0):
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()


def inputs(batch, slices, positions, heads, dim, dtype=torch.float16):
    torch.manual_seed(0)
    return [draw(batch, slices, positions, heads, dim, dtype=dtype) for _ in "qkv"]


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def same_dtype(q, k, v, scale):
    """Attention by products in the inputs' dtype."""
    q, k, v = (t.transpose(2, 3) for t in (q, k, v))
    return ((q @ k.transpose(-1, -2) * scale).softmax(-1) @ v).transpose(2, 3)


def check(tensors, scale=None):
    """y and every gradient of the Triton backend, as near to the reference in fp64 as products in the same dtype."""
    dtype = tensors[0].dtype
    y = slice_attention(*tensors, scale=scale, backend="triton")
    grad = torch.randn(y.shape, device=DEVICE).to(dtype)
    grads = torch.autograd.grad(y, tensors, grad)
    plain = same_dtype(*tensors, tensors[0].shape[-1] ** -0.5 if scale is None else scale)
    plain_grads = torch.autograd.grad(plain, tensors, grad)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = reference.slice_attention(*wide, scale=scale)
    exact_grads = torch.autograd.grad(exact, wide, grad.double())
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert error(y, exact) <= max(2 * error(plain, exact), FLOOR[dtype])
    for name, mine, theirs, truth in zip("qkv", grads, plain_grads, exact_grads, strict=True):
        assert mine.shape == truth.shape
        assert mine.dtype == dtype
        if truth.norm() > 1e-6:
            bound = max(3 * error(theirs, truth), 3 * FLOOR[dtype])
            assert error(mine, truth) <= bound, f"gradient of {name}"
        else:
            assert mine.double().norm() < 1e-2, f"gradient of {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64])
@pytest.mark.parametrize("positions", [1, 7, 64, 200, 257])
def test_matches_the_reference(positions, dim, dtype, loads):
    check(inputs(1, 2, positions, 2, dim, dtype))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(scale, loads):
    check(inputs(1, 1, 70, 2, 16), scale)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "torch"])
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_every_library_gets_a_scale_that_it_computes_right(scale, backend):
    """On an H100, cuDNN's gradients were NaN for a scale of 0 or below."""
    torch.manual_seed(0)
    tensors = [draw(1, 2, 70, 2, 32, scale=20.0) for _ in "qk"] + [draw(1, 2, 70, 2, 32)]
    try:
        select_backend("slice_attention", *tensors, backend=backend)
    except ValueError as reason:
        pytest.skip(str(reason))
    y = slice_attention(*tensors, scale=scale, backend=backend)
    grads = torch.autograd.grad(y, tensors, torch.ones_like(y))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = reference.slice_attention(*wide, scale=scale)
    truths = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    assert error(y, exact) < 2e-3
    for mine, truth in zip(grads, truths, strict=True):
        assert (mine.double() - truth).abs().max() <= 2e-2 * (1 + truth.abs().max())


@pytest.mark.parametrize("slices", [slice(None), slice(None, None, 2)], ids=["all", "every second"])
def test_packed_and_strided_inputs(slices, loads):
    torch.manual_seed(0)
    qkv = torch.randn(2, 3, 70, 3, 2, 32, device=DEVICE).half()
    check([t[:, slices].detach().requires_grad_() for t in qkv.unbind(3)])
    q, k, v = torch.randn(3, 2, 1, 2, 70, 32, device=DEVICE).half().transpose(-2, -3)  # heads outside
    check([t.detach().requires_grad_() for t in (q, k, v)])


def test_inputs_that_tma_cannot_describe(loads):
    """An odd offset, rows of an odd length, one key for all positions, and no contiguous axis."""
    torch.manual_seed(0)
    odd = torch.randn(70 * 2 * 33 + 1, device=DEVICE).half()[1:].view(1, 1, 70, 2, 33)[..., :32]
    one = torch.randn(1, 1, 1, 2, 32, device=DEVICE).half().expand(1, 1, 70, 2, 32)
    turned = torch.randn(1, 1, 70, 32, 2, device=DEVICE).half().transpose(-1, -2)
    for q, k, v in ((odd, odd, odd), (turned, one, odd), (odd, turned, one)):
        check([t.detach().requires_grad_() for t in (q, k, v)])


def test_gradient_of_a_concatenation():
    """`cat` hands the backward a gradient that is a view with foreign strides."""
    tensors = inputs(1, 2, 9, 2, 16)
    results = []
    for backend in ("triton", "torch"):
        y = slice_attention(*tensors, backend=backend)
        joined = torch.cat([y, y], -1) * torch.arange(32.0, device=DEVICE).half()
        results.append(torch.autograd.grad(joined.float().square().sum(), tensors))
    for mine, theirs in zip(*results, strict=True):
        assert error(mine, theirs.double()) < 3e-3
    assert all(g.is_contiguous() for g in results[0])


@pytest.mark.parametrize("late", [0.01, 3.0, 60.0], ids=["smaller", "larger", "overflow"])
def test_first_keys_unlike_the_others(late, loads):
    """The offset comes from the first tile of keys: later scores may be far below it, or overflow it."""
    q, k, v = (t.detach() for t in inputs(1, 1, 257, 2, 32))
    q[..., 0] = 4.0
    k[:, :, :128] *= 0.01 if late > 1 else 3
    k[:, :, 128:] *= late if late < 60 else 1
    if late == 60:
        k[:, :, 200:, :, 0] = 60.0
    check([t.requires_grad_() for t in (q, k, v)])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
def test_infinities_and_nan_do_what_a_softmax_does(value, late, loads):
    """In q they reach their own row alone; in k and v they reach what the softmax says."""
    at = 140 if late else 3
    for changed in range(3):
        tensors = [t.detach() for t in inputs(1, 1, 200, 1, 16)]
        tensors[changed][0, 0, at, 0, 2] = value
        y = slice_attention(*tensors, backend="triton")
        exact = reference.slice_attention(*(t.double() for t in tensors))
        torch.testing.assert_close(y.double(), exact, rtol=5e-3, atol=2e-3, equal_nan=True)
        if changed == 0:
            assert y.isnan().any(-1).sum() == 1


def test_scores_of_minus_infinity_get_no_weight(loads):
    """A whole first tile of −inf, which leaves no offset, and then scores that count."""
    q, k, v = (t.detach() for t in inputs(1, 1, 200, 1, 16))
    q[..., 0] = 1.0
    k[:, :, :130, :, 0] = -float("inf")
    y = slice_attention(q, k, v, backend="triton")
    exact = reference.slice_attention(*(t.double() for t in (q, k, v)))
    assert error(y, exact) < 1e-3


def test_log_sum_exp_is_natural():
    q, k, v = (t.detach() for t in inputs(1, 3, 5, 2, 16))
    _, lse = launch_forward(q[0], k[0], v[0], 0.25)
    scores = 0.25 * torch.einsum("npmd,nkmd->nmpk", q[0].double(), k[0].double())
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_more_programs_than_65535_and_more_elements_than_two_to_the_31():
    q = torch.randn(1, 70_000, 1, 1, 16, device=DEVICE, dtype=torch.bfloat16)
    torch.testing.assert_close(slice_attention(q, q, q, backend="triton"), q)
    wide = torch.randn(1, 1, 4096, 2, 2**18 + 16, device=DEVICE, dtype=torch.bfloat16)[..., :16]
    y = slice_attention(wide, wide, wide, backend="triton")
    near = wide.contiguous()
    torch.testing.assert_close(y, slice_attention(near, near, near, backend="triton"))


@pytest.mark.parametrize("shape", [(0, 2, 8, 2, 16), (1, 2, 0, 2, 16)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "sdpa", "sdpa_flash", "torch", "auto"])
def test_empty_tensors(backend, shape):
    tensors = inputs(*shape)
    y = slice_attention(*tensors, backend=backend)
    assert y.shape == shape
    for gradient in torch.autograd.grad(y.sum(), tensors):
        assert gradient.shape == shape


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "torch", "auto"])
@pytest.mark.parametrize("which", range(3))
def test_rows_that_overlap_in_memory(backend, which):
    """Sliding windows over one signal, as unfold makes them."""
    tensors = [torch.randn(1, 1, 40, 1, 16, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    signal = torch.randn(1, 1, 1, 3 * 39 + 16, device=DEVICE, dtype=torch.bfloat16)
    tensors[which] = signal.unfold(-1, 16, 3).transpose(2, 3)
    found, expected = [], []
    for results, copy in ((found, torch.Tensor.detach), (expected, torch.Tensor.contiguous)):
        q, k, v = (copy(t).detach().requires_grad_() for t in tensors)
        y = slice_attention(q, k, v, backend=backend)
        results += [y, *torch.autograd.grad(y.sum(), (q, k, v))]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("positions", [1, 20])
def test_opcheck(positions):
    q, k, v = inputs(2, 3, positions, 2, 16)
    torch.library.opcheck(torch.ops.axial_fusion.slice_attention, (q, k, v, 0.25))
    packed = torch.randn(2, 3, positions, 3, 2, 16, device=DEVICE).half().unbind(3)
    torch.library.opcheck(torch.ops.axial_fusion.slice_attention, (*packed, 0.25))
    y, lse = torch.ops.axial_fusion.slice_attention(q, k, v, 0.25)
    grad = torch.randn_like(y).detach()
    arguments = (grad, *(t.detach() for t in (q, k, v, y, lse)), 0.25)
    torch.library.opcheck(torch.ops.axial_fusion.slice_attention_backward, arguments)


@pytest.mark.filterwarnings("ignore:.*")
def test_compiled_once_for_any_number_of_positions():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda *t: slice_attention(*t, backend="triton"), backend=counter, dynamic=True)
    for positions in (9, 64, 70):
        tensors = inputs(1, 2, positions, 2, 16)
        y = compiled(*tensors)
        assert error(y, slice_attention(*tensors, backend="triton").double()) == 0
        y.sum().backward()
    assert counter.frame_count == 1


def test_auto_compiles_without_a_graph_break():
    torch._dynamo.reset()
    tensors = inputs(1, 2, 9, 2, 16)
    compiled = torch.compile(slice_attention, backend="eager", fullgraph=True, dynamic=True)
    assert error(compiled(*tensors), slice_attention(*tensors).double()) < 1e-3


def test_no_second_derivative():
    tensors = inputs(1, 1, 5, 1, 16)
    y = slice_attention(*tensors, backend="triton")
    (dq,) = torch.autograd.grad(y.float().square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="slice_attention on this backend has no second derivative"):
        dq.sum().backward()


def test_what_triton_does_not_offer():
    q = torch.randn(1, 2, 8, 2, 32, device=DEVICE)
    with pytest.raises(ValueError, match="it needs float16 or bfloat16, found float32"):
        slice_attention(q, q, q, backend="triton")
    odd = q.half()[..., :24]
    with pytest.raises(ValueError, match="head dim 24 is not 16, 32, 64"):
        slice_attention(odd, odd, odd, backend="triton")
    half = q.half()
    with pytest.raises(ValueError, match=r"no torch\.func transform"):
        torch.func.vmap(lambda t: slice_attention(t, t, t, backend="triton"))(half[None])
    assert select_backend("slice_attention", half, half, half, backend="triton").backend == "triton"
    many = half.expand(1, 2, 8, 2, 32).repeat(1, 40, 1, 1, 1)  # the slices are a batch here, without a limit
    assert select_backend("slice_attention", many, backend="triton").backend == "triton"


def test_auto_takes_triton_where_it_was_measured_fastest(monkeypatch):
    monkeypatch.setattr(compiled, "missing", lambda: "not built")
    q = torch.randn(1, 2, 600, 2, 32, device=DEVICE).bfloat16()
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    chosen = select_backend("slice_attention", q, q, q)
    assert chosen.backend == "triton"
    assert chosen.reason.startswith("measured fastest on sm_90 for bfloat16, D 32 (NVIDIA H100 80GB HBM3, ")
    assert "commit" in chosen.reason
    assert select_backend("slice_attention", q.half()).backend == "sdpa"  # not measured
    assert select_backend("slice_attention", q[..., :24]).backend == "sdpa"
    assert select_backend("slice_attention", q.float()).backend == "sdpa"
    monkeypatch.setattr(dispatch, "_capability", lambda device: (8, 0))
    assert select_backend("slice_attention", q).backend == "sdpa"
    assert {key.head_dim for key in FASTEST} == {32, 64}
    assert SliceKey((9, 0), torch.bfloat16, 64) in FASTEST


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_transforms_take_plain_products():
    q = torch.randn(1, 3, 8, 2, 16, device=DEVICE)
    tangent = torch.randn_like(q)
    y, dy = torch.func.jvp(lambda t: slice_attention(t, t, t), (q,), (tangent,))
    exact, dexact = torch.func.jvp(
        lambda t: reference.slice_attention(t, t, t), (q.double(),), (tangent.double(),)
    )
    assert error(y, exact) < 1e-5
    assert error(dy, dexact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_half_precision_scores_are_not_rounded(backend, dtype):
    """Logits of some tens lose per cents in half precision, and q·k above 65,504 is infinite in fp16."""
    torch.manual_seed(0)
    q, k, v = (4 * torch.randn(3, 1, 2, 40, 2, 64, device=DEVICE)).to(dtype)
    exact = reference.slice_attention(q.double(), k.double(), v.double())
    floor = error(exact.to(dtype), exact)
    assert error(slice_attention(q, k, v, backend=backend), exact) < 3 * floor
    large = 40 * q.sign()
    exact = reference.slice_attention(large.double(), large.double(), v.double())
    assert error(slice_attention(large, large, v, backend=backend), exact) < 3 * floor


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_autocast_does_not_round_the_scores(backend):
    torch.manual_seed(0)
    q, k, v = 4 * torch.randn(3, 1, 2, 40, 2, 64, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = slice_attention(q, k, v, backend=backend)
    assert y.dtype == torch.bfloat16
    exact = reference.slice_attention(*(t.bfloat16().double() for t in (q, k, v)))
    assert error(y, exact) < 3 * error(exact.bfloat16(), exact)


def test_threads_share_no_state():
    """A named SDPA kernel must not switch the others off for the process, not even during the call."""
    kinds = ("flash", "mem_efficient", "math", "cudnn")
    q, k, v = (t.detach() for t in inputs(1, 2, 64, 2, 32))
    seen, wrong, done = set(), [], threading.Event()

    def switches():
        return tuple(getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds)

    def watch():
        while not done.is_set():
            seen.add(switches())

    def work(backend):
        leaf = q.clone().requires_grad_()
        alone = slice_attention(leaf, k, v, backend=backend).detach()
        for _ in range(100):
            y = slice_attention(leaf, k, v, backend=backend)
            if not torch.equal(y.detach(), alone):
                wrong.append(backend)
            y.sum().backward()

    want = switches()
    watcher = threading.Thread(target=watch)
    watcher.start()
    workers = [
        threading.Thread(target=work, args=(name,)) for name in ("sdpa_flash", "sdpa_flash", "sdpa", "torch")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done.set()
    watcher.join()
    assert seen == {want}
    assert switches() == want
    assert not wrong


def test_the_backward_says_which_library_it_takes(monkeypatch):
    """cuDNN from sm_90 where torch says that it can; flash from sm_80, and for a single position."""
    q = torch.zeros(1, 2, 8, 16, dtype=torch.float16)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda params: True)
    for capability, positions, takes in (((9, 0), 8, True), ((8, 0), 8, False), ((9, 0), 1, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert op._cudnn_runs(*(q[:, :, :positions],) * 3) is takes
    monkeypatch.undo()
    if DEVICE == "cpu" and not torch.version.cuda:  # torch's CUDA build asks the driver
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert not op._cudnn_runs(q, q, q)
