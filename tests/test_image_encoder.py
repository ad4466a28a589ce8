"""The image encoder: segment_anything's own, number by number, and the size that learns from scratch."""

import pytest
import torch
from torch.nn import functional as F

from aftersam.config import ENCODERS, STEMS, EncoderSize
from aftersam.model.build import build_image_encoder
from aftersam.model.lora import LoRAOptions, add_lora
from aftersam.model.sam_checkpoint import load_image_encoder_state, sam_shapes
from aftersam.model.segment_anything import segment_anything_modeling

MINI = EncoderSize(24, 2, 2, (1,), window=3, patch=4, out_channels=8)  # like vit_b in kind, small in size
OFFICIAL = ["vit_b", "vit_l", "vit_h"]


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def randomised(module, seed=0, spread=0.05):
    """Every parameter random at a scale that keeps activations finite and makes each of them matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        scale = 0.2 if "rel_pos" in name or "pos_embed" in name else spread
        noise = scale * torch.randn(value.shape, generator=generator)
        value.data.copy_(noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module


def their_encoder(size, image_size):
    """segment_anything's encoder of `size`, as its build_sam makes it."""
    return segment_anything_modeling("image_encoder").ImageEncoderViT(
        img_size=image_size, patch_size=size.patch, embed_dim=size.dim, depth=size.depth, num_heads=size.num_heads,
        out_chans=size.out_channels, use_rel_pos=True, window_size=size.window, global_attn_indexes=size.global_blocks,
        norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6),
    )  # fmt: skip


@pytest.fixture
def mini(monkeypatch):
    monkeypatch.setitem(ENCODERS, "mini", MINI)


class PlainLoRA(torch.nn.Module):
    """segment_anything's qkv projection with LoRA on q and v as the paper writes it, weights shared with `lora`."""

    def __init__(self, lora):
        super().__init__()
        self.lora = lora

    def forward(self, x):
        q, k, v = F.linear(x, self.lora.weight, self.lora.bias).chunk(3, -1)
        q = q + self.lora.scaling * (x @ self.lora.lora_q_a.T @ self.lora.lora_q_b.T)
        v = v + self.lora.scaling * (x @ self.lora.lora_v_a.T @ self.lora.lora_v_b.T)
        return torch.cat([q, k, v], -1)


@pytest.fixture(scope="module")
def full_size(request):
    """A size's name and a random state dict of it at trained weights' scale, made by segment_anything."""
    state = randomised(their_encoder(ENCODERS[request.param], 1024), spread=0.03).state_dict()
    return request.param, {f"image_encoder.{key}": value for key, value in state.items()}


def both_encoders(full_size, image_size):
    """Ours and segment_anything's at `image_size`, with the same interpolated tables; nothing to train."""
    name, state = full_size
    ours, theirs = build_image_encoder(name, image_size=image_size), their_encoder(ENCODERS[name], image_size)
    load_image_encoder_state(ours, state)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    return ours.requires_grad_(False), theirs.requires_grad_(False), images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("full_size", "image_size"),
    [("vit_b", 256), *(pytest.param("vit_l", size, marks=pytest.mark.long) for size in (320, 512))],
    indirect=["full_size"],
)
@torch.inference_mode()
def test_full_size_equals_segment_anything(image_size, full_size):
    """At 320 px the grid of 20 is cut into windows of 14, three quarters of which leave it. The next has the rest."""
    ours, theirs, images = both_encoders(full_size, image_size)
    features = ours(images)
    assert features.skips == ()
    assert relative_error(features.embedding, theirs(images)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("full_size", "image_size"), [("vit_b", 320), ("vit_b", 512), ("vit_l", 256)], indirect=["full_size"]
)
def test_full_size_gradients_with_lora_equal_segment_anything(image_size, full_size):
    """Output, gradients of the image and of LoRA's weights; at 512 px by blocks of the grid's attention."""
    ours, theirs, images = both_encoders(full_size, image_size)
    add_lora(ours, LoRAOptions(4, 8.0))
    learned = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(2)
    for p in learned.values():
        p.data.copy_(0.03 * torch.randn(p.shape, generator=generator))
    for mine, block in zip(ours.blocks, theirs.blocks, strict=True):
        block.attn.qkv = PlainLoRA(mine.attn.qkv)
    inputs = {"images": images.requires_grad_(), **learned}
    results = []
    for output in (ours(images).embedding, theirs(images)):
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        results.append((output.detach(), torch.autograd.grad(output, list(inputs.values()), grad)))
    (output, grads), (expected, expected_grads) = results
    assert len(learned) == 4 * len(ours.blocks)
    assert relative_error(output, expected) < 1e-5
    for name, mine, other in zip(inputs, grads, expected_grads, strict=True):
        assert relative_error(mine, other) < 1e-5, name


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names_and_shapes_load_strictly(name):
    prefix = "image_encoder."
    theirs = {k.removeprefix(prefix): v for k, v in sam_shapes(name).items() if k.startswith(prefix)}
    with torch.device("meta"):
        ours = build_image_encoder(name, image_size=1024)
    assert {key: value.shape for key, value in ours.state_dict().items()} == theirs


