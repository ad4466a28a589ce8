"""The compiled kernels of axial attention: values and gradients, threads, memory, and what happens without them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from axial_fusion import axial_attention, reference, select_backend
from axial_fusion.cpu import compiled
from axial_fusion.registry import OPS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "kernels" / "axial_fusion" / "cpu" / "kernels.c"
TOL = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BUILT = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))
LEVELS = range(1 + (0 if compiled.missing() else compiled._level()))  # instruction sets that this machine has
SHAPES = {  # B, Nq, N, P, M, D
    "one of everything": (1, 1, 1, 1, 1, 1),
    "paper": (1, 9, 9, 6, 8, 32),
    "small": (1, 5, 5, 7, 4, 32),
    "past the caches": (1, 9, 9, 400, 7, 32),
    "D 96": (2, 9, 9, 3, 4, 96),
    "D 3": (2, 4, 4, 5, 3, 3),
    "D 8": (1, 2, 3, 5, 2, 8),
    "D 24": (1, 16, 16, 3, 3, 24),
    "D 130": (1, 3, 17, 2, 1, 130),
    "centre query": (2, 1, 9, 4, 2, 32),
    "centre query past the caches": (1, 1, 9, 400, 7, 32),
    "more queries than keys": (1, 8, 3, 4, 2, 16),
    "33 slices": (2, 33, 33, 2, 2, 16),
    "48 slices": (1, 48, 48, 1, 1, 40),
    "64 slices": (1, 64, 64, 2, 1, 32),
}
pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.fixture
def threads():
    """Gives torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(shape, dtype=torch.float32, packed=False):
    """q, k, v that need gradients, and dY."""
    torch.manual_seed(0)
    batch, queries, slices, positions, heads, dim = shape
    grad = torch.randn(batch, queries, positions, heads, dim).to(dtype)
    if packed:
        qkv = torch.randn(batch, slices, positions, 3, heads, dim).to(dtype).unbind(3)
    else:
        sizes = [(batch, n, positions, heads, dim) for n in (queries, slices, slices)]
        qkv = [torch.randn(size).to(dtype) for size in sizes]
    return [t.requires_grad_() for t in qkv], grad


def results(qkv, grad, run=axial_attention, **options):
    y = run(*qkv, **options)
    return [y.detach(), *torch.autograd.grad(y, qkv, grad)]


def check(qkv, grad, run=axial_attention, exactly=reference.axial_attention, **options):
    ours = results(qkv, grad, run, backend="cpu", **options)
    wide = [t.detach().double().requires_grad_() for t in qkv]
    exact = results(wide, grad.double(), exactly, **options)
    tol, floor = TOL[qkv[0].dtype], 1 + grad.double().norm()
    for name, value, truth in zip("yqkv", ours, exact, strict=True):
        assert value.dtype == qkv[0].dtype
        assert value.is_contiguous()
        off = (value.double() - truth).norm()
        assert off <= tol * (truth.norm() + floor), f"{name} is off by {off:.1e} of {truth.norm():.1e}"


