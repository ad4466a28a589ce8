"""SAM's ViT-B encoder against segment_anything's own.    python -m benchmarks.bench_image_encoder

    segment-anything             its ImageEncoderViT with the same weights, eager
    segment-anything, compiled   through torch.compile (on a GPU)
    image_encoder                ours

Forward alone, on normalised images (T, 3, S, S); random weights at the scale of trained ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn

from aftersam.config import ENCODERS
from aftersam.model.image_encoder import build_image_encoder
from aftersam.model.sam import segment_anything_modeling
from benchmarks import harness
from benchmarks.harness import Case, Provider

OURS = "image_encoder"
CPU_SHAPES = [(1, 256), (1, 512)]  # images, side in pixels
GPU_SHAPES = [(8, 1024), (16, 512), (32, 256)]


def theirs(image_size: int) -> nn.Module:
    """segment_anything's ViT-B encoder, as its build_sam makes it."""
    size = ENCODERS["vit_b"]
    encoder: nn.Module = segment_anything_modeling("image_encoder").ImageEncoderViT(
        img_size=image_size, patch_size=size.patch, embed_dim=size.dim, depth=size.depth, num_heads=size.num_heads,
        out_chans=size.out_channels, use_rel_pos=True, window_size=size.window, global_attn_indexes=size.global_blocks,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    return encoder


@cache
def encoders(image_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Ours, segment_anything's and the latter in fp64, with the same weights."""
    ours = build_image_encoder("vit_b", image_size=image_size)
    generator = torch.Generator().manual_seed(0)
    for name, value in ours.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        value.data.copy_(centre + 0.03 * torch.randn(value.shape, generator=generator))
    state = {k: v.to(device, dtype) for k, v in ours.state_dict().items()}
    built = {"ours": ours, "theirs": theirs(image_size), "exact": theirs(image_size)}
    for name, module in built.items():
        module.to(device, torch.float64 if name == "exact" else dtype).requires_grad_(False).eval()
        module.load_state_dict(state)
    return built


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    gpu = device.type == "cuda"
    for count, side in GPU_SHAPES if gpu else (CPU_SHAPES if full else CPU_SHAPES[:1]):
        images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))

        def run(which: str, side: int = side) -> Callable[[Tensor], Tensor]:
            def call(x: Tensor) -> Tensor:
                y = encoders(side, device, dtype)[which](x)
                return y if isinstance(y, Tensor) else y.embedding

            return call

        found = {"segment-anything": Provider(run("theirs"), run("exact"), 0)}
        exact = found["segment-anything"].reference
        if gpu:
            torch.compiler.reset()
            found["segment-anything, compiled"] = Provider(
                torch.compile(run("theirs"), dynamic=False), exact, 0
            )
        found[OURS] = Provider(run("ours"), exact, 0, role="ours")
        facts = {"subject": "encoder", "name": f"ViT-B, {side} px", "batch": count, "image_size": side}
        yield facts | {"items": count, "unit": "images"}, [images.to(device, dtype)], found
        encoders.cache_clear()


if __name__ == "__main__":
    sys.exit(harness.main(cases))