@pytest.mark.parametrize("side", [24, 20], ids=["whole windows", "padded windows"])
def test_gradients_equal_segment_anything(side, mini):
    """In fp64, output and the gradient of every parameter and of the image, windows and global block alike."""
    ours = randomised(build_image_encoder("mini", image_size=side)).double()
    theirs = their_encoder(MINI, side).double()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 8, side // 4, side // 4, dtype=torch.float64)
    output = ours(images).embedding
    torch.testing.assert_close(output, theirs(images), rtol=0, atol=1e-10)
    expected = torch.autograd.grad(theirs(images), [images, *theirs.parameters()], grad)
    names = dict(theirs.named_parameters()).keys()
    actual = torch.autograd.grad(output, [images, *(ours.get_parameter(name) for name in names)], grad)
    for name, mine, other in zip(["images", *names], actual, expected, strict=True):
        torch.testing.assert_close(
            mine, other, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("full_size", ["vit_b"], indirect=True)
def test_position_tables_are_interpolated_as_segment_anything_does(full_size):
    _, vit_b = full_size
    encoder = build_image_encoder("vit_b", image_size=256)
    load_image_encoder_state(encoder, vit_b)
    key = "blocks.2.attn.rel_pos_h"
    get_rel_pos = segment_anything_modeling("image_encoder").get_rel_pos
    theirs = get_rel_pos(16, 16, vit_b[f"image_encoder.{key}"])
    apart = torch.arange(16)[:, None] - torch.arange(16)
    torch.testing.assert_close(encoder.get_parameter(key)[apart + 15], theirs)
    windowed = "blocks.0.attn.rel_pos_h"
    assert torch.equal(encoder.get_parameter(windowed), vit_b[f"image_encoder.{windowed}"])
    table = vit_b["image_encoder.pos_embed"]
    averages = table.unflatten(1, (16, 4)).unflatten(3, (16, 4))[:, :, 1:3, :, 1:3].mean((2, 4))
    torch.testing.assert_close(encoder.pos_embed.data, averages)  # bilinear samples the four central entries


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("image_encoder.neck.0.weight"), r"lack image_encoder\.neck\.0\.weight"),
        (lambda s: s.update({"image_encoder.blocks.9.x": torch.zeros(1)}), r"hold image_encoder\.blocks\.9\.x"),
        (lambda s: s.update({"image_encoder.neck.0.weight": torch.zeros(8, 9, 1, 1)}), r"neck.*\(8, 24, 1, 1\)"),
        (lambda s: s.update({"image_encoder.pos_embed": torch.zeros(1, 6, 6, 9)}), r"pos_embed.*\(1, 6, 6, 24\)"),
    ],
    ids=["missing", "unknown", "shape", "width"],
)  # fmt: skip
def test_refuses_weights_of_another_encoder(change, says, mini):
    encoder = build_image_encoder("mini", image_size=24)
    state = {f"image_encoder.{key}": value for key, value in encoder.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=says):
        load_image_encoder_state(encoder, state)


def test_refuses_unknown_names_and_sizes(mini):
    with pytest.raises(ValueError, match="'vit_g', but must be one of vit_b"):
        build_image_encoder("vit_g", image_size=64)
    with pytest.raises(ValueError, match=r"image_size is 30.*patch of 4"):
        build_image_encoder("mini", image_size=30)
    with pytest.raises(ValueError, match="images are 24×28 px, but this encoder is for 24×24"):
        build_image_encoder("mini", image_size=24)(torch.zeros(1, 3, 24, 28))


