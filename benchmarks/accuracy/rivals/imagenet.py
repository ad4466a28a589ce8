"""ImageNet weights for TransUNet and Swin-Unet, from the files that their authors start from.

Source of names and shapes: github.com/google-research/vision_transformer (R50+ViT-B_16.npz) and
github.com/microsoft/Swin-Transformer (swin_tiny_patch4_window7_224.pth)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aftersam.errors import naming, one_line
from aftersam.model.sam_layouts import read_files

HINT = "give the weights that the network's authors start from"
_SWIN = (  # names in the file, and in SwinUnet
    (r"patch_embed\.(.*)", (r"embed.\1",)),
    (r"layers\.([0-2])\.downsample\.(.*)", (r"encoder.\1.downsample.\2",)),
    (
        r"layers\.0\.(blocks.*)",
        (r"encoder.0.\1", r"decoder.2.\1"),
    ),  # the decoder begins as the encoder's mirror image
    (r"layers\.1\.(blocks.*)", (r"encoder.1.\1", r"decoder.1.\1")),
    (r"layers\.2\.(blocks.*)", (r"encoder.2.\1", r"decoder.0.\1")),
    (r"layers\.3\.(blocks.*)", (r"bottleneck.0.\1",)),
    (r"norm\.(.*)", (r"bottleneck.1.\1",)),
)
_VIT = (  # names in TransUNet's transformer blocks, and in the file
    ("norm1", "LayerNorm_0"),
    ("norm2", "LayerNorm_2"),
    ("mlp.linear1", "MlpBlock_3/Dense_0"),
    ("mlp.linear2", "MlpBlock_3/Dense_1"),
)


def load_swin(network: nn.Module, path: Path) -> None:
    """Fill embedding, encoder, bottleneck and the decoder's blocks of a SwinUnet from a Swin transformer's file.

    Stages of the file may be deeper, and its windows larger. Raises ValueError on a file that lacks a tensor or has it
    in another shape."""
    loaded = read_files([path])
    state = loaded.get("model", loaded) if isinstance(loaded, Mapping) else {}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        plain = str(key).replace(".mlp.fc", ".mlp.linear")
        for pattern, names in _SWIN:
            if match := re.fullmatch(pattern, plain):
                found |= {match.expand(name): value for name in names}
    for name, table in network.named_parameters():
        if name.endswith("relative_position_bias_table") and name in found:
            found[name] = _of_smaller_window(found[name], len(table))
    _fill(network, found, path, r"(embed|encoder|bottleneck)\.|decoder\.\d\.blocks\.")


def _of_smaller_window(table: Tensor, count: int) -> Tensor:
    """The `count` biases of a table (offsets, heads) that a smaller window has: those of the smallest offsets."""
    side, kept = math.isqrt(len(table)), math.isqrt(count)
    if side**2 != len(table) or kept > side:
        return table  # which then does not fit
    first = (side - kept) // 2
    inner = table.unflatten(0, (side, side))[first : first + kept, first : first + kept]
    return inner.flatten(0, 1)


def load_r50_vit(network: nn.Module, path: Path) -> None:
    """Fill the ResNet and the transformer of a TransUNet from the file of R50+ViT-B_16.

    Positions are interpolated to the network's grid. Raises ValueError on a file that lacks a tensor or has it in
    another shape."""
    with naming(path, "could not be read as R50+ViT-B_16.npz"), np.load(path, allow_pickle=False) as file:
        state = {key: torch.from_numpy(np.asarray(file[key], np.float32)) for key in file.files}
    try:
        found = dict(_r50_vit(state, network))
    except KeyError as error:
        raise ValueError(f"{path} does not fit: it lacks {error.args[0]}; {HINT}") from None
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {one_line(str(error))}; {HINT}") from None
    grid = tuple(network.get_parameter("position").shape[2:])
    found["position"] = F.interpolate(found["position"], size=grid, mode="bilinear", align_corners=True)
    _fill(network, found, path, r"(root|stages|embed|position|blocks|norm)\b")


def _r50_vit(state: Mapping[str, Tensor], network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the file under the names of TransUNet."""
    yield from _affine("root.adn.N", state, "gn_root")
    yield "root.conv.weight", _convolution(state["conv_root/kernel"])
    for b, stage in enumerate(network.stages):  # type: ignore[arg-type]  # a ModuleList
        for u in range(len(stage)):
            home, theirs = f"stages.{b}.{u}", f"block{b + 1}/unit{u + 1}"
            for n in (1, 2, 3):
                yield f"{home}.conv{n}.weight", _convolution(state[f"{theirs}/conv{n}/kernel"])
                yield from _affine(f"{home}.bn{n}", state, f"{theirs}/gn{n}")
            if u == 0:
                yield f"{home}.downsample.conv.weight", _convolution(state[f"{theirs}/conv_proj/kernel"])
                yield from _affine(f"{home}.downsample.adn.N", state, f"{theirs}/gn_proj")
    yield "embed.weight", _convolution(state["embedding/kernel"])
    yield "embed.bias", state["embedding/bias"]
    positions = state["Transformer/posembed_input/pos_embedding"][0, 1:]  # without that of the class token
    side = math.isqrt(len(positions))
    yield "position", positions.T.unflatten(1, (side, side))[None]
    for i in range(len(network.blocks)):  # type: ignore[arg-type]  # a Sequential
        home, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for ours, other in _VIT:
            part = _affine if ours.startswith("norm") else _linear
            yield from part(f"{home}.{ours}", state, f"{theirs}/{other}")
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        parts = [dict(_linear(name, state, f"{attention}/{name}")) for name in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            whole = [value for part in parts for name, value in part.items() if name.endswith(kind)]
            yield f"{home}.attn.qkv.{kind}", torch.cat(whole)
        yield from _linear(f"{home}.attn.out_proj", state, f"{attention}/out")
    yield from _affine("norm", state, "Transformer/encoder_norm")


def _convolution(kernel: Tensor) -> Tensor:
    return kernel.permute(3, 2, 0, 1)  # from (h, w, in, out)


def _affine(name: str, state: Mapping[str, Tensor], theirs: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", state[f"{theirs}/scale"].flatten()
    yield f"{name}.bias", state[f"{theirs}/bias"].flatten()


def _linear(name: str, state: Mapping[str, Tensor], theirs: str) -> Iterator[tuple[str, Tensor]]:
    """A linear layer, whose kernel is (in, out), (in, heads, d) or (heads, d, out)."""
    kernel, bias = state[f"{theirs}/kernel"], state[f"{theirs}/bias"].flatten()
    yield f"{name}.weight", kernel.reshape(-1, len(bias)).T
    yield f"{name}.bias", bias


def _fill(network: nn.Module, found: Mapping[str, Tensor], path: Path, wanted: str) -> None:
    """Copy `found` into the parameters of `network` whose names start as `wanted`, each of which must be there."""
    named = {name: p for name, p in network.named_parameters() if re.match(wanted, name)}
    for name, parameter in named.items():
        shape = tuple(found[name].shape) if name in found else "missing"
        if shape != tuple(parameter.shape):
            raise ValueError(
                f"{path} does not fit: {name} is {shape}, but must be {tuple(parameter.shape)}; {HINT}"
            )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(found[name])
