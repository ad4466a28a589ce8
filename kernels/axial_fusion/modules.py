"""Thin modules over the ops: parameters, initialisation and conversion, no arithmetic of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .hosts import (
    AttentionParts,
    HostCall,
    Part,
    attention_parts,
    block_parts,
    self_attention_input,
)
from .lora import LoRAUpdates, runs_more
from .ops.axial_attention import axial_attention
from .ops.axial_fusion_attention import (
    _checked_index,
    axial_fusion_attention,
)
from .ops.slice_attention import slice_attention
from .reference import AttentionWeights

_PLAIN = frozenset((nn.Linear, nn.LayerNorm, type(None)))


class AxialFusionAttention(nn.Module):
    """Axial attention, then slice attention, on tokens (B, N, P, C) or (B, N, H', W', C).

    "Axial" means across the N slices at one position, not along the rows or columns of an image. `attention`
    leaves one half out. `rank` > 0 puts LoRA on q and v of both halves; the caller decides
    what is frozen (`freeze_projections`). `norm` and `residual` False fit the module into a block that has its
    own.

    The op reads the weights of plain layers. Where one is of another class or has hooks (adapters, quantised layers,
    pruning, sharding or offloading by layer), every layer is called instead, which is right and slower."""

    host = HostCall()  # how the host calls this module, where it is made from a host's attention
    training_only = ""  # the host's dropout, described; evaluation skips it
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
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, but must divide dim = {dim}")
        if dim < 1 or rank < 0:
            raise ValueError(f"dim is {dim} and rank {rank}, but must be at least 1 and at least 0")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, but must lie in [0, 1)")
        if attention not in ("both", "axial", "slice"):
            raise ValueError(f"attention is {attention!r}, but must be both, axial or slice")
        self.num_heads = num_heads
        self.residual = residual
        self.eps = 1e-6  # eps of the norms; set_eps changes it
        self.dropout = dropout
        halves = {"both": (True, True), "axial": (True, False), "slice": (False, True)}[attention]
        options = {"rank": rank, "alpha": alpha, "norm": norm}
        self.inter = AttentionHalf(dim, **options) if halves[0] else None
        self.intra = AttentionHalf(dim, **options) if halves[1] else None

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
        plain = True
        for half in self._modules.values():  # cheaper than a generator over halves(), on every call
            plain = plain and (half is None or half.is_plain())
        y = (self._fused if plain else self._by_calls)(host.to_slices(x), query_index)
        y = host.from_slices(y)
        return (y, None) if host.returns_pair(alone) else y

    def set_eps(self, eps: float) -> None:
        """Set what the LayerNorms of both halves add to the variance."""
        self.eps = eps
        for half in self.halves():
            if half.norm is not None:
                half.norm.eps = eps

    def train(self, mode: bool = True) -> AxialFusionAttention:
        """Like nn.Module.train. Raises ValueError where the host's dropout would be missing."""
        if mode and self.training_only:
            raise ValueError(
                f"AxialFusionAttention was made from a host in evaluation, without its {self.training_only}, which acts"
                " in training; set that to 0 before from_attention or from_block"
            )
        return super().train(mode)

    def _fused(self, x: Tensor, query_index: Sequence[int] | None) -> Tensor:
        """The op, which reads the weights of plain layers."""
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

    def _by_calls(self, x: Tensor, query_index: Sequence[int] | None) -> Tensor:
        """The same result by calling each layer, so that hooks run and subclasses compute."""
        grid = x.shape[2:-1]
        x = x.flatten(2, 3) if len(grid) == 2 else x  # (B, N, P, C)
        every = slice(None)
        index = every if query_index is None else _checked_index(query_index, x.shape[1])
        options = {"num_heads": self.num_heads, "dropout_p": self.dropout if self.training else 0.0}
        if self.inter is not None:
            update = self.inter(x, axial_attention, index, **options)
            x = x[:, index] + update if self.residual or self.intra is not None else update
        else:
            x = x[:, index]
        if self.intra is not None:
            update = self.intra(x, slice_attention, every, **options)
            x = x + update if self.residual else update
        return x if len(grid) == 1 else x.unflatten(2, grid)

    def reset_parameters(self) -> None:
        """Initialise both halves as the constructor does."""
        for half in self.halves():
            half.reset_parameters()

    def halves(self) -> list[AttentionHalf]:
        """The halves that the module has, across slices first."""
        return [half for half in (self.inter, self.intra) if half is not None]

    def freeze_projections(self) -> None:
        """Freeze W_Q, W_K, W_V and their biases. With `rank` > 0 this gives the paper's LoRA equations."""
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
        own = norm is not None
        new = cls(weight.shape[0], parts.heads, rank=rank, alpha=alpha, norm=own, residual=own)
        if norm is not None:
            new.set_eps(norm.eps)
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
    """Copy weights and biases into `layer`, stacked in rows. A missing bias becomes 0; frozen ones stay frozen."""
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
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.rank = rank
        if rank:
            self.add_lora(rank, alpha)

    def is_plain(self) -> bool:
        """Whether reading the layers' weights gives the same result as calling the layers."""
        layers = self._modules.values()  # their hooks, and those of a half that is sharded by itself
        return _PLAIN.issuperset(map(type, layers)) and not (
            runs_more(self, *layers) or nn.modules.module._has_any_global_hook()
        )

    def forward(
        self, x: Tensor, attend: Callable[..., Tensor], index: Any, *, num_heads: int, dropout_p: float
    ) -> Tensor:
        """This half by calling its layers: x (B, N, P, C) -> its update (B, Nq, P, C) of the slices `index`."""
        z = x if self.norm is None else self.norm(x)
        qkv = self.qkv(z)
        q, k, v = (self.through(qkv) if self.merged else qkv).chunk(3, -1)
        if self.rank and not self.merged:
            seen = F.dropout(z, dropout_p) if dropout_p else z
            q, v = (t + self.update(seen, part) for t, part in ((q, "q"), (v, "v")))
        q, k, v = (t.unflatten(-1, (num_heads, -1)) for t in (q[:, index], k, v))
        return self.project(attend(q, k, v).flatten(3)).to(x.dtype)

    def update(self, z: Tensor, part: str) -> Tensor:
        """scaling · B A z of one part."""
        a, b, scaling = self.lora(part)
        return scaling * F.linear(F.linear(z, a.to(z.dtype)), b.to(z.dtype))

    def project(self, o: Tensor) -> Tensor:
        """The output projection, by calling it."""
        return self.out(o)  # type: ignore[no-any-return]  # a module's call is Any

    def base(self) -> nn.Module:
        """The fused projection."""
        return self.qkv

    def reset_parameters(self) -> None:
        """Initialise the layers and LoRA as the constructor does."""
        self.merged = False
        for layer in (self.norm, self.qkv, self.out):
            if layer is not None:
                layer.reset_parameters()
        self.reset_lora()

    def updated_weights(self) -> dict[str, Tensor]:
        """The rows of q and of v."""
        q, _, v = self.qkv.weight.chunk(3)
        return {"q": q, "v": v}

    def weights(self) -> AttentionWeights:
        """The current parameters. Nothing is cached, so that optimisers and DDP always see them."""
        live = self.rank > 0 and not self.merged
        return AttentionWeights(
            self.through(self.qkv.weight) if self.merged else self.qkv.weight,
            self.qkv.bias,
            self.out.weight,
            self.out.bias,
            None if self.norm is None else self.norm.weight,
            None if self.norm is None else self.norm.bias,
            self.lora("q") if live else None,
            self.lora("v") if live else None,
        )
