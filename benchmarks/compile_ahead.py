"""Compile kernels for a GPU that is not there, for `first_contact --cache`.    python -m benchmarks.compile_ahead FILE

The kernels' tests and timed cases of first contact run on CPU tensors. What they launch is compiled for sm_ARCH and not
run, so that tests fail and results mean nothing. Triton takes a compiled kernel where sources, its own files and the
cache's folder are the same: run this with the Python and the Triton wheel of the GPU's machine."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from aftersam.errors import counted
from axial_fusion import dispatch, obstacles
from axial_fusion.gpu import tiles
from benchmarks import first_contact
from benchmarks.__main__ import SUBJECTS
from benchmarks.machine import ROOT

# Not slice: its backward, which torch computes, would take 20 GiB on a CPU, and its forward the tests compile.
TIMED = ["axial", "lora", "rel_pos", "window"]
BACKENDS = {"lora_linear": "augmented"}  # what auto takes on a GPU, where that is not triton
ARCH = "COMPILE_AHEAD_ARCH"  # of the process that compiles


class _Absent:
    """A driver of a GPU that nothing is launched on."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {key: _here(value) for key, value in (kwargs or {}).items()}
        return func(*map(_here, args), **given)


def _here(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


class _Generator(torch.Generator):
    """Of the CPU, whichever device is asked for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]  # torch gives no signature


def compile_only(arch: int) -> None:
    """From now on this process compiles for sm_`arch` what it would launch, from CPU tensors too."""
    driver.set_active(_Absent(arch))
    tiles.arch = lambda device: arch  # type: ignore[assignment]  # in this process alone
    obstacles.INTERPRETED = True
    run = JITFunction.run

    def instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        run(kernel, *args, grid=grid, warmup=True, **keywords)

    JITFunction.run = instead


def compile_cases(subjects: Sequence[str]) -> None:
    """Forward and backward of ours in each case of `subjects` that first contact times."""
    select = dispatch.select_backend

    def instead(op: Any, *tensors: torch.Tensor, backend: str = "auto") -> dispatch.Choice:
        return select(op, *tensors, backend=BACKENDS.get(op, "triton") if backend == "auto" else backend)

    for module in [m for name, m in sys.modules.items() if name.startswith("axial_fusion")]:
        if getattr(module, "select_backend", None) is select:
            module.select_backend = instead  # type: ignore[attr-defined]
    torch.Generator = _Generator  # type: ignore[misc]
    for subject in subjects:
        for call, inputs in _ours(subject):
            wanted = [t for t in inputs if t.requires_grad]
            y = call(*inputs)
            if wanted:
                torch.autograd.grad(y, wanted, torch.empty_like(y), allow_unused=True)


def _ours(subject: str) -> Iterator[tuple[Any, Sequence[torch.Tensor]]]:
    with _OnCpu():
        for _, inputs, providers in SUBJECTS[subject](torch.device("cuda"), torch.bfloat16, full=False):
            for provider in providers.values():
                if provider.role == "ours" and provider.call is not None:
                    yield provider.call, inputs


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest: the tests compile only."""
    compile_only(int(os.environ[ARCH]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.compile_ahead", description=__doc__)
    parser.add_argument("file", type=Path, help="archive to write")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, as 90 for an H100")
    parser.add_argument(
        "--tests", nargs="*", default=first_contact.TESTS, help="files of tests, or tests by id"
    )
    parser.add_argument("--subjects", nargs="*", default=TIMED, choices=TIMED, help="whose timed cases")
    args = parser.parse_args(argv)
    os.environ |= first_contact.environment() | {
        "TRITON_INTERPRET": "0",
        ARCH: str(args.arch),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / first_contact.LINES
        lines.touch()
        running = [
            subprocess.Popen(
                [*(part.replace("{seconds}", "3600") for part in command), "-p", "benchmarks.compile_ahead"],
                cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for command in (first_contact.shared(args.tests, lines, os.cpu_count() or 1) if args.tests else ())
        ]  # fmt: skip
        compile_only(args.arch)
        compile_cases(args.subjects)
        codes = [process.wait() for process in running]
    if lost := [code for code in codes if code not in (0, 1, 5)]:  # tests passed, failed, or there were none
        sys.exit(f"pytest ended with code {lost[0]}; nothing was written")
    count = first_contact.archive(args.file)
    if not count:
        sys.exit("no kernel was compiled; name tests or subjects that launch one")
    print(f"{args.file}: {counted(count, 'kernel')}, {args.file.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
