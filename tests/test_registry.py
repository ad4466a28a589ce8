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