@pytest.mark.parametrize(("name", "side", "stem"), [("tiny", 48, "slim"), ("small", 72, "wide")])
def test_stem_encoder_shapes_and_independence_of_slices(name, side, stem):
    """A slice's features do not depend on its batch, so that each slice needs encoding once."""
    torch.manual_seed(0)
    encoder = build_image_encoder(name, image_size=side, stem_size=STEMS[stem]).eval()
    assert encoder.skip_channels == STEMS[stem].channels
    images = torch.randn(3, 3, side, side)
    with torch.inference_mode():
        embedding, skips = encoder(images)
        alone = encoder(images[1:2])
    assert embedding.shape == (3, 128, side // 8, side // 8)
    assert [tuple(skip.shape) for skip in skips] == [
        (3, channels, side >> level, side >> level) for level, channels in enumerate(encoder.skip_channels)
    ]
    for whole, single in zip((embedding, *skips), (alone.embedding, *alone.skips), strict=True):
        torch.testing.assert_close(whole[1:2], single, rtol=1e-4, atol=1e-5)


def test_stem_encoder_starts_sane_and_every_parameter_learns():
    torch.manual_seed(0)
    encoder = build_image_encoder("tiny", image_size=48)
    embedding, skips = encoder(torch.randn(2, 3, 48, 48))
    assert 0.5 < embedding.std() < 2
    assert all(0.2 < skip.std() < 3 for skip in skips)
    (embedding * torch.randn_like(embedding)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_bf16_autocast_stays_near_fp32():
    torch.manual_seed(0)
    encoder = build_image_encoder("tiny", image_size=48).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        exact = encoder(images).embedding
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder(images).embedding
    assert relative_error(rounded.float(), exact) < 0.03


def test_checkpointing_changes_no_gradient(mini):
    encoder = randomised(build_image_encoder("mini", image_size=20)).double()
    images = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    gradients = []
    for encoder.activation_checkpointing in (False, True):
        encoder.zero_grad()
        encoder(images).embedding.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, msg=name)


@pytest.mark.parametrize("name", ["mini", "tiny"])
def test_compiles_without_a_graph_break(name, mini):
    torch.manual_seed(0)
    encoder = build_image_encoder(name, image_size=48)
    images = torch.randn(2, 3, 48, 48)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).embedding, encoder(images).embedding, rtol=1e-4, atol=1e-5)
    compiled(images).embedding.square().sum().backward()
    learned = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    encoder(images).embedding.square().sum().backward()
    expected = [p.grad for p in encoder.parameters() if p.grad is not None]
    for mine, theirs in zip(learned, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def lora_encoder():
    encoder = randomised(build_image_encoder("mini", image_size=20)).double()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.requires_grad_(False)
    add_lora(encoder, LoRAOptions(2, 4.0))
    return encoder.double(), before


def test_lora_starts_as_the_base_and_keeps_its_names(mini):
    images = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    plain = randomised(build_image_encoder("mini", image_size=20)).double()
    encoder, before = lora_encoder()
    torch.testing.assert_close(encoder(images).embedding, plain(images).embedding)
    state = encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    added = {f"blocks.{i}.attn.qkv.lora_{part}_{side}" for i in range(2) for part in "qv" for side in "ab"}
    assert state.keys() - before.keys() == added
    assert {name for name, p in encoder.named_parameters() if p.requires_grad} == added


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_lora_compiles_without_a_graph_break(autocast, mini):
    """Output and the gradients of the adapters, which stay fp32 under autocast, equal eager's."""
    encoder = lora_encoder()[0].float()
    for name, parameter in encoder.named_parameters():
        if "lora" in name and name.endswith("_b"):
            torch.nn.init.normal_(parameter, std=0.05)
    adapters = [p for p in encoder.parameters() if p.requires_grad]
    images = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(3))
    found = []
    for run in (encoder, torch.compile(encoder, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(images).embedding.float()
        found.append([y, *torch.autograd.grad((y * weight).sum(), adapters)])
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == torch.float32
        assert relative_error(mine, theirs) < (0.03 if autocast else 1e-4)
