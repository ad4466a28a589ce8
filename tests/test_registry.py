"""Ops are registered in a namespace that follows the package, and again wherever the package is imported again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import axial_fusion

PACKAGE = Path(axial_fusion.__file__).parent
# Forward and gradients through every registered op that runs on a CPU, compiled and not.
USE = """
import torch
torch._dynamo.config.recompile_limit = 64
torch.manual_seed(0)
def use(copy):
    q = torch.randn(1, 5, 3, 2, 16, requires_grad=True)
    module = copy.AxialFusionAttention(32, 2, rank=2)
    attend = torch.compile(lambda t: copy.axial_attention(t, t, t), backend="aot_eager", fullgraph=True)
    y = attend(q).sum() + copy.slice_attention(q, q, q).sum() + module(torch.randn(1, 3, 4, 32)).sum()
    y.backward()
    lengths = torch.tensor([3])
    op = getattr(torch.ops, copy.registry.NAMESPACE).axial_attention
    return op(q, q, q, lengths, 0.25, False, "torch").detach(), q.grad
"""


def run(code: str, *path: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_vendored_copy_imports_nothing_of_the_installed_one(tmp_path):
    """Nor does it find it: the one package that there is has another name."""
    copy = tmp_path / "host" / "third_party" / "fused"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys, host.third_party.fused as fused, host.third_party.fused.tune\nuse(fused)\n"
    run(USE + code + "assert 'axial_fusion' not in sys.modules", tmp_path)


def test_two_copies_in_one_process_have_ops_of_their_own(tmp_path):
    for name in ("first", "second"):
        shutil.copytree(PACKAGE, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    # The second copy's axial attention is another function, as another version's might be.
    changed = tmp_path / "second" / "cpu" / "axial_attention.py"
    changed.write_text(changed.read_text(encoding="utf-8").replace(
        "def forward(q: Tensor, k: Tensor, v: Tensor,", "def forward(q: Tensor, v: Tensor, k: Tensor,"
    ), encoding="utf-8")  # fmt: skip
    code = """
import axial_fusion, first, second
for copy in (axial_fusion, first, second):
    use(copy)
q = torch.arange(96.0).view(1, 3, 1, 2, 16).sin()
results = []
for copy in (axial_fusion, first, second):
    op = getattr(torch.ops, copy.registry.NAMESPACE).axial_attention
    results.append(op(q, q, 2 * q, None, 0.25, False, "torch"))
assert torch.equal(results[0], results[1])
assert not torch.allclose(results[0], results[2])
"""
    run(USE + code, tmp_path, PACKAGE.parent)


@pytest.mark.parametrize("again", ["reload", "import"])
def test_a_second_import_replaces_the_ops_and_old_functions_run_on(again):
    code = f"""
import importlib, sys
import axial_fusion
old = axial_fusion
use(old)
for name in [name for name in sys.modules if name.startswith("axial_fusion")]:
    if {again == "reload"}:
        importlib.reload(sys.modules[name])
    else:
        del sys.modules[name]
import axial_fusion as new
use(new)
use(old)
"""
    run(USE + code, PACKAGE.parent)


UNUSABLE = {
    "ImportError": "raise ImportError('DLL load failed')",
    "AttributeError": "raise AttributeError('module has no attribute')",
    "OSError": "raise OSError('libcuda.so.1: cannot open shared object file')",
    "RuntimeError": "raise RuntimeError('no driver')",
    "SyntaxError": "def f(:",
    "nothing inside": "",
    "a stub whose jit gives functions": "jit = lambda f: f\nfrom . import language",
}


def test_a_triton_that_cannot_be_used_is_named_and_never_taken(tmp_path):
    for number, source in enumerate(UNUSABLE.values()):
        (tmp_path / str(number) / "triton").mkdir(parents=True)
        (tmp_path / str(number) / "triton" / "__init__.py").write_text(source)
        if "language" in source:
            (tmp_path / str(number) / "triton" / "language.py").write_text("")
    code = f"""
import sys, types, warnings
folders = [{str(tmp_path)!r} + "/" + str(number) for number in range({len(UNUSABLE)})]
for folder in [*folders, "a stub", None]:
    for name in [name for name in sys.modules if name.split(".")[0] in ("triton", "axial_fusion")]:
        del sys.modules[name]
    sys.path[:] = [folder, *(p for p in sys.path if p not in folders)] if folder in folders else sys.path
    if folder not in folders:
        sys.modules["triton"] = folder and types.ModuleType("triton")
    import torch, axial_fusion
    from axial_fusion import dispatch
    for dtype in (torch.float32, torch.bfloat16):
        module = axial_fusion.AxialFusionAttention(32, 2, rank=2).to(dtype)
        module(torch.randn(1, 3, 4, 32, dtype=dtype)).sum().backward()
    there = dispatch.Facts(torch.device("cuda"), torch.bfloat16, head_dim=32, slices=3)
    for op in ("axial_attention", "rel_pos_attention", "window_attention", "rel_terms", "row_norm"):
        choice = dispatch._fastest_kernel(op, there)
        assert choice.backend == "torch" and "package triton" in choice.reason, (folder, choice)
    q = torch.zeros(1, 3, 4, 2, 16)
    try:
        axial_fusion.axial_attention(q, q, q, backend="triton")
    except ValueError as error:
        print(error)
    else:
        raise AssertionError(folder)
"""
    said = run(code, PACKAGE.parent).splitlines()
    assert len(said) == len(UNUSABLE) + 2
    for kind, line in zip(UNUSABLE, said, strict=False):
        assert kind in line or not kind.endswith("Error"), line
    assert "is a stub" in said[len(UNUSABLE) - 1]
    assert "is not installed" in said[-1]


def test_a_stub_in_place_of_a_rival_is_no_obstacle_until_it_is_named():
    code = """
import sys, types, torch
sys.modules["flash_attn"] = types.ModuleType("flash_attn")  # no spec
sys.modules["xformers"] = types.ModuleType("xformers")
import axial_fusion
q = torch.zeros(1, 3, 4, 2, 16)
axial_fusion.slice_attention(q, q, q)
for backend in ("flash", "xformers"):
    try:
        axial_fusion.slice_attention(q, q, q, backend=backend)
    except ValueError as error:
        print(error)
"""
    said = run(code, PACKAGE.parent)
    assert "the package flash_attn does not import" in said
    assert "the package xformers does not import" in said
