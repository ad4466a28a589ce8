"""The attentions by property: any layout, dtype, class and set of gradients gives what the reference gives in fp64.

Backends are those of a CPU, the Triton kernels in their interpreter, and the registered op of the torch backend, which
is what runs it elsewhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axial_fusion import (
    AttentionWeights,
    LoRA,
    axial_attention,
    axial_fusion_attention,
    reference,
    rel_pos_attention,
    slice_attention,
    window_attention,
)
from axial_fusion.cpu import compiled
from axial_fusion.dispatch import HalfBackends
from axial_fusion.ops import axial_fusion_attention as fusion
from axial_fusion.registry import OPS
from drawn import FEW, MANY, asked, exact, tensors

TOL = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SMALL = st.integers(1, 3)
SCALES = st.sampled_from([None, None, 1.0, 0.3, -0.5, 0.0])
HEAD_DIMS = st.sampled_from([1, 3, 8, 16, 24, 32, 80])


class Marked(torch.Tensor):
    """A subclass that changes nothing."""


def dtype_of(draw, backend):
    """The interpreter has no bf16 product, and kernels have no fp64."""
    known = {"triton": [torch.float32, torch.float16], "cpu": list(compiled.DTYPES)}
    return draw(st.sampled_from(known.get(backend, list(TOL))))


def rounding(q, k, scale):
    """How far roundings alone move a weight, of itself: |s| bounds a score, which is rounded as a sum and as a multiple
    of the scale, each by eps / 2 · |s|, and a weight is the exponential of the difference of two scores.

    Rows of one value repeated, at scale 1, make scores of hundreds, which fp32 holds to 5e-5."""
    q, k = (t.detach().double().norm(dim=-1).amax() for t in (q, k))
    return 2 * torch.finfo(torch.float32).eps * float(q * k) * abs(scale)


def assert_same(ours, theirs, given, grad, kinds=(None,), rounded=0.0):
    """A result, in evaluation and in training, and its gradients, against fp64; errors are of the norm.

    The floor is the incoming gradient's norm: that of q and k is exactly 0 where there is one key. `rounded` is what
    fp32 scores may move a weight by."""
    tol = TOL[given[0].dtype]
    if given[0].dtype != torch.float64:
        tol += rounded
    leaves = exact(*given)
    truth = theirs(*leaves)
    marked = [t if t is None or kinds[0] is None else t.as_subclass(kinds[0]) for t in given]
    with torch.no_grad():
        evaluated = ours(*marked)
    mine = ours(*marked)
    pairs = [(evaluated, truth), (mine, truth)]
    wanted = [(t, e) for t, e in zip(given, leaves, strict=True) if t is not None and t.requires_grad]
    assert mine.requires_grad == bool(wanted)
    if wanted:
        inputs, truths = zip(*wanted, strict=True)
        found = torch.autograd.grad(mine, inputs, grad, allow_unused=True, materialize_grads=True)
        expected = torch.autograd.grad(
            truth, truths, grad.double(), allow_unused=True, materialize_grads=True
        )
        pairs += zip(found, expected, strict=True)
        assert [g.dtype for g in found] == [t.dtype for t in inputs]
    for value, right in pairs:
        assert value.shape == right.shape
        off, floor = (value.double() - right).norm(), 1 + grad.double().norm()
        assert off <= tol * (right.norm() + floor), f"off by {off:.1e} of {right.norm():.1e}"


def drawn(data, *shapes, backend, scale=1.0):
    """Leaves of one dtype in drawn layouts, a gradient of the first one's shape, and the class that tensors have."""
    dtype = dtype_of(data.draw, backend)
    leaves = data.draw(asked(*(data.draw(tensors(shape, dtype, scale)) for shape in shapes)))
    return leaves, (data.draw(st.sampled_from([None, None, Marked])),)


def drawn_axial(data):
    batch, queries, slices, positions, heads, dim = (data.draw(s) for s in (*(SMALL,) * 5, HEAD_DIMS))
    slices = data.draw(st.sampled_from([slices, slices, 9]))
    if data.draw(st.booleans()):
        queries = slices
    backend = data.draw(st.sampled_from(["auto", "cpu", "torch", "registered", "triton"]))
    keys = (batch, slices, positions, heads, dim)
    if backend == "cpu" and compiled.missing():
        backend = "auto"
    leaves, kinds = drawn(data, (batch, queries, positions, heads, dim), keys, keys, backend=backend)
    options = {"scale": data.draw(SCALES), "causal": data.draw(st.booleans())}
    used = dim**-0.5 if options["scale"] is None else options["scale"]
    if data.draw(st.booleans()):
        several = torch.tensor(
            data.draw(st.lists(st.integers(-1, slices + 1), min_size=2 * batch, max_size=2 * batch))
        )
        several = several.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
        options["lengths"] = data.draw(
            st.sampled_from([several[:batch], several[::2], several[:1].expand(batch)])
        )

    def ours(q, k, v):
        if backend != "registered":
            return axial_attention(q, k, v, backend=backend, **options)
        return OPS.axial_attention(q, k, v, options.get("lengths"), used, options["causal"], "torch")

    grad = data.draw(tensors(leaves[0].shape, leaves[0].dtype))
    rounded = rounding(*leaves[:2], used)
    assert_same(ours, lambda *t: reference.axial_attention(*t, **options), leaves, grad, kinds, rounded)


