"""A training step of the whole model: forward, loss, backward.    python -m benchmarks.speed.train_step

    naive 3D           LoRA as PEFT composes it; SAM's attention with its bias in memory, through SDPA; blocks that
                       attend over all N·P tokens, scores in memory
    SDPA factorised    the same encoder; the blocks' own function, composed of torch's parts
    compiled           the line above through torch.compile (on a GPU, in a full run)
    train_step         ours

An encoder with LoRA on q and v, or frozen; everything behind it trained; the optimiser left out, the same for all.
On a GPU a step is the replay of a CUDA graph, as in training, for every form. There it runs in bf16 autocast on fp32
weights, as in training, and is checked without autocast: rounding alone moves the gradient of so deep a model by
several percent. Gradients are compared as one vector; the loss is always computed in fp32."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from aftersam.config import ModelConfig
from aftersam.model.aftersam import AfterSAM
from aftersam.model.build import build_aftersam
from aftersam.model.image_encoder import EncoderAttention
from aftersam.model.lora import LoRAQKV
from aftersam.model.segment_anything import segment_anything_modeling
from aftersam.training.losses import segmentation_loss
from benchmarks import harness, machine
from benchmarks.harness import Case, Provider
from benchmarks.speed import fusion, transformer

OURS = "train_step"
CLASSES = 5

SMALL = ModelConfig(
    image_encoder="small",
    image_size=128,
    encoder="lora",
    num_heads=4,
    num_blocks=2,
    num_slices=5,
    stem="wide",
    output_stride=1,
)
VIT_B = ModelConfig(encoder="lora", output_stride=2)
CPU_SHAPES = [("small, 128 px", SMALL)]
CPU_FULL = [("ViT-B, 256 px", dataclasses.replace(VIT_B, image_size=256, num_slices=3, num_blocks=2))]
GPU_SHAPES = [
    (f"ViT-B {encoder}, {px} px", dataclasses.replace(VIT_B, image_size=px, encoder=encoder))
    for encoder in ("frozen", "lora")
    for px in (1024, 512)
]


class _LoRA(nn.Module):
    """A fused projection with separate LoRA updates of q and v, as in PEFT and in LoRA ports of SAM."""

    def __init__(self, known: LoRAQKV) -> None:
        super().__init__()
        self.weight, self.bias, self.scaling = known.weight, known.bias, known.scaling
        for part in "qv":
            for side in "ab":
                name = f"lora_{part}_{side}"
                self.register_parameter(name, getattr(known, name))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.weight, self.bias).chunk(3, -1)
        return torch.cat([q + self._update(x, "q"), k, v + self._update(x, "v")], -1)

    def _update(self, x: Tensor, part: str) -> Tensor:
        a, b = (getattr(self, f"lora_{part}_{side}") for side in "ab")
        return F.linear(F.linear(x, a), b) * self.scaling


class _Attention(nn.Module):
    """SAM's attention with segment_anything's windows and its bias in memory; `attend` takes q, k, v and the bias.

    `frugal` computes an image or 64 windows at a time and again in the backward, so that the bias fits in fp64, too."""

    def __init__(self, known: EncoderAttention, attend: Callable[..., Tensor], *, frugal: bool) -> None:
        super().__init__()
        self.frugal = frugal
        self.num_heads, self.window, self.attend = known.num_heads, known.window, attend
        self.qkv = _LoRA(known.qkv) if isinstance(known.qkv, LoRAQKV) else known.qkv
        self.proj = known.proj
        self.rel_pos_h, self.rel_pos_w = known.rel_pos_h, known.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        theirs = segment_anything_modeling("image_encoder")
        grid = x.shape[1:3]
        padded = grid
        if self.window:
            x, padded = theirs.window_partition(x, self.window)
        if self.frugal:
            parts = x.split(64 if self.window else 1)
            x = torch.cat([checkpoint(self._attention, part, use_reentrant=False) for part in parts])
        else:
            x = self._attention(x)
        return theirs.window_unpartition(x, self.window, padded, grid) if self.window else x

    def _attention(self, x: Tensor) -> Tensor:
        theirs = segment_anything_modeling("image_encoder")
        count, height, width, channels = x.shape
        qkv = self.qkv(x).view(count, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (T, M, P, D)
        zeros = q.new_zeros(count * self.num_heads, height * width, height * width)
        bias = theirs.add_decomposed_rel_pos(
            zeros, q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, (height, width), (height, width)
        )
        x = self.attend(q, k, v, bias.view(count, self.num_heads, *bias.shape[1:]).to(q.dtype))
        return self.proj(x.transpose(1, 2).reshape(count, height, width, channels))


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def equations(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


def composed(
    model: AfterSAM, attend: Callable[..., Tensor], fuse: transformer.Attention, *, frugal: bool = False
) -> AfterSAM:
    """`model` with its encoder's attention and its blocks' attention computed by `attend` and `fuse`; same weights."""
    model = copy.deepcopy(model)
    for block in model.encoder.blocks:  # type: ignore[union-attr]  # a ModuleList
        block.attn = _Attention(block.attn, attend, frugal=frugal)
    for block in model.fusion.blocks:  # type: ignore[union-attr]  # a ModuleList
        block.attention = transformer.OtherAttention(block.attention, fuse)  # type: ignore[arg-type]  # modules out of a ModuleList
    return model


def step(model: AfterSAM, labels: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as a function of HU (B, N, H, W) and of all trained parameters as one vector."""
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}

    def call(hu: Tensor, vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in trained.values()])
        known = {name: part.view(shape) for (name, shape), part in zip(trained.items(), parts, strict=True)}
        low = vector.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(hu.device.type, dtype=dtype) if low else contextlib.nullcontext():
            logits = torch.func.functional_call(model, known, (hu.to(vector.dtype),))
        return segmentation_loss(logits, labels).total

    return call


