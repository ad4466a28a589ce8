"""MobileSAM's encoder: its names, its block written out by hand, LoRA on its q and v, any image size."""

import dataclasses
import math

import pytest
import torch

from aftersam.config import ENCODERS, Stage, preset
from aftersam.model.build import build_aftersam, build_image_encoder
from aftersam.model.sam_checkpoint import load_image_encoder_state, read_sam_checkpoint, sam_shapes
from aftersam.model.tiny_vit import CLASSIFIER, TinyViTBlock


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A full-size random state dict in MobileSAM's format, classifier and counters of BatchNorm included."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in sam_shapes("vit_t").items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(100)
        elif key.endswith("running_var"):
            state[key] = 0.5 + torch.rand(shape, generator=generator)
        else:
            gain = key.endswith("weight") and len(shape) == 1
            fan_in = math.prod(shape[1:]) or 1
            state[key] = (
                gain
                + torch.randn(shape, generator=generator) * (0.5 if len(shape) > 1 else 0.1) / fan_in**0.5
            )
    path = tmp_path_factory.mktemp("mobile") / "mobile_sam.pt"
    torch.save(state, path)
    return path


def test_names_are_mobilesams():
    """302 tensors of the encoder, as its own code makes them; its 10.13 M parameters are these and SAM's decoders."""
    shapes = {k: s for k, s in sam_shapes("vit_t").items() if k.startswith("image_encoder.")}
    assert len(shapes) == 302
    assert CLASSIFIER.keys() < shapes.keys()
    assert shapes["image_encoder.patch_embed.seq.2.bn.running_var"] == (64,)
    assert shapes["image_encoder.layers.0.blocks.1.conv2.c.weight"] == (256, 1, 3, 3)
    assert shapes["image_encoder.layers.1.downsample.conv2.c.weight"] == (160, 1, 3, 3)
    assert shapes["image_encoder.layers.2.blocks.5.attn.attention_biases"] == (5, 196)
    assert shapes["image_encoder.layers.3.blocks.0.local_conv.bn.num_batches_tracked"] == ()
    encoder = sum(p.numel() for p in build_image_encoder("vit_t", image_size=64).parameters())
    classifier = sum(math.prod(shape) for shape in CLASSIFIER.values())
    decoders = 93_735_472 - 89_670_912  # of ViT-B with and without them
    assert encoder + classifier + decoders == 10_130_092


def written_out(block, x):
    """TinyViTBlock on x (h, w, C) in fp64, token by token."""
    p = dict(block.state_dict())

    def norm(t, name):
        centred = t - t.mean(-1, keepdim=True)
        return (
            centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]
            + p[f"{name}.bias"]
        )

    height, width, channels = x.shape
    side, heads = block.window, block.attn.num_heads
    d = channels // heads
    attended = torch.zeros_like(x)
    for top in range(0, height, side):
        for left in range(0, width, side):
            places = [(top + i, left + j) for i in range(side) for j in range(side)]
            inside = [y < height and z < width for y, z in places]
            tokens = torch.stack(
                [
                    x[at] if real else torch.zeros_like(x[0, 0])
                    for at, real in zip(places, inside, strict=True)
                ]
            )
            qkv = norm(tokens, "attn.norm") @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]
            for a, (y, z) in enumerate(places):
                if not inside[a]:
                    continue
                joined = []
                for m in range(heads):
                    q, k, v = (qkv[:, m * 3 * d + i * d : m * 3 * d + (i + 1) * d] for i in range(3))
                    bias = p["attn.attention_biases"][m]
                    scores = torch.stack([
                        q[a] @ k[b] / d**0.5 + bias[abs(y - r) * side + abs(z - c)] for b, (r, c) in enumerate(places)
                    ])  # fmt: skip
                    joined.append(scores.softmax(0) @ v)
                attended[y, z] = torch.cat(joined) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
    x = x + attended
    padded = torch.zeros(height + 2, width + 2, channels, dtype=x.dtype)
    padded[1:-1, 1:-1] = x
    kernel = p["local_conv.c.weight"]  # (C, 1, 3, 3)
    x = sum(padded[i : i + height, j : j + width] * kernel[:, 0, i, j] for i in range(3) for j in range(3))
    scale = p["local_conv.bn.weight"] / (p["local_conv.bn.running_var"] + 1e-5).sqrt()
    x = (x - p["local_conv.bn.running_mean"]) * scale + p["local_conv.bn.bias"]
    hidden = norm(x, "mlp.norm") @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return x + hidden @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (2, 2)], ids=str)
