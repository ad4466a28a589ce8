"""State dicts of SAM and its relatives by their published names, of a ViT small enough to be written 300 times."""

import re

import torch
from safetensors.torch import save_file

from aftersam.config import ENCODERS, EncoderSize
from aftersam.model.sam_checkpoint import sam_shapes

SIZE = EncoderSize(32, 2, 2, global_blocks=(1,), window=2, out_channels=32)  # in place of vit_b
SIDE = 64  # px that the position tables of a `small_sam` are for


TIED = (
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"  # which transformers keeps under two names
)


def make_small(monkeypatch):
    """vit_b is `SIZE` until monkeypatch undoes it; whoever asks clears `sam_shapes` afterwards."""
    monkeypatch.setitem(ENCODERS, "vit_b", SIZE)
    sam_shapes.cache_clear()


def sam(name="vit_b", side=SIDE, seed=0):
    """SAM's state dict with random values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.tensor(7)
        if key.endswith("num_batches_tracked")
        else 0.2 * torch.randn(shape, generator=generator)
        for key, shape in sam_shapes(name, side).items()
    }


def hollow(shapes):
    """A state dict of these shapes whose file is small: each tensor is one number, expanded."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


_TO_HUGGING_FACE = {
    r"^image_encoder\.neck\.0": "vision_encoder.neck.conv1",
    r"^image_encoder\.neck\.1": "vision_encoder.neck.layer_norm1",
    r"^image_encoder\.neck\.2": "vision_encoder.neck.conv2",
    r"^image_encoder\.neck\.3": "vision_encoder.neck.layer_norm2",
    r"^image_encoder\.blocks": "vision_encoder.layers",
    r"^image_encoder": "vision_encoder",
    r"patch_embed\.proj\.": "patch_embed.projection.",
    r"\.norm": ".layer_norm",
    r"mask_downscaling\.0": "mask_embed.conv1",
    r"mask_downscaling\.1": "mask_embed.layer_norm1",
    r"mask_downscaling\.3": "mask_embed.conv2",
    r"mask_downscaling\.4": "mask_embed.layer_norm2",
    r"mask_downscaling\.6": "mask_embed.conv3",
    r"point_embeddings": "point_embed",
    r"^prompt_encoder\.pe_layer.*": "shared_image_embedding.positional_embedding",
    r"output_upscaling\.0": "upscale_conv1",
    r"output_upscaling\.1": "upscale_layer_norm",
    r"output_upscaling\.3": "upscale_conv2",
    r"^(mask_decoder\.(?:output|iou).*)layers\.0": r"\1proj_in",
    r"^(mask_decoder\.(?:output|iou).*)layers\.1": r"\1layers.0",
    r"^(mask_decoder\.(?:output|iou).*)layers\.2": r"\1proj_out",
}


def hugging_face(state):
    """The same tensors under the names of transformers' SamModel, which ties two of them."""
    renamed = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in _TO_HUGGING_FACE.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    tied = {"prompt_encoder.shared_embedding.positional_embedding":
            renamed["shared_image_embedding.positional_embedding"].clone()}  # fmt: skip
    return renamed | tied


def hq_extras(dim=32, vit_dim=32):
    """What SAM-HQ's decoder has beside SAM's."""
    shapes = {
        "hf_token.weight": (1, dim),
        **{f"hf_mlp.layers.{i}.weight": (dim if i < 2 else dim // 8, dim) for i in range(3)},
        **{f"hf_mlp.layers.{i}.bias": (dim if i < 2 else dim // 8,) for i in range(3)},
        "compress_vit_feat.0.weight": (vit_dim, dim, 2, 2), "compress_vit_feat.0.bias": (dim,),
        "compress_vit_feat.1.weight": (dim,), "compress_vit_feat.1.bias": (dim,),
        "compress_vit_feat.3.weight": (dim, dim // 8, 2, 2), "compress_vit_feat.3.bias": (dim // 8,),
        "embedding_encoder.0.weight": (dim, dim // 4, 2, 2), "embedding_encoder.0.bias": (dim // 4,),
        "embedding_encoder.1.weight": (dim // 4,), "embedding_encoder.1.bias": (dim // 4,),
        "embedding_encoder.3.weight": (dim // 4, dim // 8, 2, 2), "embedding_encoder.3.bias": (dim // 8,),
        "embedding_maskfeature.0.weight": (dim // 4, dim // 8, 3, 3), "embedding_maskfeature.0.bias": (dim // 4,),
        "embedding_maskfeature.1.weight": (dim // 4,), "embedding_maskfeature.1.bias": (dim // 4,),
        "embedding_maskfeature.3.weight": (dim // 8, dim // 4, 3, 3), "embedding_maskfeature.3.bias": (dim // 8,),
    }  # fmt: skip
    return {f"mask_decoder.{key}": torch.ones(shape) for key, shape in shapes.items()}


def hugging_face_hq_extras(dim=32, vit_dim=32):
    """The same in transformers' SamHQModel."""
    renames = {
        "hf_token": "hq_token", "hf_mlp.layers.0": "hq_mask_mlp.proj_in", "hf_mlp.layers.1": "hq_mask_mlp.layers.0",
        "hf_mlp.layers.2": "hq_mask_mlp.proj_out", "compress_vit_feat.0": "compress_vit_conv1",
        "compress_vit_feat.1": "compress_vit_norm", "compress_vit_feat.3": "compress_vit_conv2",
        "embedding_encoder.0": "encoder_conv1", "embedding_encoder.1": "encoder_norm",
        "embedding_encoder.3": "encoder_conv2", "embedding_maskfeature.0": "mask_conv1",
        "embedding_maskfeature.1": "mask_norm", "embedding_maskfeature.3": "mask_conv2",
    }  # fmt: skip
    renamed = {}
    for key, value in hq_extras(dim, vit_dim).items():
        part, _, last = key.removeprefix("mask_decoder.").rpartition(".")
        renamed[f"mask_decoder.{renames[part]}.{last}"] = value
    return renamed


def adapters(dim=32, depth=2):
    """What SAM-Med2D adds to every block."""
    shapes = {
        "norm.weight": (dim,), "norm.bias": (dim,), "channel.0.weight": (dim // 4, dim),
        "channel.2.weight": (dim, dim // 4), "spatial.0.weight": (dim, dim, 3, 3),
        "spatial.2.weight": (dim, dim, 4, 4),
    }  # fmt: skip
    return {
        f"image_encoder.blocks.{i}.Adapter.{key}": torch.ones(shape)
        for i in range(depth)
        for key, shape in shapes.items()
    }


def saved(path, state, **options):
    torch.save(state, path, **options)
    return path


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def in_safetensors(path, state):
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def folder(path, parts, write):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "sam"}')
    for name, state in parts.items():
        write(path / name, state)
    return path


def halves(state, pattern):
    names = list(state)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    return {pattern.format(i + 1): {k: state[k] for k in part} for i, part in enumerate((first, second))}
