"""ImageNet weights for TransUNet and Swin-Unet: the features of their sources, and refusals."""

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from aftersam.config import preset
from benchmarks.accuracy.rivals.imagenet import load_r50_vit, load_swin
from benchmarks.accuracy.rivals.swin_unet import SwinUnet, build_swin_unet
from benchmarks.accuracy.rivals.transunet import TransUNet

DEPTHS, WIDTH, DIM, HEADS, LAYERS, GRID = (2, 1, 1), 16, 24, 4, 2, 3
HF = (  # names of transformers 5, early and late, and those of the Swin transformer's own files
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.norm", "patch_embed.norm"),
    (r"encoder\.layers", "layers"),
    (r"attention\.(self\.)?(relative_position_bias\.)?relative_position", "attn.relative_position"),
    (r"attention\.(o_proj|output\.dense)", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"\boutput\.dense", "mlp.fc2"),
    (r"^layernorm\.", "norm."),
)


def swin_file(model, path):
    """The state of transformers' SwinModel as the Swin transformer's authors store theirs."""
    state, parts = {}, {}
    for key, value in model.state_dict().items():
        for theirs, name in HF:
            key = re.sub(theirs, name, key)
        if match := re.fullmatch(r"(.*)attention\.(?:self\.)?([qkv])[a-z_]*\.(weight|bias)", key):
            parts.setdefault(f"{match[1]}attn.qkv.{match[3]}", {})[match[2]] = value
        else:
            state[key] = value
    state |= {key: torch.cat([of[n] for n in "qkv"]) for key, of in parts.items()}
    state["head.weight"] = torch.zeros(1000, 768)
    torch.save({"model": state}, path)


def test_swin_unet_starts_with_the_features_of_the_swin_transformer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("einops")
    torch.manual_seed(0)
    config = transformers.SwinConfig(depths=(2, 2, 6, 2))
    model = transformers.SwinModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, std=0.05)
    swin_file(model, tmp_path / "swin.pth")
    network = SwinUnet(4).eval()
    load_swin(network, tmp_path / "swin.pth")
    model.encoder.layers[2].blocks = model.encoder.layers[2].blocks[:2]  # Swin-Unet takes two of the six
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        x = network.embed(images)
        for stage in network.encoder:
            x = stage(x)
        ours = network.bottleneck(x)
        theirs = model(images).last_hidden_state
    torch.testing.assert_close(ours.flatten(2).transpose(1, 2), theirs, rtol=1e-4, atol=1e-4)
    for ours, theirs in ((0, 2), (1, 1), (2, 0)):  # the decoder's blocks begin as the encoder's
        one, other = network.decoder[ours].blocks.state_dict(), network.encoder[theirs].blocks.state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_stages_of_few_tokens_have_the_biases_of_their_offsets(tmp_path):
    """At 96 pixels the last two stages have 6 and 3 tokens a side, below the 7 of a window."""
    pytest.importorskip("einops")
    tables = {}

    def file_of(network):
        state = {}
        for name, value in network.state_dict().items():
            key = re.sub(r"^embed", "patch_embed", re.sub(r"^encoder", "layers", name))
            key = re.sub(r"^bottleneck\.1", "norm", re.sub(r"^bottleneck\.0", "layers.3", key))
            state[key.replace("mlp.linear", "mlp.fc")] = value
            if key.endswith("bias_table"):
                tables[key] = value.unflatten(0, (13, 13))
        return state

    torch.save({"model": file_of(SwinUnet(4))}, tmp_path / "swin.pth")
    network = build_swin_unet(preset("small").model, 4, tmp_path / "swin.pth").encoder.network
    for stage, layer, side in (
        (network.encoder[2], 2, 6),
        (network.bottleneck[0], 3, 3),
        (network.encoder[1], 1, 7),
    ):
        attention, theirs = (
            stage.blocks[0].attn,
            tables[f"layers.{layer}.blocks.0.attn.relative_position_bias_table"],
        )
        n = side**2
        index = attention.relative_position_index[:n, :n].reshape(-1)  # as MONAI looks them up
        bias = attention.relative_position_bias_table[index].reshape(n, n, -1)
        h, w = torch.arange(n) // side, torch.arange(n) % side
        expected = theirs[h[:, None] - h + 6, w[:, None] - w + 6]
        torch.testing.assert_close(bias, expected)
    image = torch.randn(1, 3, 96, 96)
    assert network(image).shape == (1, 4, 96, 96)


