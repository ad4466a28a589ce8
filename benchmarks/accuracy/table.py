"""The accuracy table in the paper's layout: methods down, mean and organs across, and the cost of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from aftersam.errors import counted
from aftersam.evaluation.tables import markdown_table
from aftersam.files import read_json, write_json, write_text
from benchmarks.accuracy import places
from benchmarks.accuracy.plots import draw, draw_waterfall, waterfall_of
from benchmarks.accuracy.summary import BUSY, may_be_best, summarise, title

FROM_SCRATCH = (
    "Every network starts from random weights, ours too. The rows say what each design learns from few scans in little "
    "time. They say nothing about the paper's claim, which rests on SAM's weights: with these at hand, "
    "`--sam-checkpoint vit_b --systems aftersam_paper aftersam_best msa` trains its rows "
    "([how](../how-to/benchmarks.md#accuracy))."
)
SLOWED = (
    f"‡ processor time below {100 * BUSY:.0f} % of the minutes of one thread: the row shared the machine with other "
    "work and made fewer steps."
)
LEGEND = (
    "DSC in % of held-out scans, each on the scan's own grid, by `aftersam.evaluate`: the mean over organs, ± the "
    "standard deviation of this mean over seeds, its 95 % bootstrap interval, the paired differences to the best row "
    "and to AFTer-SAM with their intervals, then organs. A bootstrap draw takes scans with replacement. Of a row with "
    "several seeds it takes seeds with replacement too, each row by itself. A row of one seed adds no variance of "
    "seeds, so that its intervals are too narrow. The best row has the highest mean among the rows of an equal budget "
    "without prompts. ICE is the inter-slice consistency error, HD95 in mm counts a missed organ with the scan's "
    "diagonal. † told where the organs are."
)
Table = Mapping[str, Any]


def write_table(
    output: Path, *, data: str, failed: Mapping[str, str] | None = None, waterfall: Any = None
) -> dict[str, Any]:
    """Put the finished rows of the folder `output` into accuracy.json, accuracy.md and accuracy.png there.

    `failed` are rows that could not be trained, and why, beside those with a failed.json; of `waterfall`, the
    tables.json of an ablation, the table `small` is drawn to waterfall.png.

    Raises ValueError where there is none, or rows that cannot be compared."""
    rows = output / "rows"
    found = [
        (read_json(path), read_json(path.with_name("metrics.json")))
        for path in sorted(rows.glob("*/row.json"))
    ]
    before = [
        read_json(path)
        for path in sorted(rows.glob("*/failed.json"))
        if not path.with_name("row.json").exists()
    ]
    failed = {row["row"]: row["reason"] for row in before} | dict(failed or {})
    table = {"data": data, **summarise(found, failed)}
    if waterfall is not None:
        table["waterfall"] = waterfall_of(waterfall, data)
        draw_waterfall(table["waterfall"], output / "waterfall.png")
    write_json(output / "accuracy.json", table)
    write_text(output / "accuracy.md", markdown(table) + "\n")
    draw(table, output / "accuracy.png")
    return table


def markdown(table: Table) -> str:
    """The page of one table."""
    return "\n\n".join([*opening([table]), *sections(table), notes([table])])


def by_budget(table: Table) -> tuple[Any, ...]:
    """Sort key of tables: data sets by name, each by its budget."""
    budget = table["budget"] or {}
    return table["data"], not budget, budget.get("max_minutes") or 0.0, budget.get("max_steps") or 0


def opening(tables: Sequence[Table]) -> list[str]:
    """What holds for all tables of a page: how to read them, and their common rows side by side."""
    rows = [row for table in tables for row in table["rows"]]
    parts = [f"# Accuracy on {' and '.join(dict.fromkeys(table['data'] for table in tables))}", LEGEND]
    if any(row.get("slowed") for row in rows):
        parts.append(SLOWED)
    if all(row["note"].endswith("from scratch") for row in rows):
        parts.append(FROM_SCRATCH)
    return [*parts, *crossings(tables)]


def crossings(tables: Sequence[Table]) -> list[str]:
    """A section for each data set that has tables of several budgets: the DSC of the networks that all of them have.

    A network is the same where its number of parameters is. `tables` are in the order of `by_budget`."""
    parts = []
    for (data, _), group in groupby(tables, key=lambda table: (table["data"], table["cases"])):
        limited = [table for table in group if table["budget"]]
        found = [
            {(r["system"], r["parameters"]): r for r in table["rows"] if r["protocol"] == "equal budget"}
            for table in limited
        ]
        shared = [key for key in found[-1] if all(key in rows for rows in found)] if len(found) > 1 else []
        if not shared:
            continue
        lines = [["method", *map(limit, limited), "difference"]]
        for key in shared:
            means = [rows[key]["mean"] for rows in found]
            change = None if None in means else 100 * (means[-1] - means[0])
            lines.append([title(found[-1][key]), *map(_percent, means), _text(change, "+.1f")])
        parts += [
            f"## DSC at each budget, {data}",
            "Mean DSC in % of the networks that are in every table with the same number of parameters, and what the "
            "largest budget adds to the smallest.",
            markdown_table(lines),
        ]
    return parts


def sections(table: Table) -> list[str]:
    """Scores, costs and trainings of a table, those of equal budgets and of own recipes apart."""
    parts = []
    for protocol in ("equal budget", "own recipe"):
        rows = [row for row in table["rows"] if row["protocol"] == protocol]
        if not rows:
            continue
        parts.append(heading(table, protocol))
        if rows[0] is table["rows"][0]:
            parts += [caption(table), apart(table)]
        parts.append(score_table(rows, table["organs"]))
        if known := [row for row in rows if row["parameters"] is not None]:
            parts.append(cost_table(known))
        if any(seed["commit"] for row in rows for seed in row.get("trained", ())):
            parts.append(trained_table(rows))
    return parts + places.section(table.get("neighbours", ()))


def notes(tables: Sequence[Table]) -> str:
    """What each row is, once for all tables, and which rows a table lacks."""
    lines = [f"- **{row['title']}**: {row['note']}." for table in tables for row in table["rows"]]
    for table in tables:
        where = f" ({table['data']}, {limit(table)})" if len(tables) > 1 else ""
        lines += [f"- **{name}**: not run: {reason}{where}." for name, reason in table["not_run"].items()]
        lines += [f"- **{name}**: failed: {reason}{where}." for name, reason in table["failed"].items()]
    return "\n\n".join(["## Notes", "\n".join(dict.fromkeys(lines))])


def apart(table: Table) -> str:
    """One sentence: the row of the highest mean, and the rows that these scans do not separate from it."""
    able = [row for row in table["rows"] if may_be_best(row)]
    best = next((row for row in able if row["to_best"] is None), None)
    if best is None:
        return "No row has both an equal budget and no prompts, so no row is called the best."
    others = [(row["title"], row["to_best"]["interval"]) for row in able if row is not best]
    close = [name for name, interval in others if interval and interval[0] <= 0 <= interval[1]]
    if not close:
        return f"{best['title']} has the highest mean DSC."
    return (
        f"{best['title']} has the highest mean DSC. The interval of the paired difference includes 0 for "
        f"{', '.join(close)}: {counted(len(table['cases']), 'scan does', 'scans do')} not separate them from it."
    )


def limit(table: Table) -> str:
    """The budget of a table in words."""
    budget = table["budget"]
    if not budget:
        return "own recipes"
    minutes, steps = budget["max_minutes"], budget["max_steps"]
    return counted(minutes, "minute") if minutes else counted(steps, "step")


def heading(table: Table, protocol: str) -> str:
    if protocol == "own recipe":
        level, recipe = "###" if table["budget"] else "##", "trained as their authors or users chose"
        return f"{level} Own recipe, {table['data']}: {recipe}, not comparable in cost"
    threads = counted(table["budget"]["threads"], "processor thread")
    return f"## Equal budget, {table['data']}: {limit(table)} of training a row on {threads}"


def caption(table: Table) -> str:
    """Number of scans and the machines, with their commits where the rows do not say which commit trained them."""
    commits: dict[str, list[str]] = {}  # of each machine
    for e in table["environments"]:
        commit = f"{e['commit']}{' with local changes' if e['dirty'] else ''}"
        commits.setdefault(f"{e['device']}, torch {e['torch']}", []).append(commit)
    old = not any("trained" in row for row in table["rows"])
    where = [
        machine + (f", commit{'s' * (len(found) > 1)} {', '.join(found)}" if old else "")
        for machine, found in commits.items()
    ]
    return "; ".join([counted(len(table["cases"]), "held-out scan"), *where]) + "."


def score_table(rows: Sequence[Mapping[str, Any]], organs: Sequence[str]) -> str:
    """The paper's layout."""
    against = [("to_best", "to the best", "best"), ("to_ours", "to AFTer-SAM", "–")]
    against = [
        entry for entry in against if any(entry[0] in row for row in rows)
    ]  # older tables lack to_ours
    lines = [
        [
            "method",
            "seeds",
            "mean",
            "95 %",
            *(name for _, name, _ in against),
            *organs,
            "ICE",
            "HD95",
            "missed",
        ]
    ]
    for row in rows:
        over_seeds = "" if row["seed_deviation"] is None else f" ± {100 * row['seed_deviation']:.1f}"
        lines.append(
            [
                title(row), str(row["seeds"]), _percent(row["mean"]) + over_seeds, _span(row["interval"]),
                *(_difference(row, key, itself) for key, _, itself in against),
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


def trained_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which commit trained each seed, when, and in how many minutes."""
    lines = [["method", "seed: commit, day, minutes of its training"]]
    for row in rows:
        seeds = [
            f"{seed['seed']}: {seed['commit']}{' dirty' * bool(seed['dirty'])}, {seed['date'][:10]}, "
            f"{_text(seed['minutes'], '.1f')}"
            for seed in row["trained"]
            if seed["commit"]  # masks made elsewhere have none
        ]
        if seeds:
            lines.append([title(row), "; ".join(seeds)])
    return markdown_table(lines, left=(0, 1))


def published(paper: Mapping[str, Any]) -> str:
    """The section of a paper's own tables, as it printed them."""
    parts = ["## Published", f"{paper['source']}, DSC in %. {paper['differs']}"]
    for table in paper["tables"]:
        lines = [["method", *table["columns"]]]
        lines += [[name, *(f"{score:.2f}" for score in scores)] for name, scores in table["rows"].items()]
        parts += [f"**{table['table']}**: {table['data']}", markdown_table(lines)]
    return "\n\n".join(parts)


def _difference(row: Mapping[str, Any], key: str, itself: str) -> str:
    difference = row[key]
    if difference is None:
        return itself if may_be_best(row) else "–"
    return f"{100 * (difference['mean'] or 0.0):+.1f} ({_span(difference['interval'], '+')})"


def _span(interval: Sequence[float] | None, sign: str = "") -> str:
    return "–" if interval is None else " … ".join(f"{100 * end:{sign}.1f}" for end in interval)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
