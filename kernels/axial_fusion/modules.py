"""Thin modules over the ops: parameters, initialisation and conversion, no arithmetic of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .hosts import (
    AttentionParts,
    HostCall,
    Part,
    attention_parts,
    block_parts,
    self_attention_input,
)
from .ops.axial_fusion_attention import axial_fusion_attention
from .ops.lora_linear import lora_linear
from .reference import AttentionWeights, LoRA


class LoRAUpdates(nn.Module):
    """Low-rank updates W + scaling · B A of some weights of a module: parameters, reset, merging, adapter's state.

    The update of part "q" has A (rank, in) as `lora_q_a` and B (out, rank) as `lora_q_b`; that of part "" has `lora_a`
    and `lora_b`. A starts Kaiming-uniform, B at zero.    Source: LoRA, arXiv 2106.09685."""

    scaling: float  # alpha / rank
    merged = False

    def updated_weights(self) -> dict[str, Tensor]:
        """Part -> the weight (out, in) that is updated, or a view of it (..., in); empty without LoRA."""
        raise NotImplementedError

    def add_lora(self, rank: int, alpha: float | None) -> None:
        """Make the parameters; alpha None means alpha = rank."""
        self.scaling = (rank if alpha is None else alpha) / rank
        for part, weight in self.updated_weights().items():
            name_a, name_b = _lora_names(part)
            self.register_parameter(name_a, nn.Parameter(weight.new_empty(rank, weight.shape[-1])))
            self.register_parameter(name_b, nn.Parameter(weight.new_empty(weight.shape[:-1].numel(), rank)))
        self.reset_lora()

    @torch.no_grad()
    def reset_lora(self) -> None:
        """Start anew: updates that are random but zero."""
        for part in self.updated_weights():
            update = self.lora(part)
            nn.init.kaiming_uniform_(update.a, a=5**0.5)
            update.b.zero_()

    def lora(self, part: str = "") -> LoRA:
        """The update of a part, its parameters as they are now."""
        name_a, name_b = _lora_names(part)
        return LoRA(getattr(self, name_a), getattr(self, name_b), self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the updates into the weights for inference: computed in fp32, rounded once."""
        self._fold(1.0)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the updates out of the weights again, to within one rounding."""
        self._fold(-1.0)

    def _fold(self, sign: float) -> None:
        weights = self.updated_weights()
        if not weights or self.merged == (sign > 0):
            return
        for part, weight in weights.items():
            a, b, scaling = self.lora(part)
            merge_update(weight, a, b, sign * scaling)
        self.merged = sign > 0

    def lora_state_dict(self) -> dict[str, Tensor]:
        """The adapter alone, {"lora_a": ..., "lora_b": ...} of each part; load it back with strict=False."""
        names = [name for part in self.updated_weights() for name in _lora_names(part)]
        return {name: getattr(self, name).detach().clone() for name in names}


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
        self.add_lora(rank, alpha)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, alpha: float | None = None, dropout: float = 0.0
    ) -> LoRALinear:
        """The layer `linear` with LoRA beside its own parameters, which are frozen and shared, not copied."""
        new = cls(linear.in_features, linear.out_features, rank=rank, alpha=alpha, dropout=dropout,
                  bias=linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype)  # fmt: skip
        new.weight, new.bias = linear.weight, linear.bias
        new.weight.requires_grad_(False)
        if new.bias is not None:
            new.bias.requires_grad_(False)
        return new.train(linear.training)

    def updated_weights(self) -> dict[str, Tensor]:
        """The layer's one weight."""
        return {"": self.weight}

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return lora_linear(x, self.weight, self.bias)
        dropout = self.dropout if self.training else 0.0
        a, b, scaling = self.lora()
        return lora_linear(x, self.weight, self.bias, a, b, scaling=scaling, dropout_p=dropout)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_a.shape[0]}, scaling={self.scaling:g}"


