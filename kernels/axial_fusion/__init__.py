"""Attention across and within slices, factorised: fused ops with gradients, and thin modules over them."""

from axial_fusion.dispatch import select_backend
from axial_fusion.lora import LoRALinear
from axial_fusion.modules import AxialFusionAttention
from axial_fusion.ops.axial_attention import axial_attention
from axial_fusion.ops.axial_fusion_attention import axial_fusion_attention
from axial_fusion.ops.lora_linear import lora_linear
from axial_fusion.ops.lora_qkv import lora_qkv
from axial_fusion.ops.rel_pos_attention import rel_pos_attention
from axial_fusion.ops.slice_attention import slice_attention
from axial_fusion.ops.window_attention import window_attention
from axial_fusion.reference import AttentionWeights, LoRA

__all__ = [
    "AttentionWeights",
    "AxialFusionAttention",
    "LoRA",
    "LoRALinear",
    "axial_attention",
    "axial_fusion_attention",
    "lora_linear",
    "lora_qkv",
    "rel_pos_attention",
    "select_backend",
    "slice_attention",
    "window_attention",
]
