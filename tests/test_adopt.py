"""Attention of other libraries turned into ours, equal in output where the mathematics is equal.

The modules below have the layout, names and arithmetic of the libraries that their docstrings name; each example is
what a user of that library writes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from axial_fusion import AttentionWeights, AxialFusionAttention, axial_fusion_attention


class TimmAttention(nn.Module):
    """timm.models.vision_transformer.Attention: one qkv, tokens (B', P, C)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = self.k_norm = nn.Identity()
        self.attn_drop = self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TimmBlock(nn.Module):
    """timm.models.vision_transformer.Block without layer scale and stochastic depth."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = (
            nn.LayerNorm(dim, eps=1e-6), TimmAttention(dim, num_heads), nn.Identity(), nn.Identity()
        )  # fmt: skip
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), nn.Sequential(nn.Linear(dim, dim), nn.GELU())

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class DividedBlock(nn.Module):
    """TimeSformer's divided space-time block: tokens (B, 1 + P·N, C), class token first, then position by position."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.temporal_norm1, self.temporal_attn = nn.LayerNorm(dim, eps=1e-6), TimmAttention(dim, num_heads)
        self.temporal_fc = nn.Linear(dim, dim)
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), TimmAttention(dim, num_heads)

    def forward(self, x, frames):
        batch, channels = x.shape[0], x.shape[-1]
        first, patches = x[:, :1], x[:, 1:]
        positions = patches.shape[1] // frames
        z = patches.reshape(batch * positions, frames, channels)
        z = self.temporal_fc(self.temporal_attn(self.temporal_norm1(z))).reshape(patches.shape)
        patches = patches + z
        rows = patches.reshape(batch, positions, frames, channels).transpose(1, 2).flatten(0, 1)
        joined = torch.cat([first.repeat_interleave(frames, 0), rows], 1)
        update = self.attn(self.norm1(joined))
        first_update = update[:, :1].unflatten(0, (batch, frames)).mean(1)
        update = update[:, 1:].unflatten(0, (batch, frames)).transpose(1, 2).reshape(patches.shape)
        return torch.cat([first + first_update, patches + update], 1)


class DiffusersAttention(nn.Module):
    """diffusers.models.attention_processor.Attention as a motion module uses it: separate q, k, v without bias."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(self, x):
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_timm_block_becomes_a_3d_block_that_starts_as_the_2d_one():
    block, x = TimmBlock(48, 3), torch.randn(2, 5, 16, 48)  # (B, N, P, C)
    before = block(x.flatten(0, 1)).unflatten(0, (2, 5))

    block.attn = AxialFusionAttention.from_attention(
        block.attn
    )  # in its own place: its block keeps norm and residual

    torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)
    nn.init.normal_(block.attn.inter.out.weight, std=0.1)  # what training does: neighbours begin to matter
    assert (block(x) - before).abs().max() > 1e-2


def test_from_block_takes_norm_and_residual_along():
    block, x = TimmBlock(48, 3), torch.randn(2, 5, 4, 4, 48)
    attention = AxialFusionAttention.from_block(block)
    tokens = x.flatten(2, 3).flatten(0, 1)
    expected = tokens + block.attn(block.norm1(tokens))
    torch.testing.assert_close(attention(x).flatten(2, 3).flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_a_divided_attention_of_timesformer():
    """Time attention is the axial half, its extra linear layer folded into the output projection; space attention is
    the slice half, with the class token as one more position of every frame."""
    theirs, frames, side = DividedBlock(48, 3), 4, 3
    tokens = torch.randn(2, 1 + frames * side * side, 48)
    expected = theirs(tokens, frames)

    fc, time, space = theirs.temporal_fc, theirs.temporal_attn, theirs.attn
    inter = AttentionWeights(
        time.qkv.weight, time.qkv.bias,
        fc.weight @ time.proj.weight, F.linear(time.proj.bias, fc.weight, fc.bias),
        theirs.temporal_norm1.weight, theirs.temporal_norm1.bias,
    )  # fmt: skip
    intra = AttentionWeights(
        space.qkv.weight,
        space.qkv.bias,
        space.proj.weight,
        space.proj.bias,
        theirs.norm1.weight,
        theirs.norm1.bias,
    )
    first, patches = tokens[:, :1], tokens[:, 1:]
    x = patches.unflatten(1, (-1, frames)).transpose(1, 2)  # (B, N, P, C), a view
    x = axial_fusion_attention(x, inter, None, num_heads=3)
    joined = torch.cat([first[:, None].expand(-1, frames, -1, -1), x], 2)
    y = axial_fusion_attention(joined, None, intra, num_heads=3)
    ours = torch.cat([y[:, :, :1].mean(1), y[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)

    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_temporal_attention_of_diffusers():
    """A motion module attends over frames at each position: the axial half without norm and residual, in the feature
    map's own layout instead of (B·P, N, C)."""
    theirs, features = DiffusersAttention(48, 3), torch.randn(2, 5, 48, 4, 4)  # (B, frames, C, H', W')
    rows = features.permute(0, 3, 4, 1, 2).reshape(-1, 5, 48)
    expected = theirs(rows).unflatten(0, (2, 4, 4)).movedim(3, 1)  # (B, N, H', W', C)

    weights = AttentionWeights(
        torch.cat([theirs.to_q.weight, theirs.to_k.weight, theirs.to_v.weight]), None,
        theirs.to_out[0].weight, theirs.to_out[0].bias,
    )  # fmt: skip
    x = features.movedim(2, -1)  # (B, N, H', W', C)
    ours = axial_fusion_attention(x, weights, None, num_heads=3, residual=False)

    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
