"""The axial half in front of a lifted block, and what all halves of a model share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .blocks import Block
from .modules import AttentionHalf, AxialFusionAttention
from .reference import AttentionWeights


class SliceGroups:
    """What a lifted model and its blocks share: N, the batch of the call that runs, and how to undo it all."""

    def __init__(self, num_slices: int) -> None:
        self.num_slices = num_slices
        self.rows: tuple[int, ...] = ()  # what B·N may be in the call that runs; empty where it is not known
        self.batch: int | None = None  # B of an input (B, N, ...), to which the output returns
        self.image_dims = 0  # axes of the 2D model's input; one more means (B, N, ...)
        self.handles: list[RemovableHandle] = []
        self.frozen: list[str] = []  # parameters of the host that lift froze
        self.nested: list[str] = []  # encoders of torch that made nested tensors


class AcrossSlices(AxialFusionAttention):
    """The axial half of a lifted block: tokens as the block takes them -> tokens + FC(Attn_N(LN(tokens)))."""

    def __init__(
        self, name: str, block: Block, groups: SliceGroups, *, num_heads: int | None, alone: int
    ) -> None:
        heads = block.heads if num_heads is None else num_heads
        super().__init__(block.dim, heads, attention="axial", residual=False)
        self.set_eps(getattr(block.norm, "eps", None) or self.eps)
        self.name, self.groups, self.alone = name, groups, alone
        self.dim, self.layout, self.argument = block.dim, block.layout, block.argument
        like = next((p for p in block.module.parameters() if p.is_floating_point()), torch.empty(()))
        self.to(device=like.device, dtype=like.dtype).train(block.module.training)
        self.from_host = self._start_from(block)

    @torch.no_grad()
    def _start_from(self, block: Block) -> bool:
        """Copy the host's norm and projections where their shapes fit; returns whether q, k and v were copied."""
        half, norm = self.inter, block.norm
        assert half is not None
        nn.init.zeros_(half.out.weight)
        nn.init.zeros_(half.out.bias)
        assert half.norm is not None
        if isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.weight.shape == (self.dim,):
            half.norm.weight.copy_(norm.weight)
            if norm.bias is not None:
                half.norm.bias.copy_(norm.bias)
        parts = [] if block.projections is None else list(block.projections.values())
        if not parts or any(part.weight.shape != (self.dim, self.dim) for part in parts):
            return False
        half.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        for ours, part in zip(half.qkv.bias.chunk(3), parts, strict=True):
            ours.zero_() if part.bias is None else ours.copy_(part.bias)
        return True

    def reduce(self, rank: int, alpha: float | None) -> None:
        """Train low-rank updates of q, v and the output projection in place of the weights."""
        full = self.inter
        assert full is not None
        self.inter = LowRankHalf(self.dim, rank=rank, alpha=alpha, norm=True).to(full.qkv.weight)
        self.inter.load_state_dict(full.state_dict(), strict=False)
        self.inter.reset_lora()
        self.inter.out.weight.requires_grad_(False)
        self.inter.qkv.requires_grad_(not self.from_host)

    def added(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are not copies of the host's."""
        for name, parameter in self.named_parameters():
            low_rank = isinstance(self.inter, LowRankHalf)
            if not (low_rank and (name == "inter.out.weight" or (self.from_host and ".qkv." in name))):
                yield name, parameter

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]  # narrower than nn.Module's
        n = self.groups.num_slices
        x = tokens if self.layout == "slices" else tokens.transpose(0, 1)  # (B·N, P, C) or (B·N, H', W', C)
        self._check(x, n)
        grouped = x.reshape(x.shape[0] // n, n, math.prod(x.shape[1:-1]), self.dim)
        update = super().forward(grouped[:, :, self.alone :] if self.alone else grouped)
        if self.alone:
            update = F.pad(update, (0, 0, self.alone, 0))
        update = update.reshape(x.shape)
        return tokens + (update if self.layout == "slices" else update.transpose(0, 1))

    def _check(self, x: Tensor, n: int) -> None:
        if x.dim() < 3 or x.shape[-1] != self.dim or x.is_nested:
            raise ValueError(
                f"lift: {self.name!r} got tokens {tuple(x.shape)}, but needs (B·N, P, {self.dim}) or "
                f"(B·N, H', W', {self.dim})"
            )
        rows = x.shape[0]
        if self.layout == "positions":
            if rows != n:
                raise ValueError(
                    f"lift: {self.name!r} got N = {rows} for each position, but num_slices is {n}"
                )
        elif rows % n:
            raise ValueError(
                f"lift: {self.name!r} got tokens {tuple(x.shape)}, but num_slices is {n} and does not divide {rows}; "
                "give B·N slices, group after group, or change num_slices with set_num_slices"
            )
        elif self.layout == "slices" and self.groups.rows and rows not in self.groups.rows:
            raise ValueError(
                f"lift: {self.name!r} got tokens {tuple(x.shape)} in a call with B·N = {self.groups.rows[0]}: the rows "
                "are windows or positions, not slices; leave this block out with where, or lift it by itself"
            )


class LowRankHalf(AttentionHalf):
    """An axial half whose output projection is a low-rank product too: W_O + scaling · B A, W_O zero."""

    parts = ("q", "v", "out")

    def updated_weights(self) -> dict[str, Tensor]:
        return super().updated_weights() | {"out": self.out.weight}

    def weights(self) -> AttentionWeights:
        if self.merged:
            return super().weights()
        a, b, scaling = self.lora("out")
        wide = torch.promote_types(b.dtype, torch.float32)
        update = (scaling * (b.to(wide) @ a.to(wide))).to(self.out.weight.dtype)
        return super().weights()._replace(out_weight=self.out.weight + update)

    def project(self, o: Tensor) -> Tensor:
        y = self.out(o)
        return y if self.merged else y + self.update(o, "out")


def groups_of(model: nn.Module) -> SliceGroups:
    groups = getattr(model, "slice_groups", None)
    if not isinstance(groups, SliceGroups):
        raise ValueError(f"{type(model).__name__} is not lifted; give the module that lift was called on")
    return groups
