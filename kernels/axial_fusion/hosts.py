"""Attentions of other libraries that can be taken over: classes, where their weights are, and what prevents it.

A class is known by its module and name, as long as its forward is its own. Every parameter, buffer, child and
attribute of a known class is checked: it must be a projection, or be unable to change the result, or hold the value at
which it has no effect. Anything else is refused by name, so that an attention of another release is refused instead of
taken over wrongly."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

_HUGGING_FACE = {
    "ViTAttention": "vit",
    "DeiTAttention": "deit",
    "ViTMAEAttention": "vit_mae",
    "ViTMSNAttention": "vit_msn",
    "IJepaAttention": "ijepa",
    "VivitAttention": "vivit",
    "Dinov2Attention": "dinov2",
    "Dinov2WithRegistersAttention": "dinov2_with_registers",
    "CLIPAttention": "clip",
    "SiglipAttention": "siglip",
    "SamVisionAttention": "sam",
    "SamVisionSdpaAttention": "sam",
}
_KNOWN = {
    "torch.nn.modules.activation.MultiheadAttention",
    "timm.layers.attention.Attention",
    "timm.models.vision_transformer.Attention",  # where timm kept it before 1.0.16
    "timm.models.vision_transformer_sam.Attention",
    "segment_anything.modeling.image_encoder.Attention",
    "monai.networks.blocks.selfattention.SABlock",
    "diffusers.models.attention_processor.Attention",
    *(f"transformers.models.{m}.modeling_{m}.{name}" for name, m in _HUGGING_FACE.items()),
}
_QKV = (("qkv",), ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"))
_OUT = ("proj", "o_proj", "out_proj", "to_out")
_HEADS = ("num_heads", "num_attention_heads", "heads")

# Pre-norm blocks: where their norm and their attention are.
_BLOCKS = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("norm1", "self_attn"),
    "timm.models.vision_transformer.Block": ("norm1", "attn"),
    "timm.models.vision_transformer_sam.Block": ("norm1", "attn"),
    "segment_anything.modeling.image_encoder.Block": ("norm1", "attn"),
    "monai.networks.blocks.transformerblock.TransformerBlock": ("norm1", "attn"),
    "torchvision.models.vision_transformer.EncoderBlock": ("ln_1", "self_attention"),
    "transformers.models.vit.modeling_vit.ViTLayer": ("layernorm_before", "attention"),
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer": ("layer_norm1", "self_attn"),
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": ("layer_norm1", "self_attn"),
    "transformers.models.sam.modeling_sam.SamVisionLayer": ("layer_norm1", "attn"),
}
_NORMS = {"torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"}
_LINEARS = {
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",  # nn.MultiheadAttention.out_proj
}

# Attributes by the values they may hold. Sizes that are not listed may be anything: weights' shapes are checked.
_CHANNELS = {
    "attn_dim", "embed_dim", "inner_dim", "inner_kv_dim", "query_dim", "out_dim", "kdim", "vdim", "hidden_input_size",
    "cross_attention_dim",
}  # fmt: skip
_HEAD_DIM = {"head_dim", "dim_head"}
_FREE = {
    "input_size", "sequence_length", "out_context_dim", "use_bias", "sliceable_head_dim", "fused_attn", "batch_first",
    "use_flash_attention", "use_combined_linear", "added_proj_bias", "out_rearrange", "_from_deprecated_attn_block",
    *_HEADS,
}  # fmt: skip
_TRAINING_ONLY = {
    "attn_drop", "proj_drop", "dropout", "dropout1", "attention_dropout", "drop_output", "drop_weights", "dropout_rate",
    "drop_path1",
}  # fmt: skip
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "_qkv_same_embed_dim": (True,), "include_fc": (True,), "scale_qk": (True,), "rescale_output_factor": (1.0,),
    "norm_first": (True,), "window_size": (0,), "_fast_norm": (False,),
}  # fmt: skip
_ABSENT = {
    "q_norm", "k_norm", "norm", "gate", "rope", "use_rel_pos", "bias_k", "bias_v", "add_zero_attn", "is_causal",
    "causal", "causal_mask", "save_attn", "att_mat", "attention_dtype", "rel_positional_embedding",
    "is_cross_attention", "upcast_attention", "upcast_softmax", "residual_connection", "fused_projections",
    "context_pre_only", "pre_only", "added_kv_proj_dim", "only_cross_attention", "group_norm", "spatial_norm",
    "norm_q", "norm_k", "norm_cross", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q",
    "norm_added_k", "q_proj_weight", "k_proj_weight", "v_proj_weight", "ls1", "with_cross_attention",
}  # fmt: skip
_BESIDE = {  # parts of a block that lie after its attention
    "norm2", "mlp", "ls2", "drop_path2", "linear1", "linear2", "dropout2", "activation", "activation_relu_or_gelu",
    "ln_2", "layernorm_after", "layer_norm2", "norm_cross_attn", "cross_attn", "gradient_checkpointing",
}  # fmt: skip
_IMPLEMENTATIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
_REARRANGED = ("b h (qkv l d) -> qkv b l h d", "b h (l d) -> b l h d")
Part = tuple[Tensor, Tensor | None]  # weight and bias of a linear layer or a norm
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERY_MODULE = {*vars(nn.Module()), "_compiled_call_impl", "_is_full_backward_hook", "_is_hf_initialized"}

# Keywords of hosts' calls that choose extra results or an implementation and never change the output.
_IGNORED = {"average_attn_weights", "num_items_in_batch", "output_hidden_states", "return_dict", "use_cache"}
_SELF = {"key", "value", "encoder_hidden_states"}


@dataclass(frozen=True)
class HostCall:
    """How a host calls its attention: argument order, batch axis, and whether it expects a pair."""

    arguments: tuple[str, ...] = ("x", "query_index")
    batch_first: bool = True
    pair: bool = False
    num_slices: int | None = None  # the batch holds groups of this many slices; None: tokens are (B, N, ...)

    def to_slices(self, x: Tensor) -> Tensor:
        """The host's tokens as (B, N, ...)."""
        slices = self.num_slices
        if slices is None:
            if x.dim() == 3:
                raise ValueError(
                    f"AxialFusionAttention: x must be (B, N, P, C), found shape {tuple(x.shape)}; where the host has"
                    " (B·N, P, C), give from_attention num_slices"
                )
            return x
        x = x if self.batch_first else x.transpose(0, 1)
        if x.dim() not in (3, 4) or x.shape[0] % slices:
            raise ValueError(
                f"AxialFusionAttention: x must be (B·N, P, C) or (B·N, H', W', C) with N = num_slices = {slices},"
                f" found shape {tuple(x.shape)}"
            )
        return x.unflatten(0, (-1, slices))

    def from_slices(self, y: Tensor) -> Tensor:
        """The inverse of `to_slices`."""
        if self.num_slices is None:
            return y
        y = y.flatten(0, 1)
        return y if self.batch_first else y.transpose(0, 1)

    def returns_pair(self, alone: bool) -> bool:
        """Whether the host expects (output, None). Hosts of MultiheadAttention do, and always pass a key as well."""
        return self.pair and not (alone and "value" in self.arguments)


