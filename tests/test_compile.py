"""Every kernel, built for real GPUs on a machine without one: no spills, tensor cores, shared memory in bounds."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB a block may have
DTYPES = ["bfloat16", "float16", "float32"]
SHIPPED = (
    "N 9, D 32",
    "768 to",
    "256 to 768",
    "slice",
)  # cases whose products must run asynchronously on sm_90
THIN = (
    "rows_kernel",
    "thin_product_kernel",
)  # a rank of 4 fills no 64-row product: the older instruction serves


def _built(arch: int, dtype: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    command = [sys.executable, ROOT / "tests" / "kernel_builds.py", str(arch), dtype]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)


@pytest.fixture(scope="module")
def builds():
    """A compiler is one thread: as many run side by side as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {key: pool.submit(_built, *key) for key in product(SHARED_MEMORY, DTYPES)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_kernel_builds(arch, dtype, builds):
    done = builds[arch, dtype].result()
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows
    for built in rows:
        assert built["lines"] > 100, "no code was disassembled"
        assert built["shared"] <= SHARED_MEMORY[arch] * 1024, built
        if dtype == "float32":
            continue  # exact products run on the FMA units, where a spill costs less than another tile would
        relative = built["kernel"].startswith("rel_pos")
        assert built["spills"] == 0, built
        assert built["mma"] > 0, built
        shipped = relative or any(name in built["case"] for name in SHIPPED)
        if arch == 90 and shipped and built["kernel"] not in THIN:
            assert built["hgmma"] > 0, built
            assert built["waits"] <= 2 or built["waits"] < built["hgmma"], f"every product waits: {built}"
