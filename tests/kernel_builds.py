"""Builds every kernel for a GPU that is not there.    python kernel_builds.py ARCH DTYPE -> JSON, a row a kernel

Launchers run on CPU tensors with Triton's launch replaced by a recorder; what they would have launched, arguments
and divisibility included, is then compiled for the architecture and disassembled. Run without TRITON_INTERPRET.

To add a kernel, add a case: a function of a dtype that calls its launcher on tensors of a real size or an odd one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from axial_fusion.gpu import axial_attention as axial
from axial_fusion.gpu import lora, tiles
from axial_fusion.gpu import rel_pos_attention as rel_pos
from axial_fusion.gpu import row_norm as norm
from axial_fusion.gpu import slice_attention as slices
from axial_fusion.ops import lora_qkv as qkv

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
    axial.launch_forward(q, k, v, None, dim**-0.5, False)
    axial.launch_backward(torch.zeros(q.shape, dtype=dtype), q, k, v, None, dim**-0.5, False)


def row_norm(dtype: torch.dtype, rows: int, channels: int, *, weights: torch.dtype = torch.float32) -> None:
    x, (gamma, beta) = torch.zeros(2, rows, channels, dtype=dtype), torch.zeros(2, channels, dtype=weights)
    out = torch.zeros(2 * rows, channels, dtype=dtype)
    mean, rstd = norm.launch_forward(x, gamma, beta, out, 1e-6)
    norm.launch_backward(out, x, mean, rstd, gamma, need_x=True, need_weights=True)
    norm.launch_column_sums(out)


def lora_linear(dtype: torch.dtype, rows: int, k: int, n: int, rank: int, *, dropout: bool = False) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    x, dy, a, b = draw(rows, k), draw(rows, n), draw(rank, k), draw(n, rank)
    drop, xa = lora.Dropout(torch.tensor(1) if dropout else None, 0.1), draw(rows, rank)
    lora.launch_tail(x, a, draw(rows, k + lora.tail_width(rank)), drop, xa)
    lora.launch_weight(draw(n, k), b, 0.5)
    if rank <= lora.MAX_REDUCED_RANK:
        lora.launch_reduce(dy, x, xa, b, 0.5, drop, need_a=True, need_b=True)


def lora_qkv(dtype: torch.dtype, rows: int, channels: int, rank: int) -> None:
    x, weight = torch.zeros(rows, channels, dtype=dtype), torch.zeros(3 * channels, channels, dtype=dtype)
    gamma, beta = torch.zeros(2, channels).unbind()
    a, b = torch.zeros(rank, channels), torch.zeros(channels, rank)  # LoRA's weights stay fp32
    call = qkv._Call(x, gamma, beta, weight, None, a, b, a, b, 0.5, 0.5, 1e-6, "triton")
    qkv._normalised(call, call.stacked())
    qkv._augmented(call)


def rel_pos_attention(dtype: torch.dtype, heads: int, dim: int, height: int, width: int) -> None:
    tokens = height * width
    q, k, v = torch.zeros(1, tokens, 3, heads, dim, dtype=dtype).unbind(2)
    rel_h = torch.zeros(1, heads, height, tokens, dtype=dtype)
    rel_w = torch.zeros(1, heads, tokens, width, dtype=dtype)
    y, lse = rel_pos.launch_forward(q, k, v, rel_h, rel_w, dim**-0.5)
    rel_pos.launch_backward(y, (q, k, v, rel_h, rel_w), y, lse, dim**-0.5)


def window_attention(dtype: torch.dtype, heads: int, dim: int, height: int, width: int, window: int) -> None:
    qkv, bias = (
        torch.zeros(1, height, width, 3, heads, dim, dtype=dtype),
        torch.zeros(3 * heads * dim, dtype=dtype),
    )
    rel = torch.zeros(1, height, width, heads, window, dtype=dtype)
    y, lse = rel_pos.launch_window_forward(qkv, bias, rel, rel, window, dim**-0.5)
    rel_pos.launch_window_backward(y, (qkv, bias, rel, rel), y, lse, window, dim**-0.5)


def slice_attention(dtype: torch.dtype, positions: int, heads: int, dim: int) -> None:
    if dtype == torch.float32:
        return  # half precisions alone
    q, k, v = torch.zeros(2, positions, 3, heads, dim, dtype=dtype).unbind(2)
    slices.launch_forward(q, k, v, dim**-0.5)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "axial, N 9, D 32": lambda dtype: axial_attention(dtype, 9, 9, 4096, 8, 32),
    "axial, N 9, D 32, packed": lambda dtype: axial_attention(dtype, 9, 9, 4096, 8, 32, packed=True),
    "axial, N 16, D 32, packed": lambda dtype: axial_attention(dtype, 16, 16, 4096, 8, 32, packed=True),
    "axial, N 5, D 32, packed": lambda dtype: axial_attention(dtype, 5, 5, 4096, 8, 32, packed=True),
    "axial, N 9, D 32, 3 heads": lambda dtype: axial_attention(dtype, 9, 9, 4096, 3, 32),
    "axial, N 9, D 64, packed": lambda dtype: axial_attention(dtype, 9, 9, 4096, 12, 64, packed=True),
    "axial, N 9, D 96, packed": lambda dtype: axial_attention(dtype, 9, 9, 4096, 8, 96, packed=True),
    "axial, N 9, D 80": lambda dtype: axial_attention(dtype, 9, 9, 4096, 16, 80),
    "axial, N 32, D 32": lambda dtype: axial_attention(dtype, 32, 32, 4096, 8, 32),
    "axial, N 64, D 64": lambda dtype: axial_attention(dtype, 64, 64, 4096, 12, 64),
    "axial, Nq 1, D 96, P 7": lambda dtype: axial_attention(dtype, 1, 9, 7, 3, 96),
    "axial, N 16, D 24, P 7": lambda dtype: axial_attention(dtype, 16, 16, 7, 3, 24),
    "lora, 768 to 2304, r 4": lambda dtype: lora_linear(dtype, 36_864, 768, 2304, 4),
    "lora, 768 to 768, r 64, dropout": lambda dtype: lora_linear(dtype, 4096, 768, 768, 64, dropout=True),
    "lora, 37 to 53, r 3, 7 rows": lambda dtype: lora_linear(dtype, 7, 37, 53, 3),
    "norm, C 256": lambda dtype: row_norm(dtype, 18_432, 256, weights=dtype),
    "norm, C 37": lambda dtype: row_norm(dtype, 7, 37),
    "norm, C 4096": lambda dtype: row_norm(dtype, 4096, 4096),
    "qkv, C 256, r 4": lambda dtype: lora_qkv(dtype, 36_864, 256, 4),
    "qkv, C 768, r 16": lambda dtype: lora_qkv(dtype, 36_864, 768, 16),
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
    """Compile one launch for sm_`arch` as Triton would specialise it there, and count what matters in its code."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, options
    )
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__
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
        "wrong_descriptors": wrong_descriptors(sass),
    }


