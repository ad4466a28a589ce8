"""lift on models made here: which blocks, which tokens, what is refused and undone; see test_lift_hosts for others."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from axial_fusion import (
    LoRALinear,
    accelerate_sam,
    adapter_state_dict,
    lift,
    load_adapter_state_dict,
    peft_adapter,
    set_num_slices,
    unlift,
)
from axial_fusion.lift import LiftedBlock
from host_checks import lifted, made, set_free


class Attention(nn.Module):
    """A self-attention that no library has, by its heads and projections alone."""

    def __init__(self, dim=32, num_heads=2):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query, key, value):
        q, k, v = (
            f(t).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for f, t in ((self.q, query), (self.k, key), (self.v, value))
        )
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.norm, self.mix, self.mlp = nn.LayerNorm(dim), Attention(dim), nn.Linear(dim, dim)

    def forward(self, tokens):
        z = self.norm(tokens)
        tokens = tokens + self.mix(z, key=z, value=z)
        return tokens + self.mlp(tokens)


class Model(nn.Module):
    """Tokens (B·N, P, C), a class token in front, `depth` blocks; `windows` puts windows into the batch."""

    def __init__(self, depth=4, windows=1, keyword=False):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.windows, self.keyword = windows, keyword

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x.reshape(len(x) * self.windows, x.shape[1] // self.windows, 32)
        for block in self.blocks:
            x = block(tokens=x) if self.keyword else block(x)
        return x


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


X = torch.randn(6, 7, 32)


def names(table):
    return [entry.block for entry in table]


@pytest.mark.parametrize("keyword", [False, True])
def test_a_block_of_ones_own_is_lifted_by_its_structure(keyword):
    model = Model(keyword=keyword)
    expected = model(X)
    table = lift(model, num_slices=3)
    assert torch.equal(model(X), expected)
    assert table[0] == LiftedBlock(
        "blocks.0", "Block: axial", sum(p.numel() for p in model.blocks[0].axial.parameters())
    )
    assert str(table).splitlines()[-1].split() == ["total", f"{sum(e.parameters for e in table):,}"]
    set_free(model)
    other = X.clone()
    other[1] = 0
    changed = (model(X) - model(other)).abs().amax((1, 2)) > 0
    assert changed.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("all", [0, 1, 2, 3]),
        (1, [0, 1, 2, 3]),
        (3, [2]),
        ([-1, 0], [0, 3]),
        (["blocks.1", 2], [1, 2]),
        ("blocks.3", [3]),
    ],
    ids=str,
)
def test_where_chooses(where, expected):
    assert names(lift(Model(), num_slices=3, where=where)) == [f"blocks.{i}" for i in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": 5}, "where is 5, but must be 1 to 4"),
        ({"where": ["blocks.9"]}, "did you mean 'blocks.3'"),
        ({"where": [4]}, "where names 4"),
        ({"where": []}, "name at least one block"),
        ({"num_slices": 0}, "num_slices is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"num_heads": 5}, "must divide dim = 32"),
        ({"prefix": "first"}, "prefix is 'first'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_and_nothing_is_changed(options, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        lift(model, **({"num_slices": 3} | options))
    assert not any("axial" in name or "lora" in name for name, _ in model.named_parameters())
    lift(model, num_slices=3)


def test_class_tokens_attend_across_slices_or_are_left_alone():
    for prefix, reaches in (("across", True), ("alone", False), (1, False)):
        model = Model(depth=1)
        lift(model, num_slices=3, prefix=prefix)
        set_free(model)
        block = model.blocks[0]
        x = torch.randn(3, 8, 32)
        other = x.clone()
        other[1, 0] += torch.randn(32)
        seen = (block.axial(x)[0, 0] - block.axial(other)[0, 0]).abs().max() > 0
        assert seen == reaches
        assert (block.axial(x)[:, 1:] - x[:, 1:]).abs().max() > 0
    _, dinov2, _ = made("timm dinov2 with registers")
    lift(dinov2, num_slices=3, prefix="alone")
    assert dinov2.blocks[0].axial.alone == 5
    with pytest.raises(ValueError, match="no class or register tokens were found"):
        lift(made("timm swin")[1], num_slices=3, prefix="alone")


def test_what_rows_are_not_slices_is_refused():
    windows = Model(windows=4)
    lift(windows, num_slices=3)
    with pytest.raises(ValueError, match=r"got tokens \(24, .* in a call with B·N = 6"):
        windows(X)
    windows.windows = 1
    assert windows(X).shape == (6, 8, 32)  # the failed call has left nothing behind
    with pytest.raises(ValueError, match=r"got tokens \(5, .*, but num_slices is 3 and does not divide 5"):
        windows(X[:5])
    with pytest.raises(ValueError, match="needs \\(B·N, P, 32\\)"):
        windows.blocks[0](torch.randn(3, 8, 16))
    _, swin, _ = made("timm swin")
    with pytest.raises(ValueError, match="gets windows, which are not slices"):
        lift(swin.layers[0].blocks[0].attn, num_slices=3)
    _, temporal, x, _ = lifted("diffusers temporal transformer")
    with pytest.raises(ValueError, match="got N = 2 for each position, but num_slices is 3"):
        temporal(x, num_frames=2)


def test_one_attention_by_itself_takes_its_tokens_three_times():
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    expected = attention(X, X, value=X)[0]
    assert names(lift(attention, num_slices=3)) == [""]
    assert torch.equal(attention(X, X, value=X)[0], expected)
    set_free(attention)
    y = attention.axial(X)
    got = attention(X, X, value=X)[0]
    unlift(attention)
    assert torch.equal(got, attention(y, y, y)[0])


def test_models_that_cannot_be_lifted_are_refused():
    with pytest.raises(ValueError, match="no block of Sequential has one attention and a norm"):
        lift(nn.Sequential(nn.Linear(3, 3)), num_slices=3)
    with pytest.raises(ValueError, match="it has the attentions 0"):
        lift(nn.Sequential(nn.MultiheadAttention(32, 4)), num_slices=3)
    model = Model()
    lift(model, num_slices=3)
    for part in (model, model.blocks[0]):
        with pytest.raises(ValueError, match="lifted already"):
            lift(part, num_slices=3)
    unlift(model)
    with pytest.raises(ValueError, match="is not lifted"):
        unlift(model)
    with pytest.raises(ValueError, match="is not lifted"):
        adapter_state_dict(model)
    import timm

    dropping = timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="drops other patches in every slice"):
        lift(dropping, num_slices=3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_with_padding_gives_the_host_s_output_on_what_is_not_padded():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.zeros(6, 7, dtype=torch.bool)
    padding[:, 5:] = True
    with torch.no_grad():
        expected = encoder(X, src_key_padding_mask=padding)
        lift(encoder, num_slices=3)
        torch.testing.assert_close(encoder(X, src_key_padding_mask=padding)[:, :5], expected[:, :5])
        unlift(encoder)
        assert torch.equal(encoder(X, src_key_padding_mask=padding), expected)


def test_another_number_of_slices_later_and_no_slices_at_all():
    model = Model()
    lift(model, num_slices=3)
    set_free(model)
    set_num_slices(model, 2)
    assert torch.equal(model(X)[:2], model(X[:2]))
    assert model(X[:0]).shape == (0, 8, 32)
    with pytest.raises(ValueError, match="num_slices is 0"):
        set_num_slices(model, 0)


def test_copies_and_pickles_are_lifted_models_of_their_own():
    model = Model()
    lift(model, num_slices=3, rank=2)
    set_free(model)
    expected = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), expected)
        set_num_slices(twin, 2)
        unlift(twin)
        assert torch.equal(model(X), expected)


def test_the_model_stays_on_its_device_in_its_dtype_and_mode():
    model = Model().to("meta", torch.bfloat16).eval()
    lift(model, num_slices=3)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert not model.blocks[0].axial.training


def test_an_adapter_of_another_lift_is_refused():
    model, other = Model(), Model()
    lift(model, num_slices=3, rank=2)
    lift(other, num_slices=3, rank=2, where=2)
    with pytest.raises(ValueError, match=r"blocks\.0\.axial.*lift with the same where and rank"):
        load_adapter_state_dict(other, adapter_state_dict(model))
    unlift(other)
    lift(other, num_slices=3, rank=3)
    with pytest.raises(ValueError, match=r"is \(2, 32\) in the state, but \(3, 32\) in the model"):
        load_adapter_state_dict(other, adapter_state_dict(model))


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_carries_alpha_into_a_model_of_another_alpha_merged_or_not(merged):
    model, other, x = Model().double(), Model().double(), torch.randn(6, 9, 32, dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    lift(model, num_slices=3, rank=2, alpha=8)
    lift(other, num_slices=3, rank=2)
    for name, parameter in (*model.named_parameters(), *other.named_parameters()):
        if name.endswith("_b"):
            nn.init.normal_(parameter)
    for module in other.modules():
        if merged and hasattr(module, "merge"):
            module.merge()
    load_adapter_state_dict(other, adapter_state_dict(model))
    torch.testing.assert_close(other(x), model(x))


def test_lora_freezes_the_host_and_unlift_thaws_what_was_trained():
    model = Model()
    model.blocks[0].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    table = lift(model, num_slices=3, where=4, rank=2)
    assert names(table) == [f"blocks.{i}" for i in range(4)]
    assert [entry.kind for entry in table] == ["Block: LoRA"] * 3 + ["Block: axial + LoRA"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {key for key in adapter_state_dict(model) if not key.endswith("lora_alpha")}
    unlift(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_lora_is_refused_where_q_and_v_are_not_known():
    model = Model(depth=1)
    model.blocks[0].mix.q = LoRALinear(32, 32, rank=2)
    with pytest.raises(
        ValueError, match=r"q and v of 'blocks\.0' .Block. are not known; rank=0 lifts without LoRA"
    ):
        lift(model, num_slices=3, rank=2)
    lift(model, num_slices=3)
    assert model(X).shape == (6, 8, 32)


def test_a_vit_b_s_adapter_is_a_few_megabytes():
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    lift(model, num_slices=9, rank=4)
    state = adapter_state_dict(model)
    assert sum(t.numel() * t.element_size() for t in state.values()) < 4e6


@pytest.mark.filterwarnings(
    "ignore:.*script_method. is deprecated:DeprecationWarning"
)  # in inductor's imports
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch hides it where it is shown
def test_compiled_by_inductor_with_gradients():
    host, model, x, _ = lifted("timm vit")
    set_free(model)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        host.call(run, x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["segment_anything ImageEncoderViT", "transformers SamVisionModel"])
def test_an_accelerated_sam_is_lifted_as_it_is(name):
    host, model, x = made(name)
    accelerate_sam(model)
    with torch.no_grad():
        expected = host.call(model, x)
        lift(model, num_slices=3, rank=2)
        assert torch.equal(host.call(model, x), expected)
        set_free(model)
        assert (host.call(model, x) - expected).abs().max() > 1e-3
        unlift(model)
        assert torch.equal(host.call(model, x), expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks transformers so
@pytest.mark.parametrize("name", ["timm vit", "transformers ViT"])
def test_peft_takes_the_adapter_as_its_own(name):
    import peft

    host, plain, x = made(name)
    _, model, _, _ = lifted(name, rank=2, alpha=6)
    for part, parameter in model.named_parameters():
        if "axial" not in part and part.endswith("_b"):
            nn.init.normal_(parameter, std=0.1)
    config, state = peft_adapter(model)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**config))
    loaded = peft.set_peft_model_state_dict(theirs, state)
    assert not loaded.unexpected_keys
    with torch.no_grad():
        want = host.call(model, x)
        torch.testing.assert_close(host.call(theirs, x), want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(host.call(made(name)[1], x), want, rtol=1e-2, atol=1e-2)


def test_peft_has_no_layout_for_some_hosts():
    with pytest.raises(ValueError, match="has no LoRA"):
        peft_adapter(lifted("timm vit")[1])
    with pytest.raises(ValueError, match=r"q and v alone of 'encoder\.layers"):
        peft_adapter(lifted("torchvision vit", rank=2)[1])


def test_compiled_inside_a_larger_model_in_one_graph():
    """There the hooks that part (B, N, ...) are traced too; of a model by itself torch calls them outside."""
    _, model, x, _ = lifted("timm vit")
    set_free(model)
    whole = nn.Sequential(model, nn.Flatten(0, 1)).requires_grad_(False)
    x = x.unflatten(0, (2, 3))
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), whole(x))
    assert model.slice_groups.batch is None


@pytest.mark.parametrize(
    ("page", "shape"), [("README.md", (1, 9, 384)), ("docs/how-to/lift.md", (16, 32, 4, 4))]
)
def test_what_the_pages_show_runs(page, shape):
    """Word for word: the blocks of python that lift something."""
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    names = {"torch": torch}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        if "lift(" in code:
            exec(code, names)
    assert names["y"].shape == shape
