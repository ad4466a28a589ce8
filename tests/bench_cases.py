"""Cases and results of no meaning, for the tests of the benchmarks."""

import pytest
import torch

from benchmarks import harness
from benchmarks.speed import fusion

SMALL = fusion.Shape(2, 3, 3, 16, 2)
CEILING = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}
SQUARE = {"subject": "square", "name": "x²", "size": 8}


def square(x):
    return x * x


def times(*ms):
    return {"median": ms[1], "q20": ms[0], "q80": ms[2], "n": 5}


def a_result(provider_ms):
    """A result of one case, forward times by provider; the first one is ours."""
    records = [
        {"subject": "square", "name": "x²", "provider": name, "role": "rival" if i else "ours", "status": "ok",
         "flops": 8, "bytes": 4, "ms": {"forward": ms}, "peak_bytes": {"forward": 4}}
        for i, (name, ms) in enumerate(provider_ms.items())
    ]  # fmt: skip
    where = {
        "device": "d",
        "kind": "cpu",
        "torch": "2",
        "triton": None,
        "commit": "c",
        "dirty": False,
        "date": "2026",
    }
    return {"environment": where, "dtype": "float32", "ceilings": CEILING, "records": records}


def fusion_result():
    """A real result of the fusion benchmark at a size that takes no time."""
    cpu, dtype = torch.device("cpu"), torch.float32
    shapes = [("small", SMALL), ("", SMALL._replace(slices=1))]
    cases = [fusion.case(name, shape, cpu, dtype) for name, shape in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "ceilings", lambda dtype: CEILING)
        return harness.run(cases, dtype=dtype, budget_s=0.01)