@BUILT
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_the_reference(shape, dtype, level, monkeypatch):
    monkeypatch.setattr(compiled, "_level", lambda: level)
    qkv, grad = inputs(shape, dtype)
    for causal in (False, True):
        for lengths in (None, torch.tensor([shape[2] // 2, 0][: shape[0]])):
            check(qkv, grad, causal=causal, lengths=lengths)


@BUILT
@pytest.mark.parametrize("slices", range(1, 65))
def test_any_number_of_slices(slices):
    check(*inputs((1, slices, slices, 2, 2, 8)))


@BUILT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_as_torch_rounds(dtype):
    """With one key the result is v, and its gradient dY: denormals, infinities, NaN and ties keep their bits."""
    every = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 64, 4, 256)
    )
    q = torch.zeros_like(every)
    y = axial_attention(q, q, every, backend="cpu")
    torch.testing.assert_close(y, every, rtol=0, atol=0, equal_nan=True)
    torch.manual_seed(0)
    v = (torch.randn(1, 2, 64, 4, 256) * torch.logspace(-9, 5, 256)).to(dtype)
    y = axial_attention(torch.zeros_like(v), torch.zeros_like(v), v, backend="cpu")
    mean = (v[:, :1].float() * 0.5 + v[:, 1:].float() * 0.5).to(dtype).expand_as(v)
    torch.testing.assert_close(y, mean, rtol=0, atol=0, equal_nan=True)


@BUILT
def test_the_same_bits_on_any_number_of_threads(threads):
    qkv, grad = inputs((2, 9, 9, 130, 3, 32))
    found = []
    for count in (1, 2, 8, 8):
        torch.set_num_threads(count)
        found.append(results(qkv, grad, backend="cpu", causal=True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@BUILT
@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP is looked up on Linux alone")
def test_threads_are_those_of_torch(threads):
    """One OpenMP in the process, and no thread more than torch has."""
    assert "OpenMP" not in torch.__config__.parallel_info() or compiled._parallel()
    torch.set_num_threads(3)
    (torch.randn(512, 512) @ torch.randn(512, 512)).exp().sum()
    before = len(os.listdir("/proc/self/task"))
    results(*inputs((1, 9, 9, 256, 8, 32)), backend="cpu")
    assert len(os.listdir("/proc/self/task")) <= before
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line}) == 1


@BUILT
def test_memory_is_read_as_it_lies():
    check(*inputs((2, 5, 5, 13, 2, 32), packed=True))
    (q, k, v), grad = inputs((2, 9, 9, 6, 4, 24))
    views = [
        q[:, ::2].flip(2), k[:, 1:6], v[:, :1].expand(2, 5, 6, 4, 24),
    ]  # fmt: skip
    check(
        [t.detach().requires_grad_() for t in views], grad[:, :5].transpose(2, 3).contiguous().transpose(2, 3)
    )
    apart = [torch.randn(24, 2, 5, 6, 4).permute(1, 2, 3, 4, 0).requires_grad_() for _ in "qkv"]
    check(apart, torch.ones(()).expand(2, 5, 6, 4, 24))
    negative = [
        torch.randn(2, 5, 6, 4, 24, dtype=torch.complex64).conj().imag.requires_grad_() for _ in "qkv"
    ]
    assert all(t.is_neg() for t in negative)
    check(negative, torch.randn(2, 5, 6, 4, 24))


@BUILT
@pytest.mark.parametrize(
    "shape", [(0, 3, 3, 4, 2, 16), (1, 3, 3, 0, 2, 16), (1, 3, 0, 4, 2, 16), (1, 0, 3, 4, 2, 16)]
)
def test_empty_tensors(shape):
    qkv, grad = inputs(shape)
    found = results(qkv, grad, backend="cpu")
    assert [t.shape for t in found] == [qkv[0].shape, *(t.shape for t in qkv)]
    assert all((t == 0).all() for t in found)


@BUILT
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_stays_with_what_its_query_sees(value):
    qkv, grad = inputs((1, 9, 9, 4, 2, 32))
    clean = results(qkv, grad, backend="cpu", causal=True)
    grad[:, 3, 2, 1] = value
    y, dq, dk, dv = results(qkv, grad, backend="cpu", causal=True)
    assert torch.equal(y, clean[0])
    for found, before, reached in ((dq, clean[1], [3]), (dk, clean[2], range(4)), (dv, clean[3], range(4))):
        changed = torch.zeros(found.shape, dtype=torch.bool)
        changed[:, list(reached), 2, 1] = True
        assert torch.equal(found[~changed], before[~changed])
        assert not found[changed].isfinite().all()


@BUILT
def test_derivatives_of_derivatives_are_those_of_plain_torch():
    qkv, grad = inputs((1, 3, 3, 2, 1, 4))

    def second(backend):
        y = axial_attention(*qkv, causal=True, backend=backend)
        first = torch.autograd.grad(y, qkv, grad, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), qkv)

    for mine, plain in zip(second("cpu"), second("torch"), strict=True):
        torch.testing.assert_close(mine, plain)
    grads = torch.randn(5, *grad.shape)
    y = axial_attention(*qkv, backend="cpu")
    batched = torch.autograd.grad(y, qkv, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, qkv, g, retain_graph=True) for g in grads]
    for together, alone in zip(batched, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(alone))


@BUILT
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_looks_on_sees_the_registered_op():
    qkv, grad = inputs((1, 3, 3, 2, 1, 4))
    with FlopCounterMode(display=False) as counter:
        results(qkv, grad, backend="cpu")
    assert counter.get_total_flops() == (4 + 10) * 3 * 3 * 2 * 4
    torch.library.opcheck(OPS.axial_attention.default, (*qkv, None, 0.5, True, "cpu"))
    traced = torch.jit.trace(lambda *t: axial_attention(*t, backend="cpu"), [t.detach() for t in qkv])
    other = [torch.randn_like(t) for t in qkv]
    torch.testing.assert_close(traced(*other), axial_attention(*other))


