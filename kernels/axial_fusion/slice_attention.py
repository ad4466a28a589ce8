"""Attention among the positions of each slice: FlashAttention by dispatch, no kernel of our own.

Every backend but `torch` is a fused attention that somebody maintains and that registers its own operator and
gradient: torch's SDPA (flash, cuDNN or memory-efficient, as the device has them), flash-attn, xformers,
FlexAttention. `torch` writes the scores to memory; it has every derivative and is the fastest at small P in half
precision on a CPU."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from axial_fusion._launch import autocast, check_alike, check_shapes, select_backend, softmax_scale


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q, k, v (B', P, M, D) -> the same; the transposes are views."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


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


_RUN = {"sdpa": _sdpa, "torch": _torch, "flash": _flash, "xformers": _xformers, "flex": _flex}


def slice_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention among the positions of each slice: q, k, v (B, N, P, M, D) -> (B, N, P, M, D).

    `scale` is D^-½ where None; `backend` auto, sdpa, flash, xformers, flex or torch. FlexAttention is fused only
    inside torch.compile. Autocast casts q, k, v. Raises ValueError on a shape, dtype, device or backend mismatch."""
    letters = "B N P M D"
    check_shapes("slice_attention", {"q": (q, letters), "k": (k, letters), "v": (v, letters)})
    q, k, v = autocast(q, k, v)
    check_alike("slice_attention", q=q, k=k, v=v)
    run = _RUN[select_backend("slice_attention", q, k, v, backend=backend).backend]
    y = run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), softmax_scale(scale, q.shape[-1]))
    return y.unflatten(0, q.shape[:2])
