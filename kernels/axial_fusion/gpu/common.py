"""What the Triton kernels and their launchers share: the decorator, loads and stores of tiles, the device's context.

Without Triton, `jit` leaves a kernel the plain function that it is, and nothing calls it: `MISSING` says why. An
installation that does not fit the machine raises any error at import, and a stub has no `jit` that makes kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..checks import import_failure

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")  # Triton reads it once, as we do
MISSING: str | None = None
try:
    import triton
    import triton.language as tl

    jit = triton.jit
except Exception as error:
    tl, MISSING = None, import_failure("triton", error)

    def jit(function):
        return function


try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except Exception:  # an older Triton, where tiles are loaded by pointers, or none
    TensorDescriptor = None

_HERE = nullcontext()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """The context to launch in: Triton launches on the current device, which need not be the tensor's."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_STARTED: dict[Hashable, tuple[Callable[..., None], tuple[Any, ...]]] = {}
_MOST_STARTED = 4096


def started(
    kernel: Any, programs: int, args: tuple[Any, ...], constants: Mapping[str, Any], key: Hashable
) -> None:
    """Launch a kernel of one grid axis. `key` tells `programs` and all that Triton compiles for, or is None where that
    changes.

    What was compiled for a key is launched without asking Triton again what it is: 2 us of Python, not 13."""
    known = _STARTED.get(key) if key is not None else None
    if known is not None:
        launch, rest = known
        launch(*args, *rest)
        return
    compiled = kernel[(programs,)](*args, **constants)
    if key is not None and hasattr(compiled, "launch_metadata"):  # None in the interpreter
        if len(_STARTED) >= _MOST_STARTED:
            _STARTED.clear()
        rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _STARTED[key] = compiled[(programs, 1, 1)], rest


def aligned(*tensors: Tensor) -> bool:
    """Whether the tensors begin where Triton's loads are widest; it compiles anew where one does not."""
    together = 0
    for tensor in tensors:
        together |= tensor.data_ptr()
    return not together & 15


def last_axis_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as kernels read them: of any strides, but contiguous along the last axis."""
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    return tensors


@jit
def octaves(x):
    """log2(e) · x: exp(x) is exp2 of it, and hardware has exp2."""
    return x * 1.4426950408889634


if MISSING is None and not hasattr(octaves, "__getitem__"):
    MISSING = "the package triton is a stub: its jit makes no kernels"


@jit
def pointers(ptr, offs, mask, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Pointers and mask of columns START .. START + WIDTH − 1 of the rows at `offs`; columns past D are masked.

    `offs` is [rows] of one head, or [rows, HEADS]."""
    offs_d = START + tl.arange(0, WIDTH)
    mask_d = mask[:, None] & (offs_d < D)[None, :] if START + WIDTH > D else mask[:, None]
    if len(offs.shape) == 1:
        ptrs = ptr + offs[:, None] + offs_d[None, :]
    else:
        ptrs = ptr + offs[:, :, None] + offs_d[None, None, :]
        mask_d = mask_d[:, None, :]
    return ptrs, mask_d


@jit
def load(ptr, offs, mask, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """[rows, WIDTH] of one head, or [HEADS, rows, WIDTH]."""
    ptrs, mask_d = pointers(ptr, offs, mask, START, WIDTH, D)
    x = tl.load(ptrs, mask=mask_d, other=0.0)
    return x if len(offs.shape) == 1 else x.permute(1, 0, 2)


@jit
def store(ptr, offs, mask, x, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Store x, [rows, WIDTH] of one head or [HEADS, rows, WIDTH], in the dtype of `ptr`."""
    ptrs, mask_d = pointers(ptr, offs, mask, START, WIDTH, D)
    x = x.to(ptr.dtype.element_ty)
    tl.store(ptrs, x if len(offs.shape) == 1 else x.permute(1, 0, 2), mask=mask_d)