@BUILT
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_auto_takes_the_compiled_kernels_where_plain_torch_is_not_asked_for():
    qkv, _ = inputs((1, 3, 3, 2, 1, 16))

    def chosen(*tensors, **options):
        return select_backend("axial_attention", *tensors, **options).backend

    assert chosen(*qkv) == "cpu"
    assert chosen(*(t[:, :2] for t in qkv)) == "torch"
    assert chosen(qkv[0][:, :1], *qkv[1:]) == "torch"
    assert chosen(*(t[..., :8] for t in qkv)) == "torch"
    assert chosen(*qkv, backend="torch") == "torch"
    assert chosen(*(t.double() for t in qkv)) == "torch"
    seen = []
    torch.func.vmap(lambda q: seen.append(chosen(q, q, q)) or q)(qkv[0])
    torch.jit.trace(lambda q: seen.append(chosen(q, q, q)) or q + 1, qkv[0].detach(), check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(qkv[0], qkv[1])
        seen.append(chosen(dual, dual, dual))
    assert set(seen) == {"torch"}
    exported = torch.export.export(Axial(), tuple(t.detach() for t in qkv))
    assert "axial_fusion" not in str(exported.graph)


class Axial(torch.nn.Module):
    def forward(self, q, k, v):
        return axial_attention(q, k, v)


def test_without_the_compiled_kernels_torch_runs_and_says_why(monkeypatch):
    qkv, grad = inputs((1, 3, 3, 2, 1, 16))
    monkeypatch.setattr(compiled, "_path", lambda: None)
    compiled._library.cache_clear()
    try:
        choice = select_backend("axial_attention", *qkv)
        assert choice.backend == "torch"
        assert choice.reason == "the compiled kernels are not built; install with a C compiler at hand"
        with pytest.raises(ValueError, match=r"backend .cpu. cannot run axial_attention here: .*not built"):
            axial_attention(*qkv, backend="cpu")
        exact = results(qkv, grad, reference.axial_attention)
        for mine, truth in zip(results(qkv, grad), exact, strict=True):
            torch.testing.assert_close(mine, truth)
    finally:
        compiled._library.cache_clear()


def test_a_library_that_does_not_load_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(compiled, "_path", lambda: broken)
    compiled._library.cache_clear()
    try:
        assert compiled.missing().startswith("the compiled kernels do not load: ")
    finally:
        compiled._library.cache_clear()


@BUILT
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_huge_finite_scores_are_weights(monkeypatch, level, dtype):
    monkeypatch.setattr(compiled, "_level", lambda: level)
    q = torch.full((1, 2, 8, 1, 32), 6e4, dtype=dtype)
    torch.testing.assert_close(axial_attention(q, q, q, backend="cpu"), q)
    torch.manual_seed(0)
    k = 1e5 * torch.randn(1, 9, 8, 2, 32)
    y = axial_attention(k, k, k, backend="cpu")
    torch.testing.assert_close(y, reference.axial_attention(*[k.double()] * 3).float())


@pytest.mark.parametrize("compiler", ["gcc", "clang", "aarch64-linux-gnu-gcc"])
def test_compiles_without_a_warning(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    flags = [
        "-O3",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-fPIC",
        "-shared",
    ]  # -Wno-psabi: as setup.py builds it
    subprocess.run([compiler, *flags, SOURCE, "-o", tmp_path / "kernels.so"], check=True, timeout=300)


SANITIZED = """
import sys
from pathlib import Path
import torch
sys.path[:0] = sys.argv[2:]
from axial_fusion.cpu import compiled
compiled._path = lambda: Path(sys.argv[1])
import test_channels_last as images
import test_compiled as tests
import test_compiled_slices as slices
assert compiled.missing() is None
torch.set_num_threads(2)
for level in tests.LEVELS:
    compiled._level = lambda: level
    for i, shape in enumerate(tests.SHAPES.values()):
        qkv, grad = tests.inputs(shape, compiled.DTYPES[i % 3])
        tests.check(qkv, grad, causal=True, lengths=torch.tensor([shape[2] // 2, shape[2]][: shape[0]]))
    for i, shape in enumerate(slices.SHAPES.values()):
        slices.check(*slices.inputs(shape, compiled.DTYPES[i % 3]))
    for i, shape in enumerate(images.SHAPES.values()):
        images.check(shape, compiled.DTYPES[i % 3], added=i % 2 == 0, relu=True)
tests.test_memory_is_read_as_it_lies()
slices.test_memory_is_read_as_it_lies()
print("clean")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are loaded as on Linux")
def test_no_address_is_wrong_and_no_behaviour_undefined(tmp_path):
    library = tmp_path / "kernels.so"
    flags = [
        "-O1",
        "-g",
        "-fPIC",
        "-shared",
        "-Wno-psabi",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover",
    ]
    subprocess.run(["gcc", *flags, SOURCE, "-o", library], check=True, timeout=300)
    loaded = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {"LD_PRELOAD": " ".join(loaded), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, library, ROOT / "kernels", ROOT, ROOT / "tests"],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[-3000:]
