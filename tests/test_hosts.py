"""Attention of real packages: every class and every option is either taken over equal or refused by name."""

import contextlib
import copy
import functools
import importlib
import inspect
import itertools
import pkgutil
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from axial_fusion import AxialFusionAttention, LoRALinear

for package in ("timm", "diffusers"):
    pytest.importorskip(package)

MONAI = "monai.networks.blocks.selfattention"
HUGGING_FACE = {  # module: attention and config of transformers
    "vit": "ViT", "deit": "DeiT", "vit_mae": "ViTMAE", "vit_msn": "ViTMSN", "ijepa": "IJepa", "vivit": "Vivit",
    "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters", "clip": "CLIP", "siglip": "Siglip",
    "beit": "Beit", "dinov3_vit": "DINOv3ViT", "videomae": "VideoMAE", "timesformer": "Timesformer", "swin": "Swin",
    "swinv2": "Swinv2", "hiera": "Hiera", "yolos": "Yolos", "dpt": "DPT", "aimv2": "Aimv2", "segformer": "Segformer",
    "owlvit": "OwlViT", "vitdet": "VitDet", "blip": "Blip", "pvt": "Pvt", "detr": "Detr", "sam": "Sam", "sam2": "Sam2",
}  # fmt: skip
SIZES = {
    "window_size": (4, 4), "feat_size": (4, 4), "input_size": (4, 4), "resolution": (4, 4), "input_resolution": (4, 4),
    "num_heads": 4, "heads": 4, "nhead": 4, "dim": 32, "dim_out": 32, "in_dim": 32, "out_dim": 32, "in_features": 32,
    "embed_dim": 32, "hidden_size": 32, "hidden_dim": 32, "query_dim": 32, "in_chs": 32, "channels": 32, "in_chans": 32,
    "num_channels": 32, "width": 32, "key_dim": 8, "head_dim": 8, "dim_head": 8, "sr_ratio": 1, "depth": 1,
}  # fmt: skip
HOSTS = {
    "torch": lambda **options: nn.MultiheadAttention(32, 4, batch_first=True, **options),
    "timm": lambda **o: _class("timm.layers.attention", "Attention")(32, 4, norm_layer=nn.LayerNorm, **o),
    "timm sam": lambda **o: _class("timm.models.vision_transformer_sam", "Attention")(32, 4, **o),
    "sam": lambda **o: _class("segment_anything.modeling.image_encoder", "Attention")(32, 4, **o),
    "monai": lambda **options: _class(MONAI, "SABlock")(32, 4, **options),
    "diffusers": lambda **o: _class("diffusers.models.attention_processor", "Attention")(
        32, dim_head=8, heads=4, **o
    ),
    "vit": lambda **options: _hugging_face("vit", "ViTAttention", **options),
    "clip": lambda **options: _hugging_face("clip", "CLIPAttention", **options),
    "transformers sam": lambda **options: _hugging_face(
        "sam", "SamVisionSdpaAttention", use_rel_pos=False, **options
    ),
}


class Twice(nn.Module):
    def forward(self, x, *_, **__):
        return 2 * x


def _class(module, name):
    return getattr(importlib.import_module(module), name)


def _config(module, name, **options):
    config = _class(f"transformers.models.{module}.configuration_{module}", f"{name}Config")
    names = {"ijepa": "IJepa"}
    config = getattr(importlib.import_module(config.__module__), names.get(module, name) + "Config")
    vision = getattr(importlib.import_module(config.__module__), f"{name}VisionConfig", config)
    return vision(hidden_size=32, num_attention_heads=4, **options)


def _hugging_face(module, attention, **options):
    cls = _class(f"transformers.models.{module}.modeling_{module}", attention)
    more = {"window_size": 0} if "window_size" in inspect.signature(cls).parameters else {}
    return cls(_config(module, HUGGING_FACE[module], **options), **more)


def _randomised(attention, scale=0.3):
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=scale)
    return attention


def _called(attention, x):
    """What the host computes on (T, 16, C): its own call, one output."""
    if isinstance(attention, nn.MultiheadAttention):
        t = x if attention.batch_first else x.transpose(0, 1)
        y = attention(t, t, t)[0]
        return y if attention.batch_first else y.transpose(0, 1)
    grid = "image_encoder" in type(attention).__module__ or "sam" in type(attention).__module__
    y = attention(x.unflatten(1, (4, 4)) if grid else x)
    y = y[0] if isinstance(y, tuple) else y
    return y.flatten(1, 2) if grid else y


def _verdict(attention, channels=32):
    """ "equal", or why it is refused; fails where it is taken over and differs."""
    x = torch.randn(2, 16, channels)
    try:
        ours = AxialFusionAttention.from_attention(attention)
    except ValueError as error:
        return str(error)
    found = ours(x[:, None])
    found = (found[0] if isinstance(found, tuple) else found)[:, 0]
    torch.testing.assert_close(found, _called(attention, x), rtol=1e-4, atol=1e-5)
    assert ours.training == attention.training
    return "equal"