class AxialFusionAttention(nn.Module):
    """Axial attention, then slice attention, on tokens (B, N, P, C) or (B, N, H', W', C).

    "Axial" means across the N slices at one position, not along the rows or columns of an image. `attention`
    leaves one half out. `rank` > 0 puts LoRA on q and v of both halves; what is frozen beside it is the
    caller's choice (`freeze_projections`). `norm` and `residual` False fit the module into a block that has its
    own."""

    host = HostCall()  # how the host calls this module, where it is made from a host's attention
    training_only = ""  # dropout of the host that evaluation skips
    # nn.TransformerEncoderLayer reads these of its self_attn: without a bias it calls the module, as it must.
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rank: int = 0,
        alpha: float | None = None,
        dropout: float = 0.0,
        norm: bool = True,
        residual: bool = True,
        attention: Literal["both", "axial", "slice"] = "both",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, but must divide dim = {dim}")
        if attention not in ("both", "axial", "slice"):
            raise ValueError(f"attention is {attention!r}, but must be both, axial or slice")
        self.num_heads = num_heads
        self.residual = residual
        self.eps = eps
        self.dropout = dropout
        halves = {"both": (True, True), "axial": (True, False), "slice": (False, True)}[attention]
        self.inter = AttentionHalf(dim, rank=rank, alpha=alpha, norm=norm) if halves[0] else None
        self.intra = AttentionHalf(dim, rank=rank, alpha=alpha, norm=norm) if halves[1] else None

    def forward(
        self, x: Tensor | None = None, *others: Any, query_index: Sequence[int] | None = None, **keywords: Any
    ) -> Any:
        """x (B, N, P, C) or (B, N, H', W', C) -> the same; with `query_index` those slices alone.

        Made from a host's attention, it also takes the host's call: key and value that are the query itself, and any
        mask or flag at the value that changes nothing; others are refused by name. The result is then the pair
        (output, None) where the host unpacks one. With `num_slices`, x has the host's shape, (B·N, P, C) or
        (B·N, H', W', C), or (P, B·N, C) for a MultiheadAttention that is not `batch_first`, and so has the result."""
        host, alone = self.host, x is not None and len(others) + len(keywords) == 0
        if not alone:
            x, positional = self_attention_input(host, x, others, keywords)
            query_index = positional if query_index is None else query_index
        y = axial_fusion_attention(
            host.to_slices(x),
            None if self.inter is None else self.inter.weights(),
            None if self.intra is None else self.intra.weights(),
            num_heads=self.num_heads,
            residual=self.residual,
            query_index=query_index,
            eps=self.eps,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y = host.from_slices(y)
        return (y, None) if host.returns_pair(alone) else y

    def train(self, mode: bool = True) -> AxialFusionAttention:
        """Like nn.Module.train. Raises ValueError where the host's dropout would be missing."""
        if mode and self.training_only:
            raise ValueError(
                f"AxialFusionAttention was made from a host in evaluation, without its {self.training_only}, which acts"
                " in training; set that to 0 before from_attention or from_block"
            )
        return super().train(mode)

    def halves(self) -> list[AttentionHalf]:
        """The halves that are there, across slices first."""
        return [half for half in (self.inter, self.intra) if half is not None]

    def freeze_projections(self) -> None:
        """W_Q, W_K, W_V and their biases stay as they are: with `rank` > 0, the paper's LoRA equations."""
        for half in self.halves():
            for parameter in half.qkv.parameters():
                parameter.requires_grad_(False)

    @classmethod
    def from_attention(
        cls, attention: nn.Module, *, num_slices: int | None = None, rank: int = 0, alpha: float | None = None
    ) -> AxialFusionAttention:
        """A 3D attention in place of a 2D one that starts equal to it: norm and residual are its block's.

        Takes nn.MultiheadAttention and the plain attentions of timm, SAM, transformers, diffusers and MONAI that
        axial_fusion/hosts.py lists, and is called like the one it replaces. `num_slices` is N where the host's tokens
        are (B·N, P, C) or (B·N, H', W', C), one row a slice; None where they are (B, N, P, C).
        The slice half has the attention's weights, frozen where those are; the axial half has them too, but a zero
        output projection, so that it adds nothing yet, and is trained. The mode, training or evaluation, is kept.
        Raises ValueError, naming what is in the way, for every attention this would get wrong: an unknown class, q/k
        norms, rotary or relative positions, gates, hooks, quantised or adapter-wrapped layers, dropout in training."""
        return cls._from_parts(attention_parts(attention, num_slices), None, rank=rank, alpha=alpha)

    @classmethod
    def from_block(
        cls, block: nn.Module, *, rank: int = 0, alpha: float | None = None
    ) -> AxialFusionAttention:
        """Like `from_attention`, from a pre-norm block that hosts.py lists: norm and residual included.

        Raises ValueError also for layer scale, windows and stochastic depth in training, which lie between the two."""
        parts, norm = block_parts(block)
        return cls._from_parts(parts, norm, rank=rank, alpha=alpha)

    @classmethod
    def _from_parts(
        cls, parts: AttentionParts, norm: nn.LayerNorm | None, *, rank: int, alpha: float | None
    ) -> AxialFusionAttention:
        weight = parts.out[0]
        new = cls(weight.shape[0], parts.heads, rank=rank, alpha=alpha, norm=norm is not None,
                  residual=norm is not None, eps=1e-6 if norm is None else norm.eps)  # fmt: skip
        new = new.to(device=weight.device, dtype=weight.dtype)
        for half in new.halves():
            _take_over(half.qkv, parts.qkv)
            _take_over(half.out, [parts.out])
            if norm is not None:
                _take_over(half.norm, [(norm.weight, norm.bias)])
        assert new.inter is not None
        new.inter.requires_grad_(True)
        nn.init.zeros_(new.inter.out.weight)
        nn.init.zeros_(new.inter.out.bias)
        new.host, new.training_only = parts.call, parts.training_only
        return new.train(parts.training)

    @property
    def batch_first(self) -> bool:
        """Whether the batch is the first axis, as nn.TransformerEncoder asks of its layers' attention."""
        return self.host.batch_first


@torch.no_grad()
def _take_over(layer: nn.Module, parts: Sequence[Part]) -> None:
    """Copy weights and biases, one below the other, into `layer`; a bias that is missing is 0. Frozen ones stay so."""
    layer.weight.copy_(torch.cat([weight for weight, _ in parts]))
    layer.bias.copy_(
        torch.cat([weight.new_zeros(weight.shape[0]) if b is None else b for weight, b in parts])
    )
    layer.weight.requires_grad_(parts[0][0].requires_grad)
    layer.bias.requires_grad_(all(w.requires_grad if b is None else b.requires_grad for w, b in parts))


class AttentionHalf(LoRAUpdates):
    """Weights of one attention: norm, fused q, k, v projection, output projection, LoRA on q and v."""

    def __init__(self, dim: int, *, rank: int, alpha: float | None, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim) if norm else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.rank = rank
        if rank:
            self.add_lora(rank, alpha)

    def updated_weights(self) -> dict[str, Tensor]:
        """The rows of q and of v."""
        if not self.rank:
            return {}
        q, _, v = self.qkv.weight.chunk(3)
        return {"q": q, "v": v}

    def weights(self) -> AttentionWeights:
        """The parameters as they are now; nothing is cached, so that optimisers and DDP see one truth."""
        live = self.rank > 0 and not self.merged
        return AttentionWeights(
            self.qkv.weight,
            self.qkv.bias,
            self.out.weight,
            self.out.bias,
            None if self.norm is None else self.norm.weight,
            None if self.norm is None else self.norm.bias,
            self.lora("q") if live else None,
            self.lora("v") if live else None,
        )
