"""Attention among the positions of each slice: a Triton kernel where it was measured fastest, else the libraries'.

The Triton backend (gpu/slice_attention.py) is a forward alone. cuDNN's and FlashAttention's backwards start from its y
and log-sum-exp; cuDNN's was the fastest backward at every size measured on an H100.
The `cpu` backend is compiled for the CPU (cpu/slice_attention.h), with its gradients.
The other backends are fused attentions that somebody maintains and that register their own operator and gradient:
torch's SDPA (its own choice, or its flash, cuDNN or memory-efficient kernel), flash-attn, xformers, FlexAttention.
`torch` computes the scores in fp32 and writes them to memory; it has every derivative. `auto` takes it for few
positions on a CPU where the compiled kernel is not built. `auto` on a GPU is what `dispatch.FASTEST` holds,
measured by `axial_fusion.tune slice_attention`, else SDPA's own choice.

Gradients, with p = exp(scale · q kᵀ − lse): dv = pᵀ dY, dp = dY vᵀ, ds = p · (dp − Σ y · dY),
dq = scale · ds k, dk = scale · dsᵀ q."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import (
    autocast,
    check_alike,
    check_shapes,
    no_autocast,
    no_second_derivative,
    ordinary,
    softmax_scale,
    under_transform,
    without_overlap,
)
from ..cpu import compiled
from ..dispatch import select_backend
from ..gpu.slice_attention import launch_forward
from ..registry import NAMESPACE, OPS, library, register_flop_formula

# Torch's cuDNN backward then reads another layout of lse.
_RAGGED = os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "0") == "1"

_AXES = ("B", "N", "P", "M", "D")
_BLOCK = 1 << 20  # scores in a block of the torch backend on a CPU: 4 MiB in fp32

_LIB = library("slice_attention")
_OP = f"{NAMESPACE}::slice_attention"
torch.library.define(_OP, "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)", lib=_LIB)
torch.library.define(
    f"{_OP}_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    lib=_LIB,
)


@torch.library.impl(_OP, "CompositeExplicitAutograd", lib=_LIB)
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """y (B, N, P, M, D), contiguous, and its log-sum-exp (B, N, M, P) in fp32."""
    y, lse = launch_forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale)
    return y.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])


@torch.library.register_fake(_OP, lib=_LIB)
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, slices, positions, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, slices, heads, positions), dtype=torch.float32)


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd", lib=_LIB)
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    shape = q.shape[:2]
    tensors = (grad.contiguous(), q, k, v, y)
    grad, q, k, v, y = (t.flatten(0, 1).transpose(1, 2) for t in tensors)  # (B', M, P, D)
    dq, dk, dv = _library_backward(grad, q, k, v, y, lse.flatten(0, 1), scale)
    dq, dk, dv = (t.transpose(1, 2).contiguous().unflatten(0, shape) for t in (dq, dk, dv))
    return dq, dk, dv


@torch.library.register_fake(f"{_OP}_backward", lib=_LIB)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _library_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (B', M, P, D) by the fastest backward that runs here.

    cuDNN on sm_90 and later, where torch says that it can; else FlashAttention from sm_80; else plain products. Both
    libraries take 16-byte steps through memory, so that q, k and v of other strides are copied."""
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) < (8, 0):
        return _plain_backward(grad, q, k, v, y, lse, scale)
    q, k, v = (_aligned(t) for t in (q, k, v))
    positions = q.shape[2]
    unused = torch.empty(2, dtype=torch.int64, device=q.device)  # dropout's seed and offset
    grads: tuple[Tensor, Tensor, Tensor]
    if _cudnn_runs(q, k, v):
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, y, lse.unsqueeze(-1), unused[0], unused[1], None, None, None, positions, positions,
            0.0, False, scale=scale,
        )  # fmt: skip
        return grads
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, y, lse, None, None, positions, positions, 0.0, False, unused.view(torch.uint64), unused[0],
        scale=scale,
    )  # fmt: skip
    return grads


def _cudnn_runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether cuDNN's backward serves q, k and v; torch says no where determinism is asked for."""
    if _RAGGED or q.shape[2] == 1 or torch.cuda.get_device_capability(q.device) < (9, 0):
        return False
    cuda = torch.backends.cuda
    return cuda.can_use_cudnn_attention(cuda.SDPAParams(q, k, v, None, 0.0, False, False))


