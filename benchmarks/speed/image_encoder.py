"""SAM's image encoders against segment_anything's own.    python -m benchmarks.speed.image_encoder

    segment-anything    its ImageEncoderViT with the same weights: scores, bias and probabilities in memory
    SDPA, bias          the same with scaled_dot_product_attention, the bias materialised as its mask
    one-hot             the same with the bias as a product inside SDPA (rel_pos.py)
    FlexAttention       the same with rel_h and rel_w captured by the score function; on a GPU, compiled
    accelerate_sam      segment_anything's encoder with its attention replaced by ours, in place
    image_encoder       ours
    ..., compiled       each block through torch.compile, on a GPU

All rivals pad the windows. Forward alone, on normalised images (T, 3, S, S); random weights at the scale of trained
ones; on a CPU in fp32 and in bf16. FLOPs are those of the real tokens, padded keys included."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aftersam.config import ENCODERS
from aftersam.model.build import build_image_encoder
from aftersam.model.segment_anything import segment_anything_modeling
from axial_fusion import accelerate_sam
from benchmarks import harness
from benchmarks.harness import Case, Provider
from benchmarks.speed.rel_pos import flex, one_hot, sdpa_bias

OURS, ACCELERATED = "image_encoder", "accelerate_sam"
RIVALS: dict[str, Callable[..., Tensor] | None] = {
    "segment-anything": None, "SDPA, bias": sdpa_bias, "one-hot": one_hot, "FlexAttention": flex,
}  # fmt: skip
NAMES = {"vit_b": "ViT-B", "vit_h": "ViT-H"}


class Shape(NamedTuple):
    model: str
    image_size: int  # px
    batch: int


CPU_SHAPES = [Shape("vit_b", 256, 1), Shape("vit_b", 512, 1)]
GPU_SHAPES = [Shape("vit_b", 1024, 8), Shape("vit_b", 512, 8), Shape("vit_b", 256, 32)]
GPU_SHAPES_FULL = [Shape(m, side, t) for m in NAMES for side in (1024, 512, 256) for t in (1, 8, 32)]


def flops(model: str, image_size: int) -> int:
    """Of one image: every projection on real tokens alone, every query against its grid or its whole window."""
    size = ENCODERS[model]
    side, c, out = image_size // size.patch, size.dim, size.out_channels
    p = side**2
    total = 2 * p * c * 3 * size.patch**2 + 2 * p * c * out + 18 * p * out**2  # patches and neck
    for block in range(size.depth):
        keys = side if block in size.global_blocks else size.window  # a side
        total += 24 * p * c**2 + 4 * p * keys**2 * c + 4 * p * keys * c  # linears, attention, rel_h and rel_w
    return total


def theirs(model: str, image_size: int) -> nn.Module:
    """segment_anything's encoder, as its build_sam makes it."""
    size = ENCODERS[model]
    encoder: nn.Module = segment_anything_modeling("image_encoder").ImageEncoderViT(
        img_size=image_size, patch_size=size.patch, embed_dim=size.dim, depth=size.depth, num_heads=size.num_heads,
        out_chans=size.out_channels, use_rel_pos=True, window_size=size.window, global_attn_indexes=size.global_blocks,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    return encoder


class RivalAttention(nn.Module):
    """segment_anything's Attention with its weights and another `attend` (q, k, v, rel_h, rel_w) -> y."""

    def __init__(self, original: Any, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.original, self.attend = original, attend
        self.table = segment_anything_modeling("image_encoder").get_rel_pos

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.original.qkv(x).unflatten(-1, (3, self.original.num_heads, -1))  # (T, h, w, 3, M, D)
        q = qkv[..., 0, :, :]
        rows, columns = (
            self.table(n, n, t)
            for n, t in ((height, self.original.rel_pos_h), (width, self.original.rel_pos_w))
        )
        rel_h = torch.einsum("thwmd,hkd->tmkhw", q, rows).flatten(3)
        rel_w = torch.einsum("thwmd,wkd->tmhwk", q, columns).flatten(2, 3)
        y = self.attend(*qkv.flatten(1, 2).unbind(2), rel_h, rel_w)  # (T, P, M, D)
        return self.original.proj(y.unflatten(1, (height, width)).flatten(-2))


@cache
def weights(model: str, image_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A random state dict of SAM's names."""
    with torch.device("meta"):
        shapes = build_image_encoder(model, image_size=image_size).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in shapes.items():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = (centre + 0.03 * torch.randn(value.shape, generator=generator)).to(device, dtype)
    return state


@cache
def encoder(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> nn.Module:
    """The provider `name`, or segment_anything in fp64 as "exact", on the weights that all share."""
    state = weights(shape.model, shape.image_size, device, dtype)
    with torch.device("meta"):
        if name == OURS:
            module: nn.Module = build_image_encoder(shape.model, image_size=shape.image_size)
        else:
            module = theirs(shape.model, shape.image_size)
    if name == "exact":
        state = {key: value.double() for key, value in state.items()}
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False).eval()
    if name == ACCELERATED:
        accelerate_sam(module)
    attend = RIVALS.get(name)
    blocks: Any = module.blocks
    for block in blocks:
        if attend is not None:
            block.attn = RivalAttention(block.attn, attend)
        if compiled:
            block.compile(dynamic=False)  # windowed and global blocks: two graphs, however deep
    return module


def providers(
    shape: Shape, device: torch.device, dtype: torch.dtype, full: bool = False
) -> dict[str, Provider]:
    gpu = device.type == "cuda"
    count = shape.batch * flops(shape.model, shape.image_size)

    def exact(images: Tensor) -> Tensor:
        whole = encoder("exact", shape, device, dtype)
        return torch.cat([whole(image) for image in images.split(1)])  # fp64 scores of one image at a time

    def run(name: str, compiled: bool, images: Tensor) -> Tensor:
        y = encoder(name, shape, device, dtype, compiled)(images)
        return y if isinstance(y, Tensor) else y.embedding

    found = {}
    for name in (*RIVALS, ACCELERATED, OURS):
        role: Any = {OURS: "ours", ACCELERATED: "other"}.get(name, "rival")
        if name != "FlexAttention":
            found[name] = Provider(partial(run, name, False), exact, count, role=role)
        elif not gpu:
            found[name] = Provider(None, exact, count, "it is compiled on a GPU")
        elif not full:
            found[name] = Provider(None, exact, count, "compiled in a full run")
        if gpu and (full or name in (OURS, "SDPA, bias")):
            label = name if name == "FlexAttention" else f"{name}, compiled"
            other: Any = "other" if name in (OURS, ACCELERATED) else "rival"
            found[label] = Provider(partial(run, name, True), exact, count, role=other)
    return found


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    gpu = device.type == "cuda"
    for shape in (GPU_SHAPES_FULL if full else GPU_SHAPES) if gpu else CPU_SHAPES:
        images = torch.randn(
            shape.batch, 3, *(shape.image_size,) * 2, generator=torch.Generator().manual_seed(1)
        )
        for of in dict.fromkeys((dtype,) if gpu else (dtype, torch.bfloat16)):
            name = f"{NAMES[shape.model]}, {shape.image_size} px" + (f", batch {shape.batch}" if gpu else "")
            name += "" if of == dtype else ", bf16"
            facts = {"subject": "encoder", "name": name, **shape._asdict(), "dtype": str(of).split(".")[1]}
            if gpu:
                torch.compiler.reset()
            yield (
                facts | {"items": shape.batch, "unit": "images"},
                [images.to(device, of)],
                providers(shape, device, of, full),
            )
            encoder.cache_clear()
            weights.cache_clear()


if __name__ == "__main__":
    sys.exit(harness.main(cases))