def drawn_slice(data):
    batch, slices, heads = (data.draw(SMALL) for _ in range(3))
    positions = data.draw(st.sampled_from([1, 2, 7, 40, 130]))
    backend = data.draw(st.sampled_from(["auto", "sdpa", "sdpa_flash", "torch", "triton"]))
    dim = data.draw(st.sampled_from([16, 32, 64]) if backend == "triton" else HEAD_DIMS)
    dtype = torch.float16 if backend == "triton" else dtype_of(data.draw, backend)
    shape = (batch, slices, positions, heads, dim)
    leaves = data.draw(asked(*(data.draw(tensors(shape, dtype)) for _ in "qkv")))
    scale = data.draw(SCALES)
    grad = data.draw(tensors(shape, dtype))
    assert_same(
        lambda *t: slice_attention(*t, scale=scale, backend=backend),
        lambda *t: reference.slice_attention(*t, scale=scale),
        leaves, grad, (data.draw(st.sampled_from([None, None, Marked])),),
        rounding(*leaves[:2], dim**-0.5 if scale is None else scale),
    )  # fmt: skip


def masked(data, tables):
    """The leaves that are tables of a bias, some of their entries -inf."""
    if data.draw(st.booleans()):
        for table in tables:
            kept = torch.rand(
                table.shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
            )
            with torch.no_grad():
                hidden = table.detach().masked_fill(kept < data.draw(st.sampled_from([0.1, 0.7])), -torch.inf)
                table.copy_(hidden) if table.is_contiguous() else None


def drawn_rel_pos(data):
    batch, heads, height, width = (
        data.draw(s) for s in (SMALL, st.integers(1, 2), SMALL, st.integers(1, 18))
    )
    dim = data.draw(HEAD_DIMS)
    backend = data.draw(st.sampled_from(["auto", "registered", "triton"]))
    count = height * width
    token = (batch, count, heads, dim)
    shapes = (token, token, token, (batch, heads, height, count), (batch, heads, count, width))
    leaves, kinds = drawn(data, *shapes, backend=backend)
    masked(data, leaves[3:])
    scale = data.draw(SCALES)
    used = dim**-0.5 if scale is None else scale

    def ours(*t):
        if backend != "registered":
            return rel_pos_attention(*t, grid=(height, width), scale=scale, backend=backend)
        return OPS.rel_pos_attention(*t, used, "torch")[0]

    grad = data.draw(tensors(token, leaves[0].dtype))
    assert_same(
        ours,
        lambda *t: reference.rel_pos_attention(*t, grid=(height, width), scale=scale),
        leaves,
        grad,
        kinds,
        rounding(*leaves[:2], used),
    )


def drawn_window(data):
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    height, width, window = (data.draw(st.integers(1, 6)) for _ in range(3))
    dim = data.draw(HEAD_DIMS)
    backend = data.draw(st.sampled_from(["auto", "registered", "triton"]))
    table = (batch, height, width, heads, window)
    shapes = ((batch, height, width, 3, heads, dim), (3 * heads * dim,), table, table)
    leaves, kinds = drawn(data, *shapes, backend=backend)
    masked(data, leaves[2:])
    scale = data.draw(SCALES)
    used = dim**-0.5 if scale is None else scale

    def ours(*t):
        if backend != "registered":
            return window_attention(*t, window=window, scale=scale, backend=backend)
        return OPS.window_attention(*t, window, used, "torch")[0]

    grad = data.draw(tensors((batch, height, width, heads, dim), leaves[0].dtype))
    qkv, pad = leaves[0], leaves[1].view(3, heads, dim)
    assert_same(
        ours, lambda *t: reference.window_attention(*t, window=window, scale=scale), leaves, grad, kinds,
        rounding(qkv[..., 0, :, :], torch.cat([qkv[..., 1, :, :].flatten(0, 2), pad[1:2]]), used),
    )  # fmt: skip


