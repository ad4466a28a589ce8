"""The accuracy table in the paper's layout: methods down, mean and organs across, and the cost of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from aftersam.errors import counted
from aftersam.evaluation.statistics import (
    bootstrap_interval,
    mean_of,
    mean_over_organs,
    number,
    paired,
    score_matrix,
)
from aftersam.evaluation.tables import markdown_table
from aftersam.files import read_json, write_json, write_text
from benchmarks.accuracy.systems import SYSTEMS

FROM_SCRATCH = (
    "Every network starts from random weights, ours too. The rows say what each design learns from few scans in little "
    "time. They say nothing about the paper's claim, which rests on SAM's weights: with these at hand, "
    "`--sam-checkpoint vit_b --systems aftersam_paper aftersam_best msa` trains its rows "
    "([how](../how-to/benchmarks.md#accuracy))."
)
BUSY = 0.9  # least share of processor time in the minutes of one thread; on a quiet machine it is above 0.95
SLOWED = (
    f"‡ processor time below {100 * BUSY:.0f} % of the minutes of one thread: the row shared the machine with other "
    "work and made fewer steps."
)
BUDGET = ("max_minutes", "max_steps", "threads", "fold")  # limits that rows of an equal budget have in common
FACTS = ("system", "title", "protocol", "note", "prompted", "parameters", "spacing_mm", "precision")
COSTS = ("minutes", "cpu_minutes", "steps", "peak_mib", "prediction_s", "prediction_peak_mib")
OURS, RIVAL, PROMPTED = "#b3262e", "#5b7fa6", "#b0b0b0"
Found = tuple[Mapping[str, Any], Mapping[str, Any]]  # a row.json and its metrics.json
Table = Mapping[str, Any]


def write_table(
    output: Path, *, data: str, failed: Mapping[str, str] | None = None, waterfall: Any = None
) -> dict[str, Any]:
    """Put the finished rows of the folder `output` into accuracy.json, accuracy.md and accuracy.png there.

    `failed` are titles of rows that could not be finished, and why; of `waterfall`, the tables.json of an ablation,
    the table `small` is drawn to waterfall.png.

    Raises ValueError where there is none, or rows that cannot be compared."""
    found = [
        (read_json(path), read_json(path.with_name("metrics.json")))
        for path in sorted((output / "rows").glob("*/row.json"))
    ]
    table = {"data": data, **summarise(found), "failed": dict(failed or {})}
    if waterfall is not None:
        table["waterfall"] = waterfall_of(waterfall, data)
        draw_waterfall(table["waterfall"], output / "waterfall.png")
    write_json(output / "accuracy.json", table)
    write_text(output / "accuracy.md", markdown(table) + "\n")
    draw(table, output / "accuracy.png")
    return table


def summarise(found: Sequence[Found]) -> dict[str, Any]:
    """Rows and metrics of every system and seed -> {"organs", "cases", "budget", "environments", "rows", "not_run"}.

    A case's scores are averaged over seeds first; means are over cases, then organs; intervals are over cases.
    "to_best" is a row's paired difference to the best row: that of the highest mean among those that were not
    prompted. It is None for the best row itself, and for all where every row was prompted.
    Raises ValueError where rows differ in cases or organs, or rows of an equal budget in the budget."""
    budget = _common_budget(found)
    _, first = found[0]
    organs, cases = list(first["organs"]), sorted(first["cases"])
    rows, matrices = [], []
    for _, group in groupby(sorted(found, key=_place), key=_place):
        seeds = list(group)
        values = np.array([score_matrix(metrics["cases"], cases, organs) for _, metrics in seeds])
        matrices.append(np.apply_along_axis(mean_of, 0, values))  # (cases, organs)
        rows.append({**_scores(matrices[-1], organs), **_others(seeds, values, cases, organs)})
    unprompted = [i for i, row in enumerate(rows) if not row["prompted"]]
    best = max(unprompted, key=lambda i: rows[i]["mean"] or 0.0, default=None)
    for i, (row, matrix) in enumerate(zip(rows, matrices, strict=True)):
        row["to_best"] = None if best in (i, None) else paired(matrix - matrices[best])
    there = {name for row in rows for name in (row["system"], row["title"].lower())}
    return {
        "organs": organs,
        "cases": cases,
        "budget": budget,
        "environments": _distinct(row["environment"] for row, _ in found if "environment" in row),
        "rows": rows,
        "not_run": {
            system.title: reason
            for name, system in SYSTEMS.items()
            if (reason := system.missing()) and not there & {name, system.title.lower()}
        },
    }


def _common_budget(found: Sequence[Found]) -> dict[str, Any] | None:
    """The limits of the rows of an equal budget, after a check that rows can be compared at all."""
    if not found:
        raise ValueError("there is no finished row to make a table of; name --systems or --predictions")
    budget = None
    for row, metrics in found:
        for what in ("cases", "organs"):
            other = set(metrics[what]) ^ set(found[0][1][what])
            if other:
                raise ValueError(f"{row['title']} and {found[0][0]['title']} differ in {what}: {min(other)}")
        if row["protocol"] == "equal budget":
            own = {key: row["limits"][key] for key in BUDGET}
            budget = budget or own
            if own != budget:
                raise ValueError(f"{row['title']} was trained with {own}, another row with {budget}")
    return budget


def _place(found: Found) -> tuple[bool, int, str, str]:
    """Sort key of a row: equal budgets first, then the paper's order; the same for all seeds of a system."""
    row = found[0]
    names = [{name, system.title.lower()} for name, system in SYSTEMS.items()]
    own = {row["system"], row["title"].lower()}
    place = next((i for i, known in enumerate(names) if known & own), len(names))
    return row["protocol"] != "equal budget", place, row["title"], row["system"]


