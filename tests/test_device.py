"""Devices and number formats by their names."""

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
