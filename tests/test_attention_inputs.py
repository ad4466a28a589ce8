"""Unusual inputs of the attentions: large scores in half precision, tensor classes, transforms, wrong arguments."""

from functools import partial
from itertools import product

import pytest
import torch
from torch.autograd import forward_ad

from axial_fusion import (
    AttentionWeights,
    AxialFusionAttention,
    axial_attention,
    axial_fusion_attention,
    reference,
    rel_pos_attention,
    select_backend,
    slice_attention,
    window_attention,
)
from axial_fusion.cpu import biased_attention, compiled
from axial_fusion.dispatch import FEW_POSITIONS
from axial_fusion.ops import slice_attention as slices

HALVES = [torch.float16, torch.bfloat16]
pytestmark = [  # torch's own, of nested tensors and of forward-mode derivatives
    pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def rel_pos(q, k, v, rel_h, rel_w, **options):
    return rel_pos_attention(q, k, v, rel_h, rel_w, grid=(4, 9), **options)


def windowed(qkv, bias, rel_h, rel_w, **options):
    return window_attention(qkv, bias, rel_h, rel_w, window=3, **options)


OPS = {  # an op, its reference, and the shapes of its inputs
    "axial, 9 slices": (axial_attention, reference.axial_attention, [(2, 9, 4, 2, 64)] * 3),
    "axial, 3 slices": (axial_attention, reference.axial_attention, [(2, 3, 4, 2, 64)] * 3),
    "slice": (slice_attention, reference.slice_attention, [(2, 2, 9, 2, 64)] * 3),
    "rel pos": (
        rel_pos,
        lambda *t: reference.rel_pos_attention(*t, grid=(4, 9)),
        [(2, 36, 2, 64)] * 3 + [(2, 2, 4, 36), (2, 2, 36, 9)],
    ),
    "window": (
        windowed,
        lambda *t: reference.window_attention(*t, window=3),
        [(2, 4, 5, 3, 2, 64), (384,), (2, 4, 5, 2, 3), (2, 4, 5, 2, 3)],
    ),
}
EACH = pytest.mark.parametrize(("op", "exact", "shapes"), OPS.values(), ids=OPS)


def leaves_of(shapes, dtype=torch.float32, size=1.0):
    torch.manual_seed(0)
    return [(size * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


@EACH
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_scores_of_some_tens_are_as_exact_as_an_fp32_softmax_rounded_once(op, exact, shapes, dtype, autocast):
    leaves = leaves_of(shapes, dtype, 4.0)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    narrow = [t.detach().requires_grad_() for t in leaves]
    given = [t.detach().float().requires_grad_() for t in leaves] if autocast else leaves
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = op(*given)
        with torch.no_grad():
            evaluated = op(*given)
    once, truth = exact(*narrow), exact(*wide)
    assert y.dtype == dtype
    assert max(error(y, truth), error(evaluated, truth)) < 2 * error(once, truth)
    found, rounded, expected = (
        torch.autograd.grad(of.square().sum(), inputs)
        for of, inputs in ((y, given), (once, narrow), (truth, wide))
    )
    for mine, theirs, right in zip(found, rounded, expected, strict=True):
        assert error(mine, right) < 3 * error(theirs, right) + 1e-3


@EACH
def test_fp16_scores_beyond_the_largest_number_are_scaled_first(op, exact, shapes):
    leaves = [
        t.sign().mul(40).detach() if t.shape[-1] == 64 else t.detach()
        for t in leaves_of(shapes, torch.float16)
    ]
    if op is not windowed:
        leaves[1] = leaves[0].clone()  # 40 · 40 · 64 is 1.6 times fp16's largest
    truth = exact(*(t.double() for t in leaves))
    for needs in (False, True):
        y = op(*(t.requires_grad_(needs) for t in leaves))
        assert error(y.detach(), truth) < 1e-2
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), leaves))


@EACH
@pytest.mark.parametrize("which", range(3))
def test_a_tangent_on_one_input_alone(op, exact, shapes, which):
    leaves = [t.detach().double() for t in leaves_of(shapes)]
    tangent = torch.randn_like(leaves[which])

    def derivative(f):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, tangent) if i == which else t for i, t in enumerate(leaves)]
            return forward_ad.unpack_dual(f(*duals)).tangent

    assert error(derivative(op), derivative(exact)) < 1e-9


