"""The linear ops inside other people's code: derivatives of every kind, and tensors of other classes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call
from torch.nn import functional as F

from axial_fusion import (
    AxialFusionAttention,
    LoRA,
    LoRALinear,
    lora_linear,
    lora_qkv,
    reference,
    select_backend,
)
from axial_fusion.ops.dense_linear import dense_linear
from axial_fusion.ops.row_norm import row_norm
from drawn import FEW, exact, tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own


def qkv(x, gamma, beta, weight, bias, a_q, b_q, a_v, b_v):
    return lora_qkv(x, gamma, beta, weight, bias, LoRA(a_q, b_q), LoRA(a_v, b_v), eps=0.1)


def plain_qkv(x, gamma, beta, weight, bias, *lora):
    z = reference.layer_norm(x, gamma, beta, 0.1)
    parts = zip(weight.chunk(3), bias.chunk(3), (lora[:2], (), lora[2:]), strict=True)
    return torch.cat([reference.lora_linear(z, w, v, *ab) for w, v, ab in parts], -1)


OPS = {
    "lora_linear": (lora_linear, reference.lora_linear, [(3, 6), (5, 6), (5,), (2, 6), (5, 2)]),
    "linear": (lora_linear, reference.lora_linear, [(3, 6), (5, 6), (5,)]),
    "dense_linear": (dense_linear, F.linear, [(3, 6), (5, 6), (5,)]),
    "row_norm": (
        lambda *t: row_norm(*t, eps=0.1), lambda *t: reference.layer_norm(*t, 0.1), [(3, 6), (6,), (6,)]
    ),
    "lora_qkv": (qkv, plain_qkv, [(3, 6), (6,), (6,), (18, 6), (18,), (2, 6), (6, 2), (2, 6), (6, 2)]),
}  # fmt: skip


def drawn_arguments(data, shapes, batch=0):
    """One tensor a shape, and a set of places of which `batch` or a tangent may be asked, one at the least."""
    chosen = data.draw(st.sets(st.sampled_from(range(len(shapes))), min_size=1))
    sizes = [(batch, *s) if batch and i in chosen else s for i, s in enumerate(shapes)]
    return sorted(chosen), [data.draw(tensors(size)) for size in sizes]


def close(ours, truth):
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_reverse_mode_and_vmap_over_any_of_the_arguments(op):
    ours, theirs, shapes = OPS[op]

    def run(data):
        chosen, given = drawn_arguments(data, shapes)
        tangents = [data.draw(tensors(shapes[i])) for i in chosen]

        def partial(function, given):
            return lambda *t: function(
                *(t[chosen.index(i)] if i in chosen else g for i, g in enumerate(given))
            )

        for function, values, results in ((ours, given, found := []), (theirs, exact(*given), truth := [])):
            one, at = partial(function, values), [values[i].contiguous() for i in chosen]
            moved = [t.to(at[0].dtype) for t in tangents]
            results += torch.func.jvp(one, (*at,), (*moved,))
            results += torch.func.grad(lambda *t, f=one: f(*t).square().sum(), tuple(range(len(at))))(*at)
        for mine, expected in zip(found, truth, strict=True):
            close(mine, expected)
        chosen, given = drawn_arguments(data, shapes, batch=3)
        axes = tuple(0 if i in chosen else None for i in range(len(shapes)))
        many = torch.vmap(ours, axes)(*given)
        rows = ([g[j] if i in chosen else g for i, g in enumerate(exact(*given))] for j in range(3))
        close(many, torch.stack([theirs(*row) for row in rows]))

    FEW(given(st.data())(run))()


@pytest.mark.parametrize("op", [op for op in OPS if op != "lora_qkv"])
def test_a_second_derivative_is_right(op):
    ours, theirs, shapes = OPS[op]
    given = [torch.randn(s, requires_grad=True) for s in shapes]
    found = []
    for function, values in ((ours, given), (theirs, exact(*given))):
        first = torch.autograd.grad(function(*values).pow(3).sum(), values, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), values))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["augmented", "triton"])
def test_a_registered_op_refuses_a_second_derivative_and_transforms(backend):
    x, gamma, weight = torch.randn(3, 6, requires_grad=True), torch.ones(6), torch.randn(18, 6)
    lora = LoRA(torch.randn(2, 6), torch.randn(6, 2))

    def run(x):
        return lora_qkv(x, gamma, None, weight, None, lora, lora, backend=backend).square().sum()

    (first,) = torch.autograd.grad(run(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()
    for transform in (torch.vmap, torch.func.grad):
        with pytest.raises(ValueError, match=r"no forward-mode derivative and no torch\.func transform"):
            transform(run)(x.detach())


class Quantised(torch.Tensor):
    """A weight of int8 that knows F.linear alone, as quantisation libraries have them."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values_, self.scale = values, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, w, *bias = args
            return F.linear(x, w.values_.float() * w.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale)
        raise NotImplementedError(str(func))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_tensors_of_other_classes_work_as_in_linear(grad, dtype, mesh):
    """A distributed x and weights, a jagged x and a quantised weight, with autograd and without."""
    torch.manual_seed(0)
    close = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    layer = LoRALinear(8, 6, rank=2, dtype=dtype)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 8, dtype=dtype)
    with torch.set_grad_enabled(grad):
        expected, parts = layer(x), [x[:1], x[1:]]
        jagged = layer(torch.nested.as_nested_tensor(parts, layout=torch.jagged))
        assert jagged.requires_grad == grad
        for part, rows in zip(jagged.unbind(), expected.split([1, 3]), strict=True):
            torch.testing.assert_close(part, rows, **close)
        arguments = [x, *(p.detach() for p in (layer.weight, layer.bias, layer.lora_a, layer.lora_b))]
        spread = [distribute_tensor(t, mesh, [Shard(0)]) for t in arguments]
        y = lora_linear(*spread)
        assert isinstance(y, DTensor)
        torch.testing.assert_close(y.full_tensor(), expected.detach(), **close)
    assert select_backend("lora_linear", *spread).backend == "torch"


