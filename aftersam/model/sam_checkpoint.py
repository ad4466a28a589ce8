"""SAM's official weights: found or downloaded, read without running their code, checked name by name.

MobileSAM's vit_t and MedSAM's weights, which are a vit_b, come in the same format.

Source: github.com/facebookresearch/segment-anything, whose modules are loaded here too;
github.com/ChaoningZhang/MobileSAM."""

from __future__ import annotations

import difflib
import hashlib
import os
import pickle
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aftersam.config import DECODER, ENCODERS, SAM_IMAGE_SIZE
from aftersam.files import unfinished
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


PREFIX = "image_encoder."  # of the encoder's tensors in SAM's state dict


class SamCheckpoint(NamedTuple):
    """A whole SAM state dict on the CPU, its architecture's name, and the SHA-256 of the file it came from."""

    state: dict[str, Tensor]
    name: str
    sha256: str


def read_sam_checkpoint(path_or_name: str | Path, *, progress: bool = True) -> SamCheckpoint:
    """SAM weights from a .pth file, or by the names vit_b, vit_l, vit_h, vit_t from a download kept in a cache.

    The architecture is recognised from the shapes; every tensor must be there, of its shape, and no other.
    The cache is $AFTERSAM_CACHE or ~/.cache/aftersam; `progress` shows a bar while downloading.

    Raises ValueError for a file that is missing, truncated, foreign or holds code, OSError for a failed download."""
    if str(path_or_name) in DOWNLOADS and not Path(path_or_name).exists():
        path = _downloaded(DOWNLOADS[str(path_or_name)], progress=progress)
    else:
        path = Path(path_or_name)
    if not path.is_file():
        close = difflib.get_close_matches(str(path_or_name), DOWNLOADS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"SAM checkpoint {path} does not exist; give a .pth file, or {', '.join(DOWNLOADS)}{hint}"
        )
    state = _read(path)
    return SamCheckpoint(state, _recognised(path, state), sha256(path))


@cache
def sam_shapes(name: str) -> dict[str, torch.Size]:
    """The shape of every tensor of SAM called `name`, from segment-anything's own modules and our TinyViT."""
    size, image_size = ENCODERS[name], SAM_IMAGE_SIZE
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


def load_image_encoder_state(encoder: ImageEncoder | TinyViT, state: Mapping[str, Tensor]) -> None:
    """Load SAM's `image_encoder.*` tensors strictly, position tables interpolated to the encoder's grid.

    The classifier that MobileSAM's file carries is left out.

    Raises ValueError that names the first tensor that is missing, unknown or of another shape."""
    weights = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    weights = {k: v for k, v in weights.items() if PREFIX + k not in CLASSIFIER}
    expected = encoder.state_dict()
    for key, value in expected.items():
        if key not in weights:
            raise ValueError(f"the SAM weights lack {PREFIX}{key}, which this encoder needs")
        if weights[key].shape != value.shape:
            weights[key] = interpolated(key, weights[key], value.shape)
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ValueError(f"the SAM weights hold {PREFIX}{unknown[0]}, which this encoder does not have")
    encoder.load_state_dict(weights)


def load_mask_decoder_state(
    decoder: MaskDecoder, state: Mapping[str, Tensor], *, noise: float = 0.1, seed: int = 0
) -> None:
    """Load what the decoder shares with SAM's `mask_decoder.*` and `prompt_encoder.*`.

    Class tokens and hypernetworks all start as SAM's mask token 0 and its hypernetwork, with Gaussian noise of
    `noise` times each tensor's standard deviation, drawn from `seed`. SAM's other mask tokens, its IoU token and
    head and its mask prompts have no place here. Skip fusions start silent and added stages as copies
    of each pixel, so that the first logits are SAM's masks.

    Raises ValueError that names the first tensor that is missing or of another shape."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(value: Tensor) -> Tensor:
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
        return value + noise * value.std() * drawn if value.numel() > 1 else value

    weights = decoder.state_dict()
    for key, value in weights.items():
        found, seeded = _sam_tensor(key, state)
        if found is None:
            continue
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


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in `path` in fp32, unpickling nothing but tensors."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    damaged = (
        f"{path} is {'truncated or damaged' if zipped else 'not a PyTorch checkpoint'}; download it again"
    )
    if zipped and not zipfile.is_zipfile(path):
        raise ValueError(damaged)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error):  # anything but the few names that rebuild a tensor
            raise ValueError(
                f"{path} holds pickled objects besides tensors, which could run code and are refused; "
                "give a state dict of tensors alone"
            ) from error
        raise ValueError(damaged) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(damaged) from error
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"{path} is not SAM's state dict, which maps names to tensors")
    return {key: value.float() for key, value in loaded.items()}


def _recognised(path: Path, state: Mapping[str, Tensor]) -> str:
    """The name of the architecture whose tensors `state` holds, all of them and of the right shapes."""
    widths = {ENCODERS[name].dim: name for name in ("vit_b", "vit_l", "vit_h")}
    position = state.get("image_encoder.pos_embed")
    width = position.shape[-1] if position is not None and position.dim() == 4 else None
    name = "vit_t" if "image_encoder.layers.0.blocks.0.conv1.c.weight" in state else widths.get(width)
    if name is None:
        raise ValueError(f"{path} is not one of SAM's {', '.join(DOWNLOADS)}: image_encoder.pos_embed tells")
    expected = sam_shapes(name)
    for key, shape in expected.items():
        if key not in state:
            raise ValueError(f"{path} lacks {key}, which SAM's {name} has")
        if state[key].shape != shape:
            raise ValueError(
                f"{path} has {key} of shape {tuple(state[key].shape)}, but SAM's {name} has {tuple(shape)}"
            )
    for key, value in state.items():
        if key not in expected and OPTIONAL.get(key) != tuple(value.shape):
            raise ValueError(f"{path} holds {key}, which SAM's {name} does not have")
    return name


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
        length = source.headers.get("Content-Length")
        task = bar.add_task("", total=int(length) if length else None)

        def write(chunk: bytes) -> None:
            target.write(chunk)
            bar.advance(task, len(chunk))

        return _digest(source.read, write)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return _digest(file.read)


def _digest(read: Callable[[int], bytes], also: Callable[[bytes], object] | None = None) -> str:
    """SHA-256 of all that `read` gives, in chunks of 1 MiB, each handed to `also`."""
    digest = hashlib.sha256()
    while chunk := read(1 << 20):
        digest.update(chunk)
        if also is not None:
            also(chunk)
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


def _sam_tensor(key: str, state: Mapping[str, Tensor]) -> tuple[Tensor | None, bool]:
    """SAM's tensor for the decoder's `key`, and whether noise is added; None for what only we have."""
    part, _, rest = key.partition(".")
    if part in ("transformer", "output_upscaling"):
        source, seeded = f"mask_decoder.{key}", False
    elif part in ("no_mask_embed", "pe_layer"):
        source, seeded = f"prompt_encoder.{key}", False
    elif part == "prompts":
        source, seeded = f"prompt_encoder.{rest}", False
    elif part == "class_tokens":
        source, seeded = "mask_decoder.mask_tokens.weight", True
    elif part == "output_hypernetworks_mlps":
        source, seeded = f"mask_decoder.{part}.0.{rest.partition('.')[2]}", True
    else:
        return None, False
    if source not in state:
        raise ValueError(f"the SAM weights lack {source}, which the decoder needs")
    return state[source][0] if part == "class_tokens" else state[source], seeded