def projections_rounding(patch, run, dtype):
    """`rounding` of the largest scores that `run` makes by the reference, where q and k are rounded to `dtype`."""
    found = [0.0]
    for name, plain in [(n, getattr(reference, n)) for n in ("axial_attention", "slice_attention")]:

        def noted(q, k, v, plain=plain):
            if q.numel() and k.numel():
                found.append(rounding(q, k, q.shape[-1] ** -0.5))
            return plain(q, k, v)

        patch.setattr(reference, name, noted)
    run()
    return max(found) * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps


def drawn_half(data, channels, dtype):
    """Thirteen tensors of one half, None where a part is left out."""
    draw = data.draw
    vector, rank = (channels,), draw(st.integers(0, 3))
    shapes = [(3 * channels, channels), (3 * channels,), (channels, channels), vector, vector, vector]
    shapes += [(rank, channels), (channels, rank)] * 2
    given = [draw(tensors(shape, dtype, 0.3)) for shape in shapes]
    for optional in ((1,), (3,), (5,), (4, 5), (6, 7), (8, 9)):
        if draw(st.integers(0, 3)) == 0 or (rank == 0 and optional[0] >= 6):
            for i in optional:
                given[i] = None
    return given


def weights(tensors):
    lora_q, lora_v = (None if a is None else LoRA(a, b, 0.5) for a, b in (tensors[6:8], tensors[8:10]))
    return AttentionWeights(*tensors[:6], lora_q, lora_v)


def norm_rounding(x):
    """The error of LN(x) in fp32 by rounding: that of a row's mean, eps · max |x|, over the smallest deviation.

    A row of equal values has deviation √1e-6, which turns an error of 1e-7 into 1e-4."""
    if x.numel() == 0:
        return 0.0
    x = x.detach().double()
    deviation = (x.var(-1, correction=0) + 1e-6).sqrt().amin()
    return torch.finfo(torch.float32).eps * float(x.abs().amax() / deviation)


def drawn_fusion(data):
    batch, slices = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 5))
    heads, dim = data.draw(st.sampled_from([(1, 16), (2, 8), (2, 16), (3, 4)]))
    grid = data.draw(st.sampled_from([(3,), (2, 2), (1,)]))
    backend = data.draw(st.sampled_from(["auto", "torch", "triton"]))
    dtype, channels = dtype_of(data.draw, backend), heads * dim
    halves = [drawn_half(data, channels, dtype) for _ in range(2)]
    out = data.draw(st.sampled_from([None, None, 0, 1]))
    if out is not None:
        halves[out] = [None] * 10
    given = [data.draw(tensors((batch, slices, *grid, channels), dtype)), *halves[0], *halves[1]]
    leaves = data.draw(asked(*given))
    options = {"num_heads": heads, "residual": data.draw(st.booleans())}
    picked = data.draw(st.lists(st.integers(0, slices - 1), min_size=1, max_size=4))  # repeated, in any order
    index = options["query_index"] = data.draw(st.sampled_from([None, picked]))

    def call(op, *t, **more):
        pair = (None if half[0] is None else weights(half) for half in (t[1:11], t[11:]))
        return op(t[0], *pair, **options, **more)

    def theirs(*t):
        x = t[0].flatten(2, -2)
        return call(reference.axial_fusion_attention, x, *t[1:]).unflatten(2, grid)

    kept = slices if index is None else len(index)
    grad = data.draw(tensors((batch, kept, *grid, channels), dtype))
    with pytest.MonkeyPatch.context() as patch:
        if backend == "triton":  # as on a GPU, but for what is not made of our kernels
            half = HalfBackends("triton", "triton", "augmented", "triton")
            patch.setattr(fusion, "select_halves", lambda *_, **__: (half, half._replace(attention="torch")))
        more = {"backend": "torch"} if backend == "torch" else {}
        kinds = (data.draw(st.sampled_from([None, None, Marked])),)
        rounded = projections_rounding(patch, lambda: theirs(*exact(*leaves)), dtype)
        rounded += norm_rounding(given[0])
        assert_same(lambda *t: call(axial_fusion_attention, *t, **more), theirs, leaves, grad, kinds, rounded)


CALLS = {
    "axial_attention": drawn_axial,
    "slice_attention": drawn_slice,
    "rel_pos_attention": drawn_rel_pos,
    "window_attention": drawn_window,
    "axial_fusion_attention": drawn_fusion,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of the interpreter
@FEW
@given(data=st.data())
def test_a_drawn_call_equals_the_reference(call, data):
    call(data)


@pytest.mark.drawn
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@MANY
@given(data=st.data())
def test_a_thousand_drawn_calls_equal_the_reference(call, data):
    call(data)