def _aligned(t: Tensor) -> Tensor:
    steps = (t.data_ptr(), *(stride * t.element_size() for stride in t.stride()[:3]))
    usual = t.stride(-1) == 1 and 0 not in t.stride() and not any(step % 16 for step in steps)
    return t if usual else t.clone(memory_format=torch.contiguous_format)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    grad, q, k, v, y = (t.float() for t in (grad, q, k, v, y))
    p = (scale * (q @ k.transpose(-1, -2)) - lse.unsqueeze(-1)).exp()
    dp = grad @ v.transpose(-1, -2)
    ds = scale * p * (dp - (grad * y).sum(-1, keepdim=True))
    dq, dk, dv = (t.to(dtype) for t in (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*OPS.slice_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None)


torch.library.register_autograd(_OP, _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("slice_attention"), lib=_LIB)


@register_flop_formula(OPS.slice_attention)
def _flops(q_shape: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products of (P, D) and (D, P) a head, a multiply-add counted as two."""
    batch, slices, positions, heads, dim = q_shape
    return 4 * batch * slices * heads * positions * positions * dim


@register_flop_formula(OPS.slice_attention_backward)
def _backward_flops(grad_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Five products: the scores again, dp, dq, dk and dv."""
    return 5 * _flops(grad_shape) // 2


class _Compiled(torch.autograd.Function):
    """The compiled kernels of a CPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y, norms = compiled.slice_forward(q, k, v, scale)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, y, norms)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, norms = ctx.saved_tensors
        if torch.is_grad_enabled() or not ordinary(grad):
            return (*_backward_again(grad, q, k, v, ctx.scale), None)  # can be differentiated, and batched
        return (*compiled.slice_backward(grad, q, k, v, y, norms, ctx.scale), None)


def _backward_again(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Gradients of q, k and v from them alone."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    dy, q, k, v = (t.transpose(2, 3).to(wide) for t in (grad, q, k, v))  # (B, N, M, P, D)
    p = (scale * (q @ k.transpose(-1, -2))).softmax(-1)
    dp = dy @ v.transpose(-1, -2)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    grads = (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dy)
    return tuple(t.transpose(2, 3).to(grad.dtype) for t in grads)


# The libraries' backends. q, k, v (B', M, P, D) -> the same. A kernel of SDPA is called by its own operator:
# sdpa_kernel would switch the others off for every thread of the process.


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _sdpa_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    aten = torch.ops.aten
    if q.device.type == "cpu":
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        y: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[0]
        return y
    dim = q.shape[-1]
    q, k, v = (F.pad(t, (0, -dim % 8)) if dim % 8 else t for t in (q, k, v))
    y = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0][..., :dim]
    return y


def _sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    aten = torch.ops.aten
    y: Tensor = aten._scaled_dot_product_cudnn_attention(q, k, v, None, _wanted(q, k, v), scale=scale)[0]
    return y


def _sdpa_efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    aten = torch.ops.aten
    y: Tensor = aten._scaled_dot_product_efficient_attention(q, k, v, None, _wanted(q, k, v), scale=scale)[0]
    return y


def _wanted(*tensors: Tensor) -> bool:
    """Whether a backward may follow, which needs the log-sum-exp."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B', P, M, D), the layout of flash-attn and xformers
    y: Tensor = flash_attn_func(q, k, v, softmax_scale=scale).transpose(1, 2)
    return y


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y: Tensor = memory_efficient_attention(q, k, v, scale=scale).transpose(1, 2)
    return y


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention by plain products, scores and softmax in fp32: rounding scores of some tens to half precision would
    move the weights by per cents.

    On a CPU the slices are computed in blocks whose scores fit its cache."""
    with no_autocast(q):
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if q.device.type != "cpu" or traced or under_transform((q, k, v)):
            return _products(q, k, v, scale=scale)
        few = max(1, _BLOCK // max(1, q.shape[1] * q.shape[2] ** 2))
        blocks = zip(q.split(few), k.split(few), v.split(few), strict=True)
        parts = [_products(*block, scale=scale) for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _products(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    # oneDNN adds the products of bfloat16 up in fp32
    v = v if dtype == torch.bfloat16 and q.device.type == "cpu" else v.to(wide)
    return (((q * scale) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v).to(dtype)


_LIBRARIES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "sdpa": _sdpa,
    "sdpa_flash": _sdpa_flash,
    "sdpa_cudnn": _sdpa_cudnn,
    "sdpa_efficient": _sdpa_efficient,
    "flash": _flash,
    "xformers": _xformers,
    "flex": _flex,
    "torch": _torch,
}


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and a scale above 0 with the same scores.

    Our kernel takes the row maximum before it scales, and cuDNN 9.19 gave NaN gradients for a scale of 0 or below."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def slice_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention among the positions of each slice: q, k, v (B, N, P, M, D) -> (B, N, P, M, D).

    `scale` is D^-½ where None; `backend` auto, triton, cpu, sdpa, sdpa_flash, sdpa_cudnn, sdpa_efficient, flash,
    xformers, flex or torch. Triton needs float16 or bfloat16 and D 16, 32 or 64. FlexAttention is fused only inside
    torch.compile, so that auto never takes it. Under a trace or a dispatch mode, cpu computes by torch's own attention.
    Autocast casts q, k, v. Softmax in fp32.
    Raises ValueError on a shape, dtype, device or backend mismatch."""
    check_shapes("slice_attention", {"q": (q, _AXES), "k": (k, _AXES), "v": (v, _AXES)})
    q, k, v = autocast(q, k, v)
    check_alike("slice_attention", q=q, k=k, v=v)
    scale = softmax_scale("slice_attention", scale, q.shape[-1])
    chosen = select_backend("slice_attention", q, k, v, backend=backend).backend
    q, scale = _positive(q, scale)
    return run(q, k, v, scale, chosen)


def run(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    """`slice_attention` of arguments that are checked and cast, with a scale above 0, on a backend that is decided."""
    y: Tensor
    if backend == "triton":
        y = OPS.slice_attention(q, k, v, scale)[0]
        return y
    if backend == "cpu" and ordinary(q, k, v):
        if _wanted(q, k, v):
            y = _Compiled.apply(q, k, v, scale)  # type: ignore[no-untyped-call]  # torch's
            return y
        return compiled.slice_forward(q, k, v, scale)[0]
    # no library promises to take empty tensors; what counts or traces knows torch's own attention, not our kernel
    attend = _torch if q.numel() == 0 else _LIBRARIES["sdpa" if backend == "cpu" else backend]
    shape = q.shape[:2]
    q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in without_overlap(q, k, v))
    y = attend(q, k, v, scale).transpose(1, 2).unflatten(0, shape)
    return y
