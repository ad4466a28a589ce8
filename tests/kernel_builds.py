"""Builds every kernel for a GPU that is not there.    python kernel_builds.py ARCH DTYPE -> JSON, a row a kernel

Launchers run on CPU tensors with Triton's launch replaced by a recorder; what they would have launched, arguments
and divisibility included, is then compiled for the architecture and disassembled. Run without TRITON_INTERPRET.

To add a kernel, add a case: a function of a dtype that calls its launcher on tensors of a real size or an odd one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from axial_fusion import AttentionWeights, LoRA, _tiles
from axial_fusion import _axial_half_kernels as half
from axial_fusion import _lora_kernels as lora
from axial_fusion import _rel_pos_launch as rel_pos
from axial_fusion import _slice_kernels as slices
from axial_fusion.axial_attention import _launch_backward, _launch_forward

qkv = sys.modules["axial_fusion.lora_qkv"]  # named like its op
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def axial_attention(
    dtype: torch.dtype,
    queries: int,
    slices: int,
    positions: int,
    heads: int,
    dim: int,
    *,
    packed: bool = False,
) -> None:
    if packed:
        q, k, v = torch.zeros(1, slices, positions, 3, heads, dim, dtype=dtype).unbind(3)
    else:
        q, k, v = (torch.zeros(1, n, positions, heads, dim, dtype=dtype) for n in (queries, slices, slices))
    _launch_forward(q, k, v, None, dim**-0.5, False)
    _launch_backward(torch.zeros(q.shape, dtype=dtype), q, k, v, None, dim**-0.5, False)


def axial_half(
    dtype: torch.dtype,
    slices: int,
    positions: int,
    channels: int,
    heads: int,
    rank: int,
    *,
    centre: bool = False,
) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    lora = LoRA(draw(rank, channels), draw(channels, rank)) if rank else None
    norm = torch.zeros(2, channels).unbind()  # fp32 beside half-precision projections, as under autocast
    weights = AttentionWeights(
        draw(3 * channels, channels),
        draw(3 * channels),
        draw(channels, channels),
        draw(channels),
        *norm,
        lora,
        lora,
    )
    queries = (slices // 2, 1, 1) if centre else (0, 1, slices)
    x = draw(1, slices, positions, channels)
    half.launch_forward(x, weights, heads, queries, True, 1e-6)
    half.launch_backward(draw(1, queries[2], positions, channels), x, weights, heads, queries, 1e-6, True)


def lora_linear(dtype: torch.dtype, rows: int, k: int, n: int, rank: int, *, dropout: bool = False) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    x, dy, weight, bias = draw(rows, k), draw(rows, n), draw(n, k), draw(n)
    a, b = (draw(rank, k), draw(n, rank)) if rank else (None, None)
    seed = torch.tensor(1) if dropout else None
    lora.launch_forward(x, weight, bias, a, b, seed, 0.5, 0.1)
    lora.launch_dx(dy, weight, a, b, seed, 0.5, 0.1)
    if rank:
        lora.launch_thin(draw(rows, rank), x, seed, 0.1)


def lora_qkv(dtype: torch.dtype, rows: int, channels: int, rank: int) -> None:
    x, a = torch.zeros(rows, channels, dtype=dtype), torch.zeros(2 * rank, channels, dtype=dtype)
    gamma, beta = torch.zeros(2, channels).unbind()
    qkv._normalised(x, gamma, beta, a if rank else None, 1e-6, dtype, "triton")


def rel_pos_attention(dtype: torch.dtype, heads: int, dim: int, height: int, width: int) -> None:
    tokens = height * width
    q, k, v = torch.zeros(1, tokens, 3, heads, dim, dtype=dtype).unbind(2)
    rel_h = torch.zeros(1, heads, height, tokens, dtype=dtype)
    rel_w = torch.zeros(1, heads, tokens, width, dtype=dtype)
    y, lse = rel_pos.launch_forward(q, k, v, rel_h, rel_w, dim**-0.5)
    rel_pos.launch_backward(y, q, k, v, rel_h, rel_w, y, lse, dim**-0.5)


def window_attention(dtype: torch.dtype, heads: int, dim: int, height: int, width: int, window: int) -> None:
    qkv, bias = (
        torch.zeros(1, height, width, 3, heads, dim, dtype=dtype),
        torch.zeros(3 * heads * dim, dtype=dtype),
    )
    rel = torch.zeros(1, height, width, heads, window, dtype=dtype)
    y, lse = rel_pos.launch_window_forward(qkv, bias, rel, rel, window, dim**-0.5)
    rel_pos.launch_window_backward(y, qkv, bias, rel, rel, y, lse, window, dim**-0.5)


def slice_attention(dtype: torch.dtype, positions: int, heads: int, dim: int) -> None:
    if dtype == torch.float32:
        return  # half precisions alone
    q, k, v = torch.zeros(2, positions, 3, heads, dim, dtype=dtype).unbind(2)
    slices.launch_forward(q, k, v, dim**-0.5)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "axial, N 9, D 32": lambda dtype: axial_attention(dtype, 9, 9, 4096, 8, 32),
    "axial, N 9, D 32, packed": lambda dtype: axial_attention(dtype, 9, 9, 4096, 8, 32, packed=True),
    "axial, Nq 1, D 96, P 7": lambda dtype: axial_attention(dtype, 1, 9, 7, 3, 96),
    "axial, N 16, D 24, P 7": lambda dtype: axial_attention(dtype, 16, 16, 7, 3, 24),
    "half, N 9, D 32, C 256, r 4": lambda dtype: axial_half(dtype, 9, 4096, 256, 8, 4),
    "half, N 9, D 64, C 768, no LoRA": lambda dtype: axial_half(dtype, 9, 4096, 768, 12, 0),
    "lora, 768 to 2304, r 4": lambda dtype: lora_linear(dtype, 36_864, 768, 2304, 4),
    "lora, 768 to 768, r 64, dropout": lambda dtype: lora_linear(dtype, 4096, 768, 768, 64, dropout=True),
    "lora, 37 to 53, r 3, 7 rows": lambda dtype: lora_linear(dtype, 7, 37, 53, 3),
    "lora, 256 to 768, no LoRA": lambda dtype: lora_linear(dtype, 4096, 256, 768, 0),
    "qkv, C 256, r 4": lambda dtype: lora_qkv(dtype, 36_864, 256, 4),
    "qkv, C 1280, r 16": lambda dtype: lora_qkv(dtype, 4096, 1280, 16),
    "rel-pos, 64 by 64, D 32": lambda dtype: rel_pos_attention(dtype, 8, 32, 64, 64),
    "rel-pos, 64 by 64, D 64": lambda dtype: rel_pos_attention(dtype, 12, 64, 64, 64),
    "rel-pos, 64 by 64, D 80": lambda dtype: rel_pos_attention(dtype, 16, 80, 64, 64),
    "rel-pos, 20 by 20, D 64": lambda dtype: rel_pos_attention(dtype, 12, 64, 20, 20),
    "windows of 14, 64 by 64, D 32": lambda dtype: window_attention(dtype, 8, 32, 64, 64, 14),
    "windows of 14, 64 by 64, D 64": lambda dtype: window_attention(dtype, 12, 64, 64, 64, 14),
    "windows of 14, 64 by 64, D 80": lambda dtype: window_attention(dtype, 16, 80, 64, 64, 14),
    "slice, P 1024, D 16": lambda dtype: slice_attention(dtype, 1024, 8, 16),
    "slice, P 4096, D 32": lambda dtype: slice_attention(dtype, 4096, 8, 32),
    "slice, P 4096, D 64": lambda dtype: slice_attention(dtype, 4096, 8, 64),
    "slice, P 257, D 32": lambda dtype: slice_attention(dtype, 257, 3, 32),
    "slice, P 257, D 64": lambda dtype: slice_attention(dtype, 257, 3, 64),
    "half, centre of 9, D 24, C 72, P 7": lambda dtype: axial_half(dtype, 9, 7, 72, 3, 4, centre=True),
}


def recorded(
    case: Callable[[torch.dtype], None], dtype: torch.dtype
) -> list[tuple[JITFunction, tuple, dict]]:
    """(kernel, arguments, keywords) of every launch that `case` makes."""
    launches: list[tuple[JITFunction, tuple, dict]] = []
    original = JITFunction.run

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append((kernel, args, keywords))

    JITFunction.run = record
    try:
        case(dtype)
    finally:
        JITFunction.run = original
    return launches


def build(kernel: JITFunction, args: tuple, keywords: dict, arch: int) -> dict[str, Any]:
    """Compile one launch for sm_`arch` as its launcher would specialise it, and count what matters in its code."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | keywords
    options = {key: given.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in given}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given.get(name, parameter.default)
        aligned = False
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[name], aligned = ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [BIN / "nvdisasm", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "kernel": kernel.__name__,
        "shared": compiled.metadata.shared,
        "lines": sass.count("\n"),
        "spills": sass.count("STL") + sass.count("LDL"),
        "mma": sass.count("MMA"),
        "hgmma": sass.count("HGMMA"),
        "waits": sass.count("WARPGROUP.DEPBAR"),
    }


def main(arch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    _tiles.arch = lambda device: arch  # launchers choose tiles as they would there
    rows, seen = [], set()
    for name, case in CASES.items():
        for kernel, args, keywords in recorded(case, dtype):
            row = build(kernel, args, keywords, arch)
            key = (row["kernel"], name)
            if key not in seen:
                seen.add(key)
                rows.append({"case": name, **row})
    return rows


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), getattr(torch, sys.argv[2]))))
