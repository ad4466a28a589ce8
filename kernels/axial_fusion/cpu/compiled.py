"""The compiled kernels of a CPU: kernels.c, which an install builds where it finds a compiler.

They run on torch's own thread pool with torch.get_num_threads() threads, and take pointers and strides: building them
needs neither torch's headers nor a second OpenMP."""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from ..checks import constant_when_traced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by their number in kernels.c
MAX_SLICES = 64  # MAX_ROWS of kernels.c
VERSION = 3  # of what kernels.c takes
# Elements of k at a position that a thread works on at a time: as many heads as fit the cache.
_GROUP = 3 << 10
_TILE = 32  # TILE of kernels.c
_GRAIN = 1 << 15  # multiply-adds from which another thread pays


_CALL = struct.Struct("52qd")  # an Attention of kernels.c: eight views of five numbers, twelve more, scale
_NORM = struct.Struct("18qd")  # a GroupNorm of kernels.c: eleven pointers, seven numbers, eps
_ABSENT = (0,) * 5  # the view of an absent tensor


def _path() -> Path | None:
    """Where the kernels are that this Python's install has built."""
    built = (Path(__file__).with_name("_kernels" + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in built if path.exists()), None)


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    found = _path()
    if found is None:
        return "the compiled kernels are not built; install with a C compiler at hand"
    try:
        library = ctypes.CDLL(str(found))
        version = library.kernels_version()
    except (OSError, AttributeError) as error:
        return f"the compiled kernels do not load: {error}"
    if version != VERSION:
        return "the compiled kernels are of another version of this package; install it again"
    called = library.axial_attention, library.slice_attention, library.group_norm
    for function in (library.kernels_level, *called):
        function.restype = ctypes.c_int64
    for function in called:
        function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
    return library


@constant_when_traced
def missing() -> str | None:
    """Why the compiled kernels cannot be used, or None."""
    library = _library()
    return library if isinstance(library, str) else None


@functools.cache
def _parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP that torch loaded; None where torch uses another thread pool."""
    if sys.platform != "linux":
        return None
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@functools.cache
def _level() -> int:
    library = _library()
    assert not isinstance(library, str)
    return library.kernels_level()


def _view(t: Tensor) -> tuple[int, ...]:
    return (t.data_ptr(), *t.stride()[:4])


def _dense(t: Tensor) -> Tensor:
    """The tensor as kernels read it: a lazy negation resolved, and D contiguous."""
    t = t.resolve_neg()
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _run(
    q: Tensor, k: Tensor, views: list[tuple[int, ...]], lengths: Tensor | None, scale: float, causal: bool
) -> None:
    """`views`: of q, k, v, y, dy, dq, dk, dv; y is absent backward, the last four forward."""
    library = _library()
    assert not isinstance(library, str)
    batch, queries, positions, heads, dim = q.shape
    keys = k.shape[1]
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    work = batch * positions * heads * queries * keys * dim
    group = max(1, min(heads, _GROUP // (keys * dim)))
    items = batch * positions * -(-heads // group)
    threads = max(1, min(torch.get_num_threads(), items, work // _GRAIN))
    call = _CALL.pack(
        *(number for view in views for number in view),
        0 if lengths is None else lengths.data_ptr(), 0,
        batch, queries, keys, positions, heads, dim, DTYPES.index(q.dtype), causal, threads, group,
        scale,
    )  # fmt: skip
    if library.axial_attention(call, _parallel(), _level()):
        raise MemoryError("axial_attention: no memory for the rows that its threads work on")


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool) -> Tensor:
    """q (B, Nq, P, M, D), k and v (B, N, P, M, D) -> contiguous (B, Nq, P, M, D)."""
    y = q.new_empty(q.shape)
    if not k.shape[1]:
        return y.zero_()
    if y.numel():
        q, k, v = (_dense(t) for t in (q, k, v))
        _run(q, k, [*map(_view, (q, k, v, y)), *(_ABSENT,) * 4], lengths, scale, causal)
    return y


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients of q, k and v."""
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    dy, q, k, v = (_dense(t) for t in (grad, q, k, v))
    views = [*map(_view, (q, k, v)), _ABSENT, *map(_view, (dy, dq, dk, dv))]
    _run(q, k, views, lengths, scale, causal)
    return dq, dk, dv


