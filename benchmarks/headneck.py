"""The model that comes along, trained, scored and put in place.    python -m benchmarks.headneck --data DATASET -o DIR

Trains preset small twice, with the training scans of fold 0 (run DIR/scored), and with all scans but one (DIR/shipped).
The first run segments the validation scans of fold 0, which gives the scores of the model card; the second one is
shipped, with the scan that it has not seen for `aftersam demo --real`. A run that is there is not trained again, one
that was interrupted goes on."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from aftersam.config import Config, Index, Positive, Small, preset
from aftersam.data.dataset import Dataset, find_dataset, link_cases, split
from aftersam.demo import DemoArgs, real
from aftersam.errors import counted, run_command
from aftersam.evaluation.scoring import score_folder
from aftersam.evaluation.tables import markdown_table
from aftersam.export import ExportArgs, export
from aftersam.files import read_tensors, write_json, write_text
from aftersam.inference.pipeline import PredictArgs, predict_files
from aftersam.model.run_folder import WEIGHTS, read_run
from aftersam.training.arguments import TrainArgs
from aftersam.training.run import train
from benchmarks.machine import RESULTS, ROOT

NAME = "headneck"
SCORED, SHIPPED = "scored", "shipped"
HELD_OUT = RESULTS / "accuracy" / NAME  # weights and scores of the run of fold 0
CARD = """# headneck

Organs of the head and neck in radiotherapy CT: {organs}.
It comes along with AFTer-SAM, so that `aftersam predict -i scan.nii.gz -o mask.nii.gz -m headneck` works at once.

**For research. Not a medical device.**

| | |
| --- | --- |
| network | preset `small`, {parameters} parameters, from scratch, fp16 |
| trained on | {scans} CTs of OpenKBP, manual contours, at 2.5 × 4 × 4 mm; {steps} steps of {batch} groups |
| data | Babier et al., OpenKBP, Medical Physics 48, 2021; published under the MIT licence |
| licence of the weights | Apache-2.0, as this package |

## Scores

DSC in % of the same training on {training} of these scans, on the {held_out} scans of fold 0 that it has not seen, on
their own grids (`aftersam evaluate`; 95 % bootstrap interval over scans, unreliable below 10 scans). The weights that
come along saw all but one of these scans, so that no score on them would mean anything.

{table}

## What to expect

- Adult heads and necks from the skull to the lung apices, in-plane voxels of 4 to 5 mm: the resolution of a dose grid.
  On finer scans masks follow the scan's grid, but are no sharper than 4 mm.
- Contours are those of radiotherapy planning. The esophagus and the larynx are the least certain organs.
- Left and right parotid are told apart by position: a scan whose orientation is wrong gets them swapped.
- Elsewhere it still marks what looks alike. On a chest CT: the spinal cord, and fragments of brainstem, mandible,
  parotid and esophagus. On an abdomen: the spinal cord, and specks of the others.
- Children, head prostheses, resected or implanted jaws, MR and cone-beam CT were not in the data.

`imagesTr` and `labelsTr` hold scan {scan} of the same data, which neither training has seen: `aftersam demo --real`
segments it. Train the model again, or on more: `python -m benchmarks.headneck --help`.
"""


@dataclass(frozen=True)
class HeadneckArgs:
    data: Path
    """OpenKBP as nnU-Net raw, with its splits_final.json."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of both runs and of the masks."""
    demo_scan: str = "okbp_034"
    """Scan of fold 0's validation that no training sees."""
    max_steps: int = 20_000
    """Steps of each training."""
    max_minutes: Positive | None = None
    """Minutes of each training, in the place of steps."""
    batch_size: Small = 8
    num_workers: Index | None = None
    device: str = "auto"


