"""Weights spread over processes (FSDP2), and gathered again."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aftersam.config import ModelConfig
from aftersam.model.aftersam import AfterSAM
from aftersam.model.build import build_aftersam
from aftersam.model.fusion import AxialFusionBlock
from aftersam.model.image_encoder import EncoderBlock
from aftersam.model.tiny_vit import TinyViTBlock


def shard(model: AfterSAM, device: torch.device) -> None:
    """Spread weights, gradients and moments over the processes, block by block (FSDP2), in place.

    A block is the unit, because only its own forward reads the weights inside it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # slow to import

    if not torch.distributed.is_initialized():
        raise ValueError("shard is for several processes; start them with torchrun")
    # the losses do nothing in place to the logits, which are a view
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    model.to(device)
    for block in [
        m for m in model.modules() if isinstance(m, (EncoderBlock, TinyViTBlock, AxialFusionBlock))
    ]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_copy(model: AfterSAM, config: ModelConfig, num_classes: int) -> AfterSAM:
    """A copy of a sharded model with all its weights, on the CPU. Every process must call it."""
    state = whole_state(model)
    with torch.device("meta"):
        copy = build_aftersam(config, num_classes)
    copy.load_state_dict(state, assign=True)
    return copy


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict on the CPU. Shards are gathered, so that every process must call it."""
    return {name: whole(value) for name, value in model.state_dict().items()}


def whole(value: Tensor) -> Tensor:
    """A tensor on the CPU. Shards are gathered, so that every process must call it."""
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu().contiguous()
