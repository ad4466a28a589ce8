"""The paper's pair of attentions: across the slices of a group, then within each slice.

    z' = x  + FC_inter(Attn_N(LN(x)))      N keys a token: the slices at its position
    y  = z' + FC_intra(Attn_P(LN(z')))     P keys a token: the positions of its slice, new q, k, v from z'

N + P comparisons a token instead of the N·P of attention over the volume. Plain Python over registered ops, so
that autograd, autocast and torch.compile see ops and no graph break.    Source: AFTer-SAM, section 3.4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from axial_fusion.checks import autocast_dtype
from axial_fusion.dispatch import plain_on, select_backend
from axial_fusion.ops.axial_attention import axial_attention
from axial_fusion.ops.lora_linear import lora_linear
from axial_fusion.ops.lora_qkv import lora_qkv
from axial_fusion.ops.row_norm import row_norm
from axial_fusion.ops.slice_attention import slice_attention
from axial_fusion.reference import AttentionWeights, LoRA


def axial_fusion_attention(
    x: Tensor,
    inter: AttentionWeights | None,
    intra: AttentionWeights | None,
    *,
    num_heads: int,
    residual: bool = True,
    query_index: Sequence[int] | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Axial attention, then slice attention: x (B, N, P, C) or (B, N, H', W', C) -> the same shape, in x's dtype.

    `inter` are the weights of the attention across slices, `intra` of that within a slice; one of them may be
    None, its half is then left out. `query_index` computes those slices alone, as (B, Nq, ...), with keys from
    all N. `residual` False returns FC_intra(...) without its z' (z' keeps its own). `dropout_p` is of the LoRA
    branches. `backend` "composed" is library products around the kernels of the norm and of axial attention, "torch"
    plain torch in every part.

    Under reentrant checkpointing pass every weight as an argument of the checkpointed function by itself:
    torch looks for tensors that need gradients in the arguments alone, not inside a NamedTuple.
    LayerNorm runs in fp32 and LoRA weights may stay fp32 under autocast.

    Raises ValueError on a shape, dtype, device, index or backend mismatch."""
    if x.dim() not in (4, 5):
        raise ValueError(
            f"axial_fusion_attention: x must be (B, N, P, C) or (B, N, H', W', C), found shape {tuple(x.shape)}"
        )
    if inter is None and intra is None:
        raise ValueError("axial_fusion_attention: inter and intra are both None; nothing is left to compute")
    grid = x.shape[2:-1]
    if x.dim() == 5:
        x = x.flatten(2, 3)
    slices, channels = x.shape[1], x.shape[-1]
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"axial_fusion_attention: num_heads is {num_heads}, but must divide C = {channels}")
    for name, weights in (("inter", inter), ("intra", intra)):
        if weights is not None:
            _check(name, weights, channels)
    if query_index is not None:
        query_index = list(query_index)
        if not query_index or not all(0 <= i < slices for i in query_index):
            raise ValueError(
                f"axial_fusion_attention: query_index is {query_index}, but x has the slices 0 to {slices - 1}"
            )
    chosen = select_backend("axial_fusion_attention", x, backend=backend).backend
    if inter is not None:
        q, k, v = _normed_projections(x, inter, num_heads, dropout_p, eps, chosen, query_index)
        o = axial_attention(q, k, v, backend="torch" if chosen == "torch" else "auto")
        kept = _pick(x, query_index) if residual or intra is not None else None
        x = _project(o, inter, kept, dtype=x.dtype)
    else:
        x = _pick(x, query_index)
    if intra is not None:
        q, k, v = _normed_projections(x, intra, num_heads, dropout_p, eps, chosen)
        o = slice_attention(q, k, v, backend="torch" if backend == "torch" else "auto")
        x = _project(o, intra, x if residual else None, dtype=x.dtype)
    return x if len(grid) == 1 else x.unflatten(2, grid)


