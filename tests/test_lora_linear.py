"""LoRA linear: every engine against the reference in fp64, and what LoRA promises.

The error may be at most 2× (gradients 3×) that of plain torch in the same dtype, with a floor of one rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from axial_fusion import lora_linear, reference, select_backend
from axial_fusion.gpu.common import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if not INTERPRETED:
    DTYPES.append(torch.bfloat16)  # the interpreter's bf16 dot is broken
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ENGINES = ["torch", "augmented", "triton"]

pytestmark = pytest.mark.usefixtures("nan_memory")

# leading shape of x, K, N, rank, bias
SHAPES = {
    "one row": ((1,), 16, 16, 1, True),
    "odd everything": ((3, 7), 37, 53, 3, True),
    "no bias": ((2, 5), 48, 40, 4, False),
    "more rows than a tile": ((150,), 24, 150, 16, True),
    "rank 33": ((9,), 40, 24, 33, True),
    "rank 64, no leading axis": ((), 24, 40, 64, True),
    "no LoRA": ((4, 3), 20, 28, 0, True),
}


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype).requires_grad_()


def layer(lead, k, n, rank, bias, dtype):
    tensors = [draw(*lead, k, dtype=dtype), draw(n, k, dtype=dtype, scale=k**-0.5)]
    tensors.append(draw(n, dtype=dtype) if bias else None)
    tensors += (
        [draw(rank, k, dtype=dtype, scale=k**-0.5), draw(n, rank, dtype=dtype)] if rank else [None, None]
    )
    return tensors


def drawn_seed(seed):
    """The seed of the dropout mask that the op draws right after manual_seed(seed)."""
    torch.manual_seed(seed)
    return torch.randint(2**62, (), device=DEVICE)


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def doubled(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def results(function, tensors, grad):
    y = function(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, grad.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", ENGINES)
def test_matches_the_reference(backend, shape, dtype):
    torch.manual_seed(0)
    tensors = layer(*shape, dtype)
    grad = torch.randn(*shape[0], shape[2], device=DEVICE).to(dtype)
    exact = results(lambda *t: reference.lora_linear(*t, scaling=0.7), doubled(tensors), grad.double())
    ours, plain = (
        results(lambda *t, b=b: lora_linear(*t, scaling=0.7, backend=b), tensors, grad)
        for b in (backend, "torch")
    )
    for i, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.dtype == dtype
        assert error(mine, truth) <= max((3 if i else 2) * error(theirs, truth), FLOOR[dtype]), f"result {i}"


VIEWS = {
    "every other row": lambda x: x[::2, :20],
    "transposed": lambda x: x[:, ::2].t(),
    "every other column": lambda x: x[:, ::2],
    "one row again and again": lambda x: x[:1, :20].expand(7, 20),
    "three leading axes": lambda x: x.view(2, 5, 2, 40)[::2, 1:, :, 3:23].transpose(0, 2),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("backend", ENGINES)
def test_strided_x_and_a_gradient_of_foreign_strides(backend, view):
    torch.manual_seed(0)
    _, w, bias, a, b = layer((1,), 20, 24, 4, True, torch.float32)
    x = view(torch.randn(20, 40, device=DEVICE)).detach().requires_grad_()
    found = []
    for engine in (backend, None):
        if engine:
            tensors = [x, w, bias, a, b]
            y = lora_linear(*tensors, backend=engine)
        else:
            tensors = doubled([x, w, bias, a, b])
            y = reference.lora_linear(*tensors)
        total = (torch.cat([y, y], -1) * torch.arange(48.0, device=DEVICE)).square().sum()
        found.append([y, *torch.autograd.grad(total, tensors)])
    for mine, truth in zip(*found, strict=True):
        assert error(mine, truth) < 1e-5


@pytest.mark.parametrize("lead", [(0,), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("backend", ENGINES)
def test_no_rows_give_no_rows_and_zero_gradients(backend, lead):
    tensors = layer(lead, 20, 24, 4, True, torch.float32)
    y = lora_linear(*tensors, dropout_p=0.5, backend=backend)
    assert y.shape == (*lead, 24)
    for tensor, grad in zip(tensors, torch.autograd.grad(y.sum(), tensors), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


@pytest.mark.parametrize("backend", ENGINES)
def test_zero_b_is_the_base_layer_to_the_bit(backend):
    torch.manual_seed(0)
    x, w, bias, a, b = layer((9,), 32, 24, 4, True, torch.float32)
    zero = torch.zeros_like(b)
    if backend == "torch":  # the others' products sum over another K, in another order
        assert torch.equal(
            lora_linear(x, w, bias, a, zero, backend=backend), lora_linear(x, w, bias, backend=backend)
        )
    torch.testing.assert_close(lora_linear(x, w, bias, a, zero, backend=backend), lora_linear(x, w, bias))


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (3, 4), (0, 3, 4)], ids=str)
def test_only_what_is_asked_for_is_computed(backend, wanted):
    """Any of x, weight, bias, lora_a, lora_b alone: the same gradient as among all, and none for the rest."""
    torch.manual_seed(0)
    tensors = layer((9,), 32, 24, 4, True, torch.float32)
    grad = torch.randn(9, 24, device=DEVICE)
    everything = results(lambda *t: lora_linear(*t, backend=backend), tensors, grad)[1:]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in wanted)
    lora_linear(*tensors, backend=backend).backward(grad)
    for i, (tensor, expected) in enumerate(zip(tensors, everything, strict=True)):
        if i in wanted:
            torch.testing.assert_close(tensor.grad, expected, rtol=1e-5, atol=1e-5)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("rank", [3, 16, 17])
def test_gradients_of_many_programs_are_right_and_the_same_every_time(rank):
    torch.manual_seed(0)
    tensors, grad = layer((300,), 24, 40, rank, True, torch.float32), torch.randn(300, 40, device=DEVICE)
    exact = results(reference.lora_linear, doubled(tensors), grad.double())
    found = [results(lambda *t: lora_linear(*t, backend="triton"), tensors, grad) for _ in range(2)]
    for mine, again, truth in zip(*found, exact, strict=True):
        assert error(mine, truth) < 1e-6
        assert torch.equal(mine, again)


@pytest.mark.parametrize("backend", ENGINES)
def test_dropout_is_a_function_of_its_seed_and_right_on_average(backend):
    x, w = torch.ones(500, 16, device=DEVICE), torch.zeros(16, 16, device=DEVICE)
    a = b = torch.eye(16, device=DEVICE)

    def run(seed):
        torch.manual_seed(seed)
        return lora_linear(x, w, None, a, b, dropout_p=0.25, backend=backend)

    one = run(7)
    assert torch.equal(one, run(7))
    assert not torch.equal(one, run(8))
    assert torch.equal(one != 0, reference.dropout_mask(x.shape, 0.25, drawn_seed(7)))
    assert one.mean().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(one.unique(), torch.tensor([0.0, 4 / 3], device=DEVICE))


@pytest.mark.parametrize("backend", ENGINES)
def test_dropout_in_the_gradients_and_under_checkpointing(backend):
    torch.manual_seed(0)
    tensors = layer((11,), 20, 24, 4, True, torch.float32)
    grad = torch.randn(11, 24, device=DEVICE)

    def run(*t):
        torch.manual_seed(3)
        return lora_linear(*t, scaling=0.5, dropout_p=0.3, backend=backend)

    exact = results(
        lambda *t: reference.lora_linear(*t, scaling=0.5, dropout_p=0.3, seed=drawn_seed(3)),
        doubled(tensors),
        grad.double(),
    )
    for found in (
        results(run, tensors, grad), results(lambda *t: checkpoint(run, *t, use_reentrant=False), tensors, grad)
    ):  # fmt: skip
        for mine, truth in zip(found, exact, strict=True):
            assert error(mine, truth) < 2e-6


@pytest.mark.parametrize("backend", ENGINES)
def test_dropout_is_the_same_compiled_and_checkpointed(backend):
    torch.manual_seed(0)
    tensors, grad = layer((11,), 20, 24, 4, True, torch.float32), torch.randn(11, 24, device=DEVICE)

    def run(*t):
        return lora_linear(*t, dropout_p=0.3, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ways = [run, compiled, lambda *t: checkpoint(run, *t, use_reentrant=False)]
    found = []
    for way in ways:
        torch.manual_seed(1)
        found.append(results(way, tensors, grad))
    for other in found[1:]:
        for mine, first in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half x and weight"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", *ENGINES])
def test_fp32_lora_weights_beside_half_precision(backend, dtype, autocast):
    """The normal case of training: y is not cast up, and A and B get fp32 gradients."""
    if backend == "triton" and dtype not in DTYPES:
        pytest.skip("Triton's interpreter has no bf16 product")
    torch.manual_seed(0)
    tensors = layer((9,), 32, 24, 4, True, torch.float32)
    if not autocast:
        tensors[:3] = (t.detach().to(dtype).requires_grad_() for t in tensors[:3])
    with torch.autocast(DEVICE, dtype=dtype, enabled=autocast):
        y = lora_linear(*tensors, backend=backend)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y.float().square().sum(), tensors)
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]
    exact = doubled(tensors)
    value = reference.lora_linear(*exact)
    assert error(y, value) < 3 * FLOOR[dtype]
    for mine, truth in zip(grads, torch.autograd.grad(value.square().sum(), exact), strict=True):
        assert error(mine, truth) < 5 * FLOOR[dtype]


@pytest.mark.parametrize("backend", ["augmented", "triton"])
def test_opcheck_and_one_graph_for_any_size(backend):
    torch.manual_seed(0)
    x, w, bias, a, b = layer((2, 3), 20, 24, 4, True, torch.float32)
    for dropout in ((None, 0.0), (torch.tensor(1, device=DEVICE), 0.3)):
        arguments = (x, w, bias, a, b, dropout[0], 0.5, dropout[1], backend)
        torch.library.opcheck(torch.ops.axial_fusion.lora_linear.default, arguments)
    op = torch.compile(
        lambda x: lora_linear(x, w, bias, a, b, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows in (3, 8):
        x = torch.randn(rows, 20, device=DEVICE)
        torch.testing.assert_close(op(x), lora_linear(x, w, bias, a, b), rtol=1e-4, atol=1e-5)


def test_a_small_update_survives_bf16_where_merging_rounds_it_away():
    """An update of 2⁻¹⁰ of W: the weight that our bf16 layer applies is off by less than half of W + s B A in bf16.

    It is read off many rows by least squares, in which y's own roundings average out. Adding the update to a y that is
    rounded already, as PEFT and the torch engine do, loses part of it."""
    torch.manual_seed(0)
    rows, k, n, rank = 4096, 64, 48, 4
    w = (k**-0.5 * torch.randn(n, k, device=DEVICE)).bfloat16()
    a, b = torch.randn(rank, k, device=DEVICE), torch.randn(n, rank, device=DEVICE)
    b *= 2**-10 * w.float().norm() / (b @ a).norm()
    x = torch.randn(rows, k, device=DEVICE).bfloat16()
    exact = w.double() + b.double() @ a.double()

    def off(y):
        assert y.dtype == torch.bfloat16
        return error(torch.linalg.lstsq(x.double(), y.double()).solution.T, exact)

    merged = off(x @ (w.float() + b @ a).bfloat16().T)
    for backend in ("auto", "augmented", *(["triton"] if DEVICE == "cuda" else [])):
        assert off(lora_linear(x, w, None, a, b, backend=backend)) < 0.5 * merged


DDP = """
import os, torch, torch.distributed as dist
from axial_fusion import LoRALinear
dist.init_process_group("gloo")
torch.manual_seed(0)
layer = LoRALinear(12, 8, rank=2)
torch.nn.init.normal_(layer.lora_b)
layer.weight.requires_grad_(False)
layer.bias.requires_grad_(False)
x = torch.randn(4, 12)
model = torch.nn.parallel.DistributedDataParallel(layer)
model(x[2 * dist.get_rank() : 2 * dist.get_rank() + 2]).square().mean().backward()
found = layer.lora_a.grad.clone()
layer.zero_grad()
layer(x).square().mean().backward()
torch.testing.assert_close(found, layer.lora_a.grad)
dist.barrier()  # else the first to leave may abort the other
os._exit(0)  # gloo's threads at times abort a Python that tears them down
"""


@pytest.mark.slow
def test_two_processes_average_the_adapters_gradients(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "kernels")}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fused"}, "backend is 'fused'"),
        ({"scaling": nn.Parameter(torch.ones(()))}, "scaling is a tensor"),
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\)"),
        ({"lora_b": None}, "come together"),
        ({"lora_a": torch.zeros(4, 31)}, r"lora_a must be \(r, K\) with K = 32.*\(4, 31\)"),
        ({"lora_b": torch.zeros(24, 3)}, r"lora_b must be \(N, r\) = \(24, 4\), found \(24, 3\)"),
        ({"lora_a": torch.zeros(4, 32).half()}, "lora_b is float32 but lora_a is float16"),
        ({"lora_a": torch.zeros(4, 32, device="meta")}, "lora_b is on cpu but lora_a is on meta"),
        ({"x": torch.zeros(3, 33)}, r"x must be \(..., K\) with K = 32, found shape \(3, 33\)"),
        ({"x": torch.zeros(())}, "x must be"),
        ({"x": torch.zeros(3, 32).half()}, "weight is float32 but x is float16"),
        ({"x": torch.zeros(3, 32).int()}, r"x must be floating point \(.*\), found int32"),
        ({"x": torch.zeros(3, 32, device="meta")}, "weight is on cpu but x is on meta"),
        ({"weight": torch.zeros(24)}, r"weight must be \(N, K\)"),
        ({"bias": torch.zeros(23)}, r"bias must be \(N,\) with N = 24, found shape \(23,\)"),
    ],
    ids=str,
)
def test_mistakes_are_named(change, message):
    x, weight, a, b = (torch.zeros(size) for size in ((3, 32), (24, 32), (4, 32), (24, 4)))
    arguments = {"x": x, "weight": weight, "lora_a": a, "lora_b": b}
    with pytest.raises(ValueError, match=message):
        lora_linear(**(arguments | change))


def test_lora_on_another_device_is_named():
    x, weight, a, b = (torch.zeros(size) for size in ((3, 32), (24, 32), (4, 32), (24, 4)))
    for autocast in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(ValueError, match="lora_a is on meta but x is on cpu"),
        ):
            lora_linear(x, weight, None, a.to("meta"), b.to("meta"))


def test_the_choice_of_engine_is_told():
    x = torch.zeros(3, 32)
    choice = select_backend("lora_linear", x, torch.zeros(24, 32), torch.zeros(4, 32))
    assert choice.backend == "torch"
    assert choice.reason
    half = select_backend("lora_linear", x.half(), torch.zeros(24, 32), torch.zeros(4, 32))
    assert half.backend == "augmented"
    assert "rounds y once" in half.reason
    with torch.autocast("cpu", torch.bfloat16):
        assert select_backend("lora_linear", x, torch.zeros(24, 32), torch.zeros(4, 32)) == half
    x = torch.zeros(3, 32, device=DEVICE)
    with pytest.raises(ValueError, match="rank 65"):
        select_backend("lora_linear", x, torch.zeros(24, 32), torch.zeros(65, 32), backend="triton")