def test_transunets_row_starts_from_the_file(tmp_path, monkeypatch):
    from benchmarks.accuracy.rivals import transunet

    loaded = []
    monkeypatch.setattr(transunet, "load_r50_vit", lambda *given: loaded.append(given))
    with torch.device("meta"):
        model = transunet.build_transunet(preset("small").model, 4, tmp_path / "r50.npz")
    assert loaded == [(model.encoder.network, tmp_path / "r50.npz")]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(105.28e6, rel=0.003)


def r50_vit_arrays():
    """Random arrays under the names and in the shapes of R50+ViT-B_16.npz, at a small size."""
    rng, found = np.random.default_rng(0), {}

    def add(name, *shape):
        found[name] = rng.normal(0, 0.3, shape).astype(np.float32)

    def norm(name, channels, *ones):
        add(f"{name}/scale", *ones, channels)
        add(f"{name}/bias", *ones, channels)

    add("conv_root/kernel", 7, 7, 3, WIDTH)
    norm("gn_root", WIDTH, 1, 1, 1)
    before = WIDTH
    for b, depth in enumerate(DEPTHS):
        planes = WIDTH * 2**b
        for u in range(depth):
            home = f"block{b + 1}/unit{u + 1}"
            shapes = ((1, before, planes), (3, planes, planes), (1, planes, 4 * planes))
            for n, (side, inputs, outputs) in enumerate(shapes, start=1):
                add(f"{home}/conv{n}/kernel", side, side, inputs, outputs)
                norm(f"{home}/gn{n}", outputs, 1, 1, 1)
            if u == 0:
                add(f"{home}/conv_proj/kernel", 1, 1, before, 4 * planes)
                norm(f"{home}/gn_proj", 4 * planes, 1, 1, 1)
            before = 4 * planes
    add("embedding/kernel", 1, 1, before, DIM)
    add("embedding/bias", DIM)
    add("Transformer/posembed_input/pos_embedding", 1, GRID**2 + 1, DIM)
    for i in range(LAYERS):
        home, split = f"Transformer/encoderblock_{i}", (HEADS, DIM // HEADS)
        norm(f"{home}/LayerNorm_0", DIM)
        norm(f"{home}/LayerNorm_2", DIM)
        for name in ("query", "key", "value"):
            add(f"{home}/MultiHeadDotProductAttention_1/{name}/kernel", DIM, *split)
            add(f"{home}/MultiHeadDotProductAttention_1/{name}/bias", *split)
        add(f"{home}/MultiHeadDotProductAttention_1/out/kernel", *split, DIM)
        add(f"{home}/MultiHeadDotProductAttention_1/out/bias", DIM)
        for name, inputs, outputs in (("Dense_0", DIM, 4 * DIM), ("Dense_1", 4 * DIM, DIM)):
            add(f"{home}/MlpBlock_3/{name}/kernel", inputs, outputs)
            add(f"{home}/MlpBlock_3/{name}/bias", outputs)
    norm("Transformer/encoder_norm", DIM)
    add("head/kernel", DIM, 5)
    return found


def r50_vit_features(arrays, images):
    """Tokens (T, h·w, C) by the equations of the hybrid ViT, in the arrays' own layout."""
    p = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def convolve(x, name, stride=1):
        kernel = p[f"{name}/kernel"]
        mean, deviation = kernel.mean((0, 1, 2)), (kernel.var((0, 1, 2), correction=0) + 1e-5).sqrt()
        return F.conv2d(x, ((kernel - mean) / deviation).permute(3, 2, 0, 1), None, stride, len(kernel) // 2)

    def norm(x, name, groups, eps=1e-6):
        return F.group_norm(x, groups, p[f"{name}/scale"].flatten(), p[f"{name}/bias"].flatten(), eps)

    def layer_norm(x, name):
        return F.layer_norm(x, (DIM,), p[f"{name}/scale"], p[f"{name}/bias"], 1e-6)

    groups = WIDTH // 2
    x = F.max_pool2d(norm(convolve(images, "conv_root", 2), "gn_root", groups).relu(), 3, 2, 1)
    for b, depth in enumerate(DEPTHS):
        for u in range(depth):
            home, stride = f"block{b + 1}/unit{u + 1}", 2 if b and not u else 1
            y = norm(convolve(x, f"{home}/conv1"), f"{home}/gn1", groups).relu()
            y = norm(convolve(y, f"{home}/conv2", stride), f"{home}/gn2", groups).relu()
            y = norm(convolve(y, f"{home}/conv3"), f"{home}/gn3", groups)
            if u == 0:
                x = convolve(x, f"{home}/conv_proj", stride)
                x = norm(x, f"{home}/gn_proj", x.shape[1], 1e-5)
            x = (x + y).relu()
    x = torch.einsum("tihw,io->thwo", x, p["embedding/kernel"][0, 0]) + p["embedding/bias"]
    x = x.flatten(1, 2) + p["Transformer/posembed_input/pos_embedding"][:, 1:]
    for i in range(LAYERS):
        home = f"Transformer/encoderblock_{i}"
        attention, h = f"{home}/MultiHeadDotProductAttention_1", layer_norm(x, f"{home}/LayerNorm_0")
        q, k, v = (
            torch.einsum("tnc,cmd->tmnd", h, p[f"{attention}/{n}/kernel"])
            + p[f"{attention}/{n}/bias"][:, None]
            for n in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + torch.einsum("tmnd,mdc->tnc", y, p[f"{attention}/out/kernel"]) + p[f"{attention}/out/bias"]
        h = layer_norm(x, f"{home}/LayerNorm_2")
        h = F.gelu(h @ p[f"{home}/MlpBlock_3/Dense_0/kernel"] + p[f"{home}/MlpBlock_3/Dense_0/bias"])
        x = x + h @ p[f"{home}/MlpBlock_3/Dense_1/kernel"] + p[f"{home}/MlpBlock_3/Dense_1/bias"]
    return layer_norm(x, "Transformer/encoder_norm")


def trans_unet(grid=(GRID, GRID)):
    torch.manual_seed(0)
    return TransUNet(
        2, grid, width=WIDTH, depths=DEPTHS, dim=DIM, num_layers=LAYERS, num_heads=HEADS, decoder=(32, 16, 16, 16, 16)
    ).eval()  # fmt: skip


def test_transunet_starts_with_the_features_of_the_hybrid_vit(tmp_path):
    arrays = r50_vit_arrays()
    np.savez(tmp_path / "R50+ViT-B_16.npz", **arrays)
    network = trans_unet()
    load_r50_vit(network, tmp_path / "R50+ViT-B_16.npz")
    images = torch.randn(2, 3, 16 * GRID, 16 * GRID)
    with torch.inference_mode():
        x = network.pool(network.root(images))
        for stage in network.stages:
            x = stage(x)
        ours = network._attend(network.embed(x)).flatten(2).transpose(1, 2)
        theirs = r50_vit_features(arrays, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_positions_of_another_grid_are_interpolated(tmp_path):
    arrays = r50_vit_arrays()
    np.savez(tmp_path / "r50.npz", **arrays)
    network = trans_unet((5, 5))
    load_r50_vit(network, tmp_path / "r50.npz")
    theirs = arrays["Transformer/posembed_input/pos_embedding"][0, 1:].reshape(GRID, GRID, DIM)
    torch.testing.assert_close(network.position[0, :, ::2, ::2], torch.from_numpy(theirs).permute(2, 0, 1))


@pytest.mark.parametrize("fault", ["lacks an array", "has another shape", "is no archive"])
def test_a_file_that_does_not_fit_changes_no_weight(tmp_path, fault):
    arrays, path = r50_vit_arrays(), tmp_path / "r50.npz"
    if fault == "lacks an array":
        del arrays["block3/unit1/conv2/kernel"]
    elif fault == "has another shape":
        arrays["embedding/bias"] = np.zeros(DIM + 1, np.float32)
    np.savez(path, **arrays)
    if fault == "is no archive":
        path.write_bytes(b"weights")
    network = trans_unet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"^\S*r50\.npz "):
        load_r50_vit(network, path)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_another_networks_file_is_no_swin_transformer(tmp_path):
    torch.save({"model": {"conv1.weight": torch.zeros(1)}}, tmp_path / "resnet.pth")
    pytest.importorskip("einops")
    with pytest.raises(ValueError, match=r"resnet\.pth does not fit: embed\.proj\.weight is missing"):
        load_swin(SwinUnet(4), tmp_path / "resnet.pth")
