"""Kernels run in Triton's interpreter unless there is a GPU; memory, precision and a trained run for tests that ask."""

import os
import shutil
import signal
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import benchmarks  # noqa: F401  # which lets torchvision be imported beside torch's CPU build

# A script's `make test &` ignores SIGINT, and so would the commands under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """A device mesh of this process alone, over gloo."""
    store = f"file://{tmp_path_factory.mktemp('store')}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


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


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run trained for a moment: random masks, real files."""
    from aftersam.data.phantom import write_dataset
    from aftersam.train import main as train

    root = tmp_path_factory.mktemp("run")
    write_dataset(root / "scans", cases=3, seed=0)
    with pytest.MonkeyPatch.context() as patch:  # so few steps would leave nothing but background to compare
        patch.setattr("aftersam.model.mask_decoder.BACKGROUND_LEAD", 0.0)
        code = train(
            ["--data", str(root / "scans"), "--output", str(root / "run"), "--preset", "tiny", "--image-size", "48",
             "--num-blocks", "1", "--max-steps", "3", "--device", "cpu", "--precision", "fp32"]
        )  # fmt: skip
    assert code == 0
    return root


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """The folder of a trained run, beside its scans, for one file of tests."""
    home = tmp_path_factory.mktemp("run") / "home"
    return shutil.copytree(trained, home) / "run"
