"""Which backend runs: what select_backend says is what the op does, and one call decides once."""

import importlib
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aftersam.model.fusion import AxialFusionBlock
from aftersam.model.lora import LoRAOptions
from axial_fusion import (
    AttentionWeights,
    LoRA,
    axial_attention,
    axial_fusion_attention,
    dispatch,
    lora_linear,
    lora_qkv,
    rel_pos_attention,
    select_backend,
    slice_attention,
    window_attention,
)
from axial_fusion.checks import torchs_own, wrapped
from axial_fusion.ops.rel_terms import rel_terms
from axial_fusion.ops.row_norm import row_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def qkv_with_lora(x, norm_weight, norm_bias, weight, bias, a_q, b_q, a_v, b_v, **options):
    return lora_qkv(x, norm_weight, norm_bias, weight, bias, LoRA(a_q, b_q), LoRA(a_v, b_v), **options)


def attention(op, slices=3, positions=5, dim=16, dtype=torch.float32, lengths=False):
    tensors = [draw(2, slices, positions, 2, dim, dtype=dtype) for _ in "qkv"]
    return op, tensors


def grid(height=2, width=3, dim=16, dtype=torch.float32):
    count = height * width
    tensors = [draw(1, count, 2, dim, dtype=dtype) for _ in "qkv"]
    tables = [draw(1, 2, height, count, dtype=dtype), draw(1, 2, count, width, dtype=dtype)]
    return partial(rel_pos_attention, grid=(height, width)), tensors + tables


def window(size=2, dtype=torch.float32):
    rel = [draw(1, 2, 3, 2, size, dtype=dtype) for _ in "hw"]
    return partial(window_attention, window=size), [
        draw(1, 2, 3, 3, 2, 16, dtype=dtype),
        draw(96, dtype=dtype),
        *rel,
    ]


def terms(dim=16, dtype=torch.float32):
    return rel_terms, [draw(1, 2, 3, 2, dim, dtype=dtype), *(draw(n, dim, dtype=dtype) for n in (3, 5))]


def linear(rank, outputs=100, dtype=torch.float32):
    tensors = [draw(4, 20, dtype=dtype), draw(outputs, 20, dtype=dtype), draw(outputs, dtype=dtype)]
    return lora_linear, [*tensors, *([draw(rank, 20), draw(outputs, rank)] if rank else [])]


def projections(rank, channels=80, dtype=torch.float32, norm=torch.float32):
    tensors = [draw(4, channels, dtype=dtype), draw(channels, dtype=norm), draw(channels, dtype=norm)]
    tensors += [draw(3 * channels, channels, dtype=dtype), draw(3 * channels, dtype=dtype)]
    return qkv_with_lora, tensors + [draw(rank, channels), draw(channels, rank)] * 2


CASES = {  # op -> calls: a function of tensors, and these, in the op's order
    "axial_attention": [
        attention(axial_attention), attention(axial_attention, slices=65), attention(axial_attention, dim=144),
        attention(axial_attention, dtype=torch.float64), attention(axial_attention, dtype=torch.float16),
    ],
    "slice_attention": [
        attention(slice_attention), attention(slice_attention, slices=65), attention(slice_attention, dim=24),
        attention(slice_attention, dtype=torch.float16), attention(slice_attention, dim=24, dtype=torch.float16),
        attention(slice_attention, dtype=torch.float64),
    ],
    "rel_pos_attention": [
        grid(), grid(1, 129), grid(1, 100), grid(1, 100, dtype=torch.float16), grid(dim=144),
        grid(dtype=torch.float64),
    ],
    "window_attention": [window(), window(100), window(129), window(dtype=torch.float64)],
    "rel_terms": [terms(), terms(144), terms(dtype=torch.float16), terms(dtype=torch.float64)],
    "row_norm": [
        (row_norm, [draw(3, 40), draw(40), draw(40)]), (row_norm, [draw(3, 5000), draw(5000)]),
        (row_norm, [draw(3, 40), draw(40).double()]), (row_norm, [draw(3, 40).double(), draw(40)]),
    ],
    "lora_linear": [linear(0), linear(3), linear(65), linear(3, dtype=torch.float16), linear(3, dtype=torch.float64)],
    "lora_qkv": [
        projections(3), projections(65), projections(3, dtype=torch.float64), projections(3, norm=torch.float64),
        projections(3, dtype=torch.float16),
    ],
}  # fmt: skip
CALLS = [
    pytest.param(op, index, backend, autocast, id=f"{op} {index} {backend} {autocast}")
    for op, calls in CASES.items()
    for index in range(len(calls))
    for backend in ("auto", *dispatch.BACKENDS[op])
    for autocast in (None, torch.float16)
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("op", "index", "backend", "autocast"), CALLS)
def test_a_backend_that_is_said_to_run_runs_and_no_other(op, index, backend, autocast):
    function, tensors = CASES[op][index]
    refused = []
    context = nullcontext() if autocast is None else torch.autocast(DEVICE, autocast)
    with torch.no_grad(), context:
        for call in (partial(select_backend, op, *tensors), partial(function, *tensors)):
            try:
                call(backend=backend)
                refused.append(None)
            except ValueError as error:
                refused.append(str(error))
    assert refused[0] == refused[1]
    if backend in ("auto", "torch"):
        assert refused[0] is None