def _normed_projections(
    x: Tensor,
    w: AttentionWeights,
    num_heads: int,
    dropout_p: float,
    eps: float,
    backend: str,
    query_index: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, Nq, P, M, D), k and v (B, N, P, M, D) of LN(x): one op with LoRA on q and v where that fits."""
    ranks = {None if lora is None else lora.a.shape[0] for lora in (w.lora_q, w.lora_v)}
    apart = query_index is not None or w.norm_weight is None or ranks == {None} or len(ranks) > 1 or dropout_p
    if apart or backend == "torch" or plain_on(x):
        return _projections(_norm(x, w, eps, backend), w, num_heads, dropout_p, query_index)
    qkv = lora_qkv(x, w.norm_weight, w.norm_bias, w.qkv_weight, w.qkv_bias, w.lora_q, w.lora_v, eps=eps)  # type: ignore[arg-type]
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(3)  # type: ignore[return-value]  # views


def _norm(x: Tensor, w: AttentionWeights, eps: float, backend: str) -> Tensor:
    """LayerNorm with fp32 weights and statistics, its result in the dtype that the projections compute in."""
    if w.norm_weight is None:
        return x.to(autocast_dtype(x) or x.dtype)
    return row_norm(x, w.norm_weight, w.norm_bias, eps=eps, backend="torch" if backend == "torch" else "auto")


def _projections(
    z: Tensor, w: AttentionWeights, num_heads: int, dropout_p: float, query_index: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """LN(x) (B, N, P, C) -> q (B, Nq, P, M, D) and k, v (B, N, P, M, D): one product where nothing parts them."""
    if query_index is None and w.lora_q is None and w.lora_v is None:
        qkv = lora_linear(z, w.qkv_weight, w.qkv_bias).unflatten(-1, (3, num_heads, -1))
        return qkv.unbind(3)  # type: ignore[return-value]  # views: the attentions read through strides
    weights = w.qkv_weight.chunk(3)
    biases = (None, None, None) if w.qkv_bias is None else w.qkv_bias.chunk(3)
    loras = (w.lora_q, None, w.lora_v)
    inputs = (_pick(z, query_index), z, z)
    q, k, v = (
        _linear(part, weight, bias, lora, dropout_p).unflatten(-1, (num_heads, -1))
        for part, weight, bias, lora in zip(inputs, weights, biases, loras, strict=True)
    )
    return q, k, v


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None, dropout_p: float) -> Tensor:
    if lora is None:
        return lora_linear(x, weight, bias)
    return lora_linear(x, weight, bias, lora.a, lora.b, scaling=lora.scaling, dropout_p=dropout_p)


def _project(o: Tensor, w: AttentionWeights, residual: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """FC over the joined heads, o (B, Nq, P, M, D) -> (B, Nq, P, C) in `dtype`, plus the residual."""
    y = lora_linear(o.flatten(3), w.out_weight, w.out_bias).to(dtype)
    return y if residual is None else residual + y


def _pick(x: Tensor, index: list[int] | None) -> Tensor:
    """Slices `index` of x (B, N, P, C); a view where they are a range."""
    if index is None:
        return x
    if index == list(range(index[0], index[0] + len(index))):
        return x[:, index[0] : index[0] + len(index)]
    return x[:, index]


def _check(name: str, w: AttentionWeights, channels: int) -> None:
    expected = {
        "qkv_weight": (w.qkv_weight, (3 * channels, channels)),
        "qkv_bias": (w.qkv_bias, (3 * channels,)),
        "out_weight": (w.out_weight, (channels, channels)),
        "out_bias": (w.out_bias, (channels,)),
        "norm_weight": (w.norm_weight, (channels,)),
        "norm_bias": (w.norm_bias, (channels,)),
    }
    for key, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"axial_fusion_attention: {name}.{key} must be {shape} for C = {channels}, "
                f"found shape {tuple(tensor.shape)}"
            )
