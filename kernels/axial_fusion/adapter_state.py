"""What `lift` added to a model, saved and loaded without the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .across_slices import AcrossSlices, groups_of
from .adapters import LoRAInPlace, added_parameters
from .lora import LoRAUpdates


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What `lift` added to a model: axial halves, and LoRA with its alpha; no weight of the host, nor a copy of one."""
    state = {name: parameter.detach().clone() for name, parameter in _added(model)}
    return state | {key: module.lora_alpha() for key, module in _low_rank(model)}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `adapter_state_dict` gave into a model that was lifted in the same way.

    Raises ValueError where names or shapes differ."""
    own, low_rank = dict(_added(model)), dict(_low_rank(model))
    alphas = {key: float(value) for key, value in state.items() if key in low_rank}
    state = {key: value for key, value in state.items() if key not in low_rank}
    if own.keys() != state.keys():
        name = min(own.keys() ^ state.keys())
        where = (
            "the model has it, the state does not" if name in own else "the state has it, the model does not"
        )
        raise ValueError(f"load_adapter_state_dict: {name!r}: {where}; lift with the same where and rank")
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"load_adapter_state_dict: {name!r} is {tuple(state[name].shape)} in the state, "
                f"but {tuple(parameter.shape)} in the model"
            )
    for module in low_rank.values():
        module.unmerge()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
    for key, alpha in alphas.items():
        low_rank[key].set_lora_alpha(alpha)


def peft_adapter(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LoRA of a lifted host in PEFT's format: arguments of peft.LoraConfig, and the adapter's state dict.

    PEFT has one pair (A, B) for a fused projection: of twice the rank, B zero in the rows of k. Axial halves are not
    LoRA and stay with `adapter_state_dict`. Raises ValueError for nn.MultiheadAttention, whose output projection PEFT
    adapts too."""
    groups_of(model)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRAInPlace)}
    if not adapted:
        raise ValueError(f"peft_adapter: {type(model).__name__} has no LoRA; lift it with rank above 0")
    state: dict[str, Tensor] = {}
    for name, module in adapted.items():
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"peft_adapter: PEFT has no layout for q and v alone of {name!r}, nn.MultiheadAttention"
            )
        a, b = module.joined()
        state[f"base_model.model.{name}.lora_A.weight"] = a.detach().clone()
        state[f"base_model.model.{name}.lora_B.weight"] = b.detach().clone()
        rank, scaling = len(a), module.scaling
    return {"r": rank, "lora_alpha": scaling * rank, "target_modules": list(adapted)}, state


def _low_rank(model: nn.Module) -> Iterator[tuple[str, LoRAUpdates]]:
    """Key of alpha, and module, of everything that has LoRA in the model."""
    for name, module in model.named_modules():
        if isinstance(module, LoRAUpdates) and module.lora_names():
            yield f"{name}.lora_alpha" if name else "lora_alpha", module


def _added(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and value of every parameter that lift added."""
    groups_of(model)
    for name, module in model.named_modules():
        own: Any = ()
        if isinstance(module, AcrossSlices):
            own = module.added()
        elif isinstance(module, LoRAInPlace):
            own = added_parameters(module).items()
        yield from ((f"{name}.{key}" if name else key, value) for key, value in own)
