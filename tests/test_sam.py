"""SAM's encoders of three packages, made faster in place: equal, with gradients, under the same names, or refused."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

from axial_fusion import accelerate_sam
from axial_fusion.sam import SamAttention

SIZES = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mlp_dim": 48,
}
TRANSFORMERS = {  # module: encoder, its configuration
    "sam": ("SamVisionEncoder", "SamVisionConfig"),
    "sam_hq": ("SamHQVisionEncoder", "SamHQVisionConfig"),
    "got_ocr2": ("GotOcr2VisionEncoder", "GotOcr2VisionConfig"),
    "slanext": ("SLANeXtVisionEncoder", "SLANeXtVisionConfig"),
    "deepseek_ocr2": ("DeepseekOcr2SamVisionEncoder", "DeepseekOcr2SamVisionConfig"),
}


def _segment_anything(size=80, window=4, **options):
    encoder = importlib.import_module("segment_anything.modeling.image_encoder").ImageEncoderViT
    made = {"use_rel_pos": True, "window_size": window, "global_attn_indexes": (1,), **options}
    return encoder(size, 16, 3, 32, 3, 2, out_chans=16, **made)


def _timm(size=80, window=4):
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "neck_chans": 16, "global_attn_indexes": (1,)}
    return timm.create_model("samvit_base_patch16", img_size=size, window_size=window, **sizes)


def _transformers(size=80, window=4, module="sam", attention="sdpa", **options):
    encoder, config = TRANSFORMERS[module]
    config = getattr(importlib.import_module(f"transformers.models.{module}.configuration_{module}"), config)
    encoder = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), encoder)
    made = {**SIZES, "image_size": size, "window_size": window, "global_attn_indexes": [1], **options}
    return encoder(config(**made, attn_implementation=attention))


HOSTS = {
    "segment_anything": _segment_anything,
    "timm": _timm,
    "transformers": _transformers,
    "transformers, eager": lambda **sizes: _transformers(attention="eager", **sizes),
}


def _at_work(model):
    """Weights of a size at which every part counts, relative positions too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p), alpha=0.3 if "rel_pos" in name else 0.1)
    return model.eval()


def _output(model, x):
    y = model.forward_features(x) if hasattr(model, "forward_features") else model(x)
    return getattr(y, "last_hidden_state", y)


def _error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("size", "window"), [(80, 4), (64, 4), (48, 7), (80, 5)])
def test_output_and_every_gradient_are_the_hosts(host, size, window):
    slow, x = _at_work(HOSTS[host](size=size, window=window)).double(), torch.randn(2, 3, size, size).double()
    fast = accelerate_sam(copy.deepcopy(slow))
    assert sum(isinstance(m, SamAttention) for m in fast.modules()) == 3
    results = []
    for model in (slow, fast):
        image = x.clone().requires_grad_()
        y = _output(model, image)
        y.sin().sum().backward()
        results.append(
            [y, image.grad, *(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)]
        )
    # The eager attention of transformers takes its softmax in fp32, whatever the model's dtype.
    most = {"rtol": 1e-3, "atol": 1e-5} if "eager" in host else {"rtol": 1e-7, "atol": 1e-9}
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **most)
    with torch.no_grad():
        torch.testing.assert_close(_output(fast, x), results[0][0], **most)


@pytest.mark.parametrize("host", HOSTS)
def test_weights_are_shared_and_keep_their_names(host):
    slow, x = _at_work(HOSTS[host]()), torch.randn(1, 3, 80, 80)
    before = dict(slow.named_parameters())
    frozen = next(iter(before.values())).requires_grad_(False)
    fast = accelerate_sam(copy.deepcopy(slow).train())
    assert accelerate_sam(fast) is fast  # a second time changes nothing
    assert list(fast.state_dict()) == list(slow.state_dict())
    assert all(m.training for m in fast.modules())
    assert [p.requires_grad for p in fast.parameters()].count(False) == 1
    other = accelerate_sam(HOSTS[host]()).eval()
    other.load_state_dict(slow.state_dict())
    slow.load_state_dict(other.state_dict())
    expected = _output(fast.eval(), x)
    for copied in (other, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(_output(copied, x), expected, rtol=0, atol=0)
    shared = accelerate_sam(slow)
    assert {n: p.data_ptr() for n, p in shared.named_parameters()} == {
        n: p.data_ptr() for n, p in before.items()
    }
    assert not frozen.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_errors_are_within_those_of_the_host(host, dtype):
    model, x = _at_work(HOSTS[host]()), torch.randn(2, 3, 80, 80).to(dtype)
    model.to(dtype)
    truth = _output(copy.deepcopy(model).double(), x.double())
    fast = accelerate_sam(copy.deepcopy(model))
    with torch.no_grad():
        assert _error(_output(fast, x), truth) <= 2 * _error(_output(model, x), truth) + 1e-7
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32), torch.no_grad():
        assert _error(_output(fast, x), truth) <= 2 * _error(_output(model, x), truth) + 1e-7


