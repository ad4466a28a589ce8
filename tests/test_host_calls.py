"""The module in the place of a host's attention: called as the host calls it, refusing what it cannot do by name."""

import copy

import pytest
import torch
from torch import nn

from axial_fusion import AxialFusionAttention

timm, _, _ = (pytest.importorskip(package) for package in ("timm", "torchvision", "diffusers"))
N, from_attention = 3, AxialFusionAttention.from_attention
ATTENTIONS = {"Attention", "MultiheadAttention", "ViTAttention", "CLIPAttention", "SABlock"}


def _timm_vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, init_values=0.5)


def _torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 16, 2, 4, 48, 64)


def _torch_encoder(batch_first=True, norm_first=False):
    layer = nn.TransformerEncoderLayer(48, 4, 64, 0.0, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)


def _vit_of_transformers():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTModel(ViTConfig(**sizes, image_size=32), add_pooling_layer=False)


def _clip_of_transformers():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16))


def _sam():
    from segment_anything.modeling.image_encoder import ImageEncoderViT

    return ImageEncoderViT(32, 16, 3, 48, 2, 4, out_chans=16)


def _monai_vit():
    from monai.networks.nets import ViT

    return ViT(3, (32, 32), (16, 16), 48, 64, 2, 4, spatial_dims=2)


def _diffusers_block():
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(48, 4, 12)


