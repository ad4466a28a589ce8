"""Builds kernels for a GPU that is not there: what launchers would have launched, compiled and disassembled.

Launchers run on CPU tensors while Triton's launch is replaced by a recorder. The launch, arguments and divisibility
included, is then compiled as Triton would specialise it on that architecture. Needs Triton's compiler, so no
TRITON_INTERPRET."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ..gpu import tiles

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """A kernel with its arguments by name, and how many programs it would have started."""

    kernel: JITFunction
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    programs: int

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.keywords


class Build(NamedTuple):
    """Machine code of a launch and what it takes: registers of a thread, bytes and tensor columns of a block."""

    sass: str
    ptx: str
    registers: int
    shared: int
    columns: int

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from local memory."""
        return self.sass.count("STL") + self.sass.count("LDL")


@contextmanager
def target(arch: int) -> Iterator[None]:
    """Launchers choose their tiles as they would on sm_`arch`."""
    kept = tiles.arch
    tiles.arch = lambda device: arch  # type: ignore[assignment]  # in this process alone
    try:
        yield
    finally:
        tiles.arch = kept


def recorded(call: Callable[[], object]) -> list[Launch]:
    """Every launch that `call` would make."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set; unset it, since kernels are compiled here")
    launches: list[Launch] = []
    original = JITFunction.run

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        sizes = grid if isinstance(grid, tuple) else (grid,)
        launches.append(Launch(kernel, args, keywords, int(torch.Size(sizes).numel())))

    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def build(launch: Launch, arch: int) -> Build:
    """Compile a launch for sm_`arch` as Triton would specialise it there, and disassemble it."""
    gpu = GPUTarget("cuda", arch, 32)
    backend = make_backend(gpu)
    kernel, keywords = launch.kernel, launch.keywords
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = _output("nvdisasm", "-c", file.name), _output("cuobjdump", "-res-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Build(sass, compiled.asm["ptx"], int(registers[1]), compiled.metadata.shared, columns)


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, check=True).stdout
