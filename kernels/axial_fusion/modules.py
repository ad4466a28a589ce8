"""Thin modules over the ops: parameters, initialisation and conversion, no arithmetic of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axial_fusion.lora import LoRAUpdates, runs_more
from axial_fusion.ops.axial_attention import axial_attention
from axial_fusion.ops.axial_fusion_attention import _checked_index, axial_fusion_attention
from axial_fusion.ops.slice_attention import slice_attention
from axial_fusion.reference import AttentionWeights

_PLAIN = (nn.Linear, nn.LayerNorm)


class AxialFusionAttention(nn.Module):
    """Axial attention, then slice attention, on tokens (B, N, P, C) or (B, N, H', W', C).

    "Axial" means across the N slices at one position, not along the rows or columns of an image. `attention`
    leaves one half out. `rank` > 0 puts LoRA on q and v of both halves; what is frozen beside it is the
    caller's choice (`freeze_projections`). `norm` and `residual` False fit the module into a block that has its
    own.

    The op reads the weights of plain layers. Where one is of another class or has hooks (adapters, quantised layers,
    pruning, sharding or offloading by layer), every layer is called instead, which is right and slower."""

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
        if dim < 1 or rank < 0:
            raise ValueError(f"dim is {dim} and rank {rank}, but must be at least 1 and at least 0")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, but must lie in [0, 1)")
        if attention not in ("both", "axial", "slice"):
            raise ValueError(f"attention is {attention!r}, but must be both, axial or slice")
        self.num_heads = num_heads
        self.residual = residual
        self.eps = eps
        self.dropout = dropout
        halves = {"both": (True, True), "axial": (True, False), "slice": (False, True)}[attention]
        options = {"rank": rank, "alpha": alpha, "norm": norm, "eps": eps}
        self.inter = AttentionHalf(dim, **options) if halves[0] else None
        self.intra = AttentionHalf(dim, **options) if halves[1] else None

    def forward(self, x: Tensor, query_index: Sequence[int] | None = None) -> Tensor:
        """x (B, N, P, C) or (B, N, H', W', C) -> the same; with `query_index` those slices alone."""
        if not all(half.is_plain() for half in self.halves()):
            return self._by_calls(x, query_index)
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
        """The same by calling each layer, so that its hooks run and its class computes."""
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
        """What the constructor makes, of both halves."""
        for half in self.halves():
            half.reset_parameters()

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
        qkv, out, heads = _attention_parts(attention)
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
        qkv, out, heads = _attention_parts(block.attn)
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

    def __init__(self, dim: int, *, rank: int, alpha: float | None, norm: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps) if norm else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.rank = rank
        if rank:
            self.add_lora(rank, alpha)

    def is_plain(self) -> bool:
        """Whether reading the weights of the layers comes to the same as calling the layers."""
        if type(self) is not AttentionHalf or runs_more(self):
            return False
        for layer in self._modules.values():
            if layer is not None and (type(layer) not in _PLAIN or runs_more(layer)):
                return False
        return True

    def forward(
        self, x: Tensor, attend: Callable[..., Tensor], index: Any, *, num_heads: int, dropout_p: float
    ) -> Tensor:
        """This half by calling its layers: x (B, N, P, C) -> its update (B, Nq, P, C) of the slices `index`."""
        z = x if self.norm is None else self.norm(x)
        qkv = self.qkv(z)
        q, k, v = (self.through(qkv) if self.merged else qkv).chunk(3, -1)
        if self.rank and not self.merged:
            seen = F.dropout(z, dropout_p) if dropout_p else z
            q, v = (t + self._update(seen, part) for t, part in ((q, "q"), (v, "v")))
        q, k, v = (t.unflatten(-1, (num_heads, -1)) for t in (q[:, index], k, v))
        return self.out(attend(q, k, v).flatten(3)).to(x.dtype)

    def _update(self, z: Tensor, part: str) -> Tensor:
        a, b, scaling = self.lora(part)
        return scaling * F.linear(F.linear(z, a.to(z.dtype)), b.to(z.dtype))

    def base(self) -> nn.Module:
        """The fused projection."""
        return self.qkv

    def reset_parameters(self) -> None:
        """What the constructor makes, of the layers and of LoRA."""
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
        """The parameters as they are now; nothing is cached, so that optimisers and DDP see one truth."""
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


def _attention_parts(attention: nn.Module) -> tuple[nn.Linear, nn.Linear, int]:
    """Fused q, k, v projection, output projection and heads of a 2D attention, or ValueError."""
    kind = type(attention).__name__
    if isinstance(attention, nn.MultiheadAttention):
        if not attention._qkv_same_embed_dim:
            raise ValueError(f"{kind} has keys or values of another size than its queries")
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(f"{kind} adds keys of its own (add_bias_kv or add_zero_attn)")
        if attention.dropout:
            raise ValueError(f"{kind} has attention dropout of {attention.dropout}, which this op does not")
        qkv = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, device="meta")
        qkv.weight = attention.in_proj_weight
        qkv.bias = attention.in_proj_bias
        return qkv, _plain_linear(attention.out_proj, kind, "out_proj"), attention.num_heads
    for name in ("qkv", "proj", "num_heads"):
        if not hasattr(attention, name):
            raise ValueError(
                f"{kind} has no {name!r}; from_attention takes timm's, SAM's or nn.MultiheadAttention"
            )
    for name in ("q_norm", "k_norm", "norm"):
        part = getattr(attention, name, None)
        if part is not None and not isinstance(part, nn.Identity):
            raise ValueError(
                f"{kind} has {name!r}, a norm of queries, keys or outputs, which this op does not"
            )
    for name in ("rope", "rotary_emb", "pos_embed"):
        if getattr(attention, name, None) is not None:
            raise ValueError(f"{kind} has {name!r}, a rotary position embedding, which this op does not")
    for name in ("rel_pos_h", "relative_position_bias_table", "rel_pos"):
        if getattr(attention, name, None) is not None:
            raise ValueError(f"{kind} has {name!r}: relative positions; use rel_pos_attention for SAM's")
    for name in ("attn_drop", "proj_drop"):
        part = getattr(attention, name, None)
        if isinstance(part, nn.Dropout) and part.p:
            raise ValueError(f"{kind} has dropout of {part.p} in {name!r}, which this op does not")
    qkv, proj = (_plain_linear(getattr(attention, name), kind, name) for name in ("qkv", "proj"))
    if qkv.out_features != 3 * qkv.in_features or proj.in_features != qkv.in_features:
        raise ValueError(
            f"{kind} projects {qkv.in_features} to {qkv.out_features}; q, k and v must each keep C"
        )
    return qkv, proj, int(attention.num_heads)


def _plain_linear(layer: Any, kind: str, name: str) -> nn.Linear:
    """`layer`, or ValueError where it is not nn.Linear itself: quantised, or wrapped by an adapter."""
    if type(layer) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError(f"{kind}.{name} is {type(layer).__name__}, but must be a plain nn.Linear")
    if not layer.weight.dtype.is_floating_point:
        raise ValueError(
            f"{kind}.{name} has weights of {layer.weight.dtype}: quantised layers cannot be taken over"
        )
    return layer
