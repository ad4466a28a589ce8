"""Devices and number formats by their names."""

import platform
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from aftersam.device import DTYPES, autocast, dtype_for, find_device, precision_for


def test_a_device_that_is_named_is_taken_and_auto_is_what_there_is(monkeypatch):
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")  # torchrun's
    assert find_device("auto") == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_device("cuda") == torch.device("cuda:3")
    assert find_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("command", ["predict", "encode", "train", "demo", "ablate"])
@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda", "device is cuda, but torch .* sees no GPU"),
        ("cuda:1", "device is cuda:1, but torch .* sees no GPU"),
        ("gpu", "device is 'gpu', but must be auto, cpu, cuda or cuda:1"),
        ("cpu:0", "device is 'cpu:0', but"),
        ("", "device is '', but"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    command, device, says, on_the_cpu, tmp_path, capsys
):
    """The inputs are empty or missing, of which the sentence says nothing."""
    none, out, scan = str(tmp_path / "none"), str(tmp_path / "out.nii"), tmp_path / "a.nii"
    scan.touch()
    given = {
        "predict": ["-i", str(scan), "-o", out, "-m", none],
        "encode": ["--data", none, "--output", out, "-m", none],
        "demo": ["-o", out],
    }.get(command, ["--data", none, "--output", out])
    main = import_module(f"aftersam.{command}").main
    assert main([*given, "--device", device]) == 2
    assert re.match(f"aftersam.{command}: {says}", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [scan]


def test_a_gpu_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device is cuda:2, but torch sees 2 GPUs"):
        find_device("cuda:2")


@pytest.mark.parametrize(
    ("processor", "gpu", "device", "expected"),
    [
        (True, None, "cpu", "bf16"),
        (False, None, "cpu", "fp32"),
        (True, True, "cuda", "bf16"),
        (True, False, "cuda:1", "fp16"),
        (False, None, "auto", "fp32"),
        (False, True, "auto", "bf16"),
    ],
)
def test_auto_precision_is_what_the_device_computes_natively(monkeypatch, processor, gpu, device, expected):
    """`gpu` says whether there is one, and if so whether it has bf16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: processor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bool(gpu))
    assert precision_for("auto", device) == expected
    assert dtype_for("auto", device) == DTYPES[expected]
    assert precision_for("fp32", device) == "fp32"


def test_autocast_casts_products_and_leaves_fp32_alone():
    a = torch.randn(3, 3)
    for name, dtype in DTYPES.items():
        if name != "fp16":
            with autocast(torch.device("cpu"), dtype):
                assert (a @ a).dtype == dtype


FREED = """
import ctypes, resource, sys
import torch
from aftersam.device import keep_freed_memory
keep_freed_memory(torch.device(sys.argv[1]))
libc, size = ctypes.CDLL(None), ctypes.c_size_t(12 << 20)
libc.malloc.restype = ctypes.c_void_p
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [ctypes.c_void_p(libc.malloc(size)) for _ in range(8)]
    for block in blocks:
        libc.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_on_a_cpu_freed_memory_is_not_returned_to_the_system():
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", FREED, device], check=True, capture_output=True).stdout)
        for device in ("cpu", "meta")
    )
    assert kept < 1000 < returned  # 8 blocks of 12 MiB are 24,576 pages
