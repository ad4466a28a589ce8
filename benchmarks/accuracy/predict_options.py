"""What prediction's options cost and gain.    python -m benchmarks.accuracy.predict_options -m RUN --data DATASET

Each option in turn on each scan: seconds of encoding, fusing, decoding and upsampling (reading and the mask's own file
are the same for all), DSC against the labels on the scan's own grid. Unless --cases names others, the scans are those
that the run validated on. `stored` is the second prediction with --embeddings; the first one writes them."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aftersam.data.dataset import Case, find_dataset, mirror_pairs
from aftersam.data.volume import Volume, open_probabilities, read_image, read_labels
from aftersam.evaluation.metrics import dice
from aftersam.evaluation.tables import markdown_table
from aftersam.files import read_json, write_json
from aftersam.inference.feature_cache import Embeddings
from aftersam.inference.inputs import PredictOptions
from aftersam.inference.segmenter import Prepared, Segmenter, load
from benchmarks import machine

EXACT = "none"
Segment = Callable[[Prepared], np.ndarray]


@dataclass(frozen=True)
class Measured:
    """One option on one scan."""

    seconds: float
    dsc: dict[str, float]
    """Of each organ; NaN where both masks are empty."""


def options(segmenter: Segmenter, folder: Path) -> dict[str, Segment]:
    """A function for each option that segments a scan; files go to `folder`."""
    slices = segmenter.config.model.num_slices
    size = segmenter.config.model.image_size
    store = Embeddings(folder / "store", segmenter.model, image_size=size, precision=segmenter.precision)

    def slid(options: PredictOptions) -> Segment:
        return lambda scan: segmenter.segment(scan, options).labels

    def saving_probabilities(scan: Prepared) -> np.ndarray:
        classes = len(segmenter.labels) + 1
        with open_probabilities(folder / "probabilities.npy", scan.volume, classes) as array:
            return segmenter.segment(scan, probabilities=array).labels

    def from_stored(prepared: Prepared) -> np.ndarray:
        scan = prepared.scan
        scan = dataclasses.replace(scan, stored=store.of(scan.hu, scan.box))
        return segmenter.segment(prepared._replace(scan=scan)).labels

    found = {EXACT: slid(PredictOptions())}
    found |= {
        f"--keep {k}": slid(PredictOptions(k))
        for k in sorted({2, slices // 2 + 1, slices})
        if 1 < k <= slices
    }
    found["--overlap average"] = slid(PredictOptions(average=True))
    try:
        found["--tta mirror"] = slid(PredictOptions(label_swap=mirror_pairs(segmenter.labels)))
    except ValueError as error:
        print(f"--tta mirror is left out: {error}")
    found["--roi body"] = slid(PredictOptions(body=True))
    found["--save-probabilities"] = saving_probabilities
    found["--confidence"] = slid(PredictOptions(confidence=True))
    found["--embeddings, first"] = from_stored
    found["--embeddings, stored"] = found["--embeddings, first"]
    return found


def measure(segmenter: Segmenter, cases: Sequence[Case]) -> dict[str, list[Measured]]:
    """Every option on every case. Raises ValueError on a case without a label."""
    with tempfile.TemporaryDirectory() as folder:
        found = options(segmenter, Path(folder))
        measured: dict[str, list[Measured]] = {name: [] for name in found}
        for i, case in enumerate(cases):
            if case.label is None:
                raise ValueError(f"{case.image} has no label to score against")
            volume = read_image(case.image)
            truth = read_labels(case.label, like=volume)
            prompted = segmenter.config.model.prompts != "none"
            scan = segmenter.prepare(volume, prompt_labels=truth if prompted else None)
            if i == 0:
                found[EXACT](scan)  # caches, threads and a GPU's clock warm up
            for name, segment in found.items():
                began = time.perf_counter()
                labels = segment(scan)
                seconds = time.perf_counter() - began
                measured[name].append(Measured(seconds, scores(labels, truth, segmenter.labels)))
            print(f"{case.id}: {measured[EXACT][-1].seconds:.1f} s without options", flush=True)
    return measured


def scores(labels: np.ndarray, truth: Volume, names: dict[int, str]) -> dict[str, float]:
    return {name: dice(labels == value, truth.array == value) for value, name in names.items()}


def summary(measured: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """One row an option: median seconds a scan, their ratio to those without options, mean DSC, its difference."""
    rows: list[dict[str, Any]] = []
    for name, of_cases in measured.items():
        organs = {organ: _mean([m.dsc[organ] for m in of_cases]) for organ in of_cases[0].dsc}
        seconds = statistics.median(m.seconds for m in of_cases)
        pairs = zip(of_cases, measured[EXACT], strict=True)
        rows.append(
            {
                "option": name,
                "seconds": round(seconds, 4),
                "times": round(statistics.median(m.seconds / exact.seconds for m, exact in pairs), 4),
                "dsc": _mean([value for value in organs.values() if value is not None]),
                "dsc_of_organs": organs,
            }
        )
    for row in rows:
        base = rows[0]["dsc"]
        row["dsc_gain"] = None if base is None else round(row["dsc"] - base, 6)
    return rows


def _mean(values: Sequence[float]) -> float | None:
    numbers = [value for value in values if not math.isnan(value)]
    return round(sum(numbers) / len(numbers), 6) if numbers else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [["option", "s a scan", "times", "DSC", "gain"]]
    for row in rows:
        score = ["–", "–"] if row["dsc"] is None else [f"{row['dsc']:.4f}", f"{row['dsc_gain']:+.4f}"]
        lines.append([row["option"], f"{row['seconds']:.2f}", f"{row['times']:.2f}×", *score])
    return markdown_table(lines)


def chosen(run: Path, data: Path, ids: str | None) -> list[Case]:
    """The cases `ids` of the data set, or those that the run validated on. Raises ValueError on an unknown id."""
    cases = {case.id: case for case in find_dataset(data).cases}
    if ids is not None:
        wanted = ids.split(",")
    else:
        wanted = read_json(run / "splits_final.json")[read_json(run / "run.json")["fold"]]["val"]
    for case in wanted:
        if case not in cases:
            raise ValueError(f"{data} has no case {case!r}; --cases names those to measure on")
    if not wanted:
        raise ValueError(f"{run} validated on nothing; --cases names scans to measure on")
    return [cases[case] for case in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy.predict_options", description=__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--data", type=Path, required=True, help="data set with labels")
    parser.add_argument("--cases", help="comma-separated ids; those that the run validated on unless given")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument(
        "-o", "--output", type=Path, help="JSON file; benchmarks/results/options/ unless given"
    )
    args = parser.parse_args(argv)
    try:
        cases = chosen(args.model, args.data, args.cases)
        rows = summary(measure(load(args.model, device=args.device), cases))
    except (ValueError, OSError) as error:
        print(f"benchmarks.accuracy.predict_options: {error}", file=sys.stderr)
        return 2
    where = machine.environment()
    print(table(rows))
    name = f"{machine.slug(where['device'])}-{where['date'][:10]}.json"
    path = args.output or machine.RESULTS / "options" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"run": args.model.name, "data": args.data.name, "cases": [case.id for case in cases]}
    write_json(path, {"environment": where, **facts, "rows": rows})
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