def _scores(matrix: np.ndarray, organs: Sequence[str]) -> dict[str, Any]:
    return {
        "mean": number(mean_over_organs(matrix)),
        "interval": bootstrap_interval(matrix),
        "organs": {organ: number(mean_of(matrix[:, i])) for i, organ in enumerate(organs)},
    }


def _others(
    seeds: Sequence[Found], values: np.ndarray, cases: Sequence[str], organs: Sequence[str]
) -> dict[str, Any]:
    """Facts of a row, the deviation of DSC over seeds, means over seeds of other scores and of costs."""
    means = [number(mean_over_organs(seed)) or 0.0 for seed in values]
    consistency = [score_matrix(metrics["cases"], cases, organs, "ice") for _, metrics in seeds]
    summaries = [organ for _, metrics in seeds for organ in metrics["organs"].values()]
    return {
        **{key: seeds[0][0].get(key) for key in FACTS},
        "seeds": len(seeds),
        "slowed": any(_slowed(row) for row, _ in seeds),
        "seed_deviation": number(float(np.std(means, ddof=1))) if len(means) > 1 else None,
        "ice": number(mean_of(_float(number(mean_over_organs(seed))) for seed in consistency)),
        "hd95_mm_penalised": number(mean_of(_float(organ["hd95_mm_penalised"]) for organ in summaries)),
        "missed": sum(organ["missed"] for organ in summaries) / len(seeds),
        **{key: number(mean_of(_float(row.get(key)) for row, _ in seeds)) for key in COSTS},
    }


def _slowed(row: Mapping[str, Any]) -> bool:
    """Whether a row with a limit in minutes, trained by one thread of a CPU, had less than BUSY of its processor time.

    On a GPU, and with several threads, a processor waits on a quiet machine too."""
    limits, on_gpu = row.get("limits", {}), row.get("environment", {}).get("kind") == "gpu"
    if on_gpu or not row.get("cpu_minutes") or not limits.get("max_minutes") or limits["threads"] != 1:
        return False
    return bool(row["cpu_minutes"] < BUSY * row["minutes"])


def markdown(table: Table) -> str:
    """The whole table: scores of equal budgets and of own recipes apart, then costs, then notes."""
    parts = [f"# Accuracy on {table['data']}", caption(table), apart(table)]
    if all(row["note"].endswith("from scratch") for row in table["rows"]):
        parts.append(FROM_SCRATCH)
    for protocol in ("equal budget", "own recipe"):
        rows = [row for row in table["rows"] if row["protocol"] == protocol]
        if rows:
            parts += [f"## {heading(table, protocol)}", score_table(rows, table["organs"])]
            known = [row for row in rows if row["parameters"] is not None]
            parts += [cost_table(known)] if known else []
    notes = [f"- **{row['title']}**: {row['note']}." for row in table["rows"]]
    notes += [f"- **{name}**: not run: {reason}." for name, reason in table["not_run"].items()]
    notes += [f"- **{name}**: failed: {reason}." for name, reason in table["failed"].items()]
    return "\n\n".join([*parts, "## Notes", "\n".join(notes)])


