"""Modules: LoRA merges and travels, mistakes are named. What is made from other libraries is in test_hosts.py."""

import pytest
import torch
from torch import nn

from axial_fusion import AxialFusionAttention, LoRALinear


@pytest.mark.parametrize("attention", ["both", "axial", "slice"])
def test_merging_lora_keeps_the_output(attention):
    module = AxialFusionAttention(16, 2, rank=3, alpha=6, attention=attention).eval()
    for name, parameter in module.named_parameters():
        if "lora" in name and name.endswith("_b"):
            nn.init.normal_(parameter)
    x = torch.randn(2, 3, 5, 16)
    before = module(x)
    for half in module.halves():
        half.merge()
        half.merge()  # a second time changes nothing
    torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)
    for half in module.halves():
        half.unmerge()
    torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)


def test_frozen_projections_leave_lora_the_only_change_of_q_k_v():
    module = AxialFusionAttention(16, 2, rank=2)
    module.freeze_projections()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert not any("qkv" in name for name in trained)
    assert any(name.endswith("lora_q_b") for name in trained)
    assert "inter.out.weight" in trained


def test_lora_linear_takes_a_layer_over_without_copying():
    linear = nn.Linear(8, 6)
    lora = LoRALinear.from_linear(linear, rank=2, alpha=4)
    x = torch.randn(3, 8)
    torch.testing.assert_close(lora(x), linear(x))
    assert lora.weight is linear.weight
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    assert lora.scaling == 2


def test_lora_linear_merges_and_its_adapter_travels():
    one, other = LoRALinear(8, 6, rank=2), LoRALinear(8, 6, rank=2)
    nn.init.normal_(one.lora_b)
    x = torch.randn(3, 8)
    before = one(x)
    other.weight, other.bias = one.weight, one.bias
    other.load_state_dict(one.lora_state_dict(), strict=False)
    torch.testing.assert_close(other(x), before)
    with pytest.warns(UserWarning, match="the weight is shared with LoRALinear"):
        one.merge()
    torch.testing.assert_close(one(x), before, rtol=1e-5, atol=1e-6)
    one.unmerge()
    torch.testing.assert_close(one(x), before, rtol=1e-5, atol=1e-6)


def test_the_adapter_of_a_half_travels_and_resets():
    one, other = (AxialFusionAttention(16, 2, rank=3, attention="axial").inter for _ in "ab")
    for b in (one.lora_q_b, one.lora_v_b):
        nn.init.normal_(b)
    state = one.lora_state_dict()
    assert list(state) == ["lora_alpha", "lora_q_a", "lora_q_b", "lora_v_a", "lora_v_b"]
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    for part in "qv":
        for mine, theirs in zip(one.lora(part), other.lora(part), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    one.reset_lora()
    assert not any(one.lora(part).b.any() for part in "qv")
    assert not torch.equal(one.lora_q_a, other.lora_q_a)
    assert AxialFusionAttention(16, 2).inter.lora_state_dict() == {}


def test_lora_is_made_without_memory_on_the_meta_device():
    lora = LoRALinear(8, 6, rank=2, device="meta").to_empty(device="cpu")
    lora.reset_parameters()
    lora.reset_lora()
    torch.testing.assert_close(
        lora(torch.ones(2, 8)), nn.functional.linear(torch.ones(2, 8), lora.weight, lora.bias)
    )
    assert lora.lora_a.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_merge_in_fp32_and_round_once(dtype):
    torch.manual_seed(0)
    lora = LoRALinear(32, 24, rank=3, alpha=2, dtype=dtype)
    half = AxialFusionAttention(32, 2, rank=3, alpha=2, attention="axial").inter.to(dtype)
    for b in (lora.lora_b, half.lora_q_b, half.lora_v_b):
        nn.init.normal_(b, std=1e-3)
    weights = [
        (lora, lora.weight, lora.lora_a, lora.lora_b),
        (half, half.qkv.weight[:32], half.lora_q_a, half.lora_q_b),
        (half, half.qkv.weight[64:], half.lora_v_a, half.lora_v_b),
    ]
    before = [w.detach().clone() for _, w, _, _ in weights]
    for module in (lora, half):
        module.merge()
    for (_, w, a, b), old in zip(weights, before, strict=True):
        expected = (old.float() + 2 / 3 * (b.float() @ a.float())).to(dtype)
        assert not torch.equal(old, expected)
        assert torch.equal(w, expected)
    for module in (lora, half):
        module.unmerge()
    for (_, w, _, _), old in zip(weights, before, strict=True):
        torch.testing.assert_close(w, old, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_lora_dropout_is_off_in_evaluation():
    lora = LoRALinear(8, 6, rank=2, dropout=0.5)
    nn.init.normal_(lora.lora_b)
    x = torch.randn(64, 8)
    assert not torch.equal(lora(x), lora(x))
    lora.eval()
    assert torch.equal(lora(x), lora(x))


@pytest.mark.parametrize(
    ("options", "message"), [({"rank": 0}, "rank"), ({"rank": 1, "dropout": 1.0}, "dropout")], ids=str
)
def test_lora_linear_names_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(4, 4, **options)
