"""Attention across slices at each position: softmax(scale · q kᵀ) v over the N slices of a group.

Gradients, with p the softmax's rows: dv = pᵀ dY, dp = dY vᵀ, ds = p · (dp − Σ p · dp),
dq = scale · ds k, dk = scale · dsᵀ q. Every backend but torch on an eager CPU computes p again and saves q, k and v
alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    autocast,
    check_alike,
    check_shapes,
    dtype_name,
    no_second_derivative,
    ordinary,
    softmax_scale,
    under_transform,
)
from ..cpu import axial_attention as plain
from ..cpu import compiled
from ..dispatch import plain_on, select_backend
from ..gpu import axial_attention as gpu
from ..registry import NAMESPACE, OPS, library, register_flop_formula

_QUERIES, _KEYS = ("B", "Nq", "P", "M", "D"), ("B", "N", "P", "M", "D")

_FORWARD = {"triton": gpu.launch_forward, "cpu": compiled.forward, "torch": plain.forward}
_BACKWARD = {"triton": gpu.launch_backward, "cpu": compiled.backward, "torch": plain.backward}
_LIB = library("axial_attention")
_OP = f"{NAMESPACE}::axial_attention"
torch.library.define(
    _OP,
    "(Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale, bool causal, str backend) -> Tensor",
    lib=_LIB,
)
torch.library.define(
    f"{_OP}_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale, bool causal, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lib=_LIB,
)


@torch.library.impl(_OP, "CompositeExplicitAutograd", lib=_LIB)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool, backend: str
) -> Tensor:
    return _FORWARD[backend](q, k, v, lengths, scale, causal)


@torch.library.register_fake(_OP, lib=_LIB)
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool, backend: str
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd", lib=_LIB)
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _BACKWARD[backend](grad, q, k, v, lengths, scale, causal)


@torch.library.register_fake(f"{_OP}_backward", lib=_LIB)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, lengths, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, lengths)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad), None, None, None, None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *options, backend = ctx.options
    given = (grad, *ctx.saved_tensors, *options)
    once = not torch.is_grad_enabled()
    if once and backend != "torch" and ordinary(grad):
        return _BACKWARD[backend](*given)
    if backend == "cpu" and (not once or under_transform((grad,))):
        return plain.backward(*given)  # can be differentiated again, and batched
    grads: tuple[Tensor, Tensor, Tensor] = OPS.axial_attention_backward(*given, backend)
    return grads


class _Direct(torch.autograd.Function):
    """The kernels without the registered op, whose calls forward and backward take 100 us longer."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, lengths)
        ctx.options = options
        scale, causal, backend = options
        return _FORWARD[backend](q, k, v, lengths, scale, causal)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grad), None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("axial_attention"), lib=_LIB)


@register_flop_formula(OPS.axial_attention)
def _flops(q_shape: Sequence[int], k_shape: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products of (Nq, D) and (D, N) a head and position, a multiply-add counted as two."""
    batch, num_queries, positions, heads, dim = q_shape
    return 4 * batch * positions * heads * num_queries * k_shape[1] * dim


@register_flop_formula(OPS.axial_attention_backward)
def _backward_flops(
    grad_shape: Any, q_shape: Any, k_shape: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Five products: the scores again, dp, dq, dk and dv."""
    return 5 * _flops(q_shape, k_shape) // 2


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention across slices at each position: q (B, Nq, P, M, D), k and v (B, N, P, M, D) -> (B, Nq, P, M, D).

    Not the "axial attention" of rows and columns of one image. `scale` is D^-½ where None. `causal`: query i sees
    keys 0 .. i + N − Nq. `lengths` (B,) integers: group b has keys 0 .. lengths[b] − 1. A query that sees no key
    gives 0. Any strides are read as they are where D is contiguous; the result is contiguous, in q's dtype or
    autocast's. Softmax in fp32. Raises ValueError on a shape, dtype, device or backend mismatch."""
    key = _key(q, k, v, backend) if lengths is None else None
    chosen = None if key is None else _CHOSEN.get(key)
    if chosen is None:
        check_shapes("axial_attention", {"q": (q, _QUERIES), "k": (k, _KEYS), "v": (v, _KEYS)})
        q, k, v = autocast(q, k, v)
        check_alike("axial_attention", q=q, k=k, v=v)
    scale = softmax_scale("axial_attention", scale, q.shape[-1])
    if not isinstance(causal, (bool, int)):
        raise ValueError(f"axial_attention: causal must be True or False, found {type(causal).__name__}")
    if lengths is not None:
        _check_lengths(lengths, q)
    if chosen is None:
        chosen = select_backend("axial_attention", q, k, v, backend=backend).backend
        if key is not None:
            if len(_CHOSEN) >= _MOST_CHOSEN:
                _CHOSEN.clear()
            _CHOSEN[key] = chosen
    elif chosen != "torch":
        return _direct(q, k, v, lengths, scale, bool(causal), chosen)
    return run(q, k, v, lengths, scale, bool(causal), chosen)


_CHOSEN: dict[Hashable, str] = {}  # the backend of calls whose arguments are right
_MOST_CHOSEN = 4096


def _key(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Hashable:
    """All that checks and choice depend on; None where that is more: tracing, autocast, a transform, a subclass."""
    if not ordinary(q, k, v) or not isinstance(backend, str):
        return None
    device = q.device
    if device.type not in ("cuda", "cpu") or torch.is_autocast_enabled(device.type):
        return None
    if q.is_nested or k.is_nested or v.is_nested:
        return None
    return backend, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, device, k.device, v.device


def _direct(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool, backend: str
) -> Tensor:
    """`run` on a kernel of ours, where nothing looks on."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        y: Tensor = _Direct.apply(q, k, v, lengths, (scale, causal, backend))  # type: ignore[no-untyped-call]  # torch's
        return y
    return _FORWARD[backend](q, k, v, lengths, scale, causal)


def _check_lengths(lengths: Tensor, q: Tensor) -> None:
    check_shapes("axial_attention", {"lengths": (lengths, ("B",))})
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"axial_attention: lengths must be (B,) = ({q.shape[0]},) of int32 or int64, "
            f"found {tuple(lengths.shape)} of {dtype_name(lengths.dtype)}"
        )
    if lengths.device != q.device:
        raise ValueError(f"axial_attention: lengths is on {lengths.device} but q is on {q.device}")


def run(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool, backend: str
) -> Tensor:
    """`axial_attention` of arguments that are checked and cast, on a backend that is decided."""
    if backend == "torch" and plain_on(q, k, v):
        return plain.forward(q, k, v, lengths, scale, causal)
    if backend != "torch" and ordinary(q, k, v):
        return _direct(q, k, v, lengths, scale, causal, backend)
    y: Tensor = OPS.axial_attention(q, k, v, lengths, scale, causal, backend)
    return y
