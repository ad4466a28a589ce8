"""Write docs/explanation's measured pages and README's table.    python -m benchmarks.figure

Takes the newest result of several subjects of each device in benchmarks/results, and replaces its cases by those of
newer results of a single subject. performance.md shows targets, one row a case with ours beside its best rival, time
and memory against N and image size, a waterfall of techniques, and a roofline. accuracy.md shows the tables of
benchmarks/results/accuracy, then those of published/. README's table has at most six rows and changes between its
markers alone."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from aftersam.errors import counted
from aftersam.files import write_text
from benchmarks.machine import RESULTS, ROOT, slug
from benchmarks.page import write_sections
from benchmarks.tables import Result, caption, of_subject, readme_sections, rivals_table, table, targets_table
from benchmarks.targets import targets

PERFORMANCE = """# Performance, as measured

`make bench` measures the machine it runs on. `make figure` writes this page from the newest result of each device in
`benchmarks/results`. The output and the gradients of every provider were compared with fp64 equations before it was
timed ([how](../how-to/benchmarks.md)). A gain above 1× says how many times faster ours is than the fastest correct
rival; a gain below 1× is a loss."""
COLOURS = {
    "naive 3D": "#b0b0b0",
    "SDPA 3D": "#5b7fa6",
    "SDPA factorised": "#d08a2e",
    "SDPA factorised, compiled": "#8c5a9e",
    "axial_fusion": "#b3262e",
}


def newest(folder: Path = RESULTS) -> list[Result]:
    """The newest result of each device, GPUs first, with the cases of later single subjects in it.

    Such a case was measured with the same libraries; its records have a `commit` of their own. Raises ValueError where
    there is no result."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise ValueError(f"{folder} holds no result; run `make bench` first")
    by_device: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=_rank):
        by_device.setdefault(result["environment"]["device"], []).append(result)
    found = []
    for *others, whole in by_device.values():
        for later in others:
            if _rank(later)[0] is False and _rank(whole)[0] and _same_libraries(whole, later):
                whole = _with_cases(whole, later)
        found.append(whole)
    return sorted(found, key=lambda r: (r["environment"]["kind"] != "gpu", r["environment"]["device"]))


def _rank(result: Result) -> tuple[bool, str]:
    return len({r["subject"] for r in result["records"]}) > 1, result["environment"]["date"]


def _same_libraries(one: Result, other: Result) -> bool:
    """Whether `other` was measured later than `one`, with the same libraries and in the same dtype."""
    mine, theirs = one["environment"], other["environment"]
    same = all(
        mine[key] == theirs[key] for key in ("torch", "triton", "driver", "cuda", "cudnn") if key in mine
    )
    return same and one["dtype"] == other["dtype"] and theirs["date"] > mine["date"]


def _with_cases(whole: dict[str, Any], later: Result) -> dict[str, Any]:
    """`whole` with the cases of `later` in the place of its own, and targets of both."""

    def place(record: Result) -> tuple[str, str]:
        return record["subject"], record["name"]

    commit = later["environment"]["commit"]
    fresh = {key: [r | {"commit": commit} for r in of] for key, of in groupby(later["records"], key=place)}
    records = []
    for key, of in groupby(whole["records"], key=place):
        records += fresh.pop(key, list(of))
    whole = whole | {"records": records + [r for of in fresh.values() for r in of]}
    return whole | {"targets": targets(whole)}


def curve(result: Result, along: str = "slices") -> dict[str, list[Result]]:
    """Timed fusion records of each provider in the order of `along`: "slices" is N, "side" that of the token grid.

    All other sizes are equal: those at which most values of `along` were measured."""
    shape = ("batch", "slices", "side", "channels", "heads")
    by_shape: dict[tuple[int, ...], dict[str, list[Result]]] = {}
    for record in of_subject(result, "fusion"):
        fixed = tuple(record[key] for key in shape if key != along)
        of_shape = by_shape.setdefault(fixed, {}).setdefault(record["provider"], [])
        if "ms" in record:
            of_shape.append(record)
    if not by_shape:
        return {}
    widest = max(by_shape.values(), key=lambda lines: max(map(len, lines.values())))
    return {name: sorted(line, key=lambda r: r[along]) for name, line in widest.items() if line}


