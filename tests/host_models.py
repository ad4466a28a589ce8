"""2D transformers of other libraries with random weights, small where the library allows: what `lift` is tested on."""

from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor, nn

import conftest  # noqa: F401  # torchvision can be imported


class Host(NamedTuple):
    """A model and how it is called: `call(model, x)` gives one tensor whose first axis is the slices, as x's."""

    package: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the input of one slice
    call: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    tokens: str = "slices"  # what a row of a block's tokens is: a slice, or "positions"; or "sequence first"
    compiled: str = ""  # the part that torch.compile takes without graph break, where the whole is not
    video: bool = False  # it attends across frames already

    @property
    def version(self) -> str:
        return version(self.package).partition("+")[0]

    @torch.no_grad()
    def make(self) -> nn.Module:
        """The model with random weights, those included that libraries start at zero or one, which would hide much."""
        torch.manual_seed(0)
        model = self.build().eval()
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.abs().max() < 1e-2:
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model


def _timm(name: str, size: int, **options) -> Host:
    def make():
        import timm

        return timm.create_model(name, pretrained=False, num_classes=5, **options)

    return Host("timm", make, (3, size, size))


def _timm_vit(name: str, size: int = 32, patch: int = 8, **options) -> Host:
    small = {"img_size": size, "patch_size": patch, "depth": 2, "embed_dim": 48, "num_heads": 3}
    return _timm(name, size, **(small | options))


def _mvitv2() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    config = MultiScaleVitCfg(depths=(1, 2), embed_dim=24, num_heads=1, use_cls_token=True)
    return MultiScaleVit(config, img_size=32, num_classes=5)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=5)


def _torchvision_swin(block: str) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    v2 = block.endswith("V2")
    return swin.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5, block=getattr(swin, block),
        downsample_layer=swin.PatchMergingV2 if v2 else swin.PatchMerging,
    )  # fmt: skip


