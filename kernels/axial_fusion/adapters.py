"""LoRA in place: on the query and value projections of attentions that belong to other libraries.

The projection stays the module that it was, its parameters keep their names, and A and B stand beside them. Hosts that
call the layer get y = x Wᵀ + bias + (x Aᵀ) Bᵀ · scaling; hosts that read its weight get W + scaling · B A.
Source: LoRA, arXiv 2106.09685."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .lora import LoRAUpdates, unmerge_what_was_loaded

_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("to_q", "to_k", "to_v"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
# Attentions whose fused `qkv` has rows of q, then k, then v. Other orders exist: TinyViT's rows go head by head.
_FUSED = frozenset({
    "axial_fusion.sam.SamAttention",
    "dinov2.layers.attention.Attention", "dinov2.layers.attention.MemEffAttention",
    "monai.networks.blocks.selfattention.SABlock", "monai.networks.nets.swin_unetr.WindowAttention",
    "segment_anything.modeling.image_encoder.Attention", "aftersam.model._segment_anything.image_encoder.Attention",
    "timm.layers.attention.Attention", "timm.layers.attention.AttentionRope", "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention", "timm.models.mvitv2.MultiScaleAttention",
    "timm.models.swin_transformer.WindowAttention", "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.vision_transformer_relpos.RelPosAttention", "timm.models.vision_transformer_sam.Attention",
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "transformers.models.sam.modeling_sam.SamVisionAttention",
    "transformers.models.sam2.modeling_sam2.Sam2MultiScaleAttention",
})  # fmt: skip


class Projection(NamedTuple):
    """Some rows of a module's weight: q, k or v of an attention."""

    module: nn.Module
    first: int
    last: int  # exclusive

    @property
    def weight(self) -> Tensor:
        return self.module._parameters[_weight_name(self.module)][self.first : self.last]  # type: ignore[index]  # a weight is never None

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, _weight_name(self.module).replace("weight", "bias"))
        return None if bias is None else bias[self.first : self.last]


def type_names(module: nn.Module) -> set[str]:
    """The dotted names of a module's class and of the classes it derives from."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}


def find_projections(attention: nn.Module, *, inside: bool = True) -> dict[str, Projection] | None:
    """The projections "q", "k" and "v" of an attention or of a child `inside` it; None where they are not known."""
    for module in attention.modules() if inside else [attention]:
        if type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim:
            return _thirds(module, 3 * module.embed_dim)
        fused: Any = getattr(module, "qkv", None)
        if type(fused) in _LINEAR and type_names(module) & _FUSED and fused.out_features % 3 == 0:
            return _thirds(fused, fused.out_features)
        for names in _SEPARATE:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(layer) in _LINEAR for layer in layers):
                return {
                    part: Projection(layer, 0, layer.out_features)
                    for part, layer in zip("qkv", layers, strict=True)
                }
    return None


def _thirds(module: nn.Module, rows: int) -> dict[str, Projection]:
    third = rows // 3
    return {part: Projection(module, i * third, (i + 1) * third) for i, part in enumerate("qkv")}


def _weight_name(module: nn.Module) -> str:
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


class LoRAInPlace(LoRAUpdates):
    """A host's projection with LoRA: the same module object, its class replaced by a subclass of its class."""

    rows: dict[str, tuple[int, int]]  # part -> its rows of the weight
    host_class: type[nn.Module]

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]  # a property in the place of an attribute
        return tuple(self.rows)

    def base_weight(self) -> Tensor:
        """W as it is stored: with the update where it is merged, else without."""
        weight = self._parameters[self.weight_name]
        assert weight is not None
        return self.through(weight) if self.merged else weight

    def updated_weights(self) -> dict[str, Tensor]:
        """The weight rows that have an update: q and v of a fused projection, else the module's own."""
        base = self._parameters[self.weight_name]
        assert base is not None
        return {part: base[first:last] for part, (first, last) in self.rows.items()}

    def joined(self) -> tuple[Tensor, Tensor]:
        """All updates as one: A (parts · r, in) and B (out, parts · r), zero for rows without an update."""
        updates = [self.lora(part) for part in self.rows]
        out, rank = self.base_weight().shape[0], updates[0].a.shape[0]
        placed = [
            F.pad(update.b, (i * rank, (len(updates) - 1 - i) * rank, first, out - last))
            for i, (update, (first, last)) in enumerate(zip(updates, self.rows.values(), strict=True))
        ]
        b = placed[0] if len(placed) == 1 else placed[0] + placed[1]
        return torch.cat([update.a for update in updates]), b

    def updated_weight(self) -> Tensor:
        """W + scaling · B A, computed in fp32 or better and rounded once."""
        base = self.base_weight()
        if self.merged:
            return base
        a, b = self.joined()
        wide = torch.promote_types(base.dtype, torch.float32)
        return (base.to(wide) + self.scaling * (b.to(wide) @ a.to(wide))).to(base.dtype)


class LoRAInPlaceLinear(LoRAInPlace, nn.Linear):
    """nn.Linear with LoRA on some of its rows; B = 0 gives the layer's own output to the bit."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a property in the place of an attribute
        return self.updated_weight()

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.base_weight(), self.bias)
        if self.merged:
            return y
        a, b = self.joined()
        xa = F.linear(x, a)
        return torch.addmm(y.flatten(0, -2), xa.flatten(0, -2), b.t(), alpha=self.scaling).view(y.shape)


class LoRAInPlaceAttention(LoRAInPlace, nn.MultiheadAttention):
    """nn.MultiheadAttention with LoRA on q and v. Its functional form and its fast path read the updated weight."""

    weight_name = "in_proj_weight"

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]  # a property in the place of an attribute
        return self.updated_weight()


def add_lora(projections: dict[str, Projection], rank: int, alpha: float | None) -> list[LoRAInPlace]:
    """Put LoRA on q and v, and return the modules that now have it."""
    rows: dict[nn.Module, dict[str, tuple[int, int]]] = {}
    for part in "qv":
        module, first, last = projections[part]
        rows.setdefault(module, {})[part] = (first, last)
    adapted: list[LoRAInPlace] = []
    for host, parts in rows.items():
        changed: Any = host
        changed.host_class = type(host)
        attention = isinstance(host, nn.MultiheadAttention)
        changed.__class__ = LoRAInPlaceAttention if attention else LoRAInPlaceLinear
        changed.rows = parts if len(parts) > 1 else {"": next(iter(parts.values()))}
        changed.add_lora(rank, alpha)
        adapted.append(changed)
    return adapted


def added_parameters(module: LoRAInPlace) -> dict[str, nn.Parameter]:
    """A and B of the module, by name."""
    return {name: module._parameters[name] for name in module.lora_names()}  # type: ignore[misc]  # never None here


def remove_lora(module: LoRAInPlace) -> None:
    """Restore the module as it was before `add_lora`. Raises ValueError where the update is merged into the weight."""
    if module.merged:
        raise ValueError(
            "unlift: LoRA is merged into the weights of the host; call unmerge() on its modules first"
        )
    for name in added_parameters(module):
        del module._parameters[name]
    hooks = module._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is unmerge_what_was_loaded]:
        del hooks[key]
    host_class = module.host_class
    del module.rows, module.scaling, module.host_class
    module.__dict__.pop("merged", None)
    module.__class__ = host_class  # type: ignore[assignment]  # the class that it had