def test_a_block_equals_its_equations(grid):
    """Windows of 2 on grids that they fill, leave and are."""
    generator = torch.Generator().manual_seed(1)
    block = TinyViTBlock(Stage(8, 1, 2, 2)).double()
    for value in block.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    x = torch.randn(2, 8, *grid, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        found = block.train()(x)
        for ours, plain in zip(found, x, strict=True):
            torch.testing.assert_close(ours.permute(1, 2, 0), written_out(block, plain.permute(1, 2, 0)))


def test_reads_the_official_format_and_adapts_it(official):
    """Strict reading, then a training step in which LoRA alone gets gradients, in the encoder."""
    sam = read_sam_checkpoint(official)
    assert sam.name == "vit_t"
    config = dataclasses.replace(
        preset("paper").model,
        image_encoder="vit_t",
        image_size=64,
        num_slices=3,
        num_blocks=1,
        encoder="lora",
    )
    model = build_aftersam(config, 4, sam=sam)
    stored = model.encoder.state_dict()
    name = "layers.2.blocks.3.attn.qkv.weight"
    assert torch.equal(stored[name], sam.state[f"image_encoder.{name}"])
    assert stored["layers.0.blocks.0.conv1.bn.num_batches_tracked"] == 100
    logits = model.train()(torch.randn(1, 3, 64, 64) * 300)
    assert logits.shape == (1, 3, 4, 16, 16)
    logits.square().mean().backward()
    trained = {name for name, p in model.encoder.named_parameters() if p.grad is not None}
    assert len(trained) == 10 * 4  # ten attentions, A and B of q and v
    assert all("lora" in name for name in trained)


def test_refuses_a_missing_and_an_unknown_tensor(official):
    encoder = build_image_encoder("vit_t", image_size=64)
    state = read_sam_checkpoint(official).state
    missing = {k: v for k, v in state.items() if not k.endswith("layers.3.blocks.1.attn.attention_biases")}
    with pytest.raises(ValueError, match=r"lack image_encoder\.layers\.3\.blocks\.1\.attn\.attention_biases"):
        load_image_encoder_state(encoder, missing)
    with pytest.raises(ValueError, match=r"hold image_encoder\.head\.extra"):
        load_image_encoder_state(encoder, state | {"image_encoder.head.extra": torch.zeros(1)})


@torch.no_grad()
def test_a_slice_has_the_same_features_alone_in_a_batch_and_while_training(official):
    encoder = build_image_encoder("vit_t", image_size=96)
    load_image_encoder_state(encoder, read_sam_checkpoint(official).state)
    images = torch.randn(3, 3, 96, 64)
    batch = encoder.train()(images).embedding
    assert batch.shape == (3, 256, 6, 4)
    torch.testing.assert_close(encoder.eval()(images[1:2]).embedding, batch[1:2], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="multiples of 16"):
        encoder(torch.zeros(1, 3, 40, 64))


def test_checkpointing_changes_no_gradient():
    encoder = build_image_encoder("vit_t", image_size=32).train()
    images = torch.randn(1, 3, 32, 32)
    found = []
    for encoder.activation_checkpointing in (False, True):
        encoder.zero_grad()
        encoder(images).embedding.square().sum().backward()
        found.append(encoder.layers[1].blocks[0].attn.attention_biases.grad.clone())
    torch.testing.assert_close(*found)
    assert found[0].any()


def test_its_size_says_what_a_prediction_needs():
    size = ENCODERS["vit_t"]
    assert size.dim == size.stages[-1].dim
    assert size.depth == sum(stage.depth for stage in size.stages)
