"""What a training stands on: its processes, the scans of a fold, the model with its weights, and the run's facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import filter_trackers
from accelerate.utils import set_seed

from aftersam.config import TrainConfig, from_dict, to_dict
from aftersam.data.cache import CachedCase, cache_cases
from aftersam.data.dataset import Dataset, find_dataset, mirror_pairs, split
from aftersam.data.slice_group import SliceGroups
from aftersam.data.stored_features import StoredScan
from aftersam.device import DTYPES, find_device, keep_freed_memory, precision_for
from aftersam.files import check_place, write_json
from aftersam.inference.feature_cache import Embeddings
from aftersam.inference.postprocess import one_piece
from aftersam.model.aftersam import AfterSAM
from aftersam.model.build import build_aftersam, check_weights
from aftersam.training.arguments import Plan, TrainArgs
from aftersam.training.checkpoint import load_training, provenance
from aftersam.training.schedule import Progress
from aftersam.training.warm_start import load_start, token_shares


@dataclass(frozen=True)
class Processes:
    """The processes of a run as one of them sees them, and the precision that all compute in."""

    accelerator: Accelerator
    precision: str

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.accelerator.is_main_process


@dataclass(frozen=True)
class Scans:
    """The preprocessed scans of a fold; `groups` draws from those to train on."""

    dataset: Dataset
    fold: int
    training: list[CachedCase]
    validation: list[CachedCase]
    groups: SliceGroups
    spacing_mm: tuple[float, float, float] | None
    """(d, h, w) that all were brought to; None: each has its own."""

    @property
    def labels(self) -> dict[int, str]:
        return self.dataset.labels

    @property
    def num_classes(self) -> int:
        """Background included."""
        return len(self.labels) + 1

    @property
    def absent(self) -> list[str]:
        """The organs that no training scan has."""
        present = {int(value) for case in self.training for value in np.unique(case.foreground[:, 0])}
        return [name for value, name in self.labels.items() if value not in present]


def own_folder(run: Path) -> None:
    """Make the folder `run`. Raises ValueError where training would write through what stands there already."""
    check_place(run, folder=True)
    run.mkdir(parents=True, exist_ok=True)
    for entry in run.iterdir():
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir() or not entry.exists()):
            raise ValueError(
                f"{entry} is a link or a device, and training writes into its own folder alone; remove it "
                "(--cache names a folder elsewhere)"
            )


def start_processes(config: TrainConfig, output: Path, device: str) -> Processes:
    """Devices, precision and trackers, and the seed of every draw from here on.

    Raises ValueError on a device that is not there, a tracker that is not installed, and fp16 without a GPU."""
    where = find_device(device)
    keep_freed_memory(where)
    precision = precision_for(config.precision, where.type)
    if not filter_trackers(config.tracker, output):
        raise ValueError(
            f"tracker is {config.tracker!r}, whose package is not installed; install it, or use tensorboard"
        )
    if where.type == "cuda":
        torch.cuda.set_device(where)  # what accelerate takes in a single process
    AcceleratorState._reset_state()  # a run before this one in the same process may have had another precision
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        cpu=where.type == "cpu",
        log_with=config.tracker,
        project_dir=str(output),
    )
    if accelerator.num_processes > 1 and ":" in device:
        raise ValueError(
            f"device is {device}, but each of {accelerator.num_processes} processes has its own; use cuda"
        )
    if precision == "fp16" and accelerator.device.type == "cpu":  # where nothing scales the gradients
        raise ValueError("precision fp16 needs a GPU to train on; use bf16 or fp32")
    set_seed(config.seed)
    return Processes(accelerator, precision)


def read_scans(args: TrainArgs, plan: Plan) -> Scans:
    """The scans of the fold, preprocessed, and their groups.

    Raises ValueError on a bad data set or fold, and where a resumed run was trained on other labels."""
    config, dataset = plan.config, find_dataset(args.data)
    splits, resumed, data = args.output / "splits_final.json", plan.resumed, config.data
    # the same folds for every seed, so that seeds can be compared; a run's own for a run
    stored = {"source": splits} if resumed else {"write_to": splits}
    train_ids, validation_ids = split(dataset, plan.fold, 0, **stored)
    if resumed:
        if resumed.names != dataset.labels:
            raise ValueError(
                f"{args.data} has the labels {dataset.labels}, but the run to resume was trained on {resumed.names}"
            )
        data = dataclasses.replace(data, spacing_mm=resumed.spacing_mm or "native")
    cached = cache_cases(
        dataset,
        [*train_ids, *validation_ids],
        data,
        args.cache or args.output / "cache",
        training=train_ids,
        trusted=args.trust_intensities,
    )
    training = [cached[case] for case in train_ids]
    groups = SliceGroups(
        training,
        model=config.model,
        data=config.data,
        seed=config.train.seed,
        label_swap=mirror_pairs(dataset.labels) if "mirror" in config.data.augmentation else {},
    )
    spacing_mm = None if data.spacing_mm == "native" else training[0].spacing_mm
    return Scans(dataset, plan.fold, training, [cached[case] for case in validation_ids], groups, spacing_mm)


def build_model(
    args: TrainArgs, plan: Plan, scans: Scans, say: Callable[[str], object]
) -> tuple[AfterSAM, Progress]:
    """The model with its weights, new, SAM's, another run's or the resumed run's, and where its run stands."""
    path, config = args.output / "last.safetensors", plan.config.model
    if args.resume:
        check_weights(path, config, scans.num_classes)
    model = build_aftersam(config, scans.num_classes, sam=plan.sam, say=say)
    model.set_activation_checkpointing(plan.config.train.activation_checkpointing)
    if plan.start is not None:
        load_start(plan.start, model, config, scans.labels, scans.spacing_mm)
    if not args.resume:
        return model, Progress()
    facts = load_training(path, model)
    progress: Progress = from_dict(Progress, facts.get("progress"), where=f"the progress in {path}")
    return model, progress


