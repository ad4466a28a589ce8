"""Thin modules over the ops: parameters, initialisation and conversion, no arithmetic of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .hosts import attention_parts
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

    def forward(self, x: Tensor, query_index: Sequence[int] | None = None) -> Tensor:
        """x (B, N, P, C) or (B, N, H', W', C) -> the same; with `query_index` those slices alone."""
        return axial_fusion_attention(
            x,
            None if self.inter is None else self.inter.weights(),
            None if self.intra is None else self.intra.weights(),
            num_heads=self.num_heads,
            residual=self.residual,
            query_index=query_index,
            eps=self.eps,
            dropout_p=self.dropout if self.training else 0.0,
        )

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
        cls, attention: nn.Module, *, rank: int = 0, alpha: float | None = None
    ) -> AxialFusionAttention:
        """A 3D attention in place of a 2D one that starts equal to it: norm and residual are its block's.

        Takes timm's and SAM's attention (`qkv`, `proj`, `num_heads`) and nn.MultiheadAttention. The slice half
        has its weights; the axial half has them too, but a zero output projection, so that it adds nothing yet.
        Raises ValueError, naming what is in the way, for an attention this would get wrong: q/k norms, rotary or
        relative positions, quantised or adapter-wrapped layers, dropout, separate key or value sizes."""
        qkv, out, heads = attention_parts(attention)
        return cls._from_parts(qkv, out, heads, None, None, rank=rank, alpha=alpha)

    @classmethod
    def from_block(
        cls, block: nn.Module, *, rank: int = 0, alpha: float | None = None
    ) -> AxialFusionAttention:
        """Like `from_attention`, from a pre-norm block (`norm1`, `attn`): norm and residual included.

        Raises ValueError also for layer scale and stochastic depth, which lie between the two."""
        for name in ("norm1", "attn"):
            if not hasattr(block, name):
                raise ValueError(f"{type(block).__name__} has no {name!r}; from_block needs a pre-norm block")
        norm = block.norm1
        if type(norm) is not nn.LayerNorm or norm.weight is None:
            raise ValueError(f"norm1 is {type(norm).__name__}, but must be an affine nn.LayerNorm")
        for name in ("ls1", "drop_path1", "drop_path", "gamma_1"):
            part = getattr(block, name, None)
            if part is not None and not isinstance(part, nn.Identity):
                raise ValueError(f"{type(block).__name__} has {name!r} between attention and residual")
        qkv, out, heads = attention_parts(block.attn)
        return cls._from_parts(qkv, out, heads, norm, norm.eps, rank=rank, alpha=alpha)

    @classmethod
    def _from_parts(
        cls, qkv: nn.Linear, out: nn.Linear, heads: int, norm: nn.LayerNorm | None, eps: float | None,
        *, rank: int, alpha: float | None,
    ) -> AxialFusionAttention:  # fmt: skip
        new = cls(qkv.in_features, heads, rank=rank, alpha=alpha, norm=norm is not None,
                  residual=norm is not None, eps=1e-6 if eps is None else eps)  # fmt: skip
        new = new.to(device=qkv.weight.device, dtype=qkv.weight.dtype)
        with torch.no_grad():
            for half in new.halves():
                half.qkv.weight.copy_(qkv.weight)
                half.out.weight.copy_(out.weight)
                for ours, theirs in ((half.qkv.bias, qkv.bias), (half.out.bias, out.bias)):
                    ours.zero_() if theirs is None else ours.copy_(theirs)
                if norm is not None and half.norm is not None:
                    half.norm.weight.copy_(norm.weight)
                    half.norm.bias.zero_() if norm.bias is None else half.norm.bias.copy_(norm.bias)
            assert new.inter is not None
            new.inter.out.weight.zero_()
            new.inter.out.bias.zero_()
        return new


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
