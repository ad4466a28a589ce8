"""LoRA in the encoder and the decoder: injected into their attentions, merged for inference.

Source: LoRA, arXiv 2106.09685, and the paper's section 3.3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aftersam.model.layers import Linear
from axial_fusion import LoRALinear, lora_linear
from axial_fusion.modules import merge_update

if TYPE_CHECKING:
    from aftersam.model.image_encoder import ImageEncoder
    from aftersam.model.mask_decoder import MaskDecoder
    from aftersam.model.tiny_vit import TinyViT


class LoRAQKV(Linear):
    """A fused projection (3C, C) to q, k, v with LoRA on q and v: q = (W_Q + s·B_Q A_Q) x, v likewise.

    The base weights keep their names. `heads` above 1 says that rows go by head, (M, 3, D), as in TinyViT.
    Source: LoRA, arXiv 2106.09685, and the paper's section 3.3."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        heads: int = 1,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.heads = heads
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling = (rank if alpha is None else alpha) / rank
        self.dropout = dropout
        self.merged = False
        dim = linear.in_features
        for part in "qv":
            a = nn.Parameter(linear.weight.new_empty(rank, dim))
            nn.init.kaiming_uniform_(a, a=5**0.5)
            self.register_parameter(f"lora_{part}_a", a)
            self.register_parameter(f"lora_{part}_b", nn.Parameter(linear.weight.new_zeros(dim, rank)))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return super().forward(x)
        a, b = self._stacked()
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.weight, self.bias, a, b, scaling=self.scaling, dropout_p=dropout)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the weight, for inference: computed in fp32, rounded once."""
        self._fold(1.0)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of the weight again, to within one rounding."""
        self._fold(-1.0)

    def _fold(self, sign: float) -> None:
        if self.merged == (sign > 0):
            return
        merge_update(self.weight, *self._stacked(), sign * self.scaling)
        self.merged = sign > 0

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Both pairs as one: A (2r, C), and B (3C, 2r) with B_Q and B_V on its diagonal, zeros for k."""
        q, v = self.lora_q_b, self.lora_v_b
        rank = q.shape[1]
        b = torch.cat([F.pad(q, (0, rank)), q.new_zeros(q.shape[0], 2 * rank), F.pad(v, (rank, 0))])
        if self.heads > 1:
            b = b.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        return torch.cat([self.lora_q_a, self.lora_v_a]), b


def add_encoder_lora(
    encoder: ImageEncoder | TinyViT, rank: int, alpha: float | None = None, dropout: float = 0.0
) -> None:
    """Put LoRA on q and v of every attention of `encoder`, in place. `alpha` None means alpha = rank."""
    for attention in [module for module in encoder.modules() if hasattr(module, "qkv_by_head")]:
        heads = attention.num_heads if attention.qkv_by_head else 1
        attention.qkv = LoRAQKV(attention.qkv, rank, alpha, dropout, heads=heads)


def add_decoder_lora(
    decoder: MaskDecoder, rank: int, alpha: float | None = None, dropout: float = 0.0
) -> None:
    """Freeze `decoder` but for its class tokens, hypernetworks, biases and added layers, and for LoRA on q and v
    of its attentions, put there in place. `alpha` None means alpha = rank."""
    decoder.requires_grad_(False)
    for module in list(decoder.transformer.modules()):
        for name in ("q_proj", "v_proj"):
            linear = getattr(module, name, None)
            if isinstance(linear, nn.Linear):
                setattr(module, name, LoRALinear.from_linear(linear, rank, alpha, dropout))
    for part in (
        decoder.class_tokens,
        decoder.output_hypernetworks_mlps,
        decoder.added_stages,
        decoder.fusions,
    ):
        part.requires_grad_(True)
    decoder.class_bias.requires_grad_(True)


def merge_lora(model: nn.Module) -> None:
    """Fold every LoRA update of `model` into its weight, in place, for inference."""
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
