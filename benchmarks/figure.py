"""Draw docs/bench-<device>*.png and docs/accuracy-*.png and write the README's tables.    python -m benchmarks.figure

Takes the newest result of each device in benchmarks/results, one of several subjects before one of a single
subject: time and memory against N, a roofline, and one row a case with ours beside its best rival. Of the README
only what stands between its two markers changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, slug

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"  # of write_readme's default
COLOURS = {
    "naive 3D": "#b0b0b0",
    "SDPA 3D": "#5b7fa6",
    "SDPA factorised": "#d08a2e",
    "SDPA factorised, compiled": "#8c5a9e",
    "axial_fusion": "#b3262e",
}
Result = Mapping[str, Any]


def newest(folder: Path = RESULTS) -> list[Result]:
    """The newest result of each device, GPUs first. Raises ValueError where there is none."""
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        device = result["environment"]["device"]
        if device not in found or _rank(result) > _rank(found[device]):
            found[device] = result
    if not found:
        raise ValueError(f"{folder} holds no result; run `make bench` first")
    return sorted(
        found.values(), key=lambda r: (r["environment"]["kind"] != "gpu", r["environment"]["device"])
    )


def _rank(result: Result) -> tuple[bool, str]:
    return len({r["subject"] for r in result["records"]}) > 1, result["environment"]["date"]


def curve(result: Result) -> dict[str, list[Result]]:
    """Timed records of each provider against N, for the shape that was measured at most values of N."""
    by_shape: dict[tuple[int, ...], dict[str, list[Result]]] = {}
    for record in of_subject(result, "fusion"):
        shape = tuple(record[key] for key in ("batch", "side", "channels", "heads"))
        of_shape = by_shape.setdefault(shape, {}).setdefault(record["provider"], [])
        if "ms" in record:
            of_shape.append(record)
    if not by_shape:
        return {}
    widest = max(by_shape.values(), key=lambda lines: max(map(len, lines.values())))
    return {name: sorted(line, key=lambda r: r["slices"]) for name, line in widest.items() if line}


def of_subject(result: Result, subject: str) -> list[Result]:
    return [r for r in result["records"] if r["subject"] == subject]


def draw_roofline(result: Result, path: Path) -> None:
    """FLOPs a second of every forward whose bytes are counted against FLOPs a byte, below the two ceilings."""
    from matplotlib.figure import Figure

    points = [r for r in result["records"] if "ms" in r and r.get("bytes") and r["flops"]]
    if not points:
        return
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


def draw(result: Result, path: Path) -> None:
    """Time and peak memory of a forward with backward against N, as a PNG."""
    from matplotlib.figure import Figure

    lines = curve(result)
    one = next(iter(lines.values()))[0]
    counts = sorted({r["slices"] for line in lines.values() for r in line})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name, line in lines.items():
        style = {"color": COLOURS.get(name, "black"), "marker": "o", "markersize": 4, "label": name}
        style["linewidth"] = 2.2 if name == "axial_fusion" else 1.4
        n = [r["slices"] for r in line]
        times = [r["ms"]["forward_backward"] for r in line]
        time_axes.plot(n, [t["median"] for t in times], **style)
        time_axes.fill_between(
            n,
            [t["q20"] for t in times],
            [t["q80"] for t in times],
            color=style["color"],
            alpha=0.2,
            linewidth=0,
        )
        memory_axes.plot(n, [r["peak_bytes"]["forward_backward"] / 2**20 for r in line], **style)
    for axes, title in ((time_axes, "forward + backward, ms"), (memory_axes, "peak memory, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="slices in a group, N", title=title)
        axes.set_xticks(counts, map(str, counts))
        axes.minorticks_off()
        axes.grid(True, axis="y", linewidth=0.4, color="#d0d0d0")
        axes.spines[["top", "right"]].set_visible(False)
    time_axes.legend(frameon=False, fontsize="small")
    figure.suptitle(
        f"{result['environment']['device']} · {result['dtype']} · "
        f"{one['side']}×{one['side']} tokens a slice, C {one['channels']}, {one['heads']} heads",
        fontsize="medium",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def table(result: Result) -> str:
    """Markdown: the named fusion shapes of a result, one row each, what was measured and on what."""
    named = [record for record in of_subject(result, "fusion") if record["name"]]
    providers = list(dict.fromkeys(record["provider"] for record in named))
    rows = [["tokens (N, H′×W′, C, heads)", *providers]]
    for name, records in groupby(named, key=lambda r: r["name"]):
        found = {record["provider"]: record for record in records}
        r = next(iter(found.values()))
        shape = f"{name}: {r['slices']}, {r['side']}×{r['side']}, {r['channels']}, {r['heads']}"
        rows.append([shape, *(cell(found.get(p)) for p in providers)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * len(providers))
    return "\n".join([f"**{caption(result)}**", "", *lines])


def caption(result: Result) -> str:
    """Device, versions, commit and date: what a number means nothing without."""
    where = result["environment"]
    versions = [f"torch {where['torch']}"] + ([f"triton {where['triton']}"] if where["triton"] else [])
    commit = f"commit {where['commit']}" + (" with local changes" if where["dirty"] else "")
    return f"{where['device']}, {result['dtype']}, {', '.join(versions)}, {commit}, {where['date'][:10]}."


def rivals_table(result: Result) -> str:
    """Markdown: ours beside the fastest right rival for the same function, every named case but the fusion's.

    × above 1 is how many times faster ours is, below 1 how much it loses."""
    rows = []
    for (subject, name), group in groupby(result["records"], key=lambda r: (r["subject"], r["name"])):
        records = list(group)
        if subject == "fusion" or not name:
            continue
        ours = next((r for r in records if r["role"] == "ours"), None)
        rivals = [r for r in records if r["role"] == "rival" and "ms" in r]
        if ours is None or "ms" not in ours:
            rows.append([f"{subject}, {name}", "–", "" if ours is None else ours["status"], "–"])
            continue
        for kind in ("forward", "forward_backward"):
            timed = [r for r in rivals if kind in r["ms"]]
            if kind not in ours["ms"] or not timed:
                continue
            best = min(timed, key=lambda r: r["ms"][kind]["median"])
            theirs, mine = (r["ms"][kind]["median"] for r in (best, ours))
            what = f"{subject}, {name}" + (", with backward" if kind == "forward_backward" else "")
            rows.append(
                [what, f"{best['provider']}, {theirs:.3g} ms", f"{mine:.3g} ms", f"{theirs / mine:.2f}×"]
            )
    header = ["case", "best rival", "ours", "gain"]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    lines.insert(1, "| --- | ---: | ---: | ---: |")
    return "\n".join(lines)


def cell(record: Result | None) -> str:
    """`forward / forward + backward ms, peak MiB` of a record, or why there is none."""
    if record is None:
        return "–"
    if "ms" not in record:
        return str(record["status"])
    forward, step = (record["ms"][kind]["median"] for kind in ("forward", "forward_backward"))
    return f"{forward:.3g} / {step:.3g} ms, {record['peak_bytes']['forward_backward'] / 2**20:,.0f} MiB"


def write_readme(readme: Path, sections: Sequence[str], name: str = "bench") -> None:
    """Put `sections` between the markers `name` of `readme`; ValueError unless both are there, once, in order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = readme.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{readme} needs one {begin} and, after it, one {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    partial = readme.with_name(readme.name + ".tmp")
    partial.write_text(before + "\n\n".join([begin, *sections, end]) + after, encoding="utf-8")
    partial.replace(readme)


def readme_sections(result: Result, image: Path) -> list[str]:
    """Draw what the result allows, `image` and <image>-roofline.png; the README's sections for it."""
    device = result["environment"]["device"]
    sections = []
    if curve(result):
        draw(result, image)
        link = f"![time and memory against N on {device}](docs/{image.name})"
        sections += [table(result), link]
    else:
        sections.append(f"**{caption(result)}**")
    draw_roofline(result, image.with_name(f"{image.stem}-roofline.png"))
    if any(r["subject"] != "fusion" for r in result["records"]):
        sections.append(rivals_table(result))
    return sections


def accuracy_sections(results: Path, docs: Path) -> list[str]:
    """Draw every accuracy.json of the folder `results` and write docs/accuracy.md; the README's sections, if any."""
    from benchmarks import accuracy_table

    sections, pages = [], []
    for path in sorted(results.glob("*.json")):
        table = json.loads(path.read_text())
        plot = docs / f"accuracy-{path.stem}.png"
        accuracy_table.draw(table, plot)
        pages += [accuracy_table.markdown(table), f"![mean DSC on {table['data']}]({plot.name})"]
        if "waterfall" in table:
            steps = docs / f"accuracy-{path.stem}-waterfall.png"
            accuracy_table.draw_waterfall(table["waterfall"], steps)
            pages.append(f"![mean DSC step by step on {table['data']}]({steps.name})")
        sections += accuracy_table.in_short(table)
    if pages:
        (docs / "accuracy.md").write_text("\n\n".join(pages) + "\n", encoding="utf-8")
        sections.append("[Organ by organ, costs and notes](docs/accuracy.md).")
    return sections


def main() -> int:
    try:
        sections = []
        for result in newest():
            device = result["environment"]["device"]
            image = ROOT / "docs" / f"bench-{slug(device)}.png"
            sections += readme_sections(result, image)
        write_readme(ROOT / "README.md", sections)
        accuracy = accuracy_sections(RESULTS / "accuracy", ROOT / "docs")
        if accuracy:
            write_readme(ROOT / "README.md", accuracy, "accuracy")
    except ValueError as error:
        print(f"benchmarks.figure: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