def apart(table: Table) -> str:
    """One sentence: the row of the highest mean, and the rows that these scans do not separate from it."""
    best = next((row for row in table["rows"] if row["to_best"] is None and not row["prompted"]), None)
    if best is None:
        return "Every row was told where the organs are, so no row is called the best."
    differences = [(row["title"], row["to_best"]["interval"]) for row in table["rows"] if row["to_best"]]
    close = [name for name, interval in differences if interval and interval[1] >= 0]
    if not close:
        return f"{best['title']} has the highest mean DSC."
    return (
        f"{best['title']} has the highest mean DSC. The interval of the paired difference includes 0 for "
        f"{', '.join(close)}: {counted(len(table['cases']), 'scan does', 'scans do')} not separate them from it."
    )


def heading(table: Table, protocol: str) -> str:
    if protocol == "own recipe":
        return "Own recipe: trained as their authors or users chose, not comparable in cost"
    budget = table["budget"]
    minutes, steps = budget["max_minutes"], budget["max_steps"]
    limit = counted(minutes, "minute") if minutes else counted(steps, "step")
    return f"Equal budget: {limit} of training a row on {counted(budget['threads'], 'processor thread')}"


def caption(table: Table) -> str:
    commits: dict[str, list[str]] = {}  # of each machine
    for e in table["environments"]:
        commit = f"{e['commit']}{' with local changes' if e['dirty'] else ''}"
        commits.setdefault(f"{e['device']}, torch {e['torch']}", []).append(commit)
    where = [
        f"{machine}, commit{'s' * (len(found) > 1)} {', '.join(found)}" for machine, found in commits.items()
    ]
    scans = counted(len(table["cases"]), "held-out scan")
    slowed = any(row.get("slowed") for row in table["rows"])
    return (
        f"DSC in % of {scans}, each on the scan's own grid, by `aftersam.evaluate`: the mean over organs, its "
        "95 % bootstrap interval over scans, the paired difference to the best row without prompts, then organs. ICE "
        "is the inter-slice consistency error, HD95 in mm counts a missed organ with the scan's diagonal. "
        "† told where the organs are. "
        + (f"{SLOWED} " if slowed else "")
        + ("; ".join(where) + "." if where else "")
    )


def score_table(rows: Sequence[Mapping[str, Any]], organs: Sequence[str]) -> str:
    """The paper's layout."""
    lines = [["method", "mean", "95 %", "to the best", *organs, "ICE", "HD95", "missed"]]
    for row in rows:
        over_seeds = "" if row["seed_deviation"] is None else f" ± {100 * row['seed_deviation']:.1f}"
        lines.append(
            [
                title(row), _percent(row["mean"]) + over_seeds, _span(row["interval"]), _to_best(row),
                *(_percent(row["organs"][organ]) for organ in organs),
                _text(row["ice"], ".3f"), _text(row["hd95_mm_penalised"], ".1f"), _text(row["missed"], ".3g"),
            ]
        )  # fmt: skip
    return markdown_table(lines)


def cost_table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = "method, parameters, minutes, processor minutes, steps, steps/s, training MiB, s a scan"
    lines = [heads.split(", ")]
    for row in rows:
        rate = row["steps"] / row["minutes"] / 60 if row["steps"] and row["minutes"] else None
        lines.append(
            [
                title(row), f"{row['parameters'] / 1e6:.1f} M",
                _text(row["minutes"], ".1f"), _text(row["cpu_minutes"], ".1f"), _text(row["steps"], ",.0f"),
                _text(rate, ".2f"), _text(row["peak_mib"], ",.0f"), _text(row["prediction_s"], ".1f"),
            ]
        )  # fmt: skip
    return markdown_table(lines)


def title(row: Mapping[str, Any]) -> str:
    return row["title"] + (" †" if row["prompted"] else "") + (" ‡" if row.get("slowed") else "")


