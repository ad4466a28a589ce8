"""Attention across and within slices, factorised: fused ops with gradients, and thin modules over them."""

from axial_fusion._launch import select_backend
from axial_fusion.axial_attention import axial_attention
from axial_fusion.fusion import axial_fusion_attention
from axial_fusion.lora_linear import lora_linear
from axial_fusion.lora_qkv import lora_qkv
from axial_fusion.modules import AxialFusionAttention, LoRALinear
from axial_fusion.reference import AttentionWeights, LoRA
from axial_fusion.rel_pos_attention import rel_pos_attention, window_attention
from axial_fusion.slice_attention import slice_attention

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