def wrong_descriptors(sass: str) -> list[str]:
    """Instructions that take the upper word of a wgmma descriptor from a register that does not hold zero.

    ptxas 12.8, which Triton 3.6 and 3.7 bring along, makes such code where one shared buffer is read as tiles of two
    swizzles, as heads of 64 + 32 channels were. On an H100 every kernel with such an instruction was wrong (relative
    errors of 0.3 to 0.8) or read memory that is not there, and every other one was right; ptxas 13.0 compiles the
    same PTX to code that is right."""
    last: dict[str, str] = {}  # uniform register -> the instruction that wrote it last
    found = []
    for text in sass.splitlines():
        line = re.sub(r"/\*.*?\*/", "", text).strip().rstrip(" ;")
        upper = re.match(r"UIADD3\.X UR\d+, (UR\w+), (-?0x[0-9a-f]+), URZ, UP\d", line)
        if upper and (int(upper[2], 16) & 0xFFFFFFFF) >> 30:  # the two bits that say how a tile is swizzled
            zero = upper[1] == "URZ" or re.fullmatch(r"UMOV UR\d+, URZ", last.get(upper[1], ""))
            found += [] if zero else [line]
        written = re.match(r"(?:@!?U?P\w+ )?([A-Z0-9.]+) (?:UP\d, )?UR(\d+)\b", line)
        if written:
            last[f"UR{written[2]}"] = line
            if ".64" in written[1] or ".WIDE" in written[1]:
                last[f"UR{int(written[2]) + 1}"] = line
    return found


def main(arch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    tiles.arch = lambda device: arch  # launchers choose tiles as they would there
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