@pytest.mark.parametrize("grad", [True, False])
def test_a_quantised_weight_is_multiplied_by_its_own_linear(grad):
    weight = torch.randint(-127, 128, (6, 8), dtype=torch.int8)
    x, bias, a = torch.randn(4, 8), torch.randn(6), torch.randn(2, 8)
    b = torch.randn(6, 2, requires_grad=True)
    with torch.set_grad_enabled(grad):
        y = lora_linear(x, Quantised(weight, 0.01), bias, a, b)
    torch.testing.assert_close(y, lora_linear(x, weight.float() * 0.01, bias, a, b))
    torch.testing.assert_close(dense_linear(x, Quantised(weight, 0.01)), F.linear(x, weight.float() * 0.01))
    if grad:
        y.sum().backward()
        torch.testing.assert_close(b.grad, (x @ a.t()).sum(0).expand(6, 2))


@pytest.mark.parametrize("backend", ["auto", "torch", "augmented", "triton"])
def test_monais_tensor_on_every_engine(backend):
    data = pytest.importorskip("monai.data", reason="monai is not installed")
    x, w, bias, a, b = (torch.randn(s) for s in ((2, 3, 8), (6, 8), (6,), (2, 8), (6, 2)))
    leaf = data.MetaTensor(x).requires_grad_()
    y, expected = lora_linear(leaf, w, bias, a, b, backend=backend), reference.lora_linear(x, w, bias, a, b)
    torch.testing.assert_close(torch.as_tensor(y), expected, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(torch.as_tensor(leaf.grad), (w + b @ a).sum(0).expand(2, 3, 8))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_that_cannot_be_computed_are_refused():
    layer = LoRALinear(8, 6, rank=2, dropout=0.5)
    parts = [torch.randn(1, 8), torch.randn(3, 8)]
    for x in (torch.nested.nested_tensor(parts), torch.nested.nested_tensor(parts, layout=torch.jagged)):
        with pytest.raises(ValueError, match=r"nested x must have layout torch\.jagged, and no dropout_p"):
            layer(x)


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")  # torch's own, of its switch
def test_onednn_is_not_called_where_it_is_switched_off():
    x, weight = torch.randn(512, 128), torch.randn(128, 128)
    for enabled in (True, False):
        has = torch.backends.mkldnn.is_available()
        with torch.backends.mkldnn.flags(enabled=enabled), torch.profiler.profile() as profile:
            lora_linear(x, weight)
        assert any("mkldnn" in event.key for event in profile.key_averages()) == (enabled and has)


@pytest.mark.parametrize("attention", ["both", "axial", "slice"])
def test_the_module_differentiates_forwards_by_all_of_its_parameters(attention):
    torch.manual_seed(0)
    module, x = AxialFusionAttention(8, 2, rank=2, attention=attention), torch.randn(1, 3, 4, 8)
    values = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    found = []
    for dtype in (torch.float32, torch.float64):
        where, along = ({n: t.to(dtype) for n, t in d.items()} for d in (values, tangents))
        made, given = module.to(dtype), x.to(dtype)
        found.append(torch.func.jvp(lambda p, m=made, g=given: functional_call(m, p, g), (where,), (along,)))
    for mine, truth in zip(*found, strict=True):
        assert (mine.double() - truth).norm() < 1e-4 * truth.norm()


def test_torchscript_is_refused_by_name():
    for module in (LoRALinear(8, 6, rank=2), AxialFusionAttention(8, 2)):
        with pytest.raises(
            NotImplementedError, match=r"torch\.jit\.script cannot compile \w+; use torch\.export"
        ):
            torch.jit.script(module)
