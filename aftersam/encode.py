"""Fill the embedding cache: the image encoder's features of scans.    python -m aftersam.encode --data D -o DIR -m RUN

With --embeddings DIR, predict and train (with a frozen encoder) read the features and skip the encoder. With
--sam-checkpoint in place of a run, give the same image size, windows and spacing as the later training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from aftersam.config import Config, checked
from aftersam.errors import SAID, counted, naming, plain_console, run_command, sentence, tell
from aftersam.files import by_case, check_place, refuse_input, scans_in
from aftersam.training.arguments import ConfigFile, parse

if TYPE_CHECKING:
    from aftersam.inference.feature_cache import Embeddings


@dataclass(frozen=True)
class EncodeArgs:
    data: Path
    """A NIfTI file, a folder of NIfTI files, or a data set."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the embedding cache. Features that exist in it are kept."""
    config: Config
    model: Annotated[Path | None, tyro.conf.arg(aliases=["-m"])] = None
    """Folder of a training run, whose encoder and preprocessing are used."""
    checkpoint: Literal["best", "last"] = "best"
    """best: the weights with the best validation DSC. last: the weights at the end of the training."""
    sam_checkpoint: str | None = None
    """SAM's weights in place of a run: a file, a Hugging Face folder, or vit_b, vit_l, vit_h, vit_t."""
    preset: Literal["paper", "best", "small", "tiny"] | None = None
    """Preset of the keys that are not given. By default paper with a SAM checkpoint."""
    config_file: ConfigFile = None
    """Also --config: a config.json in place of a preset."""
    trust_intensities: bool = False
    """Encode scans whose values do not look like Hounsfield units, without a warning and without an error."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""


class EncodeResult(NamedTuple):
    """Number of scans with features in the folder, and of scans that could not be read and were reported."""

    encoded: int
    failed: int


def encode(args: EncodeArgs) -> EncodeResult:
    """Encode every scan that `args` name.

    Raises ValueError where nothing can be encoded: no scans, no encoder, a spacing that is unknown before training."""
    from rich.progress import track

    from aftersam.data.dataset import find_dataset
    from aftersam.data.intensities import check_intensities
    from aftersam.data.transforms import preprocess
    from aftersam.data.volume import read_image

    checked(args)
    check_place(args.output, folder=True)
    refuse_input(args.output, [args.data, *([args.model] if args.model else [])])
    if (args.model is None) == (args.sam_checkpoint is None):
        raise ValueError("give a run (-m) or SAM weights (--sam-checkpoint), one of the two")
    if args.data.is_dir():
        scans = list(by_case(scans_in(args.data)).values())
        scans = scans or [case.image for case in find_dataset(args.data).cases]
    else:
        scans = [args.data]
    store, spacing_mm = _from_run(args) if args.model is not None else _from_sam(args)
    console = plain_console(stderr=True)
    failed = 0
    for scan in track(scans, "encoding", console=console, transient=True, disable=not console.is_terminal):
        try:
            with naming(scan):
                volume = read_image(scan)
                check_intensities(volume, trusted=args.trust_intensities)
                ready = preprocess(volume, spacing_mm)
            with naming(scan, "could not be encoded"):
                store.of(ready.array, ready.box)
        except SAID as error:
            failed += 1
            tell(console, f"aftersam.encode: {sentence(error)}")
    tell(console, f"{args.output}: {len(scans) - failed} of {counted(len(scans), 'scan')}")
    return EncodeResult(len(scans) - failed, failed)


def _from_run(args: EncodeArgs) -> tuple[Embeddings, tuple[float, float, float] | None]:
    """(embedding cache for a run's encoder, spacing in mm at which the run works)."""
    from aftersam.inference.feature_cache import Embeddings
    from aftersam.inference.segmenter import load_run

    assert args.model is not None
    segmenter = load_run(args.model, checkpoint=args.checkpoint, device=args.device)
    size = segmenter.config.model.image_size
    store = Embeddings(args.output, segmenter.model, image_size=size, precision=segmenter.precision)
    return store, segmenter.spacing_mm


def _from_sam(args: EncodeArgs) -> tuple[Embeddings, tuple[float, float, float] | None]:
    """(embedding cache for the encoder that a training with these keys would freeze, spacing in mm)."""
    import dataclasses

    from aftersam.device import dtype_for, find_device
    from aftersam.inference.feature_cache import Embeddings
    from aftersam.model.build import build_aftersam
    from aftersam.model.sam_checkpoint import read_sam_checkpoint

    assert args.sam_checkpoint is not None
    config, spacing, device = args.config, args.config.data.spacing_mm, find_device(args.device)
    if spacing == "median":
        raise ValueError("spacing_mm is median, which depends on the training set; give three lengths in mm")
    sam = read_sam_checkpoint(args.sam_checkpoint)
    model = dataclasses.replace(config.model, image_encoder=sam.name, encoder="frozen")  # type: ignore[arg-type]  # a name in ENCODERS
    precision = dtype_for(config.train.precision, device.type)
    built = build_aftersam(model, num_classes=2, sam=sam).to(device)
    store = Embeddings(args.output, built, image_size=model.image_size, precision=precision)
    return store, None if spacing == "native" else spacing


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("encode", lambda: 1 if encode(parse(argv, EncodeArgs, __doc__)).failed else 0)


if __name__ == "__main__":
    sys.exit(main())