def _within(tensors: Sequence[Tensor | None], norms: Tensor, scale: float) -> None:
    """`tensors` (B, N, P, M, D): q, k, v, y, dy, dq, dk, dv; the last four are absent forward."""
    library = _library()
    assert not isinstance(library, str)
    q = tensors[0]
    assert q is not None
    batch, slices, positions, heads, dim = q.shape
    # whole heads, or parts of them where there are too few heads for the threads
    threads, group, all_heads = torch.get_num_threads(), positions, batch * slices * heads
    if tensors[4] is None and all_heads < 4 * threads:
        group = -(-positions * all_heads // (4 * threads))
    group = -(-group // _TILE) * _TILE
    items = all_heads * -(-positions // group)
    threads = max(1, min(threads, items, all_heads * positions**2 * dim // _GRAIN))
    numbers: list[int] = []
    for t in tensors:
        if t is None:
            numbers += _ABSENT
        else:
            to_batch, to_slice, to_position, to_head, _ = t.stride()
            numbers += (t.data_ptr(), to_batch, to_position, to_slice, to_head)
    call = _CALL.pack(
        *numbers,
        0, norms.data_ptr(),
        batch, positions, positions, slices, heads, dim, DTYPES.index(q.dtype), 0, threads, group,
        scale,
    )  # fmt: skip
    if library.slice_attention(call, _parallel(), _level()):
        raise MemoryError("slice_attention: no memory for the rows that its threads work on")


def slice_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v (B, N, P, M, D) -> contiguous (B, N, P, M, D), and what the backward needs of the softmax, in fp32
    (2, B·N·M·P): the largest score of each query, and the sum of e^(score - largest)."""
    y, norms = q.new_empty(q.shape), q.new_empty((2, q.shape[:4].numel()), dtype=torch.float32)
    if y.numel():
        _within([_dense(q), _dense(k), _dense(v), y, None, None, None, None], norms, scale)
    return y, norms


def slice_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, norms: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients of q, k and v."""
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    if q.numel():
        dy, q, k, v = map(_dense, (grad, q, k, v))
        _within([q, k, v, y, dy, dq, dk, dv], norms, scale)
    return dq, dk, dv


def _norm(tensors: Sequence[Tensor | None], x: Tensor, groups: int, eps: float, relu: bool) -> None:
    """`tensors`: x, added, y, dy, dx, weight, bias, mean, rstd, dweight and dbias as in kernels.c."""
    library = _library()
    assert not isinstance(library, str)
    images, channels, height, width = x.shape
    threads = max(1, min(torch.get_num_threads(), images, x.numel() // _GRAIN))
    call = _NORM.pack(
        *(0 if t is None else t.data_ptr() for t in tensors),
        images, height * width, channels, groups, DTYPES.index(x.dtype), relu, threads,
        eps,
    )  # fmt: skip
    if library.group_norm(call, _parallel(), _level()):
        raise MemoryError("group_norm: no memory for the rows that its threads work on")


def norm_forward(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm of x (T, C, h, w) by weight and bias (C,) in fp32, plus `added`, through a ReLU -> y, mean, rstd.

    x and `added` are dense with channels last and of one dtype, as y is; mean and rstd (T, groups) are fp32."""
    y = torch.empty_like(x)
    mean, rstd = x.new_empty((2, len(x), groups), dtype=torch.float32)
    if x.numel():
        _norm([x, added, y, None, None, weight, bias, mean, rstd, None, None], x, groups, eps, relu)
    return y, mean, rstd


def norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    relu: bool,
    added: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, of what was added where it was, of weight and bias; dy lies in memory as x does.

    Only a ReLU needs y."""
    dx = torch.empty_like(x)
    dadded = torch.empty_like(x) if added else None
    dweight, dbias = x.new_zeros((2, *x.shape[:2]), dtype=torch.float32)
    if x.numel():
        tensors = [x, dadded, y, dy, dx, weight, None, mean, rstd, dweight, dbias]
        _norm(tensors, x, mean.shape[1], 0.0, relu)
    return dx, dadded, dweight.sum(0), dbias.sum(0)