@dataclass(frozen=True)
class AttentionParts:
    """The weights and settings that are taken over from an attention."""

    heads: int
    qkv: Sequence[Part]  # weight and bias of one fused layer, or of q, k and v
    out: Part
    call: HostCall
    training: bool
    training_only: str  # the host's dropout, described; empty if it has none


def attention_parts(attention: nn.Module, num_slices: int | None = None) -> AttentionParts:
    """The parts of a known 2D attention. Raises ValueError, naming what is in the way, for every other."""
    if num_slices is not None and num_slices < 1:
        raise ValueError(f"num_slices is {num_slices}, but must be 1 or more")
    base = known_base(attention, _KNOWN, "an attention that from_attention knows")
    kind = type(attention).__name__
    if isinstance(attention, nn.MultiheadAttention):
        names: tuple[str, ...] = ("in_proj_weight", "in_proj_bias")
        if not attention._qkv_same_embed_dim:
            raise ValueError(f"{kind} has keys or values of another size than its queries")
        qkv: list[Part] = [(attention.in_proj_weight, attention.in_proj_bias)]
    else:
        there = [
            n for n in _QKV if hasattr(attention, n[0]) and type(getattr(attention, n[0])) is not nn.Identity
        ]
        names = there[0] if there else _QKV[0]
        qkv = [plain_linear(attention, name) for name in names]
    out_name = next((name for name in _OUT if hasattr(attention, name)), _OUT[0])
    out = plain_linear(attention, out_name)
    heads = head_count(attention)
    check_weights(kind, qkv, out, heads)
    skipped = account(attention, {*names, out_name}, sizes=(out[0].shape[0], heads))
    return AttentionParts(heads, qkv, out, _call(attention, base, num_slices), attention.training, skipped)