def _made(cls):
    """An instance with small sizes for what its constructor needs, or None where it needs what we do not know."""
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    sizes = {
        p.name
        for p in parameters
        if p.default is p.empty or p.name in ("num_heads", "heads", "dim_head", "dim")
    }
    if not sizes <= set(SIZES):
        return None
    try:
        return cls(**{name: SIZES[name] for name in sizes})
    except (TypeError, ValueError, AssertionError, ZeroDivisionError, AttributeError):
        return None


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _attention_classes(package):
    """Every attention class that the modules of a package, or one module, hold."""
    names = [package.__name__]
    names += [m.name for m in pkgutil.walk_packages(getattr(package, "__path__", []), package.__name__ + ".")]
    for module in map(importlib.import_module, names):
        for name, cls in list(vars(module).items()):
            if (
                isinstance(cls, type)
                and issubclass(cls, nn.Module)
                and name.endswith(("Attention", "Attn", "SABlock"))
            ):
                yield cls


@pytest.mark.filterwarnings("ignore")  # modules that a package deprecates are imported too
@pytest.mark.parametrize(
    ("package", "least", "equal"),
    [
        ("timm.layers", 10, {"timm.layers.attention.Attention"}),
        ("timm.models", 25, {"timm.models.vision_transformer_sam.Attention"}),
        ("monai.networks.blocks", 1, {f"{MONAI}.SABlock"}),
        ("torch.nn.modules", 1, {"torch.nn.modules.activation.MultiheadAttention"}),
        ("segment_anything.modeling", 1, {"segment_anything.modeling.image_encoder.Attention"}),
        ("diffusers.models.attention_processor", 1, {"diffusers.models.attention_processor.Attention"}),
    ],
)
def test_every_attention_class_of_a_package_is_equal_or_refused(package, least, equal):
    made = [a for a in map(_made, set(_attention_classes(importlib.import_module(package)))) if a is not None]
    assert len(made) >= least
    taken = {type(a) for a in made if _verdict(_randomised(a)) == "equal"}
    assert equal <= {f"{cls.__module__}.{cls.__qualname__}" for cls in taken}


def test_every_attention_class_of_transformers_vision_is_equal_or_refused():
    taken, made = set(), 0
    for module, name in HUGGING_FACE.items():
        for cls in _attention_classes(
            importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        ):
            more = {"window_size": 0} if "SamVision" in cls.__name__ else {}
            try:
                attention = cls(_config(module, name), **more)
            except Exception:  # it takes more than a configuration, or another one
                continue
            made += 1
            if _verdict(_randomised(attention)) == "equal":
                taken.add(cls.__name__)
    assert made >= 20
    assert {f"{HUGGING_FACE[m]}Attention" for m in list(HUGGING_FACE)[:10]} <= taken


OPTIONS = [
    ("timm", {"qkv_bias": (0, 1), "proj_bias": (0, 1), "qk_norm": (0, 1), "scale_norm": (0, 1), "gated": (0, 1),
              "dim_out": (None, 16), "attn_head_dim": (None, 4), "attn_drop": (0.0, 0.3), "proj_drop": (0.0, 0.3)}),
    ("timm sam", {"qkv_bias": (0, 1), "qk_norm": (0, 1), "use_rel_pos": (0, 1), "input_size": ((4, 4),),
                  "attn_drop": (0.0, 0.3), "proj_drop": (0.0, 0.3)}),
    ("sam", {"qkv_bias": (0, 1), "use_rel_pos": (0, 1), "input_size": ((4, 4),)}),
    ("torch", {"bias": (0, 1), "add_bias_kv": (0, 1), "add_zero_attn": (0, 1), "dropout": (0.0, 0.3),
               "kdim": (None, 16), "vdim": (None, 16)}),
    ("monai", {"qkv_bias": (0, 1), "use_combined_linear": (0, 1), "include_fc": (0, 1), "save_attn": (0, 1),
               "dim_head": (None, 4), "dropout_rate": (0.0, 0.3), "causal": (0, 1), "sequence_length": (16,),
               "use_flash_attention": (0, 1), "attention_dtype": (None, torch.bfloat16)}),
    ("diffusers", {"bias": (0, 1), "out_bias": (0, 1), "scale_qk": (0, 1), "qk_norm": (None, "layer_norm"),
                   "residual_connection": (0, 1), "rescale_output_factor": (1.0, 2.0), "out_dim": (None, 16),
                   "norm_num_groups": (None, 4), "kv_heads": (None, 2), "upcast_attention": (0, 1)}),
    ("vit", {"qkv_bias": (0, 1), "attention_probs_dropout_prob": (0.0, 0.3)}),
    ("clip", {"attention_dropout": (0.0, 0.3)}),
    ("transformers sam", {"qkv_bias": (0, 1), "attention_dropout": (0.0, 0.3)}),
]  # fmt: skip