def with_tokens(plan: Plan, scans: Scans) -> Plan:
    """`plan` with the tokens that a model of these organs has where it starts from a run's weights."""
    if plan.start is None:
        return plan
    shares = token_shares(plan.start, scans.labels)
    model = dataclasses.replace(plan.config.model, token_shares=shares)
    return plan._replace(config=dataclasses.replace(plan.config, model=model))


def store_features(
    folder: Path, model: AfterSAM, scans: Scans, processes: Processes
) -> dict[str, StoredScan]:
    """What the frozen encoder makes of every scan, by case: encoded once, each process its share, and kept in `folder`.

    Training groups carry the features from here on."""
    size = scans.groups.model.image_size
    store = Embeddings(folder, model.to(processes.device), image_size=size, precision=processes.dtype)
    cases = [*scans.training, *scans.validation]
    for case in cases[processes.rank :: processes.world]:
        store.of(case.hu, case.box)
    processes.accelerator.wait_for_everyone()
    scans.groups.stored = {case.id: store.of(case.hu, case.box) for case in cases}
    return scans.groups.stored


def write_facts(output: Path, plan: Plan, scans: Scans) -> None:
    """Write what repeats the run, config.json, and what its weights need beside it, run.json.

    A resumed run's limits may have changed, its facts have not."""
    write_json(output / "config.json", to_dict(plan.config))
    if plan.resumed:
        return
    longest = [max(n * mm for n, mm in zip(c.shape, c.spacing_mm, strict=True)) for c in scans.training]
    facts = {
        "labels": {str(value): name for value, name in scans.labels.items()},
        "spacing_mm": scans.spacing_mm,
        "longest_mm": [min(longest), max(longest)],
        "one_piece": one_piece((case.labels for case in scans.training), scans.labels),
        "dataset": scans.dataset.name,
        "fold": scans.fold,
        "sam_sha256": plan.sam.sha256 if plan.sam else None,
        "init_sha256": plan.start.sha256 if plan.start else None,
    }
    write_json(output / "run.json", facts | provenance())