@EACH
def test_transforms(op, exact, shapes):
    """jvp, double backward, and vmap over one input alone."""
    leaves = [t.detach().double() for t in leaves_of(shapes)]
    tangents = tuple(torch.randn_like(t) for t in leaves)
    mine, theirs = (torch.func.jvp(f, tuple(leaves), tangents)[1] for f in (op, exact))
    assert error(mine, theirs) < 1e-9

    def twice(f):
        inputs = [t.requires_grad_() for t in leaves]
        grads = torch.autograd.grad(f(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    plain = partial(op, backend="torch")
    assert all(error(a, b) < 1e-9 for a, b in zip(twice(plain), twice(exact), strict=True))
    if op is slice_attention:  # torch's fused attention says so itself
        with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
            twice(op)
    several = torch.stack([leaves[0].detach(), 2 * leaves[0].detach()])
    rest = [t.detach() for t in leaves[1:]]
    together = torch.func.vmap(lambda t: op(t, *rest))(several)
    torch.testing.assert_close(together, torch.stack([op(t, *rest) for t in several]))


def test_a_second_derivative_where_scores_are_too_many_to_keep(monkeypatch):
    """The registered op's backward is then one of plain products."""
    monkeypatch.setattr(biased_attention, "_SAVED", 0)
    for name in ("rel pos", "window"):
        test_transforms(*OPS[name])


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1])
def test_rows_that_overlap_in_memory(op, exact, shapes, dtype, which):
    """Each axis but the last starts 0 or 1 elements on, as expand, unfold and as_strided make them."""
    leaves = leaves_of(shapes, dtype)
    shape = shapes[which]
    storage = torch.randn(2 * sum(shape) + 1).to(dtype)
    for strides in product((0, 1), repeat=len(shape) - 1):
        odd = storage.as_strided(shape, (*strides, 1)).detach()
        dense = [odd.contiguous().requires_grad_() if i == which else t for i, t in enumerate(leaves)]
        given = [odd.requires_grad_() if i == which else t for i, t in enumerate(leaves)]
        with torch.no_grad():
            torch.testing.assert_close(op(*given), op(*dense))
        y, right = op(*given), op(*dense)
        torch.testing.assert_close(y, right)
        (found,), (expected,) = (
            torch.autograd.grad(t.sum(), tensors[which : which + 1])
            for t, tensors in ((y, given), (right, dense))
        )
        torch.testing.assert_close(found, expected)


@EACH
def test_the_default_device_changes_nothing(op, exact, shapes):
    """Memory of a result taken from the default device instead of q's would be another device's address."""
    leaves = leaves_of(shapes)
    right = [op(*leaves), *torch.autograd.grad(op(*leaves).sum(), leaves)]
    with torch.device("meta"):
        found = [op(*leaves), *torch.autograd.grad(op(*leaves).sum(), leaves)]
        with torch.no_grad():
            found.append(op(*leaves))
    for ours, expected in zip(found, [*right, right[0]], strict=True):
        torch.testing.assert_close(ours, expected)


def meta(t):
    from monai.data import MetaTensor

    return MetaTensor(t)


