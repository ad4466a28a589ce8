"""Write a trained model for other runtimes.    python -m aftersam.export -m RUN -o DIR

Writes two graphs on contiguous fp32 tensors, with LoRA merged, for any number of slices and groups. They are separate
so that each slice is encoded once:

    encoder    hu (T, S, S) in Hounsfield units -> embedding (T, C, h, w), and skip_0, ... where the model has skips
    decoder    embedding (B, N, C, h, w) of groups, skip_0, ... of their centre slices -> logits (B, K+1, S/s, S/s)

The graphs are .pt2 files, which torch loads or compiles ahead of time without this package, and .onnx files.
preprocessing.json lists what a caller does before, between and after the graphs. --format weights instead writes a run
with fp16 weights, three files that predict takes like any other run."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from aftersam.errors import run_command

if TYPE_CHECKING:
    import torch

    from aftersam.inference.segmenter import Segmenter


@dataclass(frozen=True)
class ExportArgs:
    model: Annotated[Path, tyro.conf.arg(aliases=["-m"])]
    """Folder of a training run, or the name of a model that comes along."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to create."""
    checkpoint: Literal["best", "last"] = "best"
    """best: the weights with the best validation DSC. last: the weights at the end of the training."""
    format: Literal["torch", "onnx", "both", "weights"] = "both"
    """torch: .pt2 files. onnx: .onnx files (needs the extra export). both: .pt2 and .onnx. weights: a run in fp16."""


class Part(NamedTuple):
    """A graph and the names of its inputs and outputs."""

    program: torch.export.ExportedProgram
    inputs: list[str]
    outputs: list[str]


def export(args: ExportArgs) -> Path:
    """Write the files that `args` ask for and return their folder, which gets its name only when it is complete.

    Raises ValueError on a bad run, a model with prompts, a folder that exists or a missing package, OSError where the
    folder cannot be written."""
    from aftersam.files import check_place, renamed_folder
    from aftersam.inference.segmenter import load_run
    from aftersam.model.run_folder import find_run

    run = find_run(args.model)
    if args.output.exists():
        raise ValueError(f"{args.output} exists already; choose another --output")
    check_place(args.output, folder=True)
    if args.format in ("onnx", "both") and find_spec("onnxscript") is None:
        raise ValueError(
            "ONNX needs the package onnxscript (pip install 'aftersam[export]'), or --format torch"
        )
    segmenter = load_run(run, checkpoint=args.checkpoint, device="cpu")
    with renamed_folder(args.output) as temporary, _quiet():
        if args.format == "weights":
            _write_weights(temporary, run, args.checkpoint)
        else:
            _write_graphs(temporary, segmenter, args.format)
    return args.output


def _write_weights(folder: Path, run: Path, checkpoint: str) -> None:
    """Write configuration, facts and weights of a run, the weights rounded to fp16.

    The calibration in run.json is of the best weights, so that the last ones go without."""
    from aftersam.files import read_json, read_tensors, write_json, write_tensors
    from aftersam.model.build import TRAINING_STATE

    write_json(folder / "config.json", read_json(run / "config.json"))
    left_out = ("temperature", "ece") if checkpoint == "last" else ()
    stored = read_json(run / "run.json")
    write_json(folder / "run.json", {key: value for key, value in stored.items() if key not in left_out})
    tensors, facts = read_tensors(run / f"{checkpoint}.safetensors")
    halved = {
        key: value.half() if value.is_floating_point() else value
        for key, value in tensors.items()
        if not key.startswith(TRAINING_STATE)
    }
    write_tensors(folder / "best.safetensors", halved, facts)


def _write_graphs(folder: Path, segmenter: Segmenter, format: str) -> None:
    import torch

    from aftersam.files import write_json

    for name, part in parts(segmenter).items():
        if format != "onnx":
            file = io.BytesIO()  # where a disk is full, torch's own writer ends the process
            torch.export.save(part.program, file)
            (folder / f"{name}.pt2").write_bytes(file.getbuffer())
        if format != "torch":
            onnx: Any = torch.onnx.export(
                part.program, input_names=part.inputs, output_names=part.outputs, verbose=False
            )
            onnx.save(folder / f"{name}.onnx")  # weights beyond 2 GB go into a file beside it
    write_json(folder / "preprocessing.json", preprocessing(segmenter))


def parts(segmenter: Segmenter) -> dict[str, Part]:
    """Encoder and decoder of a model on the CPU. Raises ValueError for a model with prompts."""
    import torch
    from torch.export import Dim

    from aftersam.model.aftersam import GroupDecoder, SliceEncoder

    config = segmenter.config.model
    if config.prompts != "none":
        raise ValueError(
            f"the model was trained with prompts={config.prompts}, drawn from labels; export has no place for them"
        )
    encoder = SliceEncoder(segmenter.model).eval()
    decoder = GroupDecoder(segmenter.model, config.num_slices // 2).eval()
    with torch.no_grad():
        near = () if config.stem_slices == 1 else (config.stem_slices,)
        # two slices, since torch.export makes a size of one a constant
        hu = torch.zeros(2, *near, config.image_size, config.image_size)
        # contiguous, as the caller's tensors will be: code compiled ahead of time relies on these strides
        embedding, *skips = (level.contiguous() for level in encoder(hu))
        groups = torch.stack([embedding] * config.num_slices, dim=1).contiguous()
        any_slices, any_groups = {0: Dim("slices")}, {0: Dim("groups")}
        encode = torch.export.export(encoder, (hu,), dynamic_shapes=(any_slices,))
        decode = torch.export.export(
            decoder, (groups, *skips), dynamic_shapes=(any_groups, tuple(any_groups for _ in skips))
        )
    levels = [f"skip_{i}" for i in range(len(skips))]
    return {
        "encoder": Part(encode, ["hu"], ["embedding", *levels]),
        "decoder": Part(decode, ["embedding", *levels], ["logits"]),
    }


def preprocessing(segmenter: Segmenter) -> dict[str, Any]:
    """Everything that a caller of the two graphs has to do, as JSON values."""
    from aftersam.data.volume import AIR_HU, CANONICAL

    config = segmenter.config.model
    return {
        "axes": f"slices, rows, columns; their indices rise towards {', '.join(CANONICAL)}",
        "spacing_mm": segmenter.spacing_mm,  # (slices, rows, columns); null: each scan's own
        "image_size": config.image_size,
        "outside_hu": AIR_HU,  # beyond the plane, where a window is larger
        "hu_windows": [list(map(float, window)) for window in config.hu_windows],  # the encoder applies them
        "num_slices": config.num_slices,
        "slice_stride": config.slice_stride,
        # above 1 the encoder's input is (slices, stem_slices, rows, columns): each slice with its neighbours
        "stem_slices": config.stem_slices,
        "centre": config.num_slices // 2,  # the nearest slice is repeated beyond the ends of a scan
        "output_stride": config.output_stride,  # logits are interpolated to the scan's grid, then argmax
        # of these organs, parts below a fifth of the largest are dropped
        "one_piece": list(segmenter.one_piece),
        "labels": {"0": "background"} | {str(value): name for value, name in segmenter.labels.items()},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and logs of torch and onnxscript: deprecations, passes, optional packages."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        print(export(tyro.cli(ExportArgs, args=argv, description=__doc__)))
        return 0

    return run_command("export", command)


if __name__ == "__main__":
    sys.exit(main())
