"""The price of the third dimension: 2D transformers lifted to N slices.    python -m benchmarks.speed.hosts

    2D model             the host on the N slices, each by itself
    every third block    lifted, an axial half in front of every third block
    SDPA across          an axial half in front of every block, composed of torch's parts and transposes
    lifted               the same by axial_fusion.lift
    all tokens           every attention of the host over the N·P tokens of a group, which its positions allow or not

ViT-B with random weights, forward alone, one group of slices. FLOPs are counted by torch on the host; a half has
8·C² + 4·N·C a token."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from axial_fusion import lift
from benchmarks import harness
from benchmarks.harness import Case, Provider
from benchmarks.speed.image_encoder import theirs

DIM, DEPTH = 768, 12


class Shape(NamedTuple):
    host: str
    slices: int
    image_size: int  # px


CPU_SHAPES = [Shape("DINOv2", 4, 224)]
CPU_FULL = [*CPU_SHAPES, Shape("SAM", 4, 224)]
GPU_SHAPES = [Shape("DINOv2", 9, 518), Shape("SAM", 9, 512)]
GPU_FULL = [*GPU_SHAPES, Shape("DINOv2", 9, 224), Shape("SAM", 9, 1024)]


def dinov2(image_size: int) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(image_size=image_size, layerscale_value=0.5))


def sam(image_size: int) -> nn.Module:
    return theirs("vit_b", image_size)


BUILDERS: dict[str, Callable[[int], nn.Module]] = {"DINOv2": dinov2, "SAM": sam}


@cache
@torch.no_grad()
def host(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The 2D model, on weights that are never zero."""
    torch.manual_seed(0)
    model = BUILDERS[shape.host](shape.image_size)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.to(device, dtype).eval().requires_grad_(False)


@cache
@torch.no_grad()
def lifted(shape: Shape, device: torch.device, dtype: torch.dtype, where: int) -> nn.Module:
    """The host with an axial half in front of every `where`-th block, its output projection no longer zero."""
    model = copy.deepcopy(host(shape, device, dtype))
    lift(model, num_slices=shape.slices, where=where)
    generator = torch.Generator().manual_seed(1)
    for half in halves(model).values():
        weight = half.inter.out.weight
        weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    return model.requires_grad_(False)


def halves(model: nn.Module) -> dict[str, Any]:
    """Block -> its axial half."""
    return {name: m.axial for name, m in model.named_modules() if hasattr(m, "axial")}


def composed(model: nn.Module, plain: nn.Module, slices: int) -> nn.Module:
    """The 2D model with the halves of `model`, by torch's layer_norm, linear and SDPA."""
    plain = copy.deepcopy(plain)
    for name, half in halves(model).items():

        def across(module: nn.Module, args: tuple[Any, ...], half: Any = half) -> tuple[Any, ...]:
            x, w = args[0], half.inter
            rows = x.flatten(1, -2).unflatten(0, (-1, slices)).transpose(1, 2).flatten(0, 1)  # (B·P, N, C)
            z = F.layer_norm(rows, rows.shape[-1:], w.norm.weight, w.norm.bias, half.eps)
            qkv = F.linear(z, w.qkv.weight, w.qkv.bias).unflatten(-1, (3, half.num_heads, -1))
            q, k, v = qkv.transpose(1, 3).unbind(2)
            o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            update = F.linear(o, w.out.weight, w.out.bias).unflatten(0, (len(x) // slices, -1))
            return x + update.transpose(1, 2).reshape(x.shape), *args[1:]

        plain.get_submodule(name).register_forward_pre_hook(across)
    return plain


def over_all_tokens(plain: nn.Module, slices: int) -> nn.Module:
    """The 2D model whose attentions see the tokens of a whole group."""
    plain = copy.deepcopy(plain)

    def join(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0].unflatten(0, (-1, slices)).flatten(1, 2), *args[1:]

    def part(module: nn.Module, args: Any, output: Any) -> Any:
        return output[0].unflatten(1, (slices, -1)).flatten(0, 1), *output[1:]

    module: Any
    for module in plain.modules():
        if type(module).__name__ == "Dinov2Layer":
            module.attention.register_forward_pre_hook(join)
            module.attention.register_forward_hook(part)
    return plain


def call(model: nn.Module, images: Tensor) -> Tensor:
    y = model(images)
    return y if isinstance(y, Tensor) else y.last_hidden_state


def flops(model: nn.Module, shape: Shape) -> int:
    """Of the forward on the slices, counted by torch without memory."""
    images = torch.empty(shape.slices, 3, shape.image_size, shape.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        copy.deepcopy(model).to("meta")(images)
    return counter.get_total_flops()


def providers(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Provider]:
    names = ("2D model", "every third block", "SDPA across", "lifted", "all tokens")
    try:
        plain = host(shape, device, dtype)
    except ImportError as error:
        return {n: Provider(None, call, 0, str(error), "ours" if n == "lifted" else "rival") for n in names}
    n = shape.slices
    every, third = (lifted(shape, device, dtype, where) for where in (1, 3))
    tokens = n * (
        (shape.image_size // (14 if shape.host == "DINOv2" else 16)) ** 2 + (shape.host == "DINOv2")
    )
    base, half = flops(plain, shape), tokens * (8 * DIM**2 + 4 * n * DIM)

    def exactly(where: int, images: Tensor) -> Tensor:
        wide = copy.deepcopy(host(shape, device, dtype)).double()
        return call(composed(copy.deepcopy(lifted(shape, device, dtype, where)).double(), wide, n), images)

    def each_by_itself(images: Tensor) -> Tensor:
        return call(copy.deepcopy(plain).double(), images)

    def jointly(images: Tensor) -> Tensor:
        return call(over_all_tokens(copy.deepcopy(plain).double(), n), images)

    in_3d = partial(exactly, 1)
    found = {
        "2D model": Provider(partial(call, plain), each_by_itself, base, role="other"),
        "every third block": Provider(
            partial(call, third), partial(exactly, 3), base + DEPTH // 3 * half, role="other"
        ),
        "SDPA across": Provider(partial(call, composed(every, plain, n)), in_3d, base + DEPTH * half),
        "lifted": Provider(partial(call, every), in_3d, base + DEPTH * half, role="ours"),
    }
    if shape.host == "SAM":
        reason = "its windows and relative positions are those of one slice"
        return found | {"all tokens": Provider(None, each_by_itself, 0, reason, role="other")}
    joint = over_all_tokens(plain, n)
    return found | {"all tokens": Provider(partial(call, joint), jointly, flops(joint, shape), role="other")}


def cases(device: torch.device, dtype: torch.dtype, full: bool = False) -> Iterator[Case]:
    gpu = device.type == "cuda"
    shapes = (GPU_FULL if full else GPU_SHAPES) if gpu else (CPU_FULL if full else CPU_SHAPES)
    for shape in shapes:
        generator = torch.Generator().manual_seed(2)
        images = torch.randn(shape.slices, 3, shape.image_size, shape.image_size, generator=generator)
        name = f"{shape.host} ViT-B, {shape.slices} slices, {shape.image_size} px"
        facts = {"subject": "hosts", "name": name, **shape._asdict()}
        yield (
            facts | {"items": shape.slices, "unit": "slices"},
            [images.to(device, dtype)],
            providers(shape, device, dtype),
        )
        host.cache_clear()
        lifted.cache_clear()


if __name__ == "__main__":
    sys.exit(harness.main(cases))