def _torch_encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _sam() -> nn.Module:
    from segment_anything.modeling.image_encoder import ImageEncoderViT

    model = ImageEncoderViT(
        img_size=128, embed_dim=48, depth=2, num_heads=3, use_rel_pos=True, window_size=3,
        global_attn_indexes=(1,), out_chans=16, norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def _transformers(model: str, config: str, **options) -> Callable[[], nn.Module]:
    def make():
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return make


_VIT = {
    "hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def _hf(model: str, config: str, size: int = 32, **options) -> Host:
    make = _transformers(model, config, **options)
    return Host("transformers", make, (3, size, size), lambda model, x: model(x).last_hidden_state)


def _diffusers_block() -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(48, 3, 16, cross_attention_dim=None)


def _diffusers_temporal() -> nn.Module:
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    return TransformerTemporalModel(3, 16, in_channels=32, num_layers=1)


def _diffusers_spatio_temporal() -> nn.Module:
    from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

    return TransformerSpatioTemporalModel(2, 16, in_channels=32, cross_attention_dim=24)


def _monai(name: str, *args, **options) -> Callable[[], nn.Module]:
    def make():
        from monai.networks import blocks, nets

        return getattr(nets if hasattr(nets, name) else blocks, name)(*args, **options)

    return make


_SWIN = {"img_size": 32, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
_MONAI_VIT = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 3, "spatial_dims": 2}

HOSTS: dict[str, Host] = {
    "timm vit": _timm_vit("vit_tiny_patch16_224"),
    "timm deit (distilled)": _timm_vit("deit_tiny_distilled_patch16_224"),
    "timm dinov2 with registers": _timm_vit("vit_small_patch14_reg4_dinov2", init_values=1.0),
    "timm dinov3": _timm_vit("vit_small_patch16_dinov3", init_values=1.0),
    "timm eva02": _timm_vit("eva02_tiny_patch14_224"),
    "timm beit": _timm_vit("beit_base_patch16_224", init_values=1.0),
    "timm swin": _timm("swin_tiny_patch4_window7_224", 32, **_SWIN),
    "timm swin v2": _timm("swinv2_tiny_window8_256", 32, **_SWIN),
    "timm mvitv2": Host("timm", _mvitv2, (3, 32, 32)),
    "timm samvit": _timm(
        "samvit_base_patch16",
        64,
        img_size=64,
        embed_dim=48,
        depth=2,
        num_heads=3,
        window_size=3,
        global_attn_indexes=(1,),
    ),
    "torchvision vit": Host("torchvision", _torchvision_vit, (3, 32, 32)),
    "torchvision swin": Host("torchvision", lambda: _torchvision_swin("SwinTransformerBlock"), (3, 32, 32)),
    "torchvision swin v2": Host(
        "torchvision", lambda: _torchvision_swin("SwinTransformerBlockV2"), (3, 32, 32)
    ),
    "torch TransformerEncoder": Host("torch", lambda: _torch_encoder(batch_first=True), (9, 48)),
    "torch TransformerEncoder, norm first": Host(
        "torch", lambda: _torch_encoder(batch_first=True, norm_first=True), (9, 48)
    ),
    "torch TransformerEncoder, sequence first": Host(
        "torch",
        _torch_encoder,
        (9, 48),
        lambda model, x: model(x.transpose(0, 1)).transpose(0, 1),
        "sequence first",
    ),
    "segment_anything ImageEncoderViT": Host("segment-anything", _sam, (3, 128, 128)),
    "transformers ViT": _hf("ViTModel", "ViTConfig", **_VIT),
    "transformers Dinov2": _hf("Dinov2Model", "Dinov2Config", **_VIT),
    "transformers Dinov2 with registers": _hf(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **_VIT
    ),
    "transformers SamVisionModel": _hf(
        "SamVisionModel",
        "SamVisionConfig",
        128,
        hidden_size=48,
        num_attention_heads=3,
        num_hidden_layers=2,
        image_size=128,
        patch_size=16,
        window_size=3,
        global_attn_indexes=[1],
        mlp_dim=96,
        output_channels=16,
    ),
    "transformers Sam2 Hiera": _hf(
        "Sam2HieraDetModel",
        "Sam2HieraDetConfig",
        64,
        hidden_size=24,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[24, 48, 96, 192],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 4, 4],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[8, 8],
    ),
    "transformers CLIP vision": _hf("CLIPVisionModel", "CLIPVisionConfig", **_VIT),
    "transformers SiglipVision": _hf("SiglipVisionModel", "SiglipVisionConfig", **_VIT),
    "diffusers BasicTransformerBlock": Host("diffusers", _diffusers_block, (9, 48)),
    "diffusers temporal transformer": Host(
        "diffusers",
        _diffusers_temporal,
        (32, 3, 3),
        lambda model, x: model(x, num_frames=3).sample,
        "positions",
        video=True,
    ),
    "diffusers spatio-temporal transformer": Host(
        "diffusers",
        _diffusers_spatio_temporal,
        (32, 3, 3),
        lambda model, x: model(x, x.new_ones(len(x), 1, 24), x.new_zeros(len(x) // 3, 3)).sample,
        video=True,
    ),
    "MONAI SABlock": Host("monai", _monai("SABlock", 48, 3), (9, 48)),
    "MONAI ViT": Host(
        "monai",
        _monai("ViT", 1, 32, 8, num_layers=2, **_MONAI_VIT),
        (1, 32, 32),
        lambda model, x: model(x)[0],
    ),
    "MONAI UNETR": Host("monai", _monai("UNETR", 1, 3, 32, feature_size=4, **_MONAI_VIT), (1, 32, 32)),
    "MONAI SwinUNETR": Host(
        "monai",
        _monai("SwinUNETR", 1, 3, feature_size=12, spatial_dims=2, window_size=4, depths=(2, 1, 1, 1)),
        (1, 64, 64),
        compiled="swinViT",
    ),
}
