"""The model that comes along, trained, scored and put in place.    python -m benchmarks.headneck --data DATASET -o DIR

Trains preset small twice, with the training scans of fold 0 (run DIR/scored), and with all scans but one (DIR/shipped).
The first run segments the validation scans of fold 0, which gives the scores of the model card and the temperature of
both runs; the second one is shipped, with the scan that it has not seen for `aftersam demo --real`. A run that is there
is not trained again, one that was interrupted goes on."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import tyro

from aftersam.config import Config, Index, Positive, Small, preset
from aftersam.data.cache import cache_cases
from aftersam.data.dataset import Dataset, find_dataset, link_cases, split
from aftersam.data.volume import AIR_HU, read_grid
from aftersam.demo import DemoArgs, real
from aftersam.errors import counted, run_command
from aftersam.evaluation.scoring import score_folder
from aftersam.evaluation.tables import markdown_table
from aftersam.export import ExportArgs, export
from aftersam.files import read_json, read_tensors, write_json, write_text
from aftersam.inference.pipeline import PredictArgs, predict_files
from aftersam.inference.segmenter import load
from aftersam.model.run_folder import WEIGHTS, read_run
from aftersam.training.arguments import TrainArgs
from aftersam.training.run import train
from aftersam.training.validation import Calibration, calibrate
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
| trained on | {scans} CTs of OpenKBP, manual contours, at {spacing} mm; {steps} steps of {batch} groups |
| calibration | {calibration} |
| data | Babier et al., OpenKBP, Medical Physics 48, 2021; de-identified as published; [MIT licence]({licence}) |
| licence of the weights | Apache-2.0, as this package |

## Scores

DSC in % of the same training on {training} of these scans, on the {held_out} scans of fold 0 that it has not seen, on
their own grids (`aftersam evaluate`; 95 % bootstrap interval over scans, unreliable below 10 scans). The weights that
come along saw all but one of these scans, so that no score on them would mean anything.

{table}

## What to expect

- The data are heads and necks from the skull to the lung apices, in slices of {slices} mm with voxels of {voxels} mm:
  the resolution of a dose grid. On finer scans masks follow the scan's grid, but are no sharper than {sharpest} mm.
- Fields of view in the data: {z} mm from head to foot, {y} mm from front to back, {x} mm from left to right.
- Contours are those of radiotherapy planning. {worst} have the lowest scores.
- Left and right parotid are told apart by position: a scan whose orientation is wrong gets them swapped.
- A scan of air alone gives {empty}.
- Elsewhere it may mark what looks alike, such as the spinal cord on a CT of the chest or the abdomen.
- It was not tested on children, prostheses, resected or implanted jaws, MR and cone-beam CT.

`imagesTr` and `labelsTr` hold scan {scan} of the same data, which neither training has seen: `aftersam demo --real`
segments it. Train the model again, or on more: `python -m benchmarks.headneck --help`.
"""
DATA_LICENCE = "LICENSE-OpenKBP.txt"
MIT = """The scan in imagesTr and its contours in labelsTr are of OpenKBP, https://github.com/ababier/open-kbp, here as
NIfTI. Cite: A. Babier, B. Zhang, R. Mahmood, K.L. Moore, T.G. Purdie, A.L. McNiven, T.C.Y. Chan, "OpenKBP: The
Open-Access Knowledge-Based Planning Grand Challenge", Medical Physics 48, 2021. The licence of that repository:

MIT License

Copyright (c) 2021 Aaron Babier

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
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
    """Both runs, their temperature, the scores, and the model in the package; returns the metrics of the scored run."""
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
            overwrite=True,
        )
    )
    metrics = score_folder(masks, truth / "labels")
    found = calibrated(args, dataset, held_out)
    for name in folds:
        path = args.output / name / "run.json"
        write_json(path, read_json(path) | found._asdict())
    ship(args, dataset, metrics, found)
    return metrics  # type: ignore[return-value]  # a TypedDict


def configured(args: HeadneckArgs) -> Config:
    """Preset small with more augmentation and weight decay, which pay in a long training, and without validations, so
    that nothing is chosen by the scans that score it."""
    config = preset("small")
    data = dataclasses.replace(
        config.data,
        augmentation=("elastic", "affine", "intensity", "noise", "mirror"),
        augmentation_probability=0.4,
    )
    train = dataclasses.replace(
        config.train,
        max_steps=None if args.max_minutes else args.max_steps,
        max_minutes=args.max_minutes,
        batch_size=args.batch_size,
        weight_decay=0.05,
        num_workers=args.num_workers,
        validations=0,
    )
    return dataclasses.replace(config, data=data, train=train)


def write_data(dataset: Dataset, home: Path, folds: Sequence[tuple[list[str], list[str]]]) -> None:
    """A data set of links to all scans, with `folds` of ids to train on and to hold out."""
    link_cases(dataset, [case.id for case in dataset.cases], home)
    write_json(home / "dataset.json", {"labels": {name: value for value, name in dataset.labels.items()}})
    write_json(home / "splits_final.json", [{"train": ours, "val": theirs} for ours, theirs in folds])


def calibrated(args: HeadneckArgs, dataset: Dataset, held_out: list[str]) -> Calibration:
    """The temperature of the scored run, fitted on the scans `held_out`, as training fits that of a run."""
    run = args.output / SCORED
    model = load(run, device=args.device)
    data = dataclasses.replace(model.config.data, spacing_mm=model.spacing_mm or "native")
    cases = cache_cases(dataset, held_out, data, run / "cache", training=())
    return calibrate(
        model.model,
        cases.values(),
        model.config.model,
        precision=model.precision,
        stored={},
        progress=lambda _: None,
    )


def ship(args: HeadneckArgs, dataset: Dataset, metrics: Any, found: Calibration) -> None:
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
    write_text(home / DATA_LICENCE, MIT)
    write_text(home / "README.md", card(args, dataset, metrics, found))
    real(DemoArgs(output=args.output, device=args.device))
    shutil.copyfile(args.output / "real.png", ROOT / "docs" / f"{NAME}.png")


def card(args: HeadneckArgs, dataset: Dataset, metrics: Any, found: Calibration) -> str:
    """The model card."""
    training, held_out = split(dataset, 0, 0)
    home = WEIGHTS / NAME
    (config, run), (weights, facts) = read_run(home), read_tensors(home / "best.safetensors")
    worst = sorted(metrics["organs"], key=lambda name: float(metrics["organs"][name]["dsc"]))[:2]
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
        batch=config.train.batch_size,
        spacing=" × ".join(f"{mm:g}" for mm in run.spacing_mm or ()),
        calibration=_calibration(found, len(held_out), len(training)),
        licence=DATA_LICENCE,
        sharpest=f"{max(run.spacing_mm or (0,)):g}",
        worst=" and ".join(worst),
        empty=_empty(args, home),
        steps=f"{facts['step']:,}",
        table=markdown_table(rows),
        scan=args.demo_scan,
        **_grids(dataset),
    )


def _grids(dataset: Dataset) -> dict[str, str]:
    """Smallest and largest slice spacing, voxel in the plane and field of view of the scans, in mm."""
    sizes = [read_grid(case.image) for case in dataset.cases]
    fields = np.array([np.multiply(shape, mm) for shape, mm in sizes])
    spacings = np.array([mm for _, mm in sizes])
    spans = {name: _span(fields[:, axis]) for axis, name in enumerate("zyx")}
    return spans | {"slices": _span(spacings[:, 0]), "voxels": _span(spacings[:, 1:])}


def _calibration(found: Calibration, held_out: int, training: int) -> str:
    """A cell on the temperature and what it does to the calibration error."""
    scans = counted(held_out, "held-out scan")
    fitted = f"temperature {found.temperature:.3g}, fitted on the {scans} of the {training}-scan run"
    if found.ece is None:
        return fitted
    before, after = found.ece
    return f"{fitted}; expected calibration error there {before:.4f} without it, {after:.4f} with it"


def _empty(args: HeadneckArgs, home: Path) -> str:
    """What the model makes of air, on the grid of the scan that comes along."""
    (path,) = (home / "imagesTr").iterdir()
    scan: Any = nib.load(path)
    mask = load(home, device=args.device).predict(np.full(scan.shape, AIR_HU, np.int16), scan.affine)
    marked = int(np.count_nonzero(np.asarray(mask.dataobj)))
    return f"a mask of {counted(marked, 'voxel')}" if marked else "an empty mask"


def _span(values: np.ndarray) -> str:
    """Lowest and highest of `values`, rounded."""
    ends = [f"{end:.0f}" if end >= 10 else f"{end:.2g}" for end in (values.min(), values.max())]
    return " to ".join(dict.fromkeys(ends))


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
