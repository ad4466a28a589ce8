"""The arguments of a training, and the configuration that they make."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from aftersam.config import Config, from_dict, preset, validate

if TYPE_CHECKING:
    from aftersam.model.sam_checkpoint import SamCheckpoint


@dataclass(frozen=True)
class TrainArgs:
    data: Path
    """Data set: nnU-Net raw, MSD, SegTHOR, or images/ beside labels/."""
    output: Path
    """Folder of the run, made if needed."""
    config: Config
    preset: Literal["paper", "best", "small", "tiny"] | None = None
    """Choices that a key not given takes; paper with a SAM checkpoint, else small."""
    config_file: Path | None = None
    """Also --config: repeat a run from its config.json; keys given beside it win."""
    sam_checkpoint: str | None = None
    """Official SAM weights: a .pth file, or vit_b, vit_l, vit_h, vit_t to download them once to a cache."""
    resume: bool = False
    """Go on from last.safetensors in --output, with the configuration stored there."""
    fold: int = 0
    """Fold of splits_final.json, or of the five seeded ones where there is none."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    cache: Path | None = None
    """Folder of the preprocessed volumes; RUN/cache unless given."""
    embeddings: Path | None = None
    """Folder for what a frozen encoder makes of each slice: found there, or written for the next run."""


def configuration(args: TrainArgs) -> tuple[Config, SamCheckpoint | None, dict[str, Any]]:
    """The configuration with every open choice made, SAM's weights if any, and run.json of a run to resume."""
    from aftersam.files import read_json
    from aftersam.model.build import resolve_encoder
    from aftersam.model.sam_checkpoint import read_sam_checkpoint
    from aftersam.training.arguments import check_still

    config, sam_name, stored = args.config, args.sam_checkpoint, {}
    if args.resume:
        config = from_dict(Config, read_json(args.output / "config.json"))
        stored, sam_name = read_json(args.output / "run.json"), None
    elif (args.output / "last.safetensors").exists():
        raise ValueError(f"{args.output} holds a run already; go on with --resume or choose another --output")
    sam = read_sam_checkpoint(sam_name) if sam_name else None
    if sam is not None:
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, image_encoder=sam.name),  # type: ignore[arg-type]
        )
    config = validate(resolve_encoder(config, pretrained=sam is not None or args.resume))
    if args.embeddings is not None:
        check_still(config)
    return config, sam, stored


def check_still(config: Config) -> None:
    """Raises ValueError unless training shows the encoder the same pixels every time and leaves its weights alone."""
    data, wanted = config.data, []
    if config.model.encoder != "frozen":
        wanted.append(f"--encoder frozen (it is {config.model.encoder})")
    if data.augmentation and data.augmentation_probability > 0:
        wanted.append(f"an empty --augmentation (it is {' '.join(data.augmentation)})")
    if data.crops != "prediction":
        wanted.append(f"--crops prediction (it is {data.crops})")
    if wanted:
        raise ValueError(f"--embeddings keeps what never changes, so it needs {' and '.join(wanted)}")


def parse(argv: Sequence[str] | None, kind: Any, about: str | None) -> Any:
    """Flags to arguments of `kind`. --preset and --config are read first: they are the other keys' defaults."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [
        "--config-file" + a.removeprefix("--config") if a.split("=")[0] == "--config" else a for a in argv
    ]
    given = {name: _peek(argv, name) for name in ("--preset", "--config-file", "--sam-checkpoint")}
    name = given["--preset"] or ("paper" if given["--sam-checkpoint"] else "small")
    if given["--config-file"]:
        from aftersam.files import read_json

        config = from_dict(Config, read_json(Path(given["--config-file"])), where=given["--config-file"])
    else:
        config = preset(name)
    limits = {"max_steps": _peek(argv, "--max-steps"), "max_minutes": _peek(argv, "--max-minutes")}
    if any(value is not None for value in limits.values()):  # one limit given replaces a preset's other
        cleared = dataclasses.replace(config.train, max_steps=None, max_minutes=None)
        config = dataclasses.replace(config, train=cleared)
    default = kind(data=tyro.MISSING, output=tyro.MISSING, config=config)
    return tyro.cli(kind, args=argv, default=default, description=about, config=(tyro.conf.OmitArgPrefixes,))


def _peek(argv: Sequence[str], name: str) -> str | None:
    """The value of flag `name`, in either spelling, before the real parser runs."""
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag.replace("_", "-") == name:
            return value if equals else (argv[i + 1] if i + 1 < len(argv) else None)
    return None
