"""The arguments of a training, from the command line to a configuration with every open choice made."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from aftersam.config import PRESETS, Args, Config, Index, checked, from_dict, preset, to_dict, validate
from aftersam.files import read_json, refuse_input
from aftersam.model.run_folder import RunFacts, find_run, read_run

if TYPE_CHECKING:
    from aftersam.model.sam_checkpoint import SamCheckpoint
    from aftersam.training.warm_start import WarmStart

# what --resume may change: limits, intervals and means, but nothing that changes a step
MAY_CHANGE = frozenset(
    {"epochs", "max_steps", "max_minutes", "validations", "checkpoint_steps", "num_workers", "tracker",
     "activation_checkpointing", "shard"}
)  # fmt: skip
FIRST_FOLD = "fold_0"  # run of the first of all folds, inside --output
ConfigFile = Annotated[Path | None, tyro.conf.arg(aliases=["--config"])]


@dataclass(frozen=True)
class TrainArgs:
    data: Path
    """Data set: nnU-Net raw, MSD, SegTHOR, or images/ beside labels/."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the run, made if needed."""
    config: Config
    preset: Literal["paper", "best", "small", "tiny"] | None = None
    """Choices that a key not given takes; paper with a SAM checkpoint, else small."""
    config_file: ConfigFile = None
    """Also --config: repeat a run from its config.json; keys given beside it win."""
    sam_checkpoint: str | None = None
    """Start from SAM's weights: a file, a Hugging Face folder, or vit_b, vit_l, vit_h, vit_t to download them once."""
    init: Path | None = None
    """Start from the best weights of another run, a folder or the name of a model that comes along. Organs are matched
    by name. Choices of model and data not given are that run's; those of the training are the preset's of its encoder:
    small, tiny, or else paper."""
    resume: bool = False
    """Go on from last.safetensors in --output, with the choices and the split stored there. Limits given beside it are
    used; another choice is refused."""
    trust_intensities: bool = False
    """Take scans as they are whose values do not look like Hounsfield units: no warning, no refusal."""
    fold: Index | Literal["all"] | None = None
    """Fold of splits_final.json, or of the five seeded ones where there is none; 0 unless given. all: one after the
    other, into folders of --output that predict takes as one model, with the scores of all validation scans."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    cache: Path | None = None
    """Folder of the preprocessed volumes; RUN/cache unless given."""
    embeddings: Path | None = None
    """Folder for what a frozen encoder makes of each slice: found there, or written for the next run."""


class Plan(NamedTuple):
    """What a training will do."""

    config: Config
    """Every open choice made."""
    sam: SamCheckpoint | None
    start: WarmStart | None
    """Of a new run."""
    fold: int
    resumed: RunFacts | None
    """Of the run that is resumed; None for a new one."""


def make_plan(args: TrainArgs) -> Plan:
    """The plan of `args`. Raises ValueError on a run that exists or is not there, and on choices that do not fit."""
    from aftersam.model.build import resolve_encoder
    from aftersam.model.sam_checkpoint import read_sam_checkpoint
    from aftersam.training.warm_start import check_architecture, read_start

    assert args.fold != "all"  # `train_folds` gives them one by one
    checked(args)
    refuse_input(args.output, [args.data, *([args.init] if args.init else [])])
    stored, resumed = read_run(args.output) if args.resume else (None, None)
    if stored is None and (args.output / "last.safetensors").exists():
        raise ValueError(f"{args.output} holds a run already; go on with --resume or choose another --output")
    if args.sam_checkpoint and args.init:
        raise ValueError("--sam-checkpoint and --init both give weights to begin with; leave one out")
    sam = read_sam_checkpoint(args.sam_checkpoint) if args.sam_checkpoint else None
    start = read_start(args.init) if args.init else None
    model = dataclasses.replace(args.config.model, token_shares=stored.model.token_shares if stored else ())
    if sam is not None:
        model = dataclasses.replace(model, image_encoder=sam.name)  # type: ignore[arg-type]  # a name out of ENCODERS
    if start is not None and model.encoder == "auto":
        model = dataclasses.replace(model, encoder=start.config.model.encoder)
    config = dataclasses.replace(args.config, model=model)
    pretrained = bool(sam or start) or (stored is not None and stored.model.encoder != "full")
    config = validate(resolve_encoder(config, pretrained=pretrained))
    if start is not None:
        check_architecture(start, config.model)
    if args.embeddings is not None:
        check_still(config)
    if stored is None or resumed is None:
        return Plan(config, sam, start, args.fold or 0, None)
    _check_same(args.output, config, stored)
    for flag, given, began in (
        (args.sam_checkpoint, sam, resumed.sam_sha256),
        (args.init, start, resumed.init_sha256),
    ):
        if given is not None and given.sha256 != began:
            raise ValueError(f"{flag} is not what the run in {args.output} began with; leave it out")
    if args.fold not in (None, resumed.fold):
        raise ValueError(
            f"--fold is {args.fold}, but the run in {args.output} is on fold {resumed.fold}; leave it out"
        )
    return Plan(config, None, None, resumed.fold, resumed)


def _check_same(run: Path, asked: Config, stored: Config) -> None:
    """Raise ValueError where `asked` differs from the run's configuration in a key outside MAY_CHANGE."""
    for part in ("model", "data", "train"):
        theirs = to_dict(getattr(stored, part))
        for key, value in to_dict(getattr(asked, part)).items():
            if value != theirs[key] and key not in MAY_CHANGE:
                raise ValueError(
                    f"{key} is {value}, but the run in {run} has {theirs[key]}; leave it out of --resume, "
                    "or train into another --output"
                )


