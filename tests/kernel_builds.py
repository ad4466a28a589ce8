"""Builds every kernel for a GPU that is not there.    python kernel_builds.py ARCH DTYPE -> JSON, a row a kernel

What launchers would have launched is compiled and disassembled by axial_fusion.counts. Run without TRITON_INTERPRET.

To add a kernel, add a case: a function of a dtype that calls its launcher on tensors of a real size or an odd one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from axial_fusion.counts import sass
from axial_fusion.counts.build import build, recorded, target
from axial_fusion.gpu import axial_attention as axial
from axial_fusion.gpu import lora
from axial_fusion.gpu import rel_pos_attention as rel_pos
from axial_fusion.gpu import rel_terms as terms
from axial_fusion.gpu import row_norm as norm
from axial_fusion.gpu import slice_attention as slices
from axial_fusion.ops import lora_qkv as qkv


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


def rel_terms(dtype: torch.dtype, heads: int, dim: int, height: int, width: int, window: int = 0) -> None:
    q = torch.zeros(1, height, width, 3, heads, dim, dtype=dtype)[..., 0, :, :]
    tables = (torch.zeros(2 * (window or side) - 1, dim, dtype=dtype) for side in (height, width))
    terms.launch(q, *tables, bool(window))


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
    "lora, 256 to 768, r 4": lambda dtype: lora_linear(dtype, 36_864, 256, 768, 4),
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
    "terms, 64 by 64, D 32": lambda dtype: rel_terms(dtype, 8, 32, 64, 64),
    "terms, 64 by 64, D 64": lambda dtype: rel_terms(dtype, 12, 64, 64, 64),
    "terms, 64 by 64, D 80": lambda dtype: rel_terms(dtype, 16, 80, 64, 64),
    "terms, 1 by 25, D 128": lambda dtype: rel_terms(dtype, 3, 128, 1, 25),
    "terms, windows of 14, D 64": lambda dtype: rel_terms(dtype, 12, 64, 64, 64, 14),
    "terms, windows of 14, D 80": lambda dtype: rel_terms(dtype, 16, 80, 64, 64, 14),
    "slice, P 1024, D 16": lambda dtype: slice_attention(dtype, 1024, 8, 16),
    "slice, P 4096, D 32": lambda dtype: slice_attention(dtype, 4096, 8, 32),
    "slice, P 4096, D 64": lambda dtype: slice_attention(dtype, 4096, 8, 64),
    "slice, P 257, D 32": lambda dtype: slice_attention(dtype, 257, 3, 32),
    "slice, P 257, D 64": lambda dtype: slice_attention(dtype, 257, 3, 64),
}


def main(arch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, case in CASES.items():
        with target(arch):
            launches = recorded(lambda case=case: case(dtype))
        for launch in launches:
            made, kernel = build(launch, arch), launch.kernel.__name__
            code, _ = sass.instructions(made.sass)
            rows.setdefault(
                (kernel, name),
                {
                    "case": name,
                    "kernel": kernel,
                    "shared": made.shared,
                    "lines": len(code),
                    "spills": made.spills,
                    "mma": sum(sass.kind_of(line) == "tensor" for line in code),
                    "hgmma": made.sass.count("HGMMA"),
                    "waits": made.sass.count("WARPGROUP.DEPBAR"),
                    "wrong_descriptors": sass.wrong_descriptors(made.sass),
                },
            )
    return list(rows.values())


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), getattr(torch, sys.argv[2]))))
