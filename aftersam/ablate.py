"""Make the paper's ablation tables on any data set.    python -m aftersam.ablate --data DATASET --output DIR --table 3

Every variant is trained on the same split with the same seeds. The weights at its end segment the validation scans, and
aftersam.evaluate scores the masks. Finished variants are not trained again; they are refused where they were trained in
another way. Prints and writes the paper's layout: organs down, variants across, mean ± deviation over seeds, a paired
test against the last column, and a PNG of each table."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from aftersam.config import Config, Count, Index, Positive, Seed, Small, checked, preset, to_dict
from aftersam.errors import counted, plain_console, run_command
from aftersam.evaluation.result import read_result
from aftersam.evaluation.statistics import AblationTable, Scores, summarise
from aftersam.evaluation.tables import markdown_table
from aftersam.files import check_place, refuse_input, write_json, write_text
from aftersam.model.run_folder import read_run

TABLES: dict[str, dict[str, dict[str, Any]]] = {  # columns in the paper's order; all are compared with the last one
    "3": {
        "Box": {"prompts": "box"}, "1 Point": {"prompts": "point"}, "3 Points": {"prompts": "points"}, "w.o.": {},
    },
    "4": {"LoRA": {"decoder": "lora"}, "Finetune": {}},
    "fusion": {
        "2D": {"attention": "none", "stem_slices": 1}, "adjacent slices": {"attention": "none"},
        "slice": {"attention": "slice"}, "axial": {"attention": "axial"}, "axial + slice": {},
    },
    "small": {  # each column has one more of the preset's own choices
        "start": {"stem": "slim", "stem_slices": 1, "slice_stride": 2, "ce_hardest": 1.0, "deep_supervision": 0.0},
        "+ deep supervision": {"stem": "slim", "stem_slices": 1, "slice_stride": 2, "ce_hardest": 1.0},
        "+ hardest voxels": {"stem": "slim", "stem_slices": 1, "slice_stride": 2},
        "+ far neighbours": {"stem": "slim", "stem_slices": 1},
        "+ adjacent slices": {"stem": "slim"},
        "+ wide stem": {},
    },
}  # fmt: skip
TITLES = {
    "3": "Table 3, prompts drawn from the labels: columns with prompts are told where the organs are",
    "4": "Table 4, mask decoder",
    "fusion": "attention of the fusion blocks; adjacent slices: in the stem alone",
    "small": "preset small, one more choice in each column",
}


@dataclass(frozen=True)
class AblateArgs:
    data: Path
    """Data set: nnU-Net raw, MSD, SegTHOR, or images/ beside labels/."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the runs and tables. Runs that exist in it are kept."""
    table: tuple[Literal["3", "4", "fusion", "small"], ...] = ("3", "4", "fusion")
    """The paper's Table 3 (prompts) or 4 (decoder), the fusion blocks' attention, or the preset small step by step."""
    preset: Literal["paper", "best", "small", "tiny"] = "small"
    """Preset of all variants."""
    sam_checkpoint: str | None = None
    """SAM's weights, as in train."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds. Each variant is trained once with each."""
    max_steps: Count | None = None
    """Steps of each training. By default those of the preset."""
    max_minutes: Positive | None = None
    """Minutes of each training, in place of steps."""
    jobs: Small = 1
    """Number of variants trained at once. Each is a process and gets an equal share of the cores."""
    trust_intensities: bool = False
    """As in train."""
    fold: Index = 0
    """Fold whose validation scans are scored."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""


def ablate(args: AblateArgs) -> dict[str, AblationTable]:
    """Train, predict and score the variants that are missing; write tables.md, tables.json and a PNG of each table.

    Raises ValueError on bad input."""
    from aftersam.device import find_device
    from aftersam.evaluation.figures import ablation_figure

    checked(args)
    check_place(args.output, folder=True)
    refuse_input(args.output, [args.data])
    find_device(args.device)
    if "small" in args.table and args.preset != "small":
        raise ValueError(f"table small shows what the preset small is made of, not {args.preset}")
    args.output.mkdir(parents=True, exist_ok=True)
    tables = {table: columns_of(args, table) for table in args.table}
    variants = {_name(change): change for columns in tables.values() for change in columns.values()}
    rows = [(name, change, seed) for name, change in variants.items() for seed in args.seeds]
    for row in rows:
        _check_finished(args, *row)
    scores = dict(zip([(name, seed) for name, _, seed in rows], _rows(args, rows), strict=True))
    _check_cases(args.output, scores)
    result: dict[str, AblationTable] = {}
    for table, changes in tables.items():
        columns = {
            column: [scores[_name(change), seed] for seed in args.seeds] for column, change in changes.items()
        }
        prompted = {column: change["prompts"] for column, change in changes.items() if "prompts" in change}
        result[table] = summarise(columns, prompted)
        ablation_figure(result[table], args.output / f"table-{table}.png", title=TITLES[table])
    text = "\n\n".join(markdown(table, found) for table, found in result.items())
    write_text(args.output / "tables.md", text + "\n")
    # NaN where no case has an organ, which write_json refuses
    write_text(args.output / "tables.json", json.dumps(result, indent=1) + "\n")
    plain_console().print(text, soft_wrap=True)
    return result


def columns_of(args: AblateArgs, table: str) -> dict[str, dict[str, Any]]:
    """The columns of a table, without those that are the same as an earlier one in this preset."""
    columns: dict[str, dict[str, Any]] = {}
    known: list[Config] = []
    for column, change in TABLES[table].items():
        if (config := row_config(args, change, 0)) not in known:
            known.append(config)
            columns[column] = change
    return columns


def _check_finished(args: AblateArgs, name: str, change: Mapping[str, Any], seed: int) -> None:
    """Raise ValueError where the row is finished, but was trained with another configuration, budget or fold."""
    home = _home(args.output, name, seed)
    if not (home / "metrics.json").exists():
        return
    stored, facts = read_run(home / "run")
    asked, found = row_config(args, change, seed), to_dict(stored)
    chosen = {"encoder", "image_encoder"} if args.sam_checkpoint else {"encoder"}  # by training
    pairs = {
        "fold": (facts.fold, args.fold),
        "sam_checkpoint": (bool(facts.sam_sha256), bool(args.sam_checkpoint)),
    }
    for part, values in to_dict(asked).items():
        pairs |= {key: (found[part][key], value) for key, value in values.items() if key not in chosen}
    for key, (before, now) in pairs.items():
        if before != now:
            raise ValueError(
                f"{home} was trained with {key} {before}, not {now}; delete it, or choose another --output"
            )


def _check_cases(output: Path, scores: Mapping[tuple[str, int], Scores]) -> None:
    """Raise ValueError unless all rows were scored on the same cases."""
    (first, known), *others = ((_home(output, *row), found.keys()) for row, found in scores.items())
    for home, cases in others:
        if cases != known:
            raise ValueError(
                f"{home} was scored on {counted(len(cases), 'case')} and {first} on other {len(known)}; delete the "
                "folder of the older data to train that row again"
            )


def _home(output: Path, name: str, seed: int) -> Path:
    return output / f"{name}-seed-{seed}"


def _name(change: Mapping[str, Any]) -> str:
    return "-".join(f"{k}-{v}" for k, v in change.items()) or "base"


def _rows(args: AblateArgs, rows: Sequence[tuple[str, Mapping[str, Any], int]]) -> list[Scores]:
    """`_row` of each (name, change, seed), `jobs` at once."""
    if args.jobs == 1:
        return [_row(args, *row) for row in rows]
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), _share_cores, (args.jobs,)) as pool:
        try:
            return [future.result() for future in [pool.submit(_row, args, *row) for row in rows]]
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)  # cancels variants that have not started
            if not isinstance(error, Exception):  # SIGINT or SIGTERM, maybe sent to this process alone
                for process in active_children():
                    process.terminate()
            raise


def _share_cores(jobs: int) -> None:
    import torch

    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))


def _row(args: AblateArgs, name: str, change: Mapping[str, Any], seed: int) -> Scores:
    """Scores of every case and organ for one variant and seed. Trains the variant unless its scores exist."""
    from aftersam.data.dataset import find_dataset, link_cases, split
    from aftersam.evaluation.scoring import score_folder
    from aftersam.inference.pipeline import PredictArgs, predict_files
    from aftersam.training.arguments import TrainArgs
    from aftersam.training.run import train

    home = _home(args.output, name, seed)
    if not (home / "metrics.json").exists():
        print(f"{name}, seed {seed}")
        # an interrupted run would be resumed with another budget
        shutil.rmtree(home, ignore_errors=True)
        run = home / "run"
        train(
            TrainArgs(
                data=args.data, output=run, config=row_config(args, change, seed), preset=args.preset, fold=args.fold,
                sam_checkpoint=args.sam_checkpoint, device=args.device, cache=args.output / "cache",
                trust_intensities=args.trust_intensities,
            )
        )  # fmt: skip
        dataset = find_dataset(args.data)
        _, held_out = split(dataset, args.fold, 0)
        link_cases(dataset, held_out, home)
        images, labels = home / "images", home / "labels"
        prompted = row_config(args, change, seed).model.prompts != "none"
        predict_files(
            PredictArgs(
                input=images, output=home / "masks", model=(run,), device=args.device, preview=False,
                prompt_labels=labels if prompted else None, trust_intensities=args.trust_intensities,
            )
        )  # fmt: skip
        write_json(home / "metrics.json", score_folder(home / "masks", labels, quiet=True))
    cases = read_result(home / "metrics.json").cases
    return {case: {organ: {"dsc": score.dsc} for organ, score in row.items()} for case, row in cases.items()}


def row_config(args: AblateArgs, change: Mapping[str, Any], seed: int) -> Config:
    """The preset with one variant's keys and the budget. Without validation, since nothing is chosen."""
    config = preset(args.preset)
    changes = {**change, "seed": seed, "validations": 0}
    if args.max_steps is not None or args.max_minutes is not None:
        changes |= {"max_steps": args.max_steps, "max_minutes": args.max_minutes}
    for key, value in changes.items():
        (part,) = (name for name in ("model", "data", "train") if hasattr(getattr(config, name), key))
        changed = dataclasses.replace(getattr(config, part), **{key: value})
        config = dataclasses.replace(config, **{part: changed})
    return config


