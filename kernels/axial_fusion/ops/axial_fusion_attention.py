"""The paper's pair of attentions: across the slices of a group, then within each slice.

    z' = x  + FC_inter(Attn_N(LN(x)))      N keys a token: the slices at its position
    y  = z' + FC_intra(Attn_P(LN(z')))     P keys a token: the positions of its slice, new q, k, v from z'

N + P comparisons a token instead of the N·P of attention over the volume. Plain Python over registered ops, so
that autograd, autocast and torch.compile see ops and no graph break.    Source: AFTer-SAM, section 3.4."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..checks import FLOATS, autocast_dtype, check_alike, check_dense, check_whole, dtype_name, softmax_scale
from ..dispatch import HalfBackends, select_halves
from ..reference import AttentionWeights, LoRA
from . import axial_attention, lora_linear, lora_qkv, row_norm, slice_attention


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
    branches. `backend` "auto" or "composed" takes the fastest kernel or library product of each part, "triton" our
    kernels in every part that has one, "torch" plain torch in every part.

    Under reentrant checkpointing pass every weight as an argument of the checkpointed function by itself:
    torch looks for tensors that need gradients in the arguments alone, not inside a NamedTuple.
    LayerNorm runs in fp32 and LoRA weights may stay fp32 under autocast.

    Raises ValueError on a shape, dtype, device, index or backend mismatch."""
    grid = x.shape[2:-1]
    _check(x, inter, intra, num_heads, dropout_p)
    if x.dim() == 5:
        x = x.flatten(2, 3)
    index = None if query_index is None else _checked_index(query_index, x.shape[1])
    queries = x.shape[1] if index is None else len(index)
    across, within = select_halves(x, inter, intra, num_heads=num_heads, queries=queries, backend=backend)
    scale = softmax_scale("axial_fusion_attention", None, x.shape[-1] // num_heads)
    if inter is not None:
        q, k, v = _projections(x, inter, num_heads, dropout_p, eps, across, index)
        o = axial_attention.run(q, k, v, None, scale, False, across.attention)
        kept = _pick(x, index) if residual or intra is not None else None
        x = _project(o, inter, kept, x.dtype, across)
    else:
        x = _pick(x, index)
    if intra is not None:
        q, k, v = _projections(x, intra, num_heads, dropout_p, eps, within)
        o = slice_attention.run(q, k, v, scale, within.attention)
        x = _project(o, intra, x if residual else None, x.dtype, within)
    return x if len(grid) == 1 else x.unflatten(2, grid)


def _projections(
    x: Tensor,
    w: AttentionWeights,
    num_heads: int,
    dropout_p: float,
    eps: float,
    backends: HalfBackends,
    index: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, Nq, P, M, D), k and v (B, N, P, M, D) of LN(x): one product where nothing parts them."""
    if backends.qkv is not None and w.norm_weight is not None and index is None and not dropout_p:
        norm, projection = (w.norm_weight, w.norm_bias), (w.qkv_weight, w.qkv_bias)
        qkv = lora_qkv.run(x, norm, projection, w.lora_q, w.lora_v, eps, backends.qkv)
        return _heads(qkv, num_heads)
    dtype = autocast_dtype(x) or x.dtype
    if w.norm_weight is None:
        z = x.to(dtype)
    else:
        z = row_norm.run(x, w.norm_weight, w.norm_bias, eps, dtype, backends.norm)
    if index is None and w.lora_q is None and w.lora_v is None:
        return _heads(_linear(z, w.qkv_weight, w.qkv_bias, None, dropout_p, backends), num_heads)
    weights = w.qkv_weight.chunk(3)
    biases = (None, None, None) if w.qkv_bias is None else w.qkv_bias.chunk(3)
    loras = (w.lora_q, None, w.lora_v)
    inputs = (_pick(z, index), z, z)
    q, k, v = (
        _linear(part, weight, bias, lora, dropout_p, backends).unflatten(-1, (num_heads, -1))
        for part, weight, bias, lora in zip(inputs, weights, biases, loras, strict=True)
    )
    return q, k, v


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of qkv (B, N, P, 3C): the attentions read through strides."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(3)
    return q, k, v


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None, dropout_p: float, backends: HalfBackends
) -> Tensor:  # fmt: skip
    backend = backends.dense if lora is None else backends.lora
    return lora_linear.run(x, weight, bias, lora, dropout_p, backend)


def _project(
    o: Tensor, w: AttentionWeights, residual: Tensor | None, dtype: torch.dtype, backends: HalfBackends
) -> Tensor:
    """FC over the joined heads, o (B, Nq, P, M, D) -> (B, Nq, P, C) in `dtype`, plus the residual."""
    y = _linear(o.flatten(3), w.out_weight, w.out_bias, None, 0.0, backends).to(dtype)
    return y if residual is None else residual + y


def _pick(x: Tensor, index: list[int] | None) -> Tensor:
    """x[:, index] of x (B, N, P, C): a view if `index` is consecutive, a copy otherwise. None gives x itself."""
    if index is None:
        return x
    if index == list(range(index[0], index[0] + len(index))):
        return x[:, index[0] : index[0] + len(index)]
    return x[:, index]


def _checked_index(query_index: Sequence[int], slices: int) -> list[int]:
    if not isinstance(query_index, Iterable):
        raise ValueError(f"axial_fusion_attention: query_index must be a list of slices, found {query_index}")
    index = [i.item() if hasattr(i, "item") else i for i in query_index]
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in index)
    if not index or not whole or not all(0 <= i < slices for i in index):
        raise ValueError(
            f"axial_fusion_attention: query_index is {index}, but x has the slices 0 to {slices - 1}"
        )
    return index


def _check(
    x: Tensor, inter: AttentionWeights | None, intra: AttentionWeights | None, num_heads: int, dropout_p: float
) -> None:  # fmt: skip
    check_dense("axial_fusion_attention: x", x)
    if x.dim() not in (4, 5):
        raise ValueError(
            f"axial_fusion_attention: x must be (B, N, P, C) or (B, N, H', W', C), found shape {tuple(x.shape)}"
        )
    if inter is None and intra is None:
        raise ValueError("axial_fusion_attention: inter and intra are both None; nothing is left to compute")
    check_alike("axial_fusion_attention", x=x)
    check_whole("axial_fusion_attention", num_heads=num_heads)
    channels = x.shape[-1]
    if channels % num_heads:
        raise ValueError(f"axial_fusion_attention: num_heads is {num_heads}, but must divide C = {channels}")
    for name, weights in (("inter", inter), ("intra", intra)):
        if weights is not None:
            _check_half(name, weights, x, dropout_p)


def _check_half(name: str, w: AttentionWeights, x: Tensor, dropout_p: float) -> None:
    channels, device = x.shape[-1], x.device
    cast = autocast_dtype(x) is not None
    square, vector = (channels, channels), (channels,)
    shapes = ((3 * channels, channels), (3 * channels,), square, vector, vector, vector)
    if w.norm_weight is None and w.norm_bias is not None:
        raise ValueError(f"axial_fusion_attention: {name}.norm_bias is given, but norm_weight is None")
    for i, (tensor, shape) in enumerate(zip(w[:6], shapes, strict=True)):
        what = f"axial_fusion_attention: {name}.{w._fields[i]}"
        if tensor is None and i not in (0, 2):
            continue
        check_dense(what, tensor)
        assert tensor is not None
        if tensor.shape != shape:
            raise ValueError(f"{what} must be {shape} for C = {channels}, found shape {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{what} is on {tensor.device} but x is on {device}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{what} must be floating point, found {dtype_name(tensor.dtype)}")
        if i < 4 and not cast and tensor.dtype != x.dtype:  # the norm's weights may be wider
            raise ValueError(
                f"{what} is {dtype_name(tensor.dtype)} but x is {dtype_name(x.dtype)}; cast one of them"
            )
    for key in ("lora_q", "lora_v"):
        lora = getattr(w, key)
        if lora is not None:
            _check_lora(f"{name}.{key}", lora, x, dropout_p)


def _check_lora(name: str, lora: LoRA, x: Tensor, dropout_p: float) -> None:
    channels, rank = x.shape[-1], lora.a.shape[0]
    if lora.a.shape != (rank, channels) or lora.b.shape != (channels, rank):
        raise ValueError(
            f"axial_fusion_attention: {name} must be a (r, C) and b (C, r) with C = {channels}, "
            f"found {tuple(lora.a.shape)} and {tuple(lora.b.shape)}"
        )
    check_alike("axial_fusion_attention", **{f"{name}.a": lora.a, f"{name}.b": lora.b})
    if lora.a.device != x.device:
        raise ValueError(f"axial_fusion_attention: {name}.a is on {lora.a.device} but x is on {x.device}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"axial_fusion_attention: dropout_p must lie in [0, 1), found {dropout_p}")
