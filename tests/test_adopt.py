"""Attention of other libraries turned into ours, equal in output where the mathematics is equal.

Each example is what a user of that library writes; the blocks of README and how-to/lift.md are run word for word."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from axial_fusion import AttentionWeights, AxialFusionAttention, axial_fusion_attention
from axial_fusion.sam import SamAttention

ROOT = Path(__file__).parents[1]
PAGES = "".join((ROOT / page).read_text() for page in ("README.md", "docs/how-to/lift.md"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def readme():
    """The lines about the library in README and on the page about lifting, by what they show."""
    shown = {
        name: code
        for code in re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL)
        for name in ("num_heads=8", "from_attention", "accelerate_sam")
        if name in code
    }
    assert len(shown) == 3
    return shown


def _run(code):
    names = {}
    exec(code, names)
    return names


def test_readmes_op_runs_word_for_word(readme):
    assert _run(readme["num_heads=8"])["y"].shape == (1, 9, 16, 16, 256)


def test_readmes_vit_starts_with_the_features_of_the_2d_model(readme):
    pytest.importorskip("timm")
    adopted = _run(readme["from_attention"])
    flat = _run(readme["from_attention"].partition("for block in vit.blocks:")[0])["vit"]
    names = {k.replace(".attn.intra.out.", ".attn.proj.").replace(".attn.intra.", ".attn."): v
             for k, v in adopted["vit"].state_dict().items() if ".attn.inter." not in k}  # fmt: skip
    flat.load_state_dict(names)
    expected = flat.forward_features(adopted["slices"])
    torch.testing.assert_close(adopted["features"], expected, rtol=1e-4, atol=1e-4)


def test_readmes_sam_is_accelerated(readme):
    pytest.importorskip("torchvision")  # which segment_anything imports
    encoder = _run(readme["accelerate_sam"])["sam"].image_encoder
    assert all(isinstance(block.attn, SamAttention) for block in encoder.blocks)


def test_a_timm_block_becomes_a_3d_block_that_starts_as_the_2d_one():
    vit = pytest.importorskip("timm").models.vision_transformer
    block, x = vit.Block(48, 3, qkv_bias=True), torch.randn(2, 5, 16, 48)  # (B, N, P, C)
    before = block(x.flatten(0, 1)).unflatten(0, (2, 5))

    # In its own place: its block keeps norm and residual.
    block.attn = AxialFusionAttention.from_attention(block.attn)

    torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)
    nn.init.normal_(block.attn.inter.out.weight, std=0.1)  # what training does: neighbours begin to matter
    assert (block(x) - before).abs().max() > 1e-2


def test_a_divided_attention_of_timesformer():
    """Time attention is the axial half, its extra linear layer folded into the output projection; space attention is
    the slice half, with the class token as one more position of every frame."""
    from transformers import TimesformerConfig
    from transformers.models.timesformer.modeling_timesformer import TimesformerLayer

    frames, side = 4, 3
    config = TimesformerConfig(
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=64,
        num_frames=frames,
        image_size=6,
        patch_size=2,
    )
    theirs, tokens = TimesformerLayer(config, 0), torch.randn(2, 1 + frames * side * side, 48)
    expected = theirs(tokens)[0]

    fc, time, space = theirs.temporal_dense, theirs.temporal_attention, theirs.attention
    inter = AttentionWeights(
        time.attention.qkv.weight, time.attention.qkv.bias,
        fc.weight @ time.output.dense.weight, F.linear(time.output.dense.bias, fc.weight, fc.bias),
        theirs.temporal_layernorm.weight, theirs.temporal_layernorm.bias,
    )  # fmt: skip
    intra = AttentionWeights(
        space.attention.qkv.weight, space.attention.qkv.bias, space.output.dense.weight, space.output.dense.bias,
        theirs.layernorm_before.weight, theirs.layernorm_before.bias,
    )  # fmt: skip
    first, patches = tokens[:, :1], tokens[:, 1:]
    x = patches.unflatten(1, (-1, frames)).transpose(1, 2)  # (B, N, P, C), a view
    x = axial_fusion_attention(x, inter, None, num_heads=3)
    joined = torch.cat([first[:, None].expand(-1, frames, -1, -1), x], 2)
    y = axial_fusion_attention(joined, None, intra, num_heads=3)
    z = torch.cat([y[:, :, :1].mean(1), y[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)
    ours = z + theirs.output(theirs.intermediate(theirs.layernorm_after(z)))

    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_temporal_attention_of_diffusers():
    """A motion module attends over frames at each position: the axial half without norm and residual, in the feature
    map's own layout instead of (B·P, N, C)."""
    processor = pytest.importorskip("diffusers.models.attention_processor")
    theirs = processor.Attention(48, heads=3, dim_head=16)
    features = torch.randn(2, 5, 48, 4, 4)  # (B, frames, C, H', W')
    rows = features.permute(0, 3, 4, 1, 2).reshape(-1, 5, 48)
    expected = theirs(rows).unflatten(0, (2, 4, 4)).movedim(3, 1)  # (B, N, H', W', C)

    weights = AttentionWeights(
        torch.cat([theirs.to_q.weight, theirs.to_k.weight, theirs.to_v.weight]), None,
        theirs.to_out[0].weight, theirs.to_out[0].bias,
    )  # fmt: skip
    x = features.movedim(2, -1)  # (B, N, H', W', C)
    ours = axial_fusion_attention(x, weights, None, num_heads=3, residual=False)

    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
