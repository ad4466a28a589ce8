"""Write one self-contained HTML page of a result.    python -m aftersam.report -m metrics.json --run RUN -o report.html

It has the curves, the table of organs, a box plot, and overlays of the best, the median and the worst case."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from aftersam.errors import run_command
from aftersam.evaluation.page import write_report
from aftersam.files import check_place, refuse_input


@dataclass(frozen=True)
class ReportArgs:
    metrics: Annotated[Path, tyro.conf.arg(aliases=["-m"])]
    """JSON file that aftersam.evaluate wrote."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """HTML file to write."""
    run: Path | None = None
    """Folder of the training run. The page then has its curves and facts."""
    images: Path | None = None
    """Folder of the scans. With --predictions and --labels the page has overlays of cases."""
    predictions: Path | None = None
    """Folder of the masks. If predict --review wrote them, the page lists the least certain scans."""
    labels: Path | None = None
    """Folder of the reference masks."""


def report(args: ReportArgs) -> Path:
    """Write the page that `args` ask for and return its path. Raises ValueError on bad files."""
    folders = {name: getattr(args, name) for name in ("run", "images", "predictions", "labels")}
    given = {name: folder for name, folder in folders.items() if folder is not None}
    for name, folder in given.items():
        if not folder.is_dir():
            raise ValueError(f"--{name} {folder} is not a folder")
    if ("images" in given or "labels" in given) and len(given.keys() - {"run"}) < 3:
        raise ValueError("cases are drawn from --images, --predictions and --labels; give all three")
    check_place(args.output)
    read = [path for folder in given.values() for path in folder.iterdir() if path.suffix != ".html"]
    refuse_input(args.output, [args.metrics, *read])
    return write_report(
        args.output,
        args.metrics,
        run=args.run,
        images=args.images,
        predictions=args.predictions,
        labels=args.labels,
    )


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        print(report(tyro.cli(ReportArgs, args=argv, description=__doc__)))
        return 0

    return run_command("report", command)


if __name__ == "__main__":
    sys.exit(main())
