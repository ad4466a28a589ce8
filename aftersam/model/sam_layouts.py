"""Files of SAM's weights: read without running their code, their layout recognised, their tensors under SAM's names.

A state dict is unwrapped (`{"model": ...}`), freed of a prefix (`module.`, `sam.`) and renamed, all by the names and
shapes of its tensors. SAM's relatives that cannot be loaded are refused by name.

Source of the names: segment-anything, sam2 and sam3 (facebookresearch), MedSAM (bowang-lab), sam-hq (SysCV), SamModel
and SamHQModel (transformers), SAM-Med2D (OpenGVLab), SlimSAM (czg1225), EfficientSAM (yformer), efficientvit
(mit-han-lab), all on github.com."""

from __future__ import annotations

import difflib
import pickle
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from aftersam.config import ENCODERS
from aftersam.errors import naming, out_of_memory

State = Mapping[str, Tensor]


class Layout(NamedTuple):
    """A layout of SAM's weights. `has` is found in a tensor's name in this layout alone, `renames` are regular
    expressions and replacements that lead to SAM's names, `left_out` is found in the names of tensors to leave out."""

    name: str
    has: str
    renames: tuple[tuple[str, str], ...] = ()
    left_out: str = r"(?!)"


class Relative(NamedTuple):
    """A model related to SAM that cannot be loaded. `tells` returns the name of a tensor that it is recognised by, or
    None; `why` goes on with the sentence after `name`."""

    name: str
    tells: Callable[[State], str | None]
    why: str


class Found(NamedTuple):
    """SAM's state under SAM's names, the layout it came in, and the names in the file that it leaves out."""

    state: dict[str, Tensor]
    layout: str
    left_out: tuple[str, ...]