def half(channels, rank=0, dtype=torch.float32, device=DEVICE):
    def draw(*shape):
        return torch.randn(shape, device=device).to(dtype)

    loras = [LoRA(draw(rank, channels), draw(channels, rank), 0.5) if rank else None] * 2
    square, vector = (channels, channels), (channels,)
    shapes = ((3 * channels, channels), (3 * channels,), square, vector, vector, vector)
    return AttentionWeights(*(draw(*shape) for shape in shapes), *loras)


def decisions(function):
    """How often `function` decides a backend."""
    count, deciders = 0, {dispatch.select_backend.__code__, dispatch.select_halves.__code__}

    def watch(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code in deciders

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("index", [None, [1]], ids=str)
def test_a_fusion_block_decides_at_most_twice(rank, index):
    """Once for both attentions with their projections, once for the norm of its MLP."""
    block = AxialFusionBlock(16, 2, lora=LoRAOptions(rank) if rank else None)
    x = torch.randn(1, 3, 8, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert decisions(lambda: block(x, index)) <= 2
            assert decisions(lambda: block.attention(x, index)) == 1


@pytest.mark.parametrize("op", CASES)
def test_a_call_decides_once(op):
    function, tensors = CASES[op][0]
    importlib.import_module(
        "axial_fusion.ops.axial_attention"
    )._CHOSEN.clear()  # known calls do not decide again
    with torch.no_grad():
        assert decisions(lambda: function(*tensors)) == 1


@pytest.mark.parametrize("index", [None, [1]], ids=str)
def test_torch_is_plain_torch_in_every_part(index):
    """In half precision `auto` takes another engine for LoRA on a CPU, and kernels for all on a GPU."""

    class Ours(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "axial_fusion":
                seen.append((func.__name__, args))
            return func(*args, **(kwargs or {}))

    x, weights = draw(1, 3, 8, 16, dtype=torch.bfloat16), half(16, 2, torch.bfloat16)
    for backend in ("auto", "torch"):
        seen = []
        with torch.no_grad(), Ours():
            axial_fusion_attention(
                x, weights, weights, num_heads=2, query_index=index, dropout_p=0.3, backend=backend
            )
        if backend == "auto":
            assert any("lora_linear" in name for name, _ in seen)
        else:
            assert all(args[-1] == "torch" for _, args in seen)
            assert not (seen and DEVICE == "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("channels", "slices", "rank"), [(64, 9, 4), (64, 70, 4), (512, 9, 80), (5000, 9, 0)]
)
def test_a_fusion_on_a_gpu_takes_for_each_part_what_its_op_would(channels, slices, rank, dtype, monkeypatch):
    """On a GPU that fake tensors pretend to be on, an sm_90."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    with FakeTensorMode():
        x = torch.empty(1, slices, 16, channels, device="cuda", dtype=dtype)
        w = half(channels, rank, dtype, "cuda")
        parts = dispatch.select_halves(x, w, w, num_heads=2, queries=slices, backend="auto")
        qkv = torch.empty(1, slices, 16, 2, channels // 2, device="cuda", dtype=dtype)
        lora = [] if w.lora_q is None else [w.lora_q.a, w.lora_q.b]
        projection = [w.qkv_weight, w.qkv_bias]

        def chosen(op, *tensors):
            return select_backend(op, *tensors).backend

        for part, op in zip(parts, ("axial_attention", "slice_attention"), strict=True):
            assert part.attention == chosen(op, qkv, qkv, qkv)
            assert part.norm == chosen("row_norm", x, w.norm_weight, w.norm_bias)
            assert part.dense == chosen("lora_linear", x, *projection)
            assert part.lora == chosen("lora_linear", x, *projection, *lora)
            if lora:
                assert part.qkv == chosen(
                    "lora_qkv", x, w.norm_weight, w.norm_bias, *projection, *lora, *lora
                )
            else:
                assert part.qkv is None


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="op is 'attention'"):
        select_backend("attention", draw(1))
    with pytest.raises(ValueError, match="needs the op's tensors"):
        select_backend("row_norm")
    with pytest.raises(ValueError, match="backend is 'cuda'; row_norm has auto, triton, torch"):
        select_backend("row_norm", draw(2, 3), backend="cuda")


def test_a_parameter_and_its_alias_are_torchs_own_when_compiled():
    class Layer(torch.nn.Linear):
        def forward(self, x):
            return x + (
                wrapped((x, self.bias.to(x.dtype))) or not torchs_own(x, self.weight, self.bias.to(x.dtype))
            )

    layer = Layer(2, 3).requires_grad_(False)
    layer.compile(backend="eager", fullgraph=True)
    assert layer(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
