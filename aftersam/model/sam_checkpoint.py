"""SAM's weights: found or downloaded, read without running their code, checked name by name, loaded.

sam_layouts.py says which file layouts are read.

Source: github.com/facebookresearch/segment-anything, whose modules are loaded here too;
github.com/ChaoningZhang/MobileSAM."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aftersam.config import DECODER, ENCODERS, SAM_IMAGE_SIZE
from aftersam.errors import counted, one_line
from aftersam.files import unfinished
from aftersam.model.sam_layouts import files_of, find_state, read_files
from aftersam.model.segment_anything import segment_anything_modeling
from aftersam.model.tiny_vit import CLASSIFIER, TinyViT

if TYPE_CHECKING:
    from aftersam.model.image_encoder import ImageEncoder
    from aftersam.model.mask_decoder import MaskDecoder


class Download(NamedTuple):
    """An official file and the SHA-256 of its bytes."""

    url: str
    sha256: str


_SITE = "https://dl.fbaipublicfiles.com/segment_anything/"
DOWNLOADS: dict[str, Download] = {
    "vit_b": Download(
        _SITE + "sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "vit_l": Download(
        _SITE + "sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "vit_h": Download(
        _SITE + "sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
    "vit_t": Download(
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
}
OPTIONAL = {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}  # buffers that some files carry
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


PREFIX = "image_encoder."  # of the encoder's tensors in SAM's state dict


class SamCheckpoint(NamedTuple):
    """A whole SAM state dict on the CPU, its architecture's name, and the SHA-256 of the file it came from."""

    state: dict[str, Tensor]
    name: str
    sha256: str
    about: str
    """The file, and the layout that it was recognised as."""
    left_out: tuple[str, ...] = ()
    """Names in the file that have no place in `state`."""


def read_sam_checkpoint(path_or_name: str | Path, *, progress: bool = True) -> SamCheckpoint:
    """SAM weights from a file, from a folder as Hugging Face's save_pretrained leaves it, or by the names vit_b, vit_l,
    vit_h, vit_t from a download kept in a cache.

    Layout and architecture are recognised from names and shapes; every tensor of SAM must be there, of its shape, and
    no other but those that sam_layouts.py leaves out by name. Tensors become fp32; fp32 tensors stay in the file,
    mapped into memory. The cache is $AFTERSAM_CACHE or ~/.cache/aftersam; `progress` shows a bar while downloading.

    Raises ValueError for a file that is missing, truncated, foreign or holds code, OSError for a failed download."""
    if str(path_or_name) in DOWNLOADS and not Path(path_or_name).exists():
        path = _downloaded(DOWNLOADS[str(path_or_name)], progress=progress)
    else:
        path = Path(path_or_name)
    files = files_of(path, DOWNLOADS)
    found = find_state(path, read_files(files))
    extra = tuple(
        key for key, shape in OPTIONAL.items() if key in found.state and found.state[key].shape == shape
    )
    state = {key: value for key, value in found.state.items() if key not in extra}
    name = _recognised(path, found.layout, state)
    types = sorted(
        {str(value.dtype).removeprefix("torch.") for value in state.values() if value.dtype in FLOATS}
    )
    about = f"{path}: {name} of {found.layout}, {' and '.join(types)}"
    state = {key: value.detach().float() for key, value in state.items()}
    return SamCheckpoint(state, name, sha256(*files), about, (*found.left_out, *extra))


