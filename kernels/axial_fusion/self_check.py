"""Whether the Triton kernels are right on this GPU: each once on a tiny input against plain torch in fp64.

python -m axial_fusion.self_check --dtype bfloat16      a line an op"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import trust
from .checks import dtype_name

TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}  # relative L2; a gradient has twice that
ELEMENT = 5  # times that, of a single element
DTYPES = {dtype_name(dtype): dtype for dtype in TOLERANCE}
Draw = Callable[..., Tensor]
Problem = tuple[Callable[..., Any], list[Tensor]]


def _axial(draw: Draw) -> Problem:
    from .ops.axial_attention import axial_attention

    return axial_attention, [draw(1, 9, 19, 2, 32) for _ in range(3)]


def _slice(draw: Draw) -> Problem:
    from .ops.slice_attention import slice_attention

    return slice_attention, [draw(1, 2, 70, 2, 32) for _ in range(3)]


def _rel_pos(draw: Draw) -> Problem:
    from .ops.rel_pos_attention import rel_pos_attention

    qkv = [draw(1, 64, 2, 64) for _ in range(3)]
    return partial(rel_pos_attention, grid=(8, 8)), [*qkv, draw(1, 2, 8, 64), draw(1, 2, 64, 8)]


def _window(draw: Draw) -> Problem:
    from .ops.window_attention import window_attention

    rel = [draw(1, 16, 16, 2, 14) for _ in range(2)]
    return partial(window_attention, window=14), [draw(1, 16, 16, 3, 2, 64), draw(384), *rel]


def _rel_terms(draw: Draw) -> Problem:
    from .ops.rel_terms import rel_terms

    return rel_terms, [draw(1, 16, 16, 2, 64), draw(31, 64), draw(31, 64)]


def _row_norm(draw: Draw) -> Problem:
    from .ops.row_norm import row_norm

    return row_norm, [draw(40, 256), draw(256), draw(256)]


def _lora_linear(draw: Draw) -> Problem:
    from .ops.lora_linear import lora_linear

    return lora_linear, [draw(70, 64), draw(96, 64), draw(96), draw(4, 64), draw(96, 4)]


def _lora_qkv(draw: Draw) -> Problem:
    from .ops.lora_qkv import lora_qkv
    from .reference import LoRA

    def call(x: Tensor, *weights: Tensor, backend: str) -> Tensor:
        norm, norm_bias, weight, bias, *ab = weights
        q, v = LoRA(ab[0], ab[1], 1.0), LoRA(ab[2], ab[3], 1.0)
        return lora_qkv(x, norm, norm_bias, weight, bias, q, v, backend=backend)

    thin = [draw(*sizes) for _ in range(2) for sizes in ((4, 64), (64, 4))]
    return call, [draw(70, 64), draw(64), draw(64), draw(192, 64), draw(192), *thin]


PROBLEMS: dict[str, Callable[[Draw], Problem]] = {
    "axial_attention": _axial,
    "slice_attention": _slice,
    "rel_pos_attention": _rel_pos,
    "window_attention": _window,
    "rel_terms": _rel_terms,
    "row_norm": _row_norm,
    "lora_linear": _lora_linear,
    "lora_qkv": _lora_qkv,
}


def check(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of `op` are not to be used for this dtype on this device, or None where they are right."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device="cpu").to(device, dtype).requires_grad_()

    try:
        call, inputs = PROBLEMS[op](draw)
        found = _results(partial(call, backend="triton"), inputs)
        wide = [t.detach().double().requires_grad_() for t in inputs]
        for i, (value, truth) in enumerate(
            zip(found, _results(partial(call, backend="torch"), wide), strict=True)
        ):
            scale, off = truth.norm() / truth.numel() ** 0.5, (value.double() - truth).abs()
            limit = TOLERANCE[dtype] * (1 if i == 0 else 2)
            worst = (off / (truth.abs() + scale)).max().item()
            whole = (off.norm() / truth.norm()).item()
            if not (whole <= limit and worst <= ELEMENT * limit):
                return f"wrong: relative error {whole:.1e}, of one element {worst:.1e}, in result {i}"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
    return None


def _results(call: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradient of every input."""
    y = call(*inputs)
    outputs = list(y) if isinstance(y, tuple) else [y]
    weights = [
        torch.linspace(-1, 1, o.numel(), device=o.device, dtype=torch.float64).view_as(o) for o in outputs
    ]
    grads = torch.autograd.grad(
        outputs, inputs, [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)]
    )
    return [t.detach() for t in (*outputs, *grads)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="axial_fusion.self_check", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ops", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    args = parser.parse_args(argv)
    os.environ[trust.SWITCH] = "0"  # what a kernel calls is not asked about meanwhile
    wrong = 0
    for op in args.ops:
        print(f"begin: {op}", flush=True)
        why = check(op, torch.device(args.device), DTYPES[args.dtype])
        print(f"{op}: {why or 'right'}", flush=True)
        wrong |= why is not None
    return wrong


if __name__ == "__main__":
    sys.exit(main())
