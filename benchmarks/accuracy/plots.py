"""The figures of the accuracy table: scores with their intervals, and what each choice of preset small gains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aftersam.errors import counted
from benchmarks.accuracy.summary import title

OURS, RIVAL, PROMPTED = "#b3262e", "#5b7fa6", "#b0b0b0"


def draw(table: Mapping[str, Any], path: Path) -> None:
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
    left.set(ylim=(-0.6, len(rows) - 0.3), title="mean DSC with its 95 % interval")
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