def check_still(config: Config) -> None:
    """Raise ValueError unless the encoder is frozen and sees the same pixels in every epoch."""
    data, wanted = config.data, []
    if config.model.encoder != "frozen":
        wanted.append(f"--encoder frozen (it is {config.model.encoder})")
    if data.augmentation and data.augmentation_probability > 0:
        wanted.append(f"an empty --augmentation (it is {' '.join(data.augmentation)})")
    if data.crops != "prediction":
        wanted.append(f"--crops prediction (it is {data.crops})")
    if wanted:
        raise ValueError(f"--embeddings keeps what never changes, so it needs {' and '.join(wanted)}")


def parse(argv: Sequence[str] | None, kind: type[Args], about: str | None) -> Args:
    """Flags to arguments of `kind`, which has `data`, `output` and the keys of a `config`.

    Keys that are not given take their value from --config, from the run of --resume, from the preset or, but for those
    of the training, from the run of --init: its limits are of its own data and machine. These flags are parsed first,
    because the defaults of the others depend on them."""
    given = _bases(argv)
    if given.config is not None:
        config = from_dict(Config, read_json(given.config), where=str(given.config))
    elif hasattr(kind, "resume") and given.resume and given.output is not None and given.preset is None:
        config, _ = read_run(given.output / FIRST_FOLD if given.fold == "all" else given.output)
    elif hasattr(kind, "init") and given.init is not None and given.preset is None:
        config, facts = read_run(find_run(given.init))
        # the run's own spacing, where it went by a median
        data = dataclasses.replace(config.data, spacing_mm=facts.spacing_mm or "native")
        training = PRESETS.get(config.model.image_encoder, PRESETS["paper"]).train
        config = dataclasses.replace(config, data=data, train=training)
    else:
        config = preset(preset_name(given.preset, given.sam_checkpoint))
    if given.max_steps or given.max_minutes or given.epochs:  # one limit given replaces a preset's others
        cleared = dataclasses.replace(config.train, max_steps=None, max_minutes=None)
        config = dataclasses.replace(config, train=cleared)
    default = kind(data=tyro.MISSING, output=tyro.MISSING, config=config)  # type: ignore[call-arg]  # `parse` wants these fields in every `kind`
    args = tyro.cli(kind, args=argv, default=default, description=about, config=(tyro.conf.OmitArgPrefixes,))
    if args.config.model.token_shares != config.model.token_shares:  # type: ignore[attr-defined]  # `parse` wants a config in every `kind`
        raise ValueError("--token-shares follow from the organs of --init and of the data; leave it out")
    return args


def preset_name(asked: str | None, sam_checkpoint: str | None) -> str:
    """The preset whose choices are taken where no configuration file is given."""
    return asked or ("paper" if sam_checkpoint else "small")


def _bases(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags that set the defaults of other flags. Other flags and all mistakes are left to the real parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "--config-file", "--config_file", type=Path, nargs="?")
    parser.add_argument("--output", "-o", type=Path, nargs="?")
    parser.add_argument("--resume", action="store_true")
    for name in ("fold", "preset", "init", "sam-checkpoint", "max-steps", "max-minutes", "epochs"):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?")
    return parser.parse_known_args(argv)[0]
