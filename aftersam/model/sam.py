"""SAM's official weights: found or downloaded, read without running their code, checked name by name.

MobileSAM's vit_t and MedSAM's weights, which are a vit_b, come in the same format.

Source: github.com/facebookresearch/segment-anything, whose modules are loaded here too;
github.com/ChaoningZhang/MobileSAM."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import pickle
import sys
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from aftersam.config import ENCODERS
from aftersam.files import unfinished


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
CLASSIFIER = {  # of ImageNet, on top of MobileSAM's encoder, never run
    "image_encoder.norm_head.weight": (320,), "image_encoder.norm_head.bias": (320,),
    "image_encoder.head.weight": (1000, 320), "image_encoder.head.bias": (1000,),
}  # fmt: skip
OPTIONAL = {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}  # buffers that some files carry
_PRIVATE_NAME = "aftersam.model._segment_anything"


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
    return SamCheckpoint(state, _recognised(path, state), _sha256(path))


@cache
def sam_shapes(name: str) -> dict[str, torch.Size]:
    """The shape of every tensor of SAM called `name`, from segment-anything's own modules and our TinyViT."""
    from aftersam.model.tiny_vit import TinyViT  # which builds on this file

    size, image_size = ENCODERS[name], 1024
    grid = (image_size // size.patch,) * 2
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
                out_chans=size.out_channels,
                use_rel_pos=True,
                window_size=size.window,
                global_attn_indexes=size.global_blocks,
            )
        )
        model = sam.Sam(
            encoder,
            sam.PromptEncoder(size.out_channels, grid, (image_size, image_size), mask_in_chans=16),
            sam.MaskDecoder(
                transformer_dim=size.out_channels, transformer=transformer(2, size.out_channels, 8, mlp_dim=2048)
            ),
        )  # fmt: skip
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return shapes | {key: torch.Size(shape) for key, shape in CLASSIFIER.items() if size.stages}


@cache
def segment_anything_modeling(module: str) -> ModuleType:
    """segment_anything.modeling.`module`, loaded under a private name.

    segment_anything/__init__ is not run: it imports torchvision for the predictor, which is not used here."""
    if _PRIVATE_NAME not in sys.modules:
        found = importlib.util.find_spec("segment_anything")
        if found is None or found.origin is None:
            raise ImportError("segment-anything is not installed; pip install segment-anything")
        folder = Path(found.origin).parent / "modeling"
        spec = importlib.util.spec_from_file_location(
            _PRIVATE_NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[_PRIVATE_NAME] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{_PRIVATE_NAME}.{module}")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast off. Where it is off, or on the meta device, which has none, nothing shows in an exported graph."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


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


def _sha256(path: Path) -> str:
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