def draw_roofline(result: Result, path: Path) -> bool:
    """FLOPs a second of every forward whose bytes are counted against FLOPs a byte, below the two ceilings.

    False where there is none to draw."""
    from matplotlib.figure import Figure

    points = [r for r in result["records"] if "ms" in r and r.get("bytes") and r["flops"]]
    if not points:
        return False
    ceiling = result["ceilings"]
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    intensity = [2.0**e for e in range(-2, 11)]
    roof = [min(i * ceiling["copy_bytes_per_s"], ceiling["matmul_flops_per_s"]) / 1e12 for i in intensity]
    axes.plot(intensity, roof, color="black", linewidth=1.2)
    for role, colour, label in (
        ("rival", "#8fa3b8", "rivals"),
        ("other", "#d0d0d0", "others"),
        ("ours", "#b3262e", "ours"),
    ):
        chosen = [r for r in points if r["role"] == role]
        axes.scatter(
            [r["flops"] / r["bytes"] for r in chosen],
            [r["flops"] / r["ms"]["forward"]["median"] / 1e9 for r in chosen],
            s=14, color=colour, label=label,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must move", ylabel="TFLOP/s",
             title="forward, below measured copy and matmul")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def draw(result: Result, path: Path) -> None:
    """Time and peak memory of a forward with backward, against N and against the image's side, as a PNG."""
    from matplotlib.figure import Figure

    rows = [(curve(result, "slices"), "slices", "slices in a group, N", 1)]
    if len(next(iter(curve(result, "side").values()))) > 1:
        rows.append((curve(result, "side"), "side", "side of the image in pixels of 16 a token", 16))
    figure = Figure(figsize=(9, 3.4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for (lines, along, label, scale), (time_axes, memory_axes) in zip(rows, panels, strict=True):
        for name, line in lines.items():
            style = {"color": COLOURS.get(name, "black"), "marker": "o", "markersize": 4, "label": name}
            style["linewidth"] = 2.2 if name == "axial_fusion" else 1.4
            x = [scale * r[along] for r in line]
            times = [r["ms"]["forward_backward"] for r in line]
            time_axes.plot(x, [t["median"] for t in times], **style)
            lower, upper = ([t[q] for t in times] for q in ("q20", "q80"))
            time_axes.fill_between(x, lower, upper, color=style["color"], alpha=0.2, linewidth=0)
            memory_axes.plot(x, [r["peak_bytes"]["forward_backward"] / 2**20 for r in line], **style)
        one = next(iter(lines.values()))[0]
        fixed = f"{one['side']}×{one['side']} tokens" if along == "slices" else f"N {one['slices']}"
        for axes, what in ((time_axes, "forward + backward, ms"), (memory_axes, "peak memory, MiB")):
            ticks = sorted({scale * r[along] for line in lines.values() for r in line})
            axes.set(xscale="log", yscale="log", xlabel=label)
            heads = counted(one["heads"], "head")
            axes.set_title(f"{what}; {fixed}, C {one['channels']}, {heads}", fontsize="medium")
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
            axes.grid(True, axis="y", linewidth=0.4, color="#d0d0d0")
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize="small")
    figure.suptitle(f"{result['environment']['device']} · {result['dtype']}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_waterfall(result: Result, path: Path) -> bool:
    """Seconds of a volume, one bar a technique, each added to those above it. False where there is none to draw."""
    from matplotlib.figure import Figure

    steps = [r for r in of_subject(result, "waterfall") if "ms" in r]
    if not steps:
        return False
    seconds = [r["ms"]["forward"]["median"] / 1e3 for r in steps]
    figure = Figure(figsize=(7, 0.4 * len(steps) + 1.1), layout="constrained")
    axes = figure.subplots()
    colours = [{"other": "#b0b0b0", "rival": "#8fa3b8", "ours": "#b3262e"}[r["role"]] for r in steps]
    bars = axes.barh([r["provider"] for r in steps], seconds, color=colours, height=0.7)
    axes.bar_label(bars, [f"{s:.3g} s   {seconds[0] / s:.2f}×" for s in seconds], padding=4, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(seconds))
    one = steps[0]
    axes.set_title(
        f"{one['name']}, {counted(one['depth'], 'slice')}, N {one['slices']}, {counted(one['blocks'], 'block')} · "
        f"{result['environment']['device']} · {result['dtype']}",
        fontsize="medium",
    )
    axes.set_xlabel("seconds of a volume; each row has what the rows above it have")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def page_sections(result: Result, image: Path) -> list[str]:
    """The page's sections of a result; plots are drawn to `image`, <image>-waterfall.png and <image>-roofline.png."""
    device = result["environment"]["device"]
    sections = [f"## {device}", caption(result)]
    if targeted := targets_table(result):
        sections.append(targeted)
    if curve(result):
        draw(result, image)
        sections += [table(result), f"![time and memory on {device}]({image.name})"]
    waterfall, roofline = (image.with_name(f"{image.stem}-{kind}.png") for kind in ("waterfall", "roofline"))
    if draw_waterfall(result, waterfall):
        sections.append(f"![what each technique gains on {device}]({waterfall.name})")
    if any(r["subject"] != "fusion" for r in result["records"]):
        sections.append(rivals_table(result))
    if draw_roofline(result, roofline):
        sections.append(
            f"Every forward with counted bytes below what the machine can: [roofline]({roofline.name})."
        )
    return sections


def accuracy_page(results: Path, docs: Path) -> list[str]:
    """The sections of accuracy.md, of every table in the folder `results`; plots are drawn to `docs`."""
    from benchmarks.accuracy import plots, table

    read = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    found = sorted(read.items(), key=lambda item: (table.by_budget(item[1]), item[0]))
    page = table.opening([values for _, values in found]) if found else []
    for name, values in found:
        plot = docs / f"accuracy-{name}.png"
        plots.draw(values, plot)
        page += [*table.sections(values), f"![mean DSC on {values['data']}]({plot.name})"]
        if "waterfall" in values:
            steps = docs / f"accuracy-{name}-waterfall.png"
            plots.draw_waterfall(values["waterfall"], steps)
            page.append(f"![mean DSC step by step on {values['data']}]({steps.name})")
    if found:
        page.append(table.notes([values for _, values in found]))
    papers = sorted((results / "published").glob("*.json"))
    return page + [table.published(json.loads(path.read_text())) for path in papers]


def main(root: Path | None = None) -> int:
    """Draw and write below `root`, the repository's by default; 2 where there is no result or no place for a table."""
    root, results = root or ROOT, root / "benchmarks" / "results" if root else RESULTS
    try:
        found, page, docs = newest(results), [PERFORMANCE], root / "docs" / "explanation"
        for result in found:
            page += page_sections(result, docs / f"bench-{slug(result['environment']['device'])}.png")
        write_text(docs / "performance.md", "\n\n".join(page) + "\n")
        write_sections(root / "README.md", readme_sections(found))
        if accuracy := accuracy_page(results / "accuracy", docs):
            write_text(docs / "accuracy.md", "\n\n".join(accuracy) + "\n")
    except ValueError as error:
        print(f"benchmarks.figure: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