@pytest.fixture(scope="module")
def mesh():
    """A device mesh of this process alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


@EACH
@pytest.mark.parametrize("kind", ["MetaTensor", "DTensor"])
def test_tensor_classes_are_kept_and_change_nothing(op, exact, shapes, kind, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    leaves = leaves_of(shapes)
    make = meta if kind == "MetaTensor" else lambda t: distribute_tensor(t, mesh, [Replicate()])
    plain = (lambda t: t.as_tensor()) if kind == "MetaTensor" else lambda t: t.full_tensor()
    given = [make(t.detach().clone()).requires_grad_() for t in leaves]
    with torch.no_grad():
        evaluated = op(*given)
    y, want = op(*given), op(*leaves)
    assert type(evaluated).__name__ == type(y).__name__ == kind
    torch.testing.assert_close(plain(evaluated), want.detach())
    torch.testing.assert_close(plain(y), want)
    found = torch.autograd.grad(y, given, make(torch.ones(y.shape)))
    for mine, theirs in zip(found, torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(plain(mine), theirs)


@pytest.mark.parametrize("grad", [False, True])
def test_a_module_takes_a_meta_tensor(grad):
    module, x = AxialFusionAttention(32, 2, rank=2), torch.randn(1, 3, 8, 32)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.as_tensor(module(meta(x))).detach(), module(x).detach())


def test_a_distributed_tensor_takes_plain_products_whatever_the_device(mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    q = distribute_tensor(torch.randn(1, 3, 4, 2, 16), mesh, [Replicate()])
    choice = select_backend("axial_attention", q, q, q)
    assert choice.backend == "torch"
    with pytest.raises(ValueError, match="torch's own tensors alone"):
        axial_attention(q, q, q, backend="triton")


def q_of(*shape, dtype=torch.float32):
    return torch.zeros(shape or (2, 3, 4, 2, 8), dtype=dtype)


def rel_pos_of(q, **options):
    return rel_pos_attention(q, q, q, q_of(1, 2, 2, 6), q_of(1, 2, 6, 3), **{"grid": (2, 3)} | options)


def window_of(dim=8, **options):
    rel = q_of(1, 4, 4, 2, 2)
    return window_attention(
        q_of(1, 4, 4, 3, 2, dim), torch.zeros(6 * dim), rel, rel, **{"window": 2} | options
    )


def fusion_of(x=None, change=None, **options):
    w = AttentionWeights(*(q_of(*s) for s in ((24, 8), (24,), (8, 8), (8,), (8,), (8,))))
    w = w._replace(**change or {})
    return axial_fusion_attention(q_of(1, 3, 4, 8) if x is None else x, w, None, **{"num_heads": 2} | options)


def three(q):
    return axial_attention(q, q, q)


def axial_of(**options):
    return axial_attention(q_of(), q_of(), q_of(), **options)


def slice_of(**options):
    return slice_attention(q_of(), q_of(), q_of(), **options)


NESTED = [torch.zeros(2, 8), torch.zeros(3, 8)]
JAGGED = torch.nested.nested_tensor(NESTED, layout=torch.jagged)
SQUARE, VECTOR = torch.zeros(0, 0), torch.zeros(0)
EMPTY = AttentionWeights(SQUARE, VECTOR, SQUARE, VECTOR, VECTOR, VECTOR)._asdict()
LEARNED = torch.nn.Parameter(torch.tensor(0.3))
REFUSED = {
    "head dim 0, axial": (lambda: three(q_of(2, 3, 4, 2, 0)), "head dim D must be at least 1"),
    "head dim 0, slice": (lambda: slice_attention(*(q_of(2, 3, 4, 2, 0),) * 3), "head dim D"),
    "head dim 0, rel pos": (lambda: rel_pos_of(q_of(1, 6, 2, 0)), "head dim D"),
    "head dim 0, window": (lambda: window_of(dim=0), "head dim D"),
    "no channels": (lambda: fusion_of(q_of(1, 3, 4, 0), EMPTY), "head dim D"),
    "a float window": (lambda: window_of(window=2.0), "window must be an integer of at least 1, found 2.0"),
    "a window of 0": (lambda: window_of(window=0), "window must be an integer of at least 1, found 0"),
    "a window of True": (lambda: window_of(window=True), "window must be an integer"),
    "a float grid": (lambda: rel_pos_of(q_of(1, 6, 2, 8), grid=(2.0, 3)), r"grid\[0\] must be an integer"),
    "float heads": (lambda: fusion_of(num_heads=2.0), "num_heads must be an integer"),
    "a mask as lengths": (
        lambda: axial_of(lengths=torch.tensor([True, False])),
        r"lengths must be \(B,\).*found.*bool",
    ),
    "a mask of keys as lengths": (
        lambda: axial_of(lengths=torch.ones(2, 3, dtype=torch.bool)),
        r"lengths must be \(B\)",
    ),
    "float lengths": (lambda: axial_of(lengths=torch.ones(2)), "float32"),
    "lengths in a list": (lambda: axial_of(lengths=[1, 2]), "lengths must be a tensor, found list"),
    "a mask as causal": (
        lambda: axial_of(causal=torch.ones(3, 3)),
        "causal must be True or False, found Tensor",
    ),
    "a learnable scale, axial": (
        lambda: axial_of(scale=LEARNED),
        "scale must be a number, found a tensor",
    ),
    "a learnable scale, slice": (lambda: slice_of(scale=LEARNED), "scale must be a number"),
    "a learnable scale, rel pos": (
        lambda: rel_pos_of(q_of(1, 6, 2, 8), scale=LEARNED),
        "scale must be a number",
    ),
    "a learnable scale, window": (lambda: window_of(scale=LEARNED), "scale must be a number"),
    "mixed dtypes": (
        lambda: axial_attention(q_of(), q_of(), q_of(dtype=torch.float16)),
        "v is float16 but q is float32",
    ),
    "mixed dtypes of a half": (
        lambda: fusion_of(q_of(1, 3, 4, 8, dtype=torch.bfloat16)),
        "inter.qkv_weight is float32 but x is bfloat16",
    ),
    "integers": (lambda: three(q_of(dtype=torch.int64)), "q must be floating point .*, found int64"),
    "float8": (
        lambda: three(q_of().to(torch.float8_e4m3fn)),
        "q must be floating point .*, found float8_e4m3fn",
    ),
    "complex": (lambda: three(q_of(dtype=torch.complex64)), "found complex64"),
    "integer x": (lambda: fusion_of(q_of(1, 3, 4, 8, dtype=torch.int32)), "x must be floating point"),
    "integer norm": (
        lambda: fusion_of(change={"norm_weight": q_of(8, dtype=torch.int32)}),
        "inter.norm_weight must be floating point",
    ),
    "None": (lambda: axial_attention(q_of(), None, q_of()), "k must be a tensor, found NoneType"),
    "an array": (lambda: three(q_of().numpy()), "q must be a tensor, found ndarray"),
    "a jagged tensor": (lambda: three(JAGGED), "q must be a dense tensor, found a nested one"),
    "a nested tensor": (
        lambda: three(torch.nested.nested_tensor(NESTED)),
        "q must be a dense tensor, found a nested one",
    ),
    "a jagged x": (lambda: fusion_of(JAGGED), "x must be a dense tensor"),
    "a sparse tensor": (
        lambda: three(q_of().to_sparse()),
        "q must be a dense tensor, found a sparse_coo one",
    ),
    "a norm bias alone": (
        lambda: fusion_of(change={"norm_weight": None}),
        "norm_bias is given, but",
    ),
    "no projection": (lambda: fusion_of(change={"out_weight": None}), "out_weight must be a tensor"),
    "a bool mask as query_index": (
        lambda: fusion_of(query_index=torch.tensor([True, False, True])),
        "query_index is",
    ),
    "bools as query_index": (lambda: fusion_of(query_index=[True, False]), "query_index is"),
    "floats as query_index": (lambda: fusion_of(query_index=[1.0]), "query_index is"),
    "one number as query_index": (lambda: fusion_of(query_index=1), "query_index must be a list"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_argument_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", FEW_POSITIONS, ids=str)
def test_without_compiled_kernels_few_positions_are_plain_products_block_by_block(monkeypatch, dtype):
    monkeypatch.setattr(compiled, "missing", lambda: "not built")
    for positions, chosen in ((FEW_POSITIONS[dtype], "torch"), (FEW_POSITIONS[dtype] + 1, "sdpa")):
        assert (
            select_backend("slice_attention", torch.empty(1, 1, positions, 1, 8, dtype=dtype)).backend
            == chosen
        )
    torch.manual_seed(0)
    qkv = (
        torch.randn(2, 5, 12, 3, 3, 8).to(dtype).requires_grad_()
    )  # q, k and v side by side, as a projection leaves them
    grad = torch.randn(2, 3, 12, 5, 8).to(dtype).transpose(1, 3)
    wide = qkv.detach().double().requires_grad_()
    exact = reference.slice_attention(*wide.unbind(3))
    expected = [exact, torch.autograd.grad(exact, wide, grad.double())[0]]
    for block in (slices._BLOCK, 3 * 12**2 * 4, 1):  # all slices, four at a time, one
        monkeypatch.setattr(slices, "_BLOCK", block)
        y = slice_attention(*qkv.unbind(3))
        for found, truth in zip((y, torch.autograd.grad(y, qkv, grad)[0]), expected, strict=True):
            assert error(found, truth) < 4 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_slice_attention_takes_any_number_of_slices(monkeypatch):
    monkeypatch.setattr(slices, "_BLOCK", 4 * 12**2)  # four slices of one head
    one, many = torch.randn(1, 2, 12, 1, 8), torch.randn(1, 11, 12, 1, 8)
    traced = torch.jit.trace(lambda q: slice_attention(q, q, q), one)
    torch.testing.assert_close(traced(many), slice_attention(many, many, many))
