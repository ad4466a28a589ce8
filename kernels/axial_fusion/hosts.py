"""Attention of other libraries: which classes are known, and where their parts are."""

from __future__ import annotations

from typing import Any

from torch import nn


def attention_parts(attention: nn.Module) -> tuple[nn.Linear, nn.Linear, int]:
    """Fused q, k, v projection, output projection and heads of a 2D attention, or ValueError."""
    kind = type(attention).__name__
    if isinstance(attention, nn.MultiheadAttention):
        if not attention._qkv_same_embed_dim:
            raise ValueError(f"{kind} has keys or values of another size than its queries")
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(f"{kind} adds keys of its own (add_bias_kv or add_zero_attn)")
        if attention.dropout:
            raise ValueError(f"{kind} has attention dropout of {attention.dropout}, which this op does not")
        qkv = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, device="meta")
        qkv.weight = attention.in_proj_weight
        qkv.bias = attention.in_proj_bias
        return qkv, _plain_linear(attention.out_proj, kind, "out_proj"), attention.num_heads
    for name in ("qkv", "proj", "num_heads"):
        if not hasattr(attention, name):
            raise ValueError(
                f"{kind} has no {name!r}; from_attention takes timm's, SAM's or nn.MultiheadAttention"
            )
    for name in ("q_norm", "k_norm", "norm"):
        part = getattr(attention, name, None)
        if part is not None and not isinstance(part, nn.Identity):
            raise ValueError(
                f"{kind} has {name!r}, a norm of queries, keys or outputs, which this op does not"
            )
    for name in ("rope", "rotary_emb", "pos_embed"):
        if getattr(attention, name, None) is not None:
            raise ValueError(f"{kind} has {name!r}, a rotary position embedding, which this op does not")
    for name in ("rel_pos_h", "relative_position_bias_table", "rel_pos"):
        if getattr(attention, name, None) is not None:
            raise ValueError(f"{kind} has {name!r}: relative positions; use rel_pos_attention for SAM's")
    for name in ("attn_drop", "proj_drop"):
        part = getattr(attention, name, None)
        if isinstance(part, nn.Dropout) and part.p:
            raise ValueError(f"{kind} has dropout of {part.p} in {name!r}, which this op does not")
    qkv, proj = (_plain_linear(getattr(attention, name), kind, name) for name in ("qkv", "proj"))
    if qkv.out_features != 3 * qkv.in_features or proj.in_features != qkv.in_features:
        raise ValueError(
            f"{kind} projects {qkv.in_features} to {qkv.out_features}; q, k and v must each keep C"
        )
    return qkv, proj, int(attention.num_heads)


def _plain_linear(layer: Any, kind: str, name: str) -> nn.Linear:
    """`layer`, or ValueError where it is not nn.Linear itself: quantised, or wrapped by an adapter."""
    if type(layer) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError(f"{kind}.{name} is {type(layer).__name__}, but must be a plain nn.Linear")
    if not layer.weight.dtype.is_floating_point:
        raise ValueError(
            f"{kind}.{name} has weights of {layer.weight.dtype}: quantised layers cannot be taken over"
        )
    return layer
