"""LoRA in the model: on q and v alone, merged within one rounding, the same in encoder and decoder."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from aftersam.config import preset
from aftersam.model.build import build_aftersam, build_image_encoder
from aftersam.model.lora import LoRAOptions, LoRAQKV, add_lora, merge_lora
from aftersam.model.tiny_vit import TinyViTAttention
from axial_fusion import LoRALinear


def test_lora_adds_to_q_and_v_alone_and_merges():
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 18, dtype=torch.float64)
    lora = LoRAQKV(base, LoRAOptions(2, 4.0))
    torch.nn.init.normal_(lora.lora_q_b)
    torch.nn.init.normal_(lora.lora_v_b)
    x = torch.randn(5, 6, dtype=torch.float64)
    q, k, v = (lora(x) - F.linear(x, base.weight, base.bias)).chunk(3, -1)
    torch.testing.assert_close(q, 2.0 * x @ lora.lora_q_a.T @ lora.lora_q_b.T)
    torch.testing.assert_close(v, 2.0 * x @ lora.lora_v_a.T @ lora.lora_v_b.T)
    assert not k.any()
    before, weight = lora(x), base.weight.clone()
    lora.merge()
    lora.merge()  # once is enough
    torch.testing.assert_close(lora(x), before)
    torch.testing.assert_close(F.linear(x, base.weight, base.bias), before)
    lora.unmerge()
    torch.testing.assert_close(base.weight, weight)
    torch.testing.assert_close(lora(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_merge_in_fp32_and_round_once(dtype):
    torch.manual_seed(0)
    lora = LoRAQKV(torch.nn.Linear(32, 96, dtype=dtype), LoRAOptions(3, 2.0))
    for part in (lora.lora_q_b, lora.lora_v_b):
        torch.nn.init.normal_(part, std=1e-3)
    before = lora.weight.detach().clone()
    update = torch.zeros(96, 32)
    update[:32] = lora.scaling * (lora.lora_q_b.float() @ lora.lora_q_a.float())
    update[64:] = lora.scaling * (lora.lora_v_b.float() @ lora.lora_v_a.float())
    lora.merge()
    assert not torch.equal(lora.weight, before)
    assert torch.equal(lora.weight, (before.float() + update).to(dtype))
    lora.unmerge()
    torch.testing.assert_close(lora.weight, before, rtol=torch.finfo(dtype).eps, atol=1e-5)


@torch.no_grad()
def test_lora_changes_q_and_v_of_every_head_and_never_k():
    encoder = build_image_encoder("vit_t", image_size=64)
    add_lora(encoder, LoRAOptions(2))
    attention = next(m for m in encoder.modules() if isinstance(m, TinyViTAttention))
    qkv, dim = attention.qkv, attention.qkv.in_features
    for part in "qv":
        getattr(qkv, f"lora_{part}_b").normal_()
    x = torch.randn(5, dim)
    change = (qkv(x) - torch.nn.functional.linear(x, qkv.weight, qkv.bias)).unflatten(
        -1, (attention.num_heads, 3, -1)
    )
    for i, part in ((0, "q"), (2, "v")):
        a, b = getattr(qkv, f"lora_{part}_a"), getattr(qkv, f"lora_{part}_b")
        torch.testing.assert_close(change[:, :, i].flatten(1), x @ a.T @ b.T, rtol=1e-4, atol=1e-5)
    assert change[:, :, 1].abs().max() < 1e-5
    before = qkv(x)
    qkv.merge()
    torch.testing.assert_close(qkv(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_reset_starts_the_adapter_anew(heads):
    torch.manual_seed(0)
    lora = LoRAQKV(torch.nn.Linear(6, 18), LoRAOptions(2), heads=heads)
    first = lora.lora_q_a.detach().clone()
    torch.nn.init.normal_(lora.lora_v_b)
    lora.reset_lora()
    x = torch.randn(5, 6)
    torch.testing.assert_close(lora(x), F.linear(x, lora.weight, lora.bias))
    assert not torch.equal(lora.lora_q_a, first)


def test_an_adapter_is_stored_by_its_parameters_names_and_loads_again():
    torch.manual_seed(0)
    lora, other = (LoRAQKV(torch.nn.Linear(6, 18), LoRAOptions(2)) for _ in range(2))
    torch.nn.init.normal_(lora.lora_q_b)
    state = lora.lora_state_dict()
    assert set(state) == {"lora_alpha", "lora_q_a", "lora_q_b", "lora_v_a", "lora_v_b"}
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    x = torch.randn(5, 6)
    plain = (F.linear(x, layer.weight, layer.bias) for layer in (lora, other))
    updates = [layer(x) - base for layer, base in zip((lora, other), plain, strict=True)]
    assert updates[0].abs().max() > 0.1
    torch.testing.assert_close(*updates)


def test_every_attention_of_encoder_and_decoder_is_adapted_and_merged_alike():
    """Injected, an update of zero changes nothing; trained, it changes the logits; merged, they stay."""
    torch.manual_seed(0)
    config = dataclasses.replace(preset("tiny").model, image_size=48, num_blocks=1, fusion_init="xavier")
    plain = build_aftersam(config, 3).eval()
    adapted = build_aftersam(dataclasses.replace(config, encoder="lora", decoder="lora"), 3).eval()
    assert not adapted.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    layers = [m for m in adapted.modules() if isinstance(m, LoRALinear | LoRAQKV)]
    assert [isinstance(layer, LoRAQKV) for layer in layers].count(True) == 4  # the encoder's blocks
    assert len(layers) == 4 + 2 * 7  # q and v of the decoder's attentions
    hu = 200 * torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(adapted(hu), plain(hu), rtol=1e-4, atol=1e-4)
        for name, value in adapted.named_parameters():
            if "lora" in name:
                value.normal_(std=0.05)
        trained = adapted(hu)
        assert (trained - plain(hu)).abs().max() > 1e-2
        merge_lora(adapted)
        torch.testing.assert_close(adapted(hu), trained, rtol=1e-3, atol=1e-3)
