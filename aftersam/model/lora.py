"""LoRA on q and v of attentions: injected, trained beside frozen weights, merged for inference.

Source: LoRA, arXiv 2106.09685, and the paper's section 3.3."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aftersam.model.layers import DenseLinear
from axial_fusion import LoRALinear, lora_linear
from axial_fusion.lora import LoRAUpdates
from axial_fusion.ops.dense_linear import dense_linear


class LoRAOptions(NamedTuple):
    """Rank r, alpha (None: alpha = rank), and the dropout on what A sees."""

    rank: int
    alpha: float | None = None
    dropout: float = 0.0


class LoRAQKV(LoRAUpdates, DenseLinear):
    """A fused projection (3C, C) to q, k, v with LoRA on q and v: q = (W_Q + s·B_Q A_Q) x, v likewise.

    The base weights keep their names and are shared with `linear`. `heads` above 1 says that rows go by head,
    (M, 3, D), as in TinyViT."""

    def __init__(self, linear: nn.Linear, options: LoRAOptions, *, heads: int = 1) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.heads = heads
        self.take_over(linear)
        self.dropout = options.dropout
        self.add_lora(options.rank, options.alpha)

    def updated_weights(self) -> dict[str, Tensor]:
        """The rows of the weight that give q and v, each (M, D, C). M is 1 unless rows go by head."""
        q, _, v = self.weight.unflatten(0, (self.heads, 3, -1)).unbind(1)
        return {"q": q, "v": v}

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return dense_linear(x, self.through(self.weight), self.bias)
        a, b = self._joined()
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.weight, self.bias, a, b, scaling=self.scaling, dropout_p=dropout)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Both updates as one: A (2r, C), and B (3C, 2r) with B_Q and B_V on its diagonal, zeros for k."""
        q, v = self.lora("q"), self.lora("v")
        rank = q.b.shape[1]
        b = torch.cat([F.pad(q.b, (0, rank)), q.b.new_zeros(q.b.shape[0], 2 * rank), F.pad(v.b, (rank, 0))])
        if self.heads > 1:
            b = b.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        return torch.cat([q.a, v.a]), b


def add_lora(part: nn.Module, options: LoRAOptions) -> None:
    """Put LoRA on q and v of every attention in `part`, in place: the encoder's fused projection, the decoder's two."""
    for attention in list(part.modules()):
        if hasattr(attention, "qkv_by_head"):
            heads = attention.num_heads if attention.qkv_by_head else 1
            attention.qkv = LoRAQKV(attention.qkv, options, heads=heads)
        for name in ("q_proj", "v_proj"):
            linear = getattr(attention, name, None)
            if isinstance(linear, nn.Linear):
                setattr(attention, name, LoRALinear.sharing(linear, *options))


def merge_lora(model: nn.Module) -> None:
    """Fold every LoRA update of `model` into its weight, in place, for inference."""
    for module in model.modules():
        if isinstance(module, LoRAUpdates):
            module.merge()