def published(paper: Mapping[str, Any]) -> str:
    """The section of a paper's own tables, as it printed them."""
    parts = ["# Published", f"{paper['source']}, DSC in %. {paper['differs']}"]
    for table in paper["tables"]:
        lines = [["method", *table["columns"]]]
        lines += [[name, *(f"{score:.2f}" for score in scores)] for name, scores in table["rows"].items()]
        parts += [f"**{table['table']}**: {table['data']}", markdown_table(lines)]
    return "\n\n".join(parts)


def draw(table: Table, path: Path) -> None:
    """Mean DSC with its interval and inter-slice consistency error of every row, as a PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in reversed(table["rows"]) if row["mean"] is not None]
    figure = Figure(figsize=(9, 0.9 + 0.34 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for at, row in enumerate(rows):
        ours = row["title"].startswith("AFTer-SAM")
        colour = PROMPTED if row["prompted"] else OURS if ours else RIVAL
        left.plot(row["interval"], (at, at), color=colour, linewidth=3, alpha=0.4, solid_capstyle="butt")
        left.plot(row["mean"], at, "o", color=colour)
        left.annotate(
            f"{row['mean']:.3f}", (row["mean"], at), (0, 5), textcoords="offset points", ha="center", size=8
        )
        right.plot([row["ice"]], [at], "o", color=colour)
    left.set_yticks(range(len(rows)), [title(row) for row in rows])
    left.set(ylim=(-0.6, len(rows) - 0.3), title="mean DSC, 95 % interval over scans")
    right.set(title="inter-slice consistency error,\nless is better")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.4, color="#d0d0d0")
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def waterfall_of(tables: Any, data: str) -> dict[str, Any]:
    """The table `small` of aftersam.ablate's tables.json as steps, with the organ that gained most by them.

    Raises ValueError where there is no such table."""
    if "small" not in tables:
        raise ValueError("a waterfall needs the tables.json of aftersam ablate --table small")
    columns = tables["small"]["columns"]
    start, *_, end = columns.values()
    *organs, _ = start  # the average is last
    organ = max(organs, key=lambda name: end[name]["mean"] - start[name]["mean"])
    steps = [
        {"name": name, "mean_dsc": scores["Average"]["mean"], "organ_dsc": scores[organ]["mean"]}
        for name, scores in columns.items()
    ]
    return {"data": data, "organ": organ, "cases": tables["small"]["cases"], "steps": steps}


def draw_waterfall(waterfall: Mapping[str, Any], path: Path) -> None:
    """Mean DSC after each step of improvement, and that of one organ, as a PNG."""
    from matplotlib.figure import Figure

    steps = waterfall["steps"]
    figure = Figure(figsize=(1.6 + 1.1 * len(steps), 3.4), layout="constrained")
    axes = figure.subplots()
    at, means = range(len(steps)), [step["mean_dsc"] for step in steps]
    before = [means[0], *means[:-1]]
    axes.bar(at, [min(pair) for pair in zip(before, means, strict=True)], color="#d0d0d0", width=0.65)
    for i, (old, new) in enumerate(zip(before, means, strict=True)):
        axes.bar(i, abs(new - old), bottom=min(old, new), color=OURS if new >= old else "black", width=0.65)
        axes.annotate(f"{new:.3f}", (i, max(old, new)), ha="center", va="bottom", fontsize=8)
    axes.plot(
        at, [step["organ_dsc"] for step in steps], "o-", color=RIVAL, lw=1, ms=4, label=waterfall["organ"]
    )
    axes.set_xticks(at, [step["name"] for step in steps], rotation=25, ha="right", fontsize=8)
    scans = f"{counted(waterfall['cases'], 'scan')} of {waterfall['data']}"
    axes.set(ylim=(0, 1), ylabel="DSC", title=f"mean DSC, step by step, on {scans}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _to_best(row: Mapping[str, Any]) -> str:
    difference = row["to_best"]
    if difference is None:
        return "–" if row["prompted"] else "best"
    return f"{100 * (difference['mean'] or 0.0):+.1f} ({_span(difference['interval'], '+')})"


def _span(interval: Sequence[float] | None, sign: str = "") -> str:
    return "–" if interval is None else " … ".join(f"{100 * end:{sign}.1f}" for end in interval)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _distinct(environments: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Environments without their dates, each once."""
    plain = [{key: value for key, value in e.items() if key != "date"} for e in environments]
    return [e for i, e in enumerate(plain) if e not in plain[:i]]
