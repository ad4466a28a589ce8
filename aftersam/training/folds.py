"""All folds of a data set: a run each, one after the other, and masks of each scan by the run that has not seen it.

Leaves in the output folder: fold_0, fold_1, ... (the runs, which predict takes as one model), masks (out-of-fold) and
metrics.json (their scores, pooled)."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from aftersam.data.dataset import Dataset, find_dataset, folds_of, link_cases, median_spacing
from aftersam.errors import plain_console, tell
from aftersam.evaluation.scoring import score_folder, table
from aftersam.files import refuse_input, write_json
from aftersam.inference.pipeline import PredictArgs, predict_files
from aftersam.model.run_folder import read_run
from aftersam.training.arguments import FIRST_FOLD, TrainArgs
from aftersam.training.run import TrainResult, train


def train_folds(args: TrainArgs) -> TrainResult:
    """Train one run a fold, or resume them. Returns the steps of all runs and the pooled out-of-fold DSC.

    Raises ValueError like `train`, under torchrun, and where the data set is split otherwise than the runs that
    exist."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--fold all trains in one process; under torchrun give one fold at a time")
    dataset, first = find_dataset(args.data), args.output / FIRST_FOLD
    folds = folds_of(dataset, 0)
    _check_begun(args, dataset, folds)
    args = _with_one_spacing(args, dataset, folds)
    trained, scored = [], False
    for number, fold in enumerate(folds):
        run = first.with_name(f"fold_{number}")
        print(f"fold {number} of {len(folds)}")
        own = dataclasses.replace(
            args,
            output=run,
            fold=number,
            cache=args.cache or args.output / "cache",
            resume=args.resume and (run / "last.safetensors").exists(),
        )
        trained.append(train(own))
        if fold["val"]:
            scored = True
            _predict_held_out(args, dataset, fold["val"], run)
    console = plain_console()
    tell(console, f"{args.output} is one model now: aftersam predict -m {args.output}")
    result = TrainResult(
        args.output,
        steps=sum(run.steps for run in trained),
        mean_dsc=None,
        minutes=sum(run.minutes for run in trained),
        cpu_minutes=sum(run.cpu_minutes for run in trained),
    )
    if not scored:
        return result
    link_cases(dataset, {case for fold in folds for case in fold["val"]}, args.output)
    metrics = score_folder(args.output / "masks", args.output / "labels", quiet=True)
    write_json(args.output / "metrics.json", metrics)
    console.print(table(metrics))
    return dataclasses.replace(result, mean_dsc=metrics["mean_dsc"])


def _with_one_spacing(args: TrainArgs, dataset: Dataset, folds: list[dict[str, list[str]]]) -> TrainArgs:
    """`args` with the spacing "median" replaced by the median of all scans in the folds.

    The folds then work at one spacing, to which a prediction with all of them resamples a scan once."""
    if args.config.data.spacing_mm != "median":
        return args
    used = {case for fold in folds for part in fold.values() for case in part}
    spacing = median_spacing([case for case in dataset.cases if case.id in used])
    data = dataclasses.replace(args.config.data, spacing_mm=spacing)
    return dataclasses.replace(args, config=dataclasses.replace(args.config, data=data))


def _check_begun(args: TrainArgs, dataset: Dataset, folds: list[dict[str, list[str]]]) -> None:
    """Raise ValueError where later folds would differ from those that have begun in more than their scans.

    Also where the first fold would overwrite other files of its folder."""
    run = args.output / FIRST_FOLD
    refuse_input(args.output, [args.data, *([args.init] if args.init else [])])
    if not (run / "last.safetensors").exists():
        later = (f"fold_{number}" for number in range(1, len(folds)))
        written = (args.output / name for name in ("images", "labels", "masks", "validation", *later))
        if there := [path for path in written if path.exists()]:
            raise ValueError(f"{there[0]} exists, and --fold all would write there; choose another --output")
    if not (args.resume and (run / "last.safetensors").exists()):
        return
    if folds_of(dataset, 0, source=run / "splits_final.json") != folds:
        raise ValueError(
            f"{args.data} is split into other folds than {run / 'splits_final.json'} was; train into another --output"
        )
    _, facts = read_run(run)
    waiting = not all((run.with_name(f"fold_{n}") / "last.safetensors").exists() for n in range(len(folds)))
    for flag, given, began in (
        ("--sam-checkpoint", args.sam_checkpoint, facts.sam_sha256),
        ("--init", args.init, facts.init_sha256),
    ):
        if (given is not None or waiting) and (given is None) != (began is None):
            raise ValueError(
                f"{run} began {'without' if began is None else 'with'} {flag}, and so must the folds after it"
            )


def _predict_held_out(args: TrainArgs, dataset: Dataset, cases: list[str], run: Path) -> None:
    """Write the masks of the validation scans of `run`, by its best weights, into the folder that all folds share."""
    home = args.output / "validation" / run.name
    prompted = read_run(run)[0].model.prompts != "none"
    link_cases(dataset, cases, home)
    predict_files(
        PredictArgs(
            input=home / "images", output=args.output / "masks", model=(run,), device=args.device, preview=False,
            prompt_labels=home / "labels" if prompted else None, trust_intensities=args.trust_intensities,
            overwrite=True,
        )
    )  # fmt: skip
