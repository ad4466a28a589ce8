"""What the ops cost, counted exactly: launches, bytes that a launch touches, FLOPs, bytes kept for the backward."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from axial_fusion import axial_attention, axial_fusion_attention, lora_linear
from axial_fusion.ops.row_norm import row_norm
from benchmarks.speed import transformer
from benchmarks.speed.fusion import Shape, providers
from benchmarks.speed.fusion import inputs as fusion_inputs

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launches(monkeypatch):
    """(kernel, bytes of its tensors) of every launch, as they happen."""
    if DEVICE == "cuda":
        from triton.runtime.jit import JITFunction as Kernel
    else:
        Kernel = interpreter.InterpretedFunction
    seen, run = [], Kernel.run

    def record(self, *args, **keywords):
        touched = {t.data_ptr(): t.numel() * t.element_size() for t in args if isinstance(t, torch.Tensor)}
        seen.append((self.fn.__name__, sum(touched.values())))
        return run(self, *args, **keywords)

    monkeypatch.setattr(Kernel, "run", record)
    return seen


def saved_bytes(function, known):
    """Bytes that autograd keeps beyond the storages of `known`, and the result."""
    ours, kept = {t.untyped_storage()._cdata for t in known}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in ours:
            kept[storage._cdata] = storage  # held, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return sum(storage.nbytes() for storage in kept.values()), y


def test_axial_attention(launches):
    """Forward reads q, k, v and writes y; backward reads these and dy and writes dq, dk, dv; nothing is saved."""
    shape = (1, 9, 20, 2, 32)
    q, k, v = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3))
    size = q.numel() * q.element_size()
    with FlopCounterMode(display=False) as counter:
        kept, y = saved_bytes(lambda: axial_attention(q, k, v, backend="triton"), (q, k, v))
        forward = counter.get_total_flops()
        y.sum().backward()
    assert kept == 0
    assert [name for name, _ in launches] == ["axial_attention_fwd_kernel", "axial_attention_bwd_kernel"]
    assert [touched for _, touched in launches] == [4 * size, 7 * size]
    assert forward == 2 * (2 * 9 * 9 * 32) * 20 * 2
    assert counter.get_total_flops() == forward + 5 * (2 * 9 * 9 * 32) * 20 * 2


def test_row_norm(launches):
    """Forward reads x once and writes z once; backward reads x and dz and writes dx; two numbers a row are saved."""
    rows, c = 20, 64
    x, weight, bias = (
        torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((rows, c), (c,), (c,))
    )
    size, vector, statistics = 4 * rows * c, 4 * c, 2 * 4 * rows
    kept, z = saved_bytes(lambda: row_norm(x, weight, bias, backend="triton"), (x, weight, bias))
    assert kept == statistics
    z.backward(torch.randn_like(z))
    assert launches == [
        ("row_norm_fwd_kernel", 2 * size + 2 * vector + statistics),
        (
            "row_norm_bwd_kernel",
            3 * size + vector + statistics + 2 * vector,
        ),  # one program's sums: one tile holds all
    ]


def test_lora_linear(launches):
    """Forward copies x and W beside the update; backward reads dY and x once; x aᵀ alone is saved."""
    rows, k, n, rank, tail = 20, 32, 48, 4, 16
    shapes = ((rows, k), (n, k), (rank, k), (n, rank))
    x, w, a, b = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in shapes)
    kept, y = saved_bytes(lambda: lora_linear(x, w, None, a, b, backend="triton"), (x, w, a, b))
    assert kept == 4 * rows * rank
    y.backward(torch.randn_like(y))
    sums = rank * (k + n)
    assert [(name, touched // 4) for name, touched in launches] == [
        ("lora_tail_kernel", rows * (2 * k + tail + rank) + rank * k),
        ("lora_weight_kernel", n * (2 * k + tail + rank)),
        ("lora_reduce_kernel", rows * (n + k + rank + tail) + n * rank + sums),
    ]


@pytest.mark.parametrize("slices", [5, 9])
def test_naive_3d_attention_needs_the_flops_that_the_paper_says(slices):
    """Beyond the projections: N·P comparisons a token against N + P."""
    shape = Shape(1, slices, 8, 64, 2)
    x, *weights = fusion_inputs(shape, torch.float32, torch.device("cpu"))
    counted = {}
    for name in ("naive 3D", "axial_fusion"):
        provider = providers(shape)[name]
        # torch's counter knows no formula for the CPU's flash attention; its products are the math backend's
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            provider.call(x, *weights)
        counted[name] = counter.get_total_flops()
        assert counted[name] == provider.flops
    tokens, positions = slices * 64, 64
    projections = 8 * tokens * 64**2
    assert counted["naive 3D"] - projections == 4 * tokens * slices * positions * 64
    assert counted["axial_fusion"] - 2 * projections == 4 * tokens * (slices + positions) * 64


@pytest.mark.parametrize(("side", "plain"), [(32, 53.3), (64, 149.3)], ids=["512 px", "1024 px"])
def test_what_a_fusion_block_keeps_for_the_backward(side, plain):
    """In units of x, counted on tensors without data: at most 40 % of the plain composition's, MLP included.

    The plain one has its probabilities in memory. The library's, whose SDPA has none, keeps 11 for both attentions and
    10 for the MLP, and so does ours; x alone under checkpointing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from aftersam.model.fusion import AxialFusionBlock, AxialFusionTransformer

    kept = {}
    with FakeTensorMode():
        block = AxialFusionBlock(256, 8)
        x = torch.randn(1, 9, side**2, 256, requires_grad=True)
        known = [x, *block.parameters()]
        weights = [half.weights() for half in (block.attention.inter, block.attention.intra)]
        ways = {
            "plain": lambda: transformer.equations(x, block.attention),
            "library": lambda: transformer.library(x, block.attention),
            **{
                backend: partial(axial_fusion_attention, x, *weights, num_heads=8, backend=backend)
                for backend in ("torch", "composed")
            },
        }
        for name, attend in ways.items():
            kept[name], z = saved_bytes(attend, known)
            mlp, _ = saved_bytes(lambda z=z: z + block.mlp(block.norm(z)), [*known])
            kept[name, "block"] = kept[name] + mlp
        model = AxialFusionTransformer(256, 8, 1, grid=(9, side, side)).train()
        features = x.detach().unflatten(2, (side, side)).movedim(-1, 2).requires_grad_()
        model.activation_checkpointing = True
        kept["checkpointed"], _ = saved_bytes(lambda: model(features), [*known, *model.parameters()])
    size = x.numel() * x.element_size()
    found = {name: round(count / size, 1) for name, count in kept.items()}
    assert found["composed", "block"] <= 0.4 * found["plain", "block"]
    assert found["plain", "block"] == plain
    # it attends to blocks of slices, and keeps what they give joined as well
    assert found["torch", "block"] == round(plain + 1, 1)
    assert (found["library"], found["library", "block"]) == (11.1, 21.1)
    assert found["composed", "block"] == pytest.approx(found["library", "block"], abs=0.3)
    assert found["checkpointed"] == 1.0


@pytest.mark.gpu
def test_the_blocks_work_on_dense_tokens():
    """Features lie channels first; were their strides kept, each norm would copy and each sum would stride."""
    model = transformer.AxialFusionTransformer(32, 4, 3, grid=(3, 4, 6)).cuda()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    model(torch.randn(2, 3, 32, 4, 6, device=DEVICE))
    assert seen == [True] * 3
