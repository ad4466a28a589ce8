"""Draw docs/bench-<device>.png and write the README's table.    python -m benchmarks.figure

Takes the newest result of each device in benchmarks/results; of the README only what stands between its two
markers changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, slug

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
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
        if device not in found or result["environment"]["date"] > found[device]["environment"]["date"]:
            found[device] = result
    if not found:
        raise ValueError(f"{folder} holds no result; run `make bench` first")
    return sorted(
        found.values(), key=lambda r: (r["environment"]["kind"] != "gpu", r["environment"]["device"])
    )


def curve(result: Result) -> dict[str, list[Result]]:
    """Timed records of each provider against N, for the shape that was measured at most values of N."""
    by_shape: dict[tuple[int, ...], dict[str, list[Result]]] = {}
    for record in result["records"]:
        shape = tuple(record[key] for key in ("batch", "side", "channels", "heads"))
        of_shape = by_shape.setdefault(shape, {}).setdefault(record["provider"], [])
        if "ms" in record:
            of_shape.append(record)
    widest = max(by_shape.values(), key=lambda lines: max(map(len, lines.values())))
    return {name: sorted(line, key=lambda r: r["slices"]) for name, line in widest.items() if line}


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
    """Markdown: the named shapes of a result, one row each, what was measured and on what."""
    named = [record for record in result["records"] if record["name"]]
    providers = list(dict.fromkeys(record["provider"] for record in named))
    rows = [["tokens (N, H′×W′, C, heads)", *providers]]
    for name, records in groupby(named, key=lambda r: r["name"]):
        found = {record["provider"]: record for record in records}
        r = next(iter(found.values()))
        shape = f"{name}: {r['slices']}, {r['side']}×{r['side']}, {r['channels']}, {r['heads']}"
        rows.append([shape, *(cell(found.get(p)) for p in providers)])
    where = result["environment"]
    versions = [f"torch {where['torch']}"] + ([f"triton {where['triton']}"] if where["triton"] else [])
    commit = f"commit {where['commit']}" + (" with local changes" if where["dirty"] else "")
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * len(providers))
    caption = f"{where['device']}, {result['dtype']}, {', '.join(versions)}, {commit}, {where['date'][:10]}."
    return "\n".join([f"**{caption}**", "", *lines])


def cell(record: Result | None) -> str:
    """`forward / forward + backward ms, peak MiB` of a record, or why there is none."""
    if record is None:
        return "–"
    if "ms" not in record:
        return str(record["status"])
    forward, step = (record["ms"][kind]["median"] for kind in ("forward", "forward_backward"))
    return f"{forward:.3g} / {step:.3g} ms, {record['peak_bytes']['forward_backward'] / 2**20:,.0f} MiB"


def write_readme(readme: Path, sections: Sequence[str]) -> None:
    """Put `sections` between the markers of `readme`; ValueError unless both are there, once, in order."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} needs one {BEGIN} and, after it, one {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    partial = readme.with_name(readme.name + ".tmp")
    partial.write_text(before + "\n\n".join([BEGIN, *sections, END]) + after, encoding="utf-8")
    partial.replace(readme)


def main() -> int:
    try:
        sections = []
        for result in newest():
            device = result["environment"]["device"]
            image = ROOT / "docs" / f"bench-{slug(device)}.png"
            draw(result, image)
            print(image)
            link = f"![time and memory against N on {device}]({image.relative_to(ROOT).as_posix()})"
            sections += [table(result), link]
        write_readme(ROOT / "README.md", sections)
    except ValueError as error:
        print(f"benchmarks.figure: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