@cache
def sam_shapes(name: str, image_size: int = SAM_IMAGE_SIZE) -> dict[str, torch.Size]:
    """The shape of every tensor of SAM called `name`, from segment-anything's own modules and our TinyViT.

    `image_size` px is what the position tables are for."""
    size = ENCODERS[name]
    grid, dim = (image_size // size.patch,) * 2, size.out_channels
    sam = segment_anything_modeling("sam")
    transformer = segment_anything_modeling("transformer").TwoWayTransformer
    with torch.device("meta"):
        encoder = (
            TinyViT(size)
            if size.stages
            else sam.ImageEncoderViT(
                img_size=image_size,
                patch_size=size.patch,
                embed_dim=size.dim,
                depth=size.depth,
                num_heads=size.num_heads,
                out_chans=dim,
                use_rel_pos=True,
                window_size=size.window,
                global_attn_indexes=size.global_blocks,
            )
        )
        model = sam.Sam(
            encoder,
            sam.PromptEncoder(dim, grid, (image_size, image_size), mask_in_chans=16),
            sam.MaskDecoder(
                transformer_dim=dim,
                transformer=transformer(
                    DECODER.depth, dim, DECODER.num_heads, mlp_dim=DECODER.mlp_ratio * dim
                ),
            ),
        )
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return shapes | {key: torch.Size(shape) for key, shape in CLASSIFIER.items() if size.stages}


def load_image_encoder_state(encoder: ImageEncoder | TinyViT, state: Mapping[str, Tensor]) -> list[str]:
    """Load SAM's `image_encoder.*` tensors strictly, position tables interpolated to the encoder's grid.

    The classifier that MobileSAM's file carries is left out. Returns the names of the tables that were interpolated.

    Raises ValueError that names the first tensor that is missing, unknown or of another shape."""
    weights = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    weights = {k: v for k, v in weights.items() if PREFIX + k not in CLASSIFIER}
    expected, resized = encoder.state_dict(), []
    for key, value in expected.items():
        if key not in weights:
            raise ValueError(f"the SAM weights lack {PREFIX}{key}, which this encoder needs")
        if weights[key].shape != value.shape:
            weights[key] = interpolated(key, weights[key], value.shape)
            resized.append(key)
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ValueError(f"the SAM weights hold {PREFIX}{unknown[0]}, which this encoder does not have")
    encoder.load_state_dict(weights)
    return resized


def load_mask_decoder_state(
    decoder: MaskDecoder, state: Mapping[str, Tensor], *, noise: float = 0.1, seed: int = 0
) -> set[str]:
    """Load what the decoder shares with SAM's `mask_decoder.*` and `prompt_encoder.*`.

    Class tokens and hypernetworks all start as SAM's mask token 0 and its hypernetwork, with Gaussian noise of
    `noise` times each tensor's standard deviation, drawn from `seed`. SAM's other mask tokens, its IoU token and
    head and its mask prompts have no place here. Skip fusions start at zero and added stages repeat
    each pixel, so that the first logits are SAM's masks. Returns the names of SAM's tensors that were used.

    Raises ValueError that names the first tensor that is missing or of another shape."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(value: Tensor) -> Tensor:
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
        return value + noise * value.std() * drawn if value.numel() > 1 else value

    weights, used = decoder.state_dict(), set()
    for key, value in weights.items():
        source, seeded = _sam_name(key)
        if source is None:
            continue
        if source not in state:
            raise ValueError(f"the SAM weights lack {source}, which the decoder needs")
        used.add(source)
        found = state[source][0] if key == "class_tokens.weight" else state[source]
        if found.shape != (value.shape[1:] if key == "class_tokens.weight" else value.shape):
            raise ValueError(
                f"the SAM weights do not fit the decoder's {key}: they have the shape {tuple(found.shape)}, "
                f"it needs {tuple(value.shape)}"
            )
        if key == "class_tokens.weight":
            found = found.expand_as(value)
        weights[key] = noisy(found.clone()) if seeded else found
    decoder.load_state_dict(weights)
    with torch.no_grad():
        for fusion in decoder.fusions.values():
            fusion.block[1].weight.zero_()
        for stage in decoder.added_stages:
            stage[0].weight.copy_(torch.eye(stage[0].out_channels)[..., None, None])
            stage[0].bias.zero_()
        decoder.class_bias.zero_()
    return used


def account(
    sam: SamCheckpoint, interpolated: Collection[str], decoded: Collection[str], image_size: int
) -> str:
    """One line on what became of the tensors of `sam`: used, interpolated to `image_size` px, left out by name.

    `interpolated` and `decoded` are what the two functions above return."""
    encoded = {key for key in sam.state if key.startswith(PREFIX) and key not in CLASSIFIER}
    left_out = [key for key in sam.state if key not in encoded and key not in decoded] + list(sam.left_out)
    groups = Counter(".".join(key.split(".")[:2]) for key in left_out)
    names = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in groups.items())
    return one_line(
        f"{sam.about}: {counted(len(encoded) + len(decoded), 'tensor')} used, "
        f"{counted(len(interpolated), 'position table')} interpolated to {image_size} px, {len(left_out)} left out: "
        f"{names}"
    )


def _recognised(path: Path, layout: str, state: Mapping[str, Tensor]) -> str:
    """The name of the architecture whose tensors `state` holds, all of them and of the right shapes and types.

    Raises ValueError that names the nearest one and the first tensors that differ."""
    position = state.get(f"{PREFIX}pos_embed")
    grid = position.shape[1] if position is not None and position.dim() == 4 else 0
    side = 16 * grid if 0 < grid <= 256 else SAM_IMAGE_SIZE
    differ = {name: _differences(state, sam_shapes(name, side)) for name in DOWNLOADS}
    name = min(differ, key=lambda name: sum(map(len, differ[name])))
    words = ("lacks", "has", "holds")
    if said := [f"{word} {_first(keys)}" for word, keys in zip(words, differ[name], strict=True) if keys]:
        raise ValueError(
            f"{path} is not one of SAM's {', '.join(DOWNLOADS)}; nearest is {name} of {layout}, but the file "
            + " and ".join(said)
        )
    for key, value in state.items():
        if value.is_meta:
            raise ValueError(
                f"{path} has {key} without its values, on the meta device; save them from the CPU"
            )
        counter = key.endswith("num_batches_tracked") and value.dtype == torch.int64
        if value.layout != torch.strided or not (value.dtype in FLOATS or counter):
            raise ValueError(
                f"{path} has {key} as {value.dtype}, {value.layout}, but weights are dense and float16, bfloat16, "
                "float32 or float64"
            )
    return name


def _differences(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> tuple[list[str], ...]:
    """What an architecture has and `state` lacks, what has another shape, what `state` alone has."""
    shared = {key: (tuple(state[key].shape), tuple(shape)) for key, shape in shapes.items() if key in state}
    return (
        [key for key in shapes if key not in state],
        [
            f"{key} of shape {found} (not {needed})"
            for key, (found, needed) in shared.items()
            if found != needed
        ],
        [f"{key:.100}" for key in state if key not in shapes],
    )


def _first(names: Sequence[str], count: int = 3) -> str:
    """The first of `names`, and how many there are more."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _downloaded(download: Download, *, progress: bool) -> Path:
    """The cached file of `download`, fetched first where it is not there yet."""
    folder = Path(os.environ.get("AFTERSAM_CACHE") or Path.home() / ".cache" / "aftersam")
    path = folder / download.url.rpartition("/")[2]
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as temporary:
        try:
            digest = _fetch(download.url, temporary, progress=progress)
        except OSError as error:
            raise OSError(
                f"cannot download {download.url} ({error}); fetch it elsewhere and put it at {path}"
            ) from error
        if digest != download.sha256:
            raise OSError(
                f"{download.url} has SHA-256 {digest[:12]}…, but SAM's file has {download.sha256[:12]}…; try again"
            )
    return path


def _fetch(url: str, path: Path, *, progress: bool) -> str:
    """Download `url` to `path` and return the SHA-256 of its bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(url.rpartition("/")[2]), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        urllib.request.urlopen(url, timeout=60) as source,
        path.open("wb") as target,
        Progress(*columns, disable=not progress) as bar,
    ):
        length, digest = source.headers.get("Content-Length"), hashlib.sha256()
        task = bar.add_task("", total=int(length) if length else None)
        while chunk := source.read(1 << 20):
            target.write(chunk)
            digest.update(chunk)
            bar.advance(task, len(chunk))
        return digest.hexdigest()


def sha256(*files: Path) -> str:
    """SHA-256 of the bytes of `files`, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def interpolated(key: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A position table for another grid: linear in each direction, as SAM's get_rel_pos does."""
    if key == "pos_embed" and value.dim() == 4 and value.shape[-1] == shape[-1]:
        table = F.interpolate(
            value.permute(0, 3, 1, 2), size=shape[1:3], mode="bilinear", align_corners=False
        )
        return table.permute(0, 2, 3, 1)
    if ".rel_pos_" in key and value.dim() == 2 and value.shape[-1] == shape[-1]:
        return F.interpolate(value.T[None], size=shape[0], mode="linear", align_corners=False)[0].T
    raise ValueError(
        f"the SAM weights have {PREFIX}{key} of shape {tuple(value.shape)}, but this encoder needs {tuple(shape)}"
    )


def _sam_name(key: str) -> tuple[str | None, bool]:
    """SAM's name of the decoder's tensor `key`, None for what only we have, and whether noise is added."""
    part, _, rest = key.partition(".")
    if part in ("transformer", "output_upscaling"):
        return f"mask_decoder.{key}", False
    if part in ("no_mask_embed", "pe_layer"):
        return f"prompt_encoder.{key}", False
    if part == "prompts":
        return f"prompt_encoder.{rest}", False
    if part == "class_tokens":
        return "mask_decoder.mask_tokens.weight", True
    if part == "output_hypernetworks_mlps":
        return f"mask_decoder.{part}.0.{rest.partition('.')[2]}", True
    return None, False
