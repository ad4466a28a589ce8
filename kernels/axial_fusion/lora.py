"""Low-rank updates of a module's weights: parameters, state, merging, and the linear layer that has one."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .checks import dtype_name, torchs_own
from .ops.lora_linear import lora_linear
from .reference import LoRA

_TAKEN_FROM: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


class LoRAUpdates(nn.Module):
    """Low-rank updates W + scaling · B A of some weights of a module: parameters, reset, merging, state.

    The update of part "q" has A (rank, in) as `lora_q_a` and B (out, rank) as `lora_q_b`; that of part "" has `lora_a`
    and `lora_b`. A starts Kaiming-uniform, B at zero.    Source: LoRA, arXiv 2106.09685.

    The state dict of a merged module has the key `lora_merged` as well. Whatever the module and the file were, a module
    is unmerged after load_state_dict."""

    scaling: float  # alpha / rank
    merged = False
    parts: tuple[str, ...] = ("q", "v")
    weight_name = "weight"  # of the parameter that is updated

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError(f"torch.jit.script cannot compile {type(self).__name__}; use torch.export")

    def base(self) -> nn.Module:
        """The layer whose weight is updated."""
        return self

    def take_over(self, linear: nn.Linear) -> None:
        """Share the parameters of `linear`."""
        self.weight, self.bias = linear.weight, linear.bias
        _TAKEN_FROM[self] = weakref.ref(linear)

    def updated_weights(self) -> dict[str, Tensor]:
        """Part -> the weight (out, in) that is updated, or a view of it (..., in); empty without LoRA."""
        raise NotImplementedError

    def add_lora(self, rank: int, alpha: float | None) -> None:
        """Make the parameters; alpha None means alpha = rank."""
        self.scaling = (rank if alpha is None else alpha) / rank
        for part, weight in self.updated_weights().items():
            name_a, name_b = _lora_names(part)
            self.register_parameter(name_a, nn.Parameter(weight.new_empty((rank, weight.shape[-1]))))
            self.register_parameter(name_b, nn.Parameter(weight.new_empty((weight.shape[:-1].numel(), rank))))
        self.register_load_state_dict_post_hook(unmerge_what_was_loaded)  # type: ignore[no-untyped-call]  # torch's
        self.reset_lora()

    def reset_parameters(self) -> None:
        """Initialise as the constructor does: the weights as nn.Linear, A at random and B at zero."""
        self.merged = False
        super().reset_parameters()  # type: ignore[misc]  # nn.Linear's
        self.reset_lora()

    @torch.no_grad()
    def reset_lora(self) -> None:
        """Initialise A at random and B at zero, if they exist: nn.Linear's constructor calls this before they do."""
        self.unmerge()
        for part in self.parts if hasattr(self, "scaling") else ():
            update = self.lora(part)
            nn.init.kaiming_uniform_(update.a, a=5**0.5)
            update.b.zero_()

    def lora(self, part: str = "") -> LoRA:
        """The update of a part, from its current parameters."""
        name_a, name_b = _lora_names(part)
        return LoRA(getattr(self, name_a), getattr(self, name_b), self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the updates into the weights for inference: computed in fp32, rounded once.

        Warns where another module has the same weight. Raises ValueError where the weight is no parameter: quantised,
        or computed from others. A backward pass that would train a merged update raises RuntimeError."""
        self._fold(1.0)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the updates out of the weights again, to within one rounding."""
        self._fold(-1.0)

    def _fold(self, sign: float) -> None:
        if self.merged == (sign > 0) or not hasattr(self, "scaling"):
            return
        layer, kind = self.base(), type(self).__name__
        _require_parameter(layer, self.weight_name, kind)
        others = _others_with(layer, self.weight_name) if sign > 0 else []
        if others:
            warnings.warn(f"{kind}: the weight is shared with {', '.join(others)}, so merging changes both",
                          stacklevel=3)  # fmt: skip
        for part, weight in self.updated_weights().items():
            a, b, scaling = self.lora(part)
            merge_update(weight, a, b, sign * scaling)
        self.merged = sign > 0

    def through(self, tensor: Tensor) -> Tensor:
        """`tensor`, unchanged; in a merged module its backward raises where the update would have to be trained."""
        if not torch.is_grad_enabled():
            return tensor
        updates = [getattr(self, name) for name in self.lora_names()]
        trained = any(t.requires_grad for t in updates)
        return _Untrained.apply(tensor, *updates) if trained else tensor  # type: ignore[no-untyped-call]  # torch's

    def lora_state_dict(self) -> dict[str, Tensor]:
        """The adapter alone, {"lora_alpha": ..., "lora_a": ..., "lora_b": ...}; load it back with strict=False."""
        state = {name: getattr(self, name).detach().clone() for name in self.lora_names()}
        return {"lora_alpha": self.lora_alpha(), **state} if state else {}

    def lora_alpha(self) -> Tensor:
        """alpha = scaling · rank, an fp64 scalar."""
        return torch.tensor(self.scaling * self._rank(), dtype=torch.float64, device="cpu")

    def set_lora_alpha(self, alpha: float) -> None:
        """Scale the updates by alpha / rank."""
        self.scaling = alpha / self._rank()

    def _rank(self) -> int:
        return int(getattr(self, self.lora_names()[0]).shape[0])

    def lora_names(self) -> list[str]:
        """Names of the parameters that are A or B."""
        return [name for part in self.parts for name in _lora_names(part)] if hasattr(self, "scaling") else []

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "lora_merged"] = torch.tensor(True, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        merged, names = False, self.lora_names()
        if names:
            self.unmerge()
            merged = bool(state_dict.pop(prefix + "lora_merged", False))
            missing = [prefix + name for name in names if prefix + name not in state_dict]
            if merged and missing:
                rest[-1].append(f"{prefix}lora_merged needs {', '.join(missing)} beside it")
            alpha = state_dict.pop(prefix + "lora_alpha", None)
            if alpha is not None:
                self.set_lora_alpha(float(alpha))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.merged = merged


def unmerge_what_was_loaded(module: nn.Module, _: object) -> None:
    """Hook after load_state_dict: unmerge the module."""
    assert isinstance(module, LoRAUpdates)
    module.unmerge()


class _Untrained(torch.autograd.Function):
    """The identity on a tensor; the derivative by the other inputs raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, *updates: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "a merged LoRA update gets no gradient; call unmerge() before training, or freeze it"
        )

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Tensor | None) -> Tensor:
        if any(t is not None for t in others):
            _Untrained.backward(ctx)
        return tangent.view_as(tangent)


def _require_parameter(layer: nn.Module, name: str, kind: str) -> None:
    weight = layer._parameters.get(name)
    if weight is None or not torchs_own(weight):
        what = f"computed by {type(layer).__name__}" if weight is None else f"a {type(weight).__name__}"
        raise ValueError(
            f"{kind}: the weight is {what}, but only a plain parameter can be merged or unmerged"
        )


def _others_with(layer: nn.Module, name: str) -> list[str]:
    """Classes of other modules that share this parameter of `layer`, except the layer it was taken from."""
    if sys.getrefcount(layer._parameters[name]) <= 2:  # the layer's and this call's
        return []
    source = _TAKEN_FROM.get(layer, lambda: None)()
    modules = [
        o for o in gc.get_objects() if issubclass(type(o), nn.Module) and o is not layer and o is not source
    ]
    return [type(m).__name__ for m in modules for p in m._parameters.values() if p is layer._parameters[name]]


def _lora_names(part: str) -> tuple[str, str]:
    stem = f"lora_{part}_" if part else "lora_"
    return stem + "a", stem + "b"


def merge_update(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """weight (..., in) += scaling · b a in place, computed in fp32 or better and rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(weight.to(wide) + scaling * (b.to(wide) @ a.to(wide)).view(weight.shape))


class LoRALinear(LoRAUpdates, nn.Linear):
    """A linear layer with a low-rank update: y = x Wᵀ + bias + (alpha / rank) · (dropout(x) Aᵀ) Bᵀ.

    `weight` and `bias` keep nn.Linear's names, so its state dict loads with strict=False; `lora_a` is A (rank, in),
    `lora_b` is B (out, rank). alpha None means alpha = rank."""

    parts = ("",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank is {rank}, but must be 1 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, but must lie in [0, 1)")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.dropout = dropout
        self.called = nn.Identity()  # its hook keeps nn.TransformerEncoderLayer from reading weights uncalled
        self.called.register_forward_hook(_no_hook)
        self.add_lora(rank, alpha)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, alpha: float | None = None, dropout: float = 0.0
    ) -> LoRALinear:
        """The layer `linear` with LoRA beside its own parameters, which are frozen and shared, not copied.

        Raises ValueError for anything but nn.Linear itself: subclasses compute something else, hooks and wrappers
        would not run, and nn.MultiheadAttention never calls its `out_proj`."""
        found = obstacle(linear)
        if found:
            raise ValueError(f"from_linear takes a plain nn.Linear, but linear {found}")
        return cls.sharing(linear, rank, alpha, dropout)

    @classmethod
    def sharing(
        cls, linear: nn.Linear, rank: int, alpha: float | None = None, dropout: float = 0.0
    ) -> LoRALinear:
        """Like `from_linear`, for a layer of another class that is known to compute what nn.Linear does."""
        new = cls(linear.in_features, linear.out_features, rank=rank, alpha=alpha, dropout=dropout,
                  bias=linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype)  # fmt: skip
        new.take_over(linear)
        for parameter in (new.weight, new.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        return new.train(linear.training)

    def updated_weights(self) -> dict[str, Tensor]:
        """The layer's only weight."""
        return {"": self.weight}

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return lora_linear(x, self.through(self.weight), self.bias)
        dropout = self.dropout if self.training else 0.0
        a, b, scaling = self.lora()
        return lora_linear(x, self.weight, self.bias, a, b, scaling=scaling, dropout_p=dropout)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_a.shape[0]}, scaling={self.scaling:g}"


def _no_hook(*_: object) -> None:
    """A hook that does nothing."""


def _refuse_uncalled(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuse a LoRALinear as the `out_proj` of nn.MultiheadAttention, which reads its weight and never calls it."""
    if (
        name == "out_proj"
        and isinstance(child, LoRALinear)
        and getattr(type(parent), "forward", None) is nn.MultiheadAttention.forward
    ):
        raise ValueError(
            "nn.MultiheadAttention reads the weight of its out_proj and never calls it, so LoRALinear's update would be"
            " lost; keep nn.Linear there"
        )


nn.modules.module.register_module_module_registration_hook(_refuse_uncalled)


def obstacle(layer: nn.Module) -> str | None:
    """Why a call of `layer` may differ from x Wᵀ + bias of its parameters, or None."""
    kind = type(layer)
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "is the out_proj of nn.MultiheadAttention, which reads its weight and never calls it"
    if kind is not nn.Linear:
        return f"is {kind.__module__}.{kind.__qualname__}"
    if runs_more(layer):
        return "has hooks or a forward of its own"
    weight = layer._parameters.get("weight")
    if weight is None or not torchs_own(weight) or not weight.dtype.is_floating_point:
        return f"has a weight that is {type(layer.weight).__name__} of {dtype_name(layer.weight.dtype)}"
    return None


def runs_more(*layers: nn.Module | None) -> bool:
    """Whether calling one of `layers` runs more than its class's forward: hooks, or a forward set on the instance."""
    for layer in layers:
        if layer is None:
            continue
        own = layer.__dict__
        if (
            own["_forward_pre_hooks"]
            or own["_forward_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False
