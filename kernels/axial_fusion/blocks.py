"""Finds the blocks of a 2D transformer and the argument that holds their tokens: known types, and a rule for the rest.

A block is a module with a norm and exactly one attention among its children; its first argument is the tokens. What
differs stands in the tables. Names of types are compared, so that no library is imported."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch import nn

from .adapters import Projection, find_projections, type_names

# (B·N, P, C) or (B·N, H', W', C) · (P, B·N, C) · (B·P, N, C): the frames of one position are a row
Layout = Literal["slices", "sequence first", "positions"]

# Blocks that also attend to other tokens: the name of the child that attends within a row.
_SELF_ATTENTION = {
    "monai.networks.blocks.transformerblock.TransformerBlock": "attn",
    "diffusers.models.attention.BasicTransformerBlock": "attn1",
    "diffusers.models.attention.TemporalBasicTransformerBlock": "attn1",
}
_POSITION_MAJOR = frozenset({  # parents whose blocks see positions as rows
    "diffusers.models.transformers.transformer_temporal.TransformerTemporalModel",
    "diffusers.models.unets.unet_motion_model.AnimateDiffTransformer3D",
})  # fmt: skip
_VIDEO = _POSITION_MAJOR | {"diffusers.models.attention.TemporalBasicTransformerBlock"}
_HEADS = ("num_heads", "num_attention_heads", "heads", "nhead")
_PREFIX = re.compile(r"(^|[._])(cls|class|dist|distillation|reg|register|storage)_?(tokens?|embedding)$")


class Block(NamedTuple):
    """A block that can be lifted."""

    module: nn.Module
    dim: int  # C of the tokens that it takes
    heads: int
    layout: Layout
    argument: str  # the name of its first argument, the tokens
    norm: nn.Module | None  # whether its norm comes before its attention or after
    projections: dict[str, Projection] | None


def find_blocks(model: nn.Module) -> dict[str, Block]:
    """Name -> block, in the model's order; the model itself, "", where it is one block or one attention."""
    found = {name: block for name, block in _walk(model, "", "slices")}
    if not found and _is_attention(model):
        if "Window" in type(model).__name__:
            raise ValueError(
                f"lift: {type(model).__name__} gets windows, which are not slices; lift the block that it is in"
            )
        found[""] = _describe(model, model, "slices")
    return found


def takes_video(model: nn.Module) -> bool:
    """Whether the model has layers that attend over frames; such a model arranges its frames itself."""
    return any(type_names(module) & _VIDEO for module in model.modules())


def attention_names(model: nn.Module) -> list[str]:
    """The attentions of a model, whether or not a block is known around them."""
    return [name for name, module in model.named_modules() if _is_attention(module)]


def count_prefix_tokens(model: nn.Module, block: str) -> int:
    """Class and register tokens in front of the positions: those of the nearest module around the block that has any.

    They are recognised by the names of their parameters."""
    parts = block.split(".")
    for end in range(len(parts) - 1, -1, -1):
        around = model.get_submodule(".".join(parts[:end]))
        tokens = [p for name, p in around.named_parameters() if _PREFIX.search(name)]
        if tokens:
            return sum(p.shape[1] if p.dim() == 3 else 1 for p in tokens)
    return 0


def _walk(module: nn.Module, name: str, layout: Layout) -> Iterator[tuple[str, Block]]:
    attention = _attention_of(module)
    if attention is not None:
        yield name, _describe(module, attention, layout)
        return
    if type_names(module) & _POSITION_MAJOR:
        layout = "positions"
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, layout)


def _attention_of(module: nn.Module) -> nn.Module | None:
    """The attention within a row of a block; None for a module that is not one."""
    for known in type_names(module) & _SELF_ATTENTION.keys():
        return getattr(module, _SELF_ATTENTION[known])
    if _first_norm(module) is None or "Pool" in type(module).__name__:
        return None
    inside = list(_outermost_attentions(module))
    if len(inside) == 1 and any(child is inside[0] for child in module.children()):
        return inside[0]
    return None


def _outermost_attentions(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _is_attention(child):
            yield child
        else:
            yield from _outermost_attentions(child)


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention: by its class name, or by its heads and projections.

    A block that is named after its attention is not one."""
    named = re.search(r"attention|attn", type(module).__name__, re.IGNORECASE)
    if not named and not (_heads_of(module) and find_projections(module, inside=False)):
        return False
    return _first_norm(module) is None or not list(_outermost_attentions(module))


def _first_norm(module: nn.Module) -> nn.Module | None:
    return next((child for child in module.children() if "Norm" in type(child).__name__), None)


def _heads_of(module: nn.Module) -> int | None:
    found = (getattr(module, name, None) for name in _HEADS)
    return next((heads for heads in found if isinstance(heads, int) and heads > 0), None)


def _describe(module: nn.Module, attention: nn.Module, layout: Layout) -> Block:
    norm, projections = _first_norm(module), find_projections(attention)
    dim = _width(attention, norm, projections)
    if dim is None:
        raise ValueError(f"lift: the width of the tokens of {type(module).__name__} is not known")
    heads = next(filter(None, map(_heads_of, attention.modules())), None)
    if heads is None or dim % heads:
        heads = next(h for h in range(max(1, dim // 32), 0, -1) if dim % h == 0)
    if layout == "slices" and getattr(attention, "batch_first", True) is False:
        layout = "sequence first"
    argument = next(iter(inspect.signature(module.forward).parameters))
    return Block(module, dim, heads, layout, argument, norm, projections)


def _width(
    attention: nn.Module, norm: nn.Module | None, projections: dict[str, Projection] | None
) -> int | None:
    if projections is not None:
        return projections["q"].weight.shape[1]
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.dim() == 1:
        return int(weight.numel())
    fused = getattr(attention, "qkv", None)
    return fused.in_features if isinstance(fused, nn.Linear) else None
