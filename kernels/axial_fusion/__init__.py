"""Attention across and within slices, factorised: fused ops with gradients, and thin modules over them."""

from .adapter_state import adapter_state_dict, load_adapter_state_dict, peft_adapter
from .dispatch import select_backend
from .lift import lift, set_num_slices, unlift
from .lora import LoRALinear
from .modules import AxialFusionAttention
from .ops.axial_attention import axial_attention
from .ops.axial_fusion_attention import (
    axial_fusion_attention,
)
from .ops.lora_linear import lora_linear
from .ops.lora_qkv import lora_qkv
from .ops.rel_pos_attention import rel_pos_attention
from .ops.slice_attention import slice_attention
from .ops.window_attention import window_attention
from .reference import AttentionWeights, LoRA
from .sam import accelerate_sam

__all__ = [
    "AttentionWeights",
    "AxialFusionAttention",
    "LoRA",
    "LoRALinear",
    "accelerate_sam",
    "adapter_state_dict",
    "axial_attention",
    "axial_fusion_attention",
    "lift",
    "load_adapter_state_dict",
    "lora_linear",
    "lora_qkv",
    "peft_adapter",
    "rel_pos_attention",
    "select_backend",
    "set_num_slices",
    "slice_attention",
    "unlift",
    "window_attention",
]
