"""A kernel that is wrong, raises, crashes or hangs on a new GPU is not used by `auto`, which says why, once."""

import json
import os
import sys
import warnings

import pytest
import torch

from axial_fusion import dispatch, obstacles, trust, tuned
from axial_fusion.gpu import axial_attention as kernels
from axial_fusion.obstacles import Facts
from axial_fusion.self_check import PROBLEMS, check

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FACTS = Facts(GPU, torch.float16, head_dim=32, slices=9, queries=9)
CHILD = """
import os, sys, time
for op in sys.argv[sys.argv.index("--ops") + 1:]:
    print("begin:", op, flush=True)
    if op == "slice_attention":
        time.sleep(60)
    if op == "rel_terms":
        os._exit(11)
    print(op + ":", "wrong: relative error 1e+0" if op == "row_norm" else "right", flush=True)
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU of which only name and capability are asked, with an empty cache folder."""
    monkeypatch.setenv(tuned.CACHE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "New GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (13, 0))
    monkeypatch.setattr(trust, "_KNOWN", {})
    for module in (dispatch, obstacles):
        monkeypatch.setattr(module, "triton_obstacle", lambda op, facts: None)
    tuned.measurements.cache_clear()
    yield tmp_path
    tuned.measurements.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own check is the command's")
@pytest.mark.parametrize("op", ["axial_attention", "row_norm", "lora_linear"])
def test_right_kernels_pass(op):
    assert check(op, CPU, torch.float32) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted on a CPU here")
def test_one_wrong_element_and_an_error_are_found(monkeypatch):
    launch = kernels.launch_forward

    def off(*args):
        y = launch(*args)
        y[0, 4, 7, 1, 5] += 0.5
        return y

    from axial_fusion.ops import axial_attention as op

    monkeypatch.setitem(op._FORWARD, "triton", off)
    assert "of one element" in check("axial_attention", CPU, torch.float32)

    def broken(*args):
        raise RuntimeError("ptxas died\nwith a long story")

    monkeypatch.setitem(op._FORWARD, "triton", broken)
    assert check("axial_attention", CPU, torch.float32) == "RuntimeError: ptxas died"


def test_a_kernel_that_hangs_or_crashes_is_named_and_the_others_are_checked_on(monkeypatch):
    monkeypatch.setattr(trust, "_command", lambda: [sys.executable, "-S", "-c", CHILD])
    monkeypatch.setattr(trust, "LIMIT_S", 2.0)
    found = trust.run(GPU, torch.float16)
    assert found.keys() == PROBLEMS.keys() == set(trust.OPS)
    assert found["slice_attention"] == "gave no result in 2 s"
    assert found["rel_terms"] == "its process ended with code 11"
    assert found["row_norm"].startswith("wrong")
    assert found["lora_qkv"] is found["axial_attention"] is None


def test_auto_falls_back_with_one_warning_says_why_and_asks_once_a_machine(gpu, monkeypatch):
    runs = []

    def run(device, dtype, ops):
        runs.append((dtype, *ops))
        return {op: "wrong: relative error 1e+0" if op == "axial_attention" else None for op in ops}

    monkeypatch.setattr(trust, "run", run)
    with pytest.warns(UserWarning, match="New GPU.*open an issue") as told:
        choice = dispatch._fastest_kernel("axial_attention", FACTS)
    assert len(told) == 1
    assert choice.backend == "torch"
    assert "failed their check on this GPU: wrong" in choice.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._fastest_kernel("axial_attention", FACTS) == choice
        assert dispatch._fastest_kernel("row_norm", FACTS).backend == "triton"
    (kept,) = (gpu / "self-check").glob("*.json")
    assert json.loads(kept.read_text())["ops"] == {
        "axial_attention": "wrong: relative error 1e+0",
        "row_norm": None,
    }
    monkeypatch.setattr(trust, "_KNOWN", {})  # another process
    with pytest.warns(UserWarning, match="wrong"):
        assert dispatch._fastest_kernel("axial_attention", FACTS).backend == "torch"
    assert runs == [(torch.float16, "axial_attention"), (torch.float16, "row_norm")]
    monkeypatch.setattr(trust, "_KNOWN", {})
    monkeypatch.setattr(torch, "__version__", "99")  # another key
    with pytest.warns(UserWarning, match="wrong"):
        dispatch._fastest_kernel("axial_attention", FACTS)
    assert len(runs) == 3


def test_the_check_can_be_turned_off_and_a_shipped_measurement_makes_it_needless(gpu, monkeypatch):
    monkeypatch.setattr(trust, "run", lambda *_: pytest.fail("nothing is to be checked"))
    monkeypatch.setenv(trust.SWITCH, "0")
    assert dispatch._fastest_kernel("axial_attention", FACTS).backend == "triton"
    monkeypatch.setenv(trust.SWITCH, "1")
    monkeypatch.setattr(trust, "_KNOWN", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(trust, "triton_version", lambda: "3.6.1")
    half = FACTS._replace(dtype=torch.bfloat16)
    assert dispatch._fastest_kernel("axial_attention", half).backend == "triton"
    assert not trust.covered("axial_attention", GPU, torch.float16)
    assert not trust.covered("lora_qkv", GPU, torch.bfloat16)


def test_what_cannot_be_checked_is_not_used_and_checked_by_the_next_process_that_can(gpu, monkeypatch):
    monkeypatch.setattr(trust, "_command", lambda: [os.path.join(gpu, "no-python")])
    with pytest.warns(UserWarning, match=trust.NO_PROCESS):
        assert dispatch._fastest_kernel("axial_attention", FACTS).backend == "torch"
    monkeypatch.setattr(trust, "_KNOWN", {})
    monkeypatch.setattr(trust, "run", lambda device, dtype, ops: dict.fromkeys(ops))
    assert dispatch._fastest_kernel("axial_attention", FACTS).backend == "triton"