def case(
    name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> Case:
    """One training step on one slice group. Every slice is supervised; weights are random and none is zero, so that
    every gradient counts."""
    torch.manual_seed(0)
    config = dataclasses.replace(config, fusion_init="xavier")
    model = build_aftersam(config, CLASSES).train()
    for key, value in model.named_parameters():
        if key.endswith("lora_q_b") or key.endswith("lora_v_b") or ".rel_pos_" in key:
            nn.init.normal_(value, std=0.02)
    shape = (1, config.num_slices, config.image_size, config.image_size)
    hu = 300 * torch.randn(shape, device=device)
    labels = torch.randint(CLASSES, shape, device=device)
    vector = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).to(device)
    naive = partial(transformer.joint, attend=fusion.materialised)
    forms: dict[str, tuple[Callable[..., Tensor], Any, Any]] = {
        "naive 3D": (sdpa, naive, naive),
        "SDPA factorised": (sdpa, transformer.library, transformer.remade),
    }
    found = {}
    positions = (config.image_size // model.encoder.patch) ** 2
    scores = 4 * config.num_blocks * config.num_heads * (config.num_slices * positions) ** 2 * 8
    for provider, (attend, fuse, exact) in forms.items():
        missing = ""
        if provider == "naive 3D" and scores > machine.free_bytes():
            missing = f"fp64 scores of its reference need {scores / 2**30:.0f} GiB"
        doubled = composed(model, equations, exact, frugal=True).double().to(device)
        doubled.decoder.pe_layer.float()  # SAM's own makes its coordinates in fp32
        reference = step(doubled, labels, torch.float64)
        form = composed(model, attend, fuse).to(device)
        call, checked = (step(form, labels, kind) for kind in (dtype, torch.float32))
        role = "other" if provider == "naive 3D" else "rival"
        found[provider] = Provider(None if missing else call, reference, 0, missing, role, checked)  # type: ignore[arg-type]  # modules out of a ModuleList
    if compiled:
        torch.compiler.reset()
        whole = torch.compile(call, dynamic=False)
        found["SDPA factorised, compiled"] = Provider(whole, reference, 0, checked=checked)
    call, checked = (step(model.to(device), labels, kind) for kind in (dtype, torch.float32))
    found[OURS] = Provider(call, reference, 0, role="ours", checked=checked)
    facts = {
        "subject": "train step", "name": name, "slices": config.num_slices, "image_size": config.image_size,
        "blocks": config.num_blocks, "encoder": config.encoder, "items": 1, "unit": "groups",
    }  # fmt: skip
    return facts, [hu, vector.requires_grad_()], found


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES + (CPU_FULL if full else [])
    for name, config in shapes:
        yield case(name, config, device, dtype, compiled=full and device.type == "cuda")


if __name__ == "__main__":
    sys.exit(harness.main(cases))