IMAGES, TOKENS = (2 * N, 3, 32, 32), (2 * N, 7, 48)
HOSTS = {
    "timm": (_timm_vit, IMAGES),
    "torchvision": (_torchvision_vit, IMAGES),
    "torch": (_torch_encoder, TOKENS),
    "torch, sequence first": (lambda: _torch_encoder(False), (7, 2 * N, 48)),
    "torch, norm first": (lambda: _torch_encoder(norm_first=True), TOKENS),
    "transformers ViT": (_vit_of_transformers, IMAGES),
    "transformers CLIP": (_clip_of_transformers, IMAGES),
    "SAM": (_sam, IMAGES),
    "MONAI": (_monai_vit, IMAGES),
    "diffusers": (_diffusers_block, TOKENS),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _adopted(model):
    """A copy of a host with each of its attentions replaced."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in ATTENTIONS:
                setattr(module, name, from_attention(child, num_slices=N))
    return model


def _output(model, x):
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    return getattr(y, "last_hidden_state", y)


def _host(name):
    """A host in evaluation whose weights are all at work, and an input of two groups of N slices."""
    make, shape = HOSTS[name]
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, torch.randn(shape)


@pytest.mark.parametrize("host", HOSTS)
def test_a_whole_host_starts_equal_and_its_neighbours_begin_to_matter(host):
    flat, x = _host(host)
    deep = _adopted(flat)
    attentions = [m for m in deep.modules() if isinstance(m, AxialFusionAttention)]
    assert attentions
    torch.testing.assert_close(_output(deep, x), _output(flat, x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(_output(deep, x), _output(flat, x), rtol=1e-4, atol=1e-5)
    _output(deep.train(), x).square().sum().backward()
    assert all(
        a.inter.out.weight.grad.abs().sum() > 0 and a.intra.qkv.weight.grad.abs().sum() > 0
        for a in attentions
    )
    for attention in attentions:
        nn.init.normal_(attention.inter.out.weight, std=0.1)
    sequence_first = host == "torch, sequence first"
    changed = x.clone()
    (changed[:, 0] if sequence_first else changed[0]).normal_()  # another first slice of the first group
    slices = (
        (_output(deep, changed) - _output(deep, x)).abs().transpose(0, int(sequence_first)).flatten(1).amax(1)
    )
    assert (slices[:N] > 1e-4).all()
    assert (slices[N:] < 1e-4).all()


@pytest.mark.parametrize("host", ["timm", "torch", "transformers ViT", "SAM"])
def test_an_adopted_host_compiles_without_graph_break_and_copies(host):
    flat, x = _host(host)
    deep = _adopted(flat)
    expected = _output(deep, x)
    torch.testing.assert_close(_output(copy.deepcopy(deep), x), expected, rtol=0, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: _output(deep, t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "arguments", "keywords", "named"),
    [
        ("timm", (), {"attn_mask": torch.zeros(7, 7)}, "attn_mask"),
        ("timm", (torch.zeros(7, 7),), {}, "attn_mask"),
        ("timm", (), {"is_causal": True}, "is_causal"),
        ("timm", (), {"shared_rel_pos_bias": torch.zeros(1)}, "shared_rel_pos_bias"),
        ("timm", (), {"rope": torch.zeros(1)}, "rope"),
        ("torch", ("x", torch.zeros(2, 3, 7, 48)), {}, "value"),
        ("torch", (torch.zeros(2, 3, 7, 48), "x"), {}, "key"),
        ("torch", ("x", "x", torch.zeros(2, 7)), {}, "key_padding_mask"),
        ("torch", ("x", "x"), {"need_weights": True}, "need_weights"),
        ("torch", ("x", "x"), {"attn_mask": torch.zeros(7, 7)}, "attn_mask"),
        ("transformers", (torch.zeros(1, 1, 7, 7),), {}, "attention_mask"),
        ("transformers", (), {"head_mask": torch.zeros(4)}, "head_mask"),
        ("transformers", (), {"output_attentions": True}, "output_attentions"),
        (None, (), {"attn_mask": torch.zeros(7, 7)}, "attn_mask"),
    ],
)
def test_what_a_call_asks_beyond_plain_attention_is_refused_by_name(make, arguments, keywords, named):
    x = torch.randn(2, 3, 7, 48)
    arguments = tuple(x if a == "x" else a for a in arguments if a is not None)
    with pytest.raises(ValueError, match=f"AxialFusionAttention: {named} is set"):
        _attention(make)(x, *arguments, **keywords)


def _attention(make):
    if make == "timm":
        return from_attention(timm.layers.Attention(48, 4))
    if make == "torch":
        return from_attention(nn.MultiheadAttention(48, 4))
    if make == "transformers":
        return from_attention(_vit_of_transformers().layers[0].attention)
    return AxialFusionAttention(48, 4)


def test_neutral_keywords_and_results_are_those_of_the_host():
    x = torch.randn(2, 3, 7, 48)
    one = _attention("timm")
    assert torch.equal(one(x, attn_mask=None, is_causal=False, shared_rel_pos_bias=None), one(x))
    one = _attention("torch")
    output, weights = one(
        x, x, x, key_padding_mask=None, need_weights=False, is_causal=False, average_attn_weights=True
    )
    assert weights is None
    assert torch.equal(output, one(x))
    assert torch.equal(one(query=x, key=x, value=x)[0], one(x))
    one = _attention("transformers")
    output, weights = one(hidden_states=x, head_mask=None, output_attentions=False, output_hidden_states=True)
    assert weights is None
    assert torch.equal(output, one(x, None)[0])
    one = AxialFusionAttention(48, 4)
    assert torch.equal(one(x, [1]), one(x, query_index=[1]))
    with pytest.raises(TypeError, match="its tokens"):
        one()
    with pytest.raises(TypeError, match=r"takes .*, .*, but was given 3 arguments"):
        one(x, None, None)


def test_the_batch_must_hold_whole_groups():
    one = from_attention(timm.layers.Attention(48, 4), num_slices=3)
    with pytest.raises(ValueError, match=r"N = num_slices = 3, found shape \(7, 5, 48\)"):
        one(torch.randn(7, 5, 48))
    with pytest.raises(ValueError, match=r"found shape \(2, 3, 2, 2, 48\)"):
        one(torch.randn(2, 3, 2, 2, 48))
    with pytest.raises(ValueError, match="give from_attention num_slices"):
        from_attention(timm.layers.Attention(48, 4))(torch.randn(6, 5, 48))
    y = one(torch.randn(6, 2, 2, 48), query_index=[1])
    assert y.shape == (2, 2, 2, 48)


def test_mode_and_frozen_weights_are_kept_and_the_axial_half_trains():
    attention = nn.MultiheadAttention(48, 4).eval().requires_grad_(False)
    ours = from_attention(attention, rank=2)
    assert not ours.training
    frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
    assert frozen == {f"intra.{part}.{p}" for part in ("qkv", "out") for p in ("weight", "bias")}
    attention.out_proj.requires_grad_(True)
    assert from_attention(attention.train()).training
    assert from_attention(attention).intra.out.weight.requires_grad
    assert not from_attention(attention).intra.qkv.bias.requires_grad


def test_dropout_of_a_host_in_evaluation_may_not_be_lost_in_training():
    attention = timm.layers.Attention(48, 4, attn_drop=0.1)
    with pytest.raises(ValueError, match=r"dropout of 0\.1 in 'attn_drop'"):
        from_attention(attention)
    ours, x = from_attention(attention.eval()), torch.randn(1, 2, 5, 48)
    torch.testing.assert_close(ours(x)[0], attention(x[0]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"without its attn_drop \(0\.1\)"):
        nn.Sequential(ours).train()


def _blocks():
    from monai.networks.blocks import TransformerBlock
    from segment_anything.modeling.image_encoder import Block
    from torchvision.models.vision_transformer import EncoderBlock

    vit = timm.models.vision_transformer
    yield "timm", vit.Block(48, 4), "norm1", "attn"
    yield (
        "timm, torch's norm",
        vit.Block(48, 4, norm_layer=nn.LayerNorm, drop_path=0.2).eval(),
        "norm1",
        "attn",
    )
    yield "torch", nn.TransformerEncoderLayer(48, 4, norm_first=True, dropout=0.0), "norm1", "self_attn"
    yield "torchvision", EncoderBlock(4, 48, 64, 0.0, 0.0), "ln_1", "self_attention"
    yield "SAM", Block(48, 4), "norm1", "attn"
    yield "MONAI", TransformerBlock(48, 64, 4), "norm1", "attn"
    yield "transformers", _vit_of_transformers().layers[0], "layernorm_before", "attention"
    yield "transformers CLIP", _clip_of_transformers().encoder.layers[0], "layer_norm1", "self_attn"


@pytest.mark.parametrize("name", [name for name, *_ in _blocks()])
def test_a_block_brings_its_norm_and_residual(name):
    block, norm, attention = next(found[1:] for found in _blocks() if found[0] == name)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    x = torch.randn(2, N, 3, 3, 48) if name == "SAM" else torch.randn(2, N, 9, 48)
    z = getattr(block, norm)(x.flatten(0, 1))
    host = getattr(block, attention)
    if name in ("torch", "torchvision"):
        z = z if host.batch_first else z.transpose(0, 1)
        y = host(z, z, z)[0]
        y = y if host.batch_first else y.transpose(0, 1)
    else:
        y = host(z)
        y = y[0] if isinstance(y, tuple) else y
    ours = AxialFusionAttention.from_block(block)
    torch.testing.assert_close(ours(x), x + y.unflatten(0, (2, N)), rtol=1e-4, atol=1e-5)
    assert ours.training == block.training


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda vit: vit.ResPostBlock(48, 4), "ResPostBlock is not a pre-norm block"),
        (lambda vit: vit.ParallelScalingBlock(48, 4), "ParallelScalingBlock is not a pre-norm block"),
        (lambda vit: vit.Block(48, 4, init_values=0.1), "ls1"),
        (lambda vit: vit.Block(48, 4, drop_path=0.1), "drop_path1"),
        (
            lambda vit: vit.Block(48, 4, norm_layer=timm.layers.LayerNormFp32),
            "LayerNormFp32 changes 'forward'",
        ),
        (
            lambda vit: vit.Block(48, 4, norm_layer=timm.layers.RmsNorm),
            "RmsNorm is not the affine nn.LayerNorm",
        ),
        (lambda vit: vit.Block(48, 4, attn_layer="diff"), "DiffAttention is not an attention"),
        (lambda vit: vit.Block(48, 4, qk_norm=True), "q_norm"),
        (lambda vit: timm.models.vision_transformer_sam.Block(48, 4, window_size=2), "window_size = 2"),
        (lambda vit: nn.TransformerEncoderLayer(48, 4, dropout=0.0), "norm_first = False"),
        (lambda vit: nn.MultiheadAttention(48, 4), "norm1"),
    ],
)
def test_blocks_with_more_between_norm_and_residual_are_refused_by_name(make, named):
    with pytest.raises(ValueError, match=named):
        AxialFusionAttention.from_block(make(timm.models.vision_transformer))
