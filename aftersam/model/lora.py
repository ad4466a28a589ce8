"""LoRA on q and v of attentions: injected, trained beside frozen weights, merged for inference.

Source: LoRA, arXiv 2106.09685, and the paper's section 3.3."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aftersam.model.layers import DenseLinear
from axial_fusion import LoRALinear


class LoRAOptions(NamedTuple):
    """Rank r, alpha (None: alpha = rank), and the dropout on what A sees."""

    rank: int
    alpha: float | None = None
    dropout: float = 0.0


class LoRAQKV(LoRALinear, DenseLinear):
    """A fused projection (3C, C) to q, k, v with LoRA on q and v: q = (W_Q + s·B_Q A_Q) x, v likewise.

    It is a LoRALinear whose A and B are made of both pairs. The base weights keep their names and are shared with
    `linear`. `heads` above 1 says that rows go by head, (M, 3, D), as in TinyViT."""

    def __init__(self, linear: nn.Linear, options: LoRAOptions, *, heads: int = 1) -> None:
        nn.Linear.__init__(self, linear.in_features, linear.out_features, device="meta")
        self.heads = heads
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling = (options.rank if options.alpha is None else options.alpha) / options.rank
        self.dropout = options.dropout
        self.merged = False
        dim = linear.in_features
        for part in "qv":
            a = nn.Parameter(linear.weight.new_empty(options.rank, dim))
            nn.init.kaiming_uniform_(a, a=5**0.5)
            self.register_parameter(f"lora_{part}_a", a)
            self.register_parameter(
                f"lora_{part}_b", nn.Parameter(linear.weight.new_zeros(dim, options.rank))
            )

    @property
    def lora_a(self) -> Tensor:  # type: ignore[override]  # made of two parameters
        """Both A as one (2r, C)."""
        return torch.cat([self.lora_q_a, self.lora_v_a])

    @property
    def lora_b(self) -> Tensor:  # type: ignore[override]
        """Both B as one (3C, 2r): B_Q and B_V on its diagonal, zeros for k."""
        q, v = self.lora_q_b, self.lora_v_b
        rank = q.shape[1]
        b = torch.cat([F.pad(q, (0, rank)), q.new_zeros(q.shape[0], 2 * rank), F.pad(v, (rank, 0))])
        if self.heads > 1:
            b = b.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        return b

    def forward(self, x: Tensor) -> Tensor:
        return DenseLinear.forward(self, x) if self.merged else super().forward(x)

    def lora_state_dict(self) -> dict[str, Tensor]:
        """The adapter alone, by its parameters' names; load it back with strict=False."""
        return {name: value.detach().clone() for name, value in self.named_parameters() if "lora" in name}


def add_lora(part: nn.Module, options: LoRAOptions) -> None:
    """Put LoRA on q and v of every attention in `part`, in place: the encoder's fused projection, the decoder's two."""
    for attention in list(part.modules()):
        if hasattr(attention, "qkv_by_head"):
            heads = attention.num_heads if attention.qkv_by_head else 1
            attention.qkv = LoRAQKV(attention.qkv, options, heads=heads)
        for name in ("q_proj", "v_proj"):
            linear = getattr(attention, name, None)
            if isinstance(linear, nn.Linear):
                setattr(
                    attention,
                    name,
                    LoRALinear.from_linear(linear, options.rank, options.alpha, options.dropout),
                )


def merge_lora(model: nn.Module) -> None:
    """Fold every LoRA update of `model` into its weight, in place, for inference."""
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
