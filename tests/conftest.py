"""Kernels run in Triton's interpreter unless there is a GPU; uninitialised memory is NaN where a test asks."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

if not hasattr(torch.ops.torchvision, "nms"):
    # torchvision's wheel is built against torch's CUDA build: beside the CPU build its operators do not load, and its
    # import stops at these two names. timm and its own models need the names, not the operators.
    TORCHVISION = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


@pytest.fixture(autouse=True)
def forget_precision():
    """accelerate keeps one precision a process: forget that of the test or fixture before."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state()


@pytest.fixture
def nan_memory():
    """torch.empty gives NaN, so that a value a kernel forgot to write cannot pass for a zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The device that every machine has, as if it had no other."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
