"""Kernels that were compiled without a GPU are those that a launch on it takes."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

LAUNCH = """
import json
import torch
from triton import knobs
from triton.runtime import driver
from axial_fusion.gpu import axial_attention, row_norm, tiles
from benchmarks.compile_ahead import _Absent

class Driver(_Absent):
    "Loads and launches nothing, and says that it did."
    class utils:
        load_binary = staticmethod(lambda *_: (1, 1, 32, 0, 1024))
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232448})
    launcher_cls = staticmethod(lambda *_: lambda *_: launched.append(1))

launched, found = [], []
driver.set_active(Driver(90))
tiles.arch = lambda device: 90
knobs.compilation.listener = lambda *, metadata, cache_hit, **_: found.append((metadata["name"], cache_hit))
q, k, v = torch.zeros(1, 9, 4096, 3, 8, 32, dtype=torch.bfloat16).unbind(3)
y = axial_attention.launch_forward(q, k, v, None, 32**-0.5, False)
axial_attention.launch_backward(y, q, k, v, None, 32**-0.5, False)
x, weight = torch.zeros(3, 37), torch.zeros(37)
row_norm.launch_forward(x, weight, weight, torch.empty_like(x), 1e-5)
print(json.dumps([len(launched), found]))
"""


def test_a_launch_takes_what_was_compiled_ahead(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import torch\n"
        "from axial_fusion.gpu import row_norm\n"
        "def test_norm():\n"
        "    x, weight = torch.zeros(3, 37), torch.zeros(37)\n"
        "    row_norm.launch_forward(x, weight, weight, torch.empty_like(x), 1e-5)\n"
        "    raise AssertionError\n"
    )
    paths = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": paths,
        "TRITON_INTERPRET": "0",
    }
    archive = tmp_path / "cache.tar.gz"
    command = [sys.executable, "-m", "benchmarks.compile_ahead", str(archive)]
    command += ["--tests", str(tmp_path / "test_one.py"), "--subjects", "axial"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{archive}: 5 kernels" in done.stdout
    done = subprocess.run([sys.executable, "-c", LAUNCH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["axial_attention_fwd_kernel", "axial_attention_bwd_kernel", "row_norm_fwd_kernel"]
    assert json.loads(done.stdout) == [3, [[name, True] for name in names]]
