"""Attention among the positions of each slice: FlashAttention by dispatch, no kernel of our own.

Every backend but `torch` is a fused attention that somebody maintains and that registers its own operator and
gradient: torch's SDPA (its own choice, or held to flash, cuDNN or memory-efficient), flash-attn, xformers,
FlexAttention. `torch` writes the scores to memory; it has every derivative and is the fastest at small P in half
precision on a CPU. `auto` on a GPU is what `axial_fusion.tune slice_attention` measured, else SDPA's own choice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from axial_fusion._launch import autocast, check_alike, check_shapes, select_backend, softmax_scale


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q, k, v (B', P, M, D) -> the same; the transposes are views."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _held(to: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(to):
        return _sdpa(q, k, v, scale)


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-1, -2) * scale).softmax(-1) @ v).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scale)


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v, scale=scale)


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flex_attention(q, k, v, scale=scale).transpose(1, 2)


_RUN: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "sdpa": _sdpa,
    "sdpa_flash": partial(_held, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(_held, SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": partial(_held, SDPBackend.EFFICIENT_ATTENTION),
    "flash": _flash,
    "xformers": _xformers,
    "flex": _flex,
    "torch": _torch,
}


def slice_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention among the positions of each slice: q, k, v (B, N, P, M, D) -> (B, N, P, M, D).

    `scale` is D^-½ where None; `backend` auto, sdpa, sdpa_flash, sdpa_cudnn, sdpa_efficient, flash, xformers, flex or
    torch. FlexAttention is fused only inside torch.compile, so that auto never takes it. Autocast casts q, k, v.
    Raises ValueError on a shape, dtype, device or backend mismatch."""
    letters = "B N P M D"
    check_shapes("slice_attention", {"q": (q, letters), "k": (k, letters), "v": (v, letters)})
    q, k, v = autocast(q, k, v)
    check_alike("slice_attention", q=q, k=k, v=v)
    run = _RUN[select_backend("slice_attention", q, k, v, backend=backend).backend]
    y = run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), softmax_scale(scale, q.shape[-1]))
    return y.unflatten(0, q.shape[:2])