def headneck(args: HeadneckArgs) -> dict[str, Any]:
    """Both runs, the scores, and the folder of the model in the package; returns the metrics of the scored run."""
    dataset = find_dataset(args.data)
    training, held_out = split(dataset, 0, 0)
    if args.demo_scan not in held_out:
        raise ValueError(f"demo_scan is {args.demo_scan}, but must be one of {', '.join(held_out)}")
    everything = sorted(case.id for case in dataset.cases)
    folds = {
        SCORED: (training, held_out),
        SHIPPED: ([i for i in everything if i != args.demo_scan], [args.demo_scan]),
    }
    scans = args.output / "scans"
    write_data(dataset, scans, list(folds.values()))
    for fold, name in enumerate(folds):
        run = args.output / name
        if not (run / "best.safetensors").exists():
            resume = (run / "last.safetensors").exists()
            train(
                TrainArgs(
                    data=scans,
                    output=run,
                    config=configured(args),
                    fold=fold,
                    resume=resume,
                    device=args.device,
                )
            )
    masks, truth = args.output / "masks", args.output / "held-out"
    link_cases(dataset, held_out, truth)
    names = {"labels": {name: value for value, name in dataset.labels.items()}}
    write_json(truth / "dataset.json", names)
    predict_files(
        PredictArgs(
            input=truth / "images",
            output=masks,
            model=(args.output / SCORED,),
            device=args.device,
            preview=False,
        )
    )
    metrics = score_folder(masks, truth / "labels")
    ship(args, dataset, metrics)
    return metrics  # type: ignore[return-value]  # a TypedDict


def configured(args: HeadneckArgs) -> Config:
    """Preset small without validations, so that nothing is chosen by the scans that score it: the final weights are
    kept."""
    config = preset("small")
    train = dataclasses.replace(
        config.train,
        max_steps=None if args.max_minutes else args.max_steps,
        max_minutes=args.max_minutes,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        validations=0,
    )
    return dataclasses.replace(config, train=train)


def write_data(dataset: Dataset, home: Path, folds: Sequence[tuple[list[str], list[str]]]) -> None:
    """A data set of links to all scans, with `folds` of ids to train on and to hold out."""
    link_cases(dataset, [case.id for case in dataset.cases], home)
    write_json(home / "dataset.json", {"labels": {name: value for value, name in dataset.labels.items()}})
    write_json(home / "splits_final.json", [{"train": ours, "val": theirs} for ours, theirs in folds])


def ship(args: HeadneckArgs, dataset: Dataset, metrics: Any) -> None:
    """The weights in the package with card and scan, and those of the scored run beside the results."""
    home = WEIGHTS / NAME
    for name, folder in ((SCORED, HELD_OUT), (SHIPPED, home)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        export(ExportArgs(model=args.output / name, output=folder, format="weights"))
    write_json(HELD_OUT / "metrics.json", metrics)
    (case,) = (case for case in dataset.cases if case.id == args.demo_scan)
    assert case.label is not None
    for file, copy in (
        (case.image, f"imagesTr/{case.id}_0000.nii.gz"),
        (case.label, f"labelsTr/{case.id}.nii.gz"),
    ):
        (home / copy).parent.mkdir()
        shutil.copyfile(file, home / copy)
    write_text(home / "README.md", card(args, dataset, metrics))
    real(DemoArgs(output=args.output, device=args.device))
    shutil.copyfile(args.output / "real.png", ROOT / "docs" / f"{NAME}.png")


def card(args: HeadneckArgs, dataset: Dataset, metrics: Any) -> str:
    """The model card."""
    training, held_out = split(dataset, 0, 0)
    weights, facts = read_tensors(WEIGHTS / NAME / "best.safetensors")
    rows = [["organ", "DSC", "95 %", "HD95, mm", "missed"]]
    for name, organ in metrics["organs"].items():
        rows.append(
            [
                name,
                *_score(organ["dsc"], organ["dsc_interval"]),
                f"{organ['hd95_mm_penalised']:.1f}",
                str(organ["missed"]),
            ]
        )
    rows.append(["**mean**", *_score(metrics["mean_dsc"], metrics["mean_dsc_interval"]), "", ""])
    return CARD.format(
        organs=", ".join(dataset.labels.values()),
        parameters=f"{sum(w.numel() for w in weights.values()) / 1e6:.1f} M",
        scans=len(dataset.cases) - 1,
        training=len(training),
        held_out=len(held_out),
        batch=read_run(WEIGHTS / NAME)[0].train.batch_size,
        steps=f"{facts['step']:,}",
        table=markdown_table(rows),
        scan=args.demo_scan,
    )


def _score(dsc: float, interval: Sequence[float]) -> list[str]:
    return [f"{100 * dsc:.1f}", " … ".join(f"{100 * bound:.1f}" for bound in interval)]


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        metrics = headneck(tyro.cli(HeadneckArgs, args=argv, description=__doc__))
        print(
            f"{WEIGHTS / NAME}: mean DSC {metrics['mean_dsc']:.4f} on {counted(metrics['num_cases'], 'scan')}"
        )
        return 0

    return run_command("headneck", command)


if __name__ == "__main__":
    sys.exit(main())