_ENCODER = re.compile(r"(.*?)(?:image_encoder|vision_encoder)\.")
_PERCEPTRON = r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)"
HUGGING_FACE = (
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
    (r"\.neck\.conv1\.", ".neck.0."),
    (r"\.neck\.layer_norm1\.", ".neck.1."),
    (r"\.neck\.conv2\.", ".neck.2."),
    (r"\.neck\.layer_norm2\.", ".neck.3."),
    (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
    (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
    (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
    (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
    (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"^(shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
     "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
    (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (_PERCEPTRON + r"\.layers\.0\.", r"\1.layers.1."),
    (_PERCEPTRON + r"\.proj_in\.", r"\1.layers.0."),
    (_PERCEPTRON + r"\.proj_out\.", r"\1.layers.2."),
    (r"\.layer_norm", ".norm"),
)  # fmt: skip

LAYOUTS = (  # the first one that fits is taken
    Layout("SAM-HQ in Hugging Face's layout", r"^mask_decoder\.hq_token\.", HUGGING_FACE,
           r"^mask_decoder\.(hq_token|hq_mask_mlp|compress_vit_\w+|encoder_(conv\d|norm)|mask_(conv\d|norm))\."),
    Layout("SAM in Hugging Face's layout", r"^vision_encoder\.", HUGGING_FACE),
    Layout("SAM-HQ", r"^mask_decoder\.hf_token\.", (),
           r"^mask_decoder\.(hf_token|hf_mlp|compress_vit_feat|embedding_encoder|embedding_maskfeature)\."),
    Layout("MobileSAM", r"^image_encoder\.layers\.0\.blocks\.0\.conv1\."),
    Layout("SAM", ""),
)  # fmt: skip


def _named(pattern: str) -> Callable[[State], str | None]:
    return lambda state: next((key for key in state if re.search(pattern, key)), None)


def _pruned(state: State) -> str | None:
    """The name of the position table if it and the patch embedding have one width that no SAM has; else None."""
    key, patches = "image_encoder.pos_embed", state.get("image_encoder.patch_embed.proj.weight")
    if key not in state or patches is None or state[key].dim() != 4 or patches.dim() != 4:
        return None
    width = state[key].shape[-1]
    ours = {ENCODERS[name].dim for name in ("vit_b", "vit_l", "vit_h")}
    return key if width == patches.shape[0] and width not in ours else None


def _lite(state: State) -> str | None:
    key = "image_encoder.patch_embed.seq.0.c.weight"
    return key if key in state and state[key].shape[2:] == (1, 1) else None


RELATIVES = (  # the first one that is told is named
    Relative("SAM2, SAM2.1 or MedSAM2", _named(r"\.pos_embed_window$"), "whose image encoder is a Hiera"),
    Relative("SAM3", _named(r"(^|\.)vision_backbone\.trunk\.|\.embeddings\.position_embeddings$"),
             "whose image encoder is a ViT with rotary positions"),
    Relative("EfficientViT-SAM", _named(r"(^|\.)image_encoder\.(backbone\.(stages|input_stem)|neck\.input_ops)\."),
             "whose image encoder is an EfficientViT"),
    Relative("EfficientSAM", _named(r"(^|\.)prompt_encoder\.bbox_top_left_embeddings\."),
             "whose image encoder is a ViT without relative positions"),
    Relative("SAM with adapters, such as SAM-Med2D", _named(r"(^|\.)image_encoder\..*[Aa]dapter"),
             "whose adapters have no place in this encoder"),
    Relative("LiteMedSAM", _lite, "whose TinyViT takes single pixels as patches"),
    Relative("a pruned SAM, such as SlimSAM", _pruned, "whose image encoder is narrower than SAM's"),
    Relative("a pruned SAM, such as SlimSAM", _named(r"(^|\.)image_encoder\.blocks\.0\.attn\.q\.weight$"),
             "whose queries, keys and values are pruned one by one"),
)  # fmt: skip


_UNREADABLE = (  # what torch.load raises on bytes that it did not write
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError, OSError, EOFError, LookupError, ValueError,
    TypeError, AttributeError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip
FOLDER = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")


def files_of(path: Path, names: Iterable[str]) -> list[Path]:
    """The file `path`, or the files of weights in the folder `path`.

    Raises ValueError where there are none. `names` are those of downloads, for a hint."""
    if path.is_dir():
        found = (sorted(path.glob(pattern)) for pattern in FOLDER)
        if files := next(filter(None, found), []):
            return files
        raise ValueError(
            f"{path} is a folder without {FOLDER[0]} and {FOLDER[2]}; give the file of SAM's weights"
        )
    if not path.is_file():
        close = difflib.get_close_matches(str(path), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"SAM checkpoint {path} does not exist; give a .pth or .safetensors file, a Hugging Face folder, or "
            f"{', '.join(names)}{hint}"
        )
    return [path]


def read_files(files: Sequence[Path]) -> Any:
    """What the file holds, or what the shards of one state dict hold together.

    Raises ValueError on a file that is damaged or holds code, and on shards that do not belong together."""
    if len(files) == 1:
        return _read(files[0])
    whole: dict[Any, Any] = {}
    for file in files:
        shard = _read(file)
        if not isinstance(shard, Mapping) or whole.keys() & shard.keys():
            raise ValueError(
                f"{file} is not a shard of the other files in its folder; keep the files of one model"
            )
        whole |= shard
    return whole


def _read(path: Path) -> Any:
    """What `path` holds, a safetensors file or one of torch.save, mapped into memory where its bytes allow.

    Nothing but tensors, numbers, texts and their containers is unpickled."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # a header of JSON after its length
        with naming(path, "is not a whole safetensors file"), safe_open(path, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  not a dict
    zipped = head[:2] == b"PK"
    damaged = (
        f"{path} is {'truncated or damaged' if zipped else 'not a PyTorch checkpoint'}; download it again"
    )
    mapped = zipped and _mappable(path)
    try:
        with path.open("rb") as file:
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except _UNREADABLE as error:
        if out_of_memory(error):
            raise MemoryError(f"{path}: memory ran out") from error
        if blocked := re.search(r"nsupported (?:global: )?GLOBAL ([\w.]+)", str(error)):
            raise ValueError(  # anything but the few names that rebuild a tensor
                f"{path} holds pickled objects besides tensors ({blocked[1]}), which could run code and are refused; "
                "give a state dict of tensors alone"
            ) from error
        raise ValueError(damaged) from error


def _mappable(path: Path) -> bool:
    """Whether torch.load can map the zip file `path`: no part was compressed, and no name sends it to safetensors.

    Raises ValueError on a TorchScript archive, which torch.load would run."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except _UNREADABLE:
        return False  # and torch.load will say so
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        raise ValueError(
            f"{path} is a TorchScript archive, which holds code and is refused; give a state dict"
        )
    stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
    return stored and path.suffix != ".safetensors"


def find_state(path: Path, loaded: Any) -> Found:
    """SAM's tensors in what a file holds, under SAM's names.

    Raises ValueError in one sentence where there is no state dict, or more than one, or that of a relative of SAM."""
    where, state, left_out = _unwrapped(path, loaded)
    prefixes = Counter(match[1] for key in state if (match := _ENCODER.match(key)))
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    plain = {key.removeprefix(prefix): value for key, value in state.items()}
    if len(plain) < len(state):
        raise ValueError(
            f"{path} holds a tensor both with and without the prefix {prefix!r}; give one of them"
        )
    layout = next(layout for layout in LAYOUTS if _named(layout.has)(plain) or not layout.has)
    renamed: dict[str, Tensor] = {}
    twice = None
    for key, value in plain.items():
        name = key
        for pattern, replacement in layout.renames:
            name = re.sub(pattern, replacement, name)
        if re.search(layout.left_out, key):
            left_out.append(key)
        elif name not in renamed:
            renamed[name] = value
        elif _same(renamed[name], value):  # transformers ties two names to one tensor
            left_out.append(key)
        else:
            twice = key
    for relative in RELATIVES:
        if telling := relative.tells(renamed):
            raise ValueError(
                f"{path} holds the weights of {relative.name}, {relative.why} (found {telling}); give the weights of "
                "SAM, MedSAM, SAM-HQ or MobileSAM"
            )
    if twice is not None:
        raise ValueError(f"{path} holds {twice} twice, under two names and with two values; give one of them")
    around = (where + prefix).rstrip(".")
    return Found(renamed, f"{layout.name}, under {around}" if around else layout.name, tuple(left_out))


def _unwrapped(path: Path, loaded: Any) -> tuple[str, State, list[str]]:
    """Where the one state dict in `loaded` lies, that state dict, and the names of all that lies beside it.

    It is the mapping that has an image encoder's tensors or, where none has, the one with the most tensors."""
    found = list(_mappings(loaded, (), set()))
    likely = [item for item in found if any(_ENCODER.match(str(key)) for key in item[1])]
    likely = likely or sorted(found, key=lambda item: -_tensors(item[1]))[:1]
    if len(likely) > 1:
        first, second = (".".join(str(key) for _, key in trail) or "the top" for trail, _ in likely[:2])
        raise ValueError(
            f"{path} holds two state dicts of SAM, under {first} and under {second}; save one of them alone"
        )
    if not likely:
        raise ValueError(f"{path} is not SAM's state dict, which maps names to tensors")
    trail, state = likely[0]
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path} is not SAM's state dict, which maps names to tensors: {key!r:.100} is a {type(value).__name__}"
            )
    where, beside = "", []
    for mapping, key in trail:
        beside += [f"{where}{other}" for other in mapping if other != key]
        where += f"{key}."
    return where, state, beside


Trail = tuple[tuple[Mapping[Any, Any], Any], ...]  # the mappings on the way, and the key taken in each


def _mappings(value: Any, trail: Trail, seen: set[int]) -> Iterator[tuple[Trail, Mapping[Any, Any]]]:
    """`value` if it is a mapping, and every mapping in it, four deep at most, that maps anything to a tensor."""
    if not isinstance(value, Mapping) or id(value) in seen:
        return
    seen.add(id(value))
    if not trail or _tensors(value):
        yield trail, value
    if len(trail) < 3:
        for key, inner in value.items():
            yield from _mappings(inner, (*trail, (value, key)), seen)


def _tensors(mapping: Mapping[Any, Any]) -> int:
    return sum(isinstance(value, Tensor) for value in mapping.values())


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors with values are equal."""
    dense = a.layout == b.layout == torch.strided and not (a.is_meta or b.is_meta)
    return dense and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