@pytest.mark.parametrize("host", ["segment_anything", "transformers"])
def test_it_compiles_without_graph_break(host):
    fast, x = accelerate_sam(_at_work(HOSTS[host]())), torch.randn(1, 3, 80, 80)
    expected = _output(fast, x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: _output(fast, t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_other_image_sizes_interpolate_the_tables_as_the_host_does():
    model = _at_work(_segment_anything(use_abs_pos=False))
    fast = accelerate_sam(copy.deepcopy(model))
    for shape in ((1, 3, 80, 80), (2, 3, 48, 112), (1, 3, 128, 96)):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_projection_without_bias_pads_with_zeros():
    model, x = _at_work(_segment_anything(qkv_bias=False)), torch.randn(1, 3, 80, 80)
    torch.testing.assert_close(accelerate_sam(copy.deepcopy(model))(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", TRANSFORMERS)
def test_every_encoder_of_transformers_with_these_layers(module):
    attention = "eager" if module in ("got_ocr2", "slanext") else "sdpa"  # what these two have
    model, x = _at_work(_transformers(module=module, attention=attention)), torch.randn(1, 3, 80, 80)
    fast = accelerate_sam(copy.deepcopy(model))
    torch.testing.assert_close(_output(fast, x), _output(model, x), rtol=1e-4, atol=1e-5)


def test_whole_models_hold_the_encoder():
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
    from transformers import SamConfig, SamModel

    two_way = TwoWayTransformer(depth=1, embedding_dim=16, mlp_dim=32, num_heads=2)
    decoder = MaskDecoder(transformer_dim=16, transformer=two_way)
    sam = Sam(_segment_anything(), PromptEncoder(16, (5, 5), (80, 80), 4), decoder).eval()
    batch = [
        {
            "image": torch.randn(3, 80, 80),
            "original_size": (80, 80),
            "boxes": torch.tensor([[9.0, 9, 60, 70]]),
        }
    ]
    expected = sam(batch, multimask_output=False)[0]["low_res_logits"]
    found = accelerate_sam(sam)(batch, multimask_output=False)[0]["low_res_logits"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    vision = {**SIZES, "image_size": 80, "num_pos_feats": 8, "window_size": 4, "global_attn_indexes": [1]}
    prompt = {"hidden_size": 16, "image_size": 80, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "iou_head_hidden_dim": 16,
    }
    model = _at_work(
        SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    )
    x = {"pixel_values": torch.randn(1, 3, 80, 80), "input_boxes": torch.tensor([[[9.0, 9, 60, 70]]])}
    expected = model(**x).pred_masks
    torch.testing.assert_close(accelerate_sam(model)(**x).pred_masks, expected, rtol=1e-3, atol=1e-4)


def _hooked(attention):
    attention.register_forward_hook(lambda *_: None)


def _hooked_qkv(attention):
    attention.qkv.register_forward_hook(lambda *_: None)


def _adapted(attention):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["qkv"]), attention)


def _wrapped(attention):
    attention.qkv = nn.Sequential(attention.qkv)


def _own_forward(attention):
    attention.forward = lambda x: x


def _dropped(attention):
    attention.dropout = 0.1


def _scaled(attention):
    attention.scale *= 2


CHANGES = [
    (_hooked, "Attention has a hook"), (_hooked_qkv, "Attention.qkv has a hook"), (_adapted, "qkv is Linear, but must"),
    (_wrapped, "qkv is Sequential"), (_own_forward, "'forward'"), (_dropped, "dropout"), (_scaled, "scale"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
@pytest.mark.parametrize("host", ["segment_anything", "transformers"])
def test_what_would_go_wrong_is_refused_by_name_and_nothing_changed(host, change, named):
    model = HOSTS[host]()
    block = (model.blocks if host == "segment_anything" else model.layers)[2]
    change(block.attn)
    before = [(name, type(module)) for name, module in model.named_modules()]
    windows = [m.window_size for m in model.modules() if hasattr(m, "window_size")]
    with pytest.raises(ValueError, match=named):
        accelerate_sam(model)
    assert before == [(name, type(module)) for name, module in model.named_modules()]
    assert windows == [m.window_size for m in model.modules() if hasattr(m, "window_size")]


def test_models_without_sams_blocks_and_attention_weights_are_refused():
    with pytest.raises(ValueError, match="TransformerEncoderLayer holds no block of SAM's image encoder"):
        accelerate_sam(nn.TransformerEncoderLayer(16, 2))
    with pytest.raises(ValueError, match=r"blocks.0.attn: Attention has no relative positions"):
        accelerate_sam(_segment_anything(use_rel_pos=False))
    block = _segment_anything().blocks[0]
    block.__class__ = type("Other", (type(block),), {"forward": lambda self, x: x})
    with pytest.raises(ValueError, match=r"Other changes 'forward'"):
        accelerate_sam(nn.ModuleList([block]))
    attention = accelerate_sam(_transformers()).layers[0].attn
    with pytest.raises(ValueError, match="output_attentions is set"):
        attention(torch.randn(1, 5, 5, 32), output_attentions=True)
