"""Axial Fusion Transformer: attention across the slices of a group, then within each slice.

Source: AFTer-UNet, arXiv 2110.10403, and AFTer-SAM sections 3.3 and 3.4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from aftersam.model.layers import DenseLinear, RowNorm
from aftersam.model.lora import LoRAOptions
from axial_fusion import AxialFusionAttention


class AxialFusionTransformer(nn.Module):
    """L blocks over slice groups, on features plus learned positions.

    The position tables are made for `grid` (N, h, w), the slices of a group and their token grid; another h, w
    interpolates them. `position_embedding` "factored" adds a table over positions and one over slices, "full" a
    table over the pairs. `fusion_init` "zero" makes the transformer the identity at the first step. With `lora`, q
    and v of every attention have LoRA."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_blocks: int,
        *,
        grid: tuple[int, int, int],
        attention: Literal["both", "axial", "slice"] = "both",
        position_embedding: Literal["factored", "full"] = "factored",
        fusion_init: Literal["zero", "xavier"] = "zero",
        lora: LoRAOptions | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            AxialFusionBlock(dim, num_heads, attention=attention, lora=lora) for _ in range(num_blocks)
        )
        self.activation_checkpointing = False
        slices, height, width = grid
        shared = position_embedding == "factored"  # one table over positions for all slices
        # (N or 1, h, w, C)
        self.position = nn.Parameter(torch.zeros(1 if shared else slices, height, width, dim))
        self.slice_position = nn.Parameter(torch.zeros(slices, 1, 1, dim)) if shared else None
        for block in self.blocks:
            block.reset_parameters(zero=fusion_init == "zero")
        if fusion_init == "xavier":
            for table in (self.position, self.slice_position):
                if table is not None:
                    nn.init.trunc_normal_(table, std=0.02)

    def forward(self, embedding: Tensor, *, query_index: Sequence[int] | None = None) -> Tensor:
        """embedding (B, N, C, h, w) -> (B, N, C, h, w); with `query_index`, those slices alone: (B, Nq, C, h, w).

        The last block computes only the queried slices; blocks before it need all of them."""
        _, slices, _, height, width = embedding.shape
        positions = self.positions(height, width)
        if positions.shape[0] not in (1, slices):
            raise ValueError(
                f"num_slices is {slices} in the group, but {positions.shape[0]} in the positions"
            )
        x = embedding.movedim(2, -1) + positions.to(embedding.dtype)  # (B, N, h, w, C)
        x = x.flatten(2, 3)  # (B, N, P, C)
        x = x.contiguous()  # strided sums and copies took 7.1 of 26.6 ms on an H100
        for i, block in enumerate(self.blocks):
            queries = query_index if i == len(self.blocks) - 1 else None
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, queries, use_reentrant=False)
            else:
                x = block(x, queries)
        return x.unflatten(2, (height, width)).movedim(-1, 2)

    def freeze_projections(self) -> None:
        """The paper's equations: W_Q, W_K, W_V stay as they are, LoRA alone changes q and v."""
        for block in self.blocks:
            block.attention.freeze_projections()

    def positions(self, height: int, width: int) -> Tensor:
        """The table (N or 1, height, width, C), interpolated where the grid differs from the one it was made for."""
        table: Tensor = self.position
        if table.shape[1:3] != (height, width):
            table = F.interpolate(table.movedim(-1, 1), size=(height, width), mode="bilinear").movedim(1, -1)
        return table if self.slice_position is None else table + self.slice_position


class AxialFusionBlock(nn.Module):
    """Pre-norm residual block on tokens (B, N, P, C): axial attention, slice attention, MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        attention: Literal["both", "axial", "slice"] = "both",
        lora: LoRAOptions | None = None,
    ) -> None:
        super().__init__()
        options = {} if lora is None else lora._asdict()
        self.attention = AxialFusionAttention(dim, num_heads, attention=attention, **options)
        self.norm = RowNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            DenseLinear(dim, int(dim * mlp_ratio)), nn.GELU(), DenseLinear(int(dim * mlp_ratio), dim)
        )

    def reset_parameters(self, *, zero: bool) -> None:
        """Xavier weights and zero biases; with `zero`, the last layer of each residual branch is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if zero:
            for layer in (*(half.out for half in self.attention.halves()), self.mlp[-1]):
                nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, query_index: Sequence[int] | None = None) -> Tensor:
        x = self.attention(x, query_index=query_index)  # (B, Nq, P, C), each half with its residual
        return x + self.mlp(self.norm(x))
