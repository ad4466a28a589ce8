"""Every kernel, built for real GPUs on a machine without one: no spills, tensor cores, shared memory in bounds.

A process without the interpreter captures what the launcher would launch, arguments and divisibility included, and
compiles exactly that for each architecture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB a block may have
SCRIPT = """
import json, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from axial_fusion import axial_attention as _  # registers
import axial_fusion.axial_attention
module = sys.modules["axial_fusion.axial_attention"]
arch, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

class Capture:
    def __init__(self, kernel): self.kernel, self.calls = kernel, []
    def __getitem__(self, grid): return lambda *args, **kwargs: self.calls.append((args, kwargs))

def build(kernel, args, kwargs):
    options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages")}
    signature, constants, attrs = {}, {}, {}
    values = (*args, *(kwargs[n] for n in kernel.arg_names[len(args):]))
    for i, (name, value) in enumerate(zip(kernel.arg_names, values)):
        aligned = False
        if name in kwargs or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = "*" + NAMES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name], aligned = ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"]); file.flush()
        sass = subprocess.run([BIN / "nvdisasm", file.name], capture_output=True, text=True).stdout
    return {"kernel": kernel.__name__, "shared": compiled.metadata.shared, "lines": sass.count(chr(10)),
            "spills": sass.count("STL") + sass.count("LDL"), "hgmma": sass.count("HGMMA"), "mma": sass.count("MMA")}

results = []
for case in json.loads(sys.argv[3]):
    queries, slices, positions, heads, dim = case["shape"]
    if case["packed"]:
        q, k, v = torch.zeros(1, slices, positions, 3, heads, dim, dtype=dtype).unbind(3)
    else:
        q, k, v = (torch.zeros(1, n, positions, heads, dim, dtype=dtype) for n in (queries, slices, slices))
    for name, launch in (("fwd", module._launch_forward), ("bwd", module._launch_backward)):
        attribute = f"_axial_attention_{name}_kernel"
        kernel = getattr(module, attribute)
        capture = Capture(kernel)
        setattr(module, attribute, capture)
        tensors = (q, k, v) if name == "fwd" else (torch.zeros(q.shape, dtype=dtype), q, k, v)
        launch(*tensors, None, dim**-0.5, False)
        setattr(module, attribute, kernel)
        (args, kwargs), = capture.calls
        results.append({**build(kernel, args, dict(kwargs)), **case})
print(json.dumps(results))
"""

CASES = [
    {"shape": [9, 9, 4096, 8, 32], "packed": False},
    {"shape": [9, 9, 4096, 8, 32], "packed": True},
    {"shape": [1, 9, 7, 3, 96], "packed": False},
    {"shape": [16, 16, 7, 3, 24], "packed": False},
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_axial_attention_builds(arch, dtype):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    cases = CASES if (arch, dtype) == (90, "bfloat16") else CASES[1:3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(arch), dtype, json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for built in json.loads(done.stdout.splitlines()[-1]):
        assert built["lines"] > 100, "no code was disassembled"
        assert built["shared"] <= SHARED_MEMORY[arch] * 1024
        if dtype != "float32":
            assert built["spills"] == 0, built
            assert built["mma"] > 0, built
        if arch == 90 and dtype != "float32" and built["shape"][0] == 9:
            assert built["hgmma"] > 0, built