def block_parts(block: nn.Module) -> tuple[AttentionParts, nn.LayerNorm]:
    """The parts of a known pre-norm block's attention, and its norm. Raises ValueError for every other."""
    base = known_base(block, _BLOCKS, "a pre-norm block (norm1, attn) that from_block knows")
    norm_name, attention_name = _BLOCKS[full_name(base)]
    norm, parts = getattr(block, norm_name), attention_parts(getattr(block, attention_name))
    channels, dtype = parts.out[0].shape[0], parts.out[0].dtype
    skipped = account(block, {norm_name, attention_name, *_BESIDE}, sizes=(channels, parts.heads))
    known_base(norm, _NORMS, f"the affine nn.LayerNorm that {norm_name} must be")
    account(norm, {"weight", "bias", "normalized_shape", "eps", "elementwise_affine"}, sizes=(channels, 1))
    if norm.weight is None or norm.weight.shape != (channels,) or norm.weight.dtype != dtype:
        raise ValueError(f"{norm_name} must be an affine nn.LayerNorm over C = {channels} in {dtype}")
    both = ", ".join(filter(None, (skipped, parts.training_only)))
    return replace(parts, call=HostCall(), training=block.training, training_only=both), norm


def self_attention_input(
    call: HostCall, x: Tensor | None, others: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[Tensor, Sequence[int] | None]:
    """The tokens and query_index of a host's call. Raises ValueError, by name, for what would change the result."""
    if len(others) >= len(call.arguments):
        raise TypeError(
            f"AxialFusionAttention takes {', '.join(call.arguments)}, but was given {len(others) + 1} arguments"
        )
    given = {**dict(zip(call.arguments[1:], others, strict=False)), **keywords}
    x = given.pop(call.arguments[0], None) if x is None else x
    if x is None:
        raise TypeError(f"AxialFusionAttention needs its tokens, {call.arguments[0]}")
    query_index = given.pop("query_index", None)
    for name, value in given.items():
        if not (value is None or value is False or name in _IGNORED or (name in _SELF and value is x)):
            raise ValueError(
                f"AxialFusionAttention: {name} is set, but must be left out: this is self-attention without masks that"
                " returns no weights; axial_fusion.lift keeps the host's own attention"
            )
    return x, query_index


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def known_base(module: nn.Module, known: Any, what: str) -> type:
    """The known class whose forward `module` runs, unchanged, or ValueError."""
    kind = type(module)
    bases = kind.__mro__
    index = next((i for i, base in enumerate(bases) if full_name(base) in known), None)
    if index is None:
        raise ValueError(f"{full_name(kind)} is not {what}; axial_fusion.lift keeps the host's own attention")
    base = bases[index]
    for derived in bases[:index]:
        own = [
            name for name in vars(derived) if not name.startswith("__") or name in ("__call__", "__getattr__")
        ]
        if own:
            raise ValueError(
                f"{full_name(kind)} changes {own[0]!r} of {full_name(base)}, which is the one that is known"
            )
    forward = inspect.getattr_static(base, "forward")
    written_in = getattr(forward, "__globals__", {}).get("__name__", "")
    if (
        written_in.split(".")[0] != base.__module__.split(".")[0]
        or forward.__qualname__ != f"{base.__qualname__}.forward"
    ):
        raise ValueError(f"{full_name(base)}.forward was replaced by one of {written_in}, which is not known")
    return base


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters, buffers, children and instance attributes, without those that every nn.Module has."""
    for table in (module._parameters, module._buffers, module._modules):
        yield from table.items()
    yield from ((name, value) for name, value in vars(module).items() if name not in _EVERY_MODULE)


def account(module: nn.Module, known: set[str], sizes: tuple[int, int]) -> str:
    """Check every attribute except the `known`; returns a description of what acts in training only.

    `sizes` are C and the heads. Raises ValueError naming what changes the result."""
    kind, skipped, (channels, heads) = type(module).__name__, [], sizes
    _check_hooks(kind, module)
    for name, value in _attributes(module):
        if name in known or name in _FREE:
            continue
        if isinstance(value, nn.Module):
            _check_hooks(f"{kind}.{name}", value)
        if name in _TRAINING_ONLY:
            rate = _dropout(kind, name, value)
            # MONAI's, in evaluation too
            always = name == "dropout_rate" and getattr(module, "use_flash_attention", False)
            if rate and (module.training or always):
                raise ValueError(f"{kind} has dropout of {rate} in {name!r}, which this op does not")
            skipped += [f"{name} ({rate})"] if rate else []
        elif name in ("scale", "scaling"):
            expected = (channels // heads) ** -0.5
            if not (isinstance(value, float) and math.isclose(value, expected, rel_tol=1e-6)):
                raise ValueError(
                    f"{kind} has a {name} of {_shown(value)}, but must have head_dim^-½ = {expected:.4g}"
                )
        else:
            size = channels if name in _CHANNELS else channels // heads if name in _HEAD_DIM else None
            allowed = _MUST_BE.get(name, (size,))
            if (size is not None or name in _MUST_BE) and value not in allowed:
                raise ValueError(f"{kind} has {name} = {_shown(value)}, but must have {allowed[0]}")
            if size is None and name not in _MUST_BE and not _changes_nothing(name, value):
                raise ValueError(f"{kind} has {name!r} ({_shown(value)}), which this op does not compute")
    return ", ".join(skipped)


def _changes_nothing(name: str, value: Any) -> bool:
    """Whether an attribute is known and holds the value with which it has no influence."""
    if name == "config":  # transformers: which function computes the attention
        return getattr(value, "_attn_implementation", None) in _IMPLEMENTATIONS
    if name == "processor":  # diffusers
        return type(value).__name__ in _PROCESSORS and not vars(value)
    if name == "input_rearrange":  # MONAI
        return getattr(value, "pattern", None) in _REARRANGED
    if type(value) is nn.Identity:
        return name in _ABSENT or any(name in names for names in _QKV)
    if isinstance(value, Tensor):
        return name in _ABSENT and not value.numel()
    return name in _ABSENT and (value is None or value is False)


def _dropout(kind: str, name: str, value: Any) -> float:
    """The rate of a dropout or a stochastic depth, module or number."""
    if isinstance(value, (int, float)):
        return float(value)
    if type(value) is nn.Identity:
        return 0.0
    rate = getattr(value, "p", getattr(value, "drop_prob", None))
    if type(value).__name__ not in ("Dropout", "DropPath") or not isinstance(rate, (int, float)):
        raise ValueError(f"{kind} has {name!r} ({_shown(value)}), which is not a dropout that is known")
    return float(rate)


def plain_linear(attention: nn.Module, name: str) -> Part:
    """Weight and bias of a plain linear layer, the first of `to_out`, or ValueError."""
    kind = type(attention).__name__
    layer: Any = getattr(attention, name, None)
    if isinstance(layer, nn.ModuleList):  # diffusers: a linear layer and a dropout
        if len(layer) != 2 or type(layer[1]) is not nn.Dropout or layer[1].p != attention.dropout:
            raise ValueError(f"{kind}.{name} must be a linear layer and a dropout of {attention.dropout}")
        _check_hooks(f"{kind}.{name}", layer[1])
        layer = layer[0]
    if layer is None:
        raise ValueError(f"{kind} has no {name!r}, a linear layer that from_attention needs")
    if full_name(type(layer)) not in _LINEARS:
        raise ValueError(f"{kind}.{name} is {type(layer).__name__}, but must be a plain nn.Linear")
    _check_hooks(f"{kind}.{name}", layer)
    for part, value in _attributes(layer):
        if part not in ("in_features", "out_features", "weight", "bias"):
            raise ValueError(f"{kind}.{name} has {part!r} ({_shown(value)}), but must be a plain nn.Linear")
    return layer.weight, layer.bias


def head_count(attention: nn.Module) -> int:
    """The number of heads, whatever the attribute is called; 0 if there is none."""
    return next((getattr(attention, name) for name in _HEADS if hasattr(attention, name)), 0)


def _check_hooks(kind: str, module: nn.Module) -> None:
    for name in _HOOKS:
        for hook in getattr(module, name).values():
            shown = getattr(hook, "__qualname__", type(hook).__name__)
            raise ValueError(
                f"{kind} has a hook ({shown} in {name}), which this op would not run; remove it first"
            )


def check_weights(kind: str, qkv: Sequence[Part], out: Part, heads: int) -> None:
    """Raises ValueError unless all weights are there: plain parameters, C to C channels, of one dtype and device."""
    channels, first = out[0].shape[0], out[0]
    for t in (t for pair in (*qkv, out) for t in pair if t is not None):
        if type(t) is not nn.Parameter or not t.dtype.is_floating_point:
            raise ValueError(
                f"{kind} has weights of {type(t).__name__}, {t.dtype}, but must have plain parameters"
            )
        if t._backward_hooks or t._post_accumulate_grad_hooks:
            raise ValueError(
                f"{kind} has a hook on a parameter, which this op would not run; remove it first"
            )
        if t.device.type == "meta":
            raise ValueError(f"{kind} has weights on the meta device; load them first")
        if t.dtype != first.dtype or t.device != first.device:
            raise ValueError(
                f"{kind} has weights of {t.dtype} on {t.device} beside {first.dtype} on {first.device}"
            )
    rows = [3 * channels] if len(qkv) == 1 else [channels] * 3
    weights = [*(weight for weight, _ in qkv), out[0]]
    if [tuple(w.shape) for w in weights] != [(r, channels) for r in (*rows, channels)]:
        found = ", ".join("×".join(map(str, w.shape)) for w in weights)
        raise ValueError(f"{kind} has projections of {found}; q, k, v and output must each keep C")
    if not isinstance(heads, int) or heads < 1 or channels % heads:
        raise ValueError(f"{kind} has {_shown(heads)} heads, but they must divide C = {channels}")
    if len({weight.requires_grad for weight, _ in qkv}) > 1:
        raise ValueError(f"{kind} has some of q, k and v frozen; freeze all three or none")


def _call(attention: nn.Module, base: type, num_slices: int | None) -> HostCall:
    """How the host calls this attention, by the signature of its known forward."""
    skip = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    _, *parameters = inspect.signature(base.forward).parameters.values()  # type: ignore[attr-defined]  # every class of modules has a forward
    return HostCall(
        arguments=tuple(p.name for p in parameters if p.kind not in skip),
        batch_first=getattr(attention, "batch_first", True),
        pair=base is nn.MultiheadAttention or base.__module__.startswith("transformers."),
        num_slices=num_slices,
    )


def _shown(value: Any) -> str:
    if isinstance(value, (bool, int, float, str)) or value is None:
        return str(value)
    return type(value).__name__ if not isinstance(value, torch.Tensor) else f"{tuple(value.shape)}"