@pytest.mark.parametrize(("host", "options"), OPTIONS, ids=[host for host, _ in OPTIONS])
def test_every_option_of_a_known_class_is_equal_or_refused(host, options):
    equal = 0
    for values in itertools.product(*options.values()):
        chosen = {k: bool(v) if options[k] == (0, 1) else v for k, v in zip(options, values, strict=True)}
        if chosen.get("use_flash_attention") and chosen.get("save_attn"):
            continue  # MONAI refuses the two together
        attention = _randomised(HOSTS[host](**chosen))
        for mode in (True, False):
            verdict = _verdict(attention.train(mode))
            equal += verdict == "equal"
            if any("drop" in k and v for k, v in chosen.items()) and mode:
                assert verdict != "equal"
    assert equal


def _tampered(attention):
    """Copies of an attention, each with one thing changed that a user or an adapter may change: name, attention."""

    def fresh():
        return _randomised(copy.deepcopy(attention)).eval()

    for name, value in [
        *vars(attention).items(),
        *attention._modules.items(),
        *attention._parameters.items(),
    ]:
        if name.startswith("_") and name != "_qkv_same_embed_dim":
            continue
        changed = {bool: lambda v: not v, int: lambda v: 2 * v, float: lambda v: v / 2 + 0.3}.get(type(value))
        if changed is not None and name != "training":
            setattr(one := fresh(), name, changed(value))
            yield name, one
        if isinstance(value, nn.Module):
            if type(value) in (nn.Identity, nn.Dropout):
                _hook(getattr(one := fresh(), name))
                yield name, one
            for other in (Twice(), nn.Dropout(0.3), LoRALinear(32, 96, rank=2), nn.LayerNorm(8), None):
                (one := fresh())._modules[name] = other  # as no setattr refuses it
                yield name, one
        if isinstance(value, nn.Linear):
            for change in CHANGES_OF_A_LINEAR:
                change(getattr(one := fresh(), name))
                yield name, one
        if value is None:
            other = nn.Parameter(torch.randn(1, 1, 32)) if name in attention._parameters else Twice()
            setattr(one := fresh(), name, other)
            yield name, one
    for change in CHANGES_OF_AN_ATTENTION:
        change(one := fresh())
        yield change.__name__, one


def _twice(module, _, y):
    return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y


def _hook(module):
    module.register_forward_hook(_twice)


def _pre_hook(module):
    module.register_forward_pre_hook(lambda _, args: tuple(2 * a for a in args))


def _spectral(linear):
    nn.utils.spectral_norm(linear)


def _weight_norm(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(linear)
    linear.weight_g.data.mul_(2)


def _parametrised(linear):
    parametrize.register_parametrization(linear, "weight", Twice())


def _pruned(linear):
    prune.random_unstructured(linear, "weight", 0.5)


def _own_forward(module):
    forward = module.forward
    module.forward = lambda *a, **k: _twice(module, a, forward(*a, **k))


def _own_class(module):
    cls = type(module)
    module.__class__ = type(
        cls.__name__, (cls,), {"forward": lambda s, *a, **k: _twice(s, a, cls.forward(s, *a, **k))}
    )


def _half_of_it(module):
    next(iter(module.parameters())).data = next(iter(module.parameters())).data.to(torch.float64)


CHANGES_OF_A_LINEAR = [
    _hook,
    _pre_hook,
    _spectral,
    _weight_norm,
    _parametrised,
    _pruned,
    _own_forward,
    _own_class,
]
CHANGES_OF_AN_ATTENTION = [_hook, _pre_hook, _own_forward, _own_class, _half_of_it]


@pytest.mark.parametrize("host", HOSTS)
def test_a_known_attention_that_was_changed_is_equal_or_refused(host):
    tried = 0
    for name, attention in _tampered(_randomised(HOSTS[host]())):
        try:
            _called(attention.eval(), torch.randn(2, 16, 32))
        except Exception:  # the host itself cannot run
            with contextlib.suppress(ValueError):
                AxialFusionAttention.from_attention(attention)
            continue
        tried += 1
        try:
            _verdict(attention)
        except AssertionError as error:
            raise AssertionError(f"{name} was changed and not seen: {error}") from error
    assert tried >= 10


def test_a_forward_that_was_replaced_on_the_class_is_refused(monkeypatch):
    cls = _class("timm.layers.attention", "Attention")
    monkeypatch.setattr(cls, "forward", functools.wraps(cls.forward)(lambda self, x, **_: x))
    with pytest.raises(ValueError, match="was replaced by one of test_hosts"):
        AxialFusionAttention.from_attention(HOSTS["timm"]())