def markdown(name: str, table: AblationTable) -> str:
    """The table as Markdown in the paper's layout: percent, p-values in brackets."""
    columns, prompted = table["columns"], table["prompted"]
    lines = [["", *(f"{column} †" if column in prompted else column for column in columns)]]
    for organ in next(iter(columns.values())):
        cells = []
        for column, scores in columns.items():
            p = table["tests"].get(column, {}).get(organ)
            tested = "" if p is None else f" ({p:.2g})"
            cells.append(f"{100 * scores[organ]['mean']:.2f} ± {100 * scores[organ]['std']:.2f}{tested}")
        lines.append([organ, *cells])
    parts = [
        f"**{TITLES[name]}**: DSC in %, {counted(table['cases'], 'case')}, mean ± deviation over "
        f"{counted(table['seeds'], 'seed')}; in brackets p of a paired Wilcoxon test against {table['against']}",
        markdown_table(lines),
    ]
    if prompted:
        parts.append("† prompted from the labels that it is scored against")
    best = table["against"]
    for column, tests in table["tests"].items():
        gains = (
            f"{organ} {100 * (columns[best][organ]['mean'] - columns[column][organ]['mean']):+.2f} (p {p:.2g})"
            for organ, p in tests.items()
        )
        parts.append(f"{best} against {column}: {', '.join(gains)}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        ablate(tyro.cli(AblateArgs, args=argv, description=__doc__))
        return 0

    return run_command("ablate", command)


if __name__ == "__main__":
    sys.exit(main())
