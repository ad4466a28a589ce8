"""Run the whole pipeline on synthetic scans.    python -m aftersam.demo -o demo-run

Makes synthetic thorax scans, trains the tiny preset on some of them, segments the others, scores the masks and writes a
report. Nothing is downloaded; it takes a few minutes on two CPU cores. --real segments the CT that comes along with the
model that comes along, in seconds."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from aftersam.config import Count, Positive, Seed, checked, preset
from aftersam.errors import plain_console, run_command
from aftersam.files import check_place, write_json

if TYPE_CHECKING:
    from aftersam.evaluation.scoring import Metrics


@dataclass(frozen=True)
class DemoArgs:
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo-run")
    """Folder for scans, run, masks, metrics.json and report.html; with --real, for the mask and real.png."""
    real: bool = False
    """Segment a real head-and-neck CT with the model headneck, which was not trained on it. Nothing is trained."""
    train_cases: Count = 20
    """Synthetic scans to train on."""
    test_cases: Count = 4
    """Synthetic scans to segment and score, which are not trained on."""
    max_minutes: Positive = 4.0
    """Longest time of the training."""
    max_steps: Count | None = None
    """Steps of the training. By default those of the tiny preset."""
    attention: Literal["both", "axial", "slice", "none"] = "both"
    """Attention of the fusion blocks; none is the 2D model."""
    seed: Seed = 0
    """Seed of the scans and of the training."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""


def real(args: DemoArgs) -> Metrics:
    """Segment and score the real scan that comes along. Writes to `args.output`; returns the scores."""
    from aftersam.data.volume import read_image, read_labels
    from aftersam.evaluation.figures import overlay_png
    from aftersam.evaluation.scoring import score_folder, table
    from aftersam.inference.pipeline import PredictArgs, predict_files
    from aftersam.model.run_folder import bundled_runs, read_run

    out, home = args.output, bundled_runs()["headneck"]  # not a folder of that name
    images, labels, masks = home / "imagesTr", home / "labelsTr", out / "real"
    predict_files(
        PredictArgs(
            input=images, output=masks, model=(home,), device=args.device, overwrite=True, preview=False
        )
    )
    metrics = score_folder(masks, labels, quiet=True)
    plain_console().print(table(metrics))
    (path,) = labels.glob("*.nii.gz")
    scan = read_image(images / path.name.replace(".nii.gz", "_0000.nii.gz"))
    mask, truth = (read_labels(folder / path.name, like=scan).array for folder in (masks, labels))
    overlay_png(
        out / "real.png", scan.array, mask, scan.spacing_mm, read_run(home)[1].names, reference=truth,
        title=f"{path.name.removesuffix('.nii.gz')}, mean DSC {metrics['mean_dsc']:.3f}",
    )  # fmt: skip
    print(f"{masks / path.name}, {out / 'real.png'}")
    return metrics


def demo(args: DemoArgs) -> Metrics:
    """Make phantoms, train, predict, score and write the report, all in `args.output`. Returns the metrics.

    Raises ValueError where the folder already holds a demo."""
    from aftersam.data.phantom import LABELS, write_dataset
    from aftersam.data.volume import read_image, read_labels
    from aftersam.device import find_device
    from aftersam.evaluation.figures import overlay_png
    from aftersam.evaluation.page import write_report
    from aftersam.evaluation.scoring import score_folder, table
    from aftersam.inference.pipeline import PredictArgs, predict_files
    from aftersam.training.arguments import TrainArgs
    from aftersam.training.run import train

    find_device(args.device)  # fails now and not after making the scans
    out, began = checked(args).output, time.monotonic()
    check_place(out, folder=True)
    if (out / "run").exists():
        raise ValueError(f"{out} holds a demo already; delete it or choose another --output")
    config = preset("tiny")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention=args.attention),
        train=dataclasses.replace(
            config.train,
            max_minutes=args.max_minutes,
            max_steps=args.max_steps or config.train.max_steps,
            seed=args.seed,
        ),
    )

    print(f"1/5 synthetic thorax scans: {args.train_cases} to train on, {args.test_cases} held out")
    write_dataset(out / "scans", cases=args.train_cases, seed=args.seed)
    write_dataset(out / "held-out", cases=args.test_cases, seed=args.seed + 10_000)
    print("2/5 training")
    train(TrainArgs(data=out / "scans", output=out / "run", config=config, preset="tiny", device=args.device))
    print("3/5 segmenting the held-out scans")
    images, labels, masks = out / "held-out" / "imagesTr", out / "held-out" / "labelsTr", out / "masks"
    predict_files(PredictArgs(input=images, output=masks, model=(out / "run",), device=args.device))
    print("4/5 scoring them")
    metrics = score_folder(masks, labels)
    write_json(out / "metrics.json", metrics)
    plain_console().print(table(metrics))
    print("5/5 report")
    first = sorted(labels.glob("*.nii.gz"))[0]
    scan = read_image(images / first.name.replace(".nii.gz", "_0000.nii.gz"))
    mask, truth = (read_labels(folder / first.name, like=scan).array for folder in (masks, labels))
    overlay_png(out / "demo.png", scan.array, mask, scan.spacing_mm, LABELS, reference=truth)
    folders = {"images": images, "predictions": masks, "labels": labels}
    write_report(out / "report.html", out / "metrics.json", run=out / "run", **folders)
    print(f"{out / 'report.html'}, {out / 'demo.png'} after {(time.monotonic() - began) / 60:.1f} min")
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        args = tyro.cli(DemoArgs, args=argv, description=__doc__)
        real(args) if args.real else demo(args)
        return 0

    return run_command("demo", command)


if __name__ == "__main__":
    sys.exit(main())
