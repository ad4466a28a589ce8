"""Markdown tables of a benchmark's result: every case for docs/explanation/performance.md, six rows for README."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from aftersam.errors import counted
from aftersam.evaluation.tables import markdown_table

Result = Mapping[str, Any]
KINDS = ("forward", "forward_backward")
SLOWER = 0.995  # a gain that is printed as less than 1.00×
README_ROWS = {  # kind of device: subject, end of the case's name, what README calls it
    "gpu": (
        ("fusion", "1024 px", "the op `axial_fusion_attention`, 9 slices of 64×64 tokens"),
        ("transformer", "1024 px", "six fusion blocks, the same tokens"),
        ("encoder", "1024 px, batch 8", "SAM's ViT-B encoder, 8 images of 1024 px"),
        ("predict", "24 slices", "prediction, ViT-B, 24 slices of 1024 px"),
        ("train step", "ViT-B frozen, 1024 px", "training step, ViT-B frozen, 1024 px"),
    ),
    "cpu": (("train step", "small, 128 px", "training step, preset `small`, 128 px"),),
}


def of_subject(result: Result, subject: str) -> list[Result]:
    return [r for r in result["records"] if r["subject"] == subject]


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
    return markdown_table(rows)


def caption(result: Result) -> str:
    """Device, dtype, versions, commits and date of a result."""
    where = result["environment"]
    commit = f"commit {where['commit']}" + (" with local changes" if where["dirty"] else "")
    later: dict[str, dict[str, None]] = {}
    for r in result["records"]:
        if "commit" in r:
            later.setdefault(r["commit"], {})[r["subject"]] = None
    own = "".join(f"; commit {measured} for cases of {', '.join(of)}" for measured, of in later.items())
    return f"{machine(result)}, {commit}, {where['date'][:10]}{own}."


def machine(result: Result) -> str:
    """Device, dtype and versions of a result."""
    where = result["environment"]
    triton = f", triton {where['triton']}" if where["triton"] else ""
    return f"{where['device']}, {result['dtype']}, torch {where['torch']}{triton}"


class Comparison(NamedTuple):
    """Ours beside the fastest correct rival at one case; `kind` is forward or forward_backward, times in ms.

    `same_call`: ours makes the call of this rival, so that the gain is the noise of the timing alone."""

    subject: str
    name: str
    kind: str
    rival: str
    rival_ms: float
    ours_ms: float
    same_call: bool = False

    @property
    def gain(self) -> float:
        return self.rival_ms / self.ours_ms


def comparisons(records: Sequence[Result]) -> Iterator[Comparison]:
    """One comparison for each kind of timing of a single case, where both ours and a rival were timed."""
    ours = next((r for r in records if r["role"] == "ours" and "ms" in r), None)
    for kind in KINDS if ours is not None else ():
        timed = [r for r in records if r["role"] == "rival" and kind in r.get("ms", {})]
        if ours is None or kind not in ours["ms"] or not timed:
            continue
        best = min(timed, key=lambda r: r["ms"][kind]["median"])
        rival_ms, ours_ms = (r["ms"][kind]["median"] for r in (best, ours))
        same = ours.get("same_as") == best["provider"]
        yield Comparison(ours["subject"], ours["name"], kind, best["provider"], rival_ms, ours_ms, same)


def cases(result: Result) -> Iterator[tuple[str, str, list[Result]]]:
    """Subject, name and records of every named case but the waterfall's, which has a picture of its own."""
    for (subject, name), group in groupby(result["records"], key=lambda r: (r["subject"], r["name"])):
        if name and subject != "waterfall":
            yield subject, name, list(group)


def rivals_table(result: Result) -> str:
    """Markdown: ours beside the fastest correct rival for the same function, every named case but the fusion's.

    A gain above 1× is how many times faster ours is, below 1× how much it loses. Where ours makes the call
    of that rival, this is said in place of a gain."""
    rows = []
    for subject, name, records in cases(result):
        ours = next((r for r in records if r["role"] == "ours"), None)
        if subject == "fusion":
            continue  # it has a table of its own
        if ours is None or "ms" not in ours:
            rows.append([f"{subject}, {name}", "–", "" if ours is None else ours["status"], "–"])
        for found in comparisons(records):
            what = f"{subject}, {name}" + (", with backward" if found.kind == "forward_backward" else "")
            best = f"{found.rival}, {_digits(found.rival_ms)} ms"
            gain = "the same call" if found.same_call else f"{found.gain:.2f}×"
            rows.append([what, best, f"{_digits(found.ours_ms)} ms", gain])
    return markdown_table([["case", "best rival", "ours", "gain"], *rows])


def readme_sections(results: Sequence[Result]) -> list[str]:
    """README's table of the first GPU and the first CPU, what was measured on what, and where ours is slower."""
    rows, machines, losses = [], [], []
    for kind, wanted in README_ROWS.items():
        result = next((r for r in results if r["environment"]["kind"] == kind), None)
        if result is None:
            continue
        machines.append(f"{machine(result)}, {result['environment']['date'][:10]}")
        losses.append(losses_of(result))
        by_case = {(subject, name): records for subject, name, records in cases(result)}
        for subject, part, words in wanted:
            found = [r for (of, name), r in by_case.items() if of == subject and name.endswith(part)]
            if found and (pairs := list(comparisons(found[0]))):
                rows.append([f"{words}, {kind.upper()}", *_cells(pairs)])
    header = ["forward / forward + backward", "fastest other form", "its ms", "ours, ms", "gain"]
    told = (
        f"{'; '.join(machines)}. Every form was compared with fp64 equations before it was timed. "
        f"{' '.join(losses)} [Every case, losses included](docs/explanation/performance.md)."
    )
    return [markdown_table([header, *rows], left=(0, 1)), told]


def _cells(pairs: Sequence[Comparison]) -> list[str]:
    """Rival, its times, our times and gains of one case."""
    return [
        " / ".join(dict.fromkeys(pair.rival for pair in pairs)),
        " / ".join(_digits(pair.rival_ms) for pair in pairs),
        " / ".join(_digits(pair.ours_ms) for pair in pairs),
        " / ".join(f"{pair.gain:.2f}×" for pair in pairs),
    ]


def losses_of(result: Result) -> str:
    """One sentence: how many timings of a result ours loses to a rival, and the largest loss of each subject."""
    pairs = [pair for _, _, records in cases(result) for pair in comparisons(records) if not pair.same_call]
    lost = sorted((pair for pair in pairs if pair.gain < SLOWER), key=lambda pair: pair.gain)
    device = result["environment"]["kind"].upper()
    if not lost:
        return f"On the {device} ours is slower in none of {counted(len(pairs), 'timing')}."
    worst: dict[str, str] = {}
    for pair in lost:
        worst.setdefault(pair.subject, f"{pair.subject} {pair.gain:.2f}×")
    largest = ", ".join(worst.values())
    return f"On the {device} ours is slower in {len(lost)} of {counted(len(pairs), 'timing')}, at worst: {largest}."


def _digits(value: float) -> str:
    """Three digits, or the whole number where it has more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def targets_table(result: Result) -> str:
    """Markdown: every target that this result has a value for, its value and its verdict."""
    rows = [
        [t["number"], t["what"] + (f", {t['case']}" if t["case"] else ""), t["rival"] or "–", f"{t['value']:.3g}",
         t["target"] + (f" ({t['scaled']} here)" if "scaled" in t else ""), t["verdict"]]
        for t in result.get("targets", ()) if t["value"] is not None and "verdict" in t
    ]  # fmt: skip
    if not rows:
        return ""
    header = ["", "target", "rival", "measured", "aim", ""]
    return markdown_table([header, *rows], left=(0, 1, 2, 5))


def cell(record: Result | None) -> str:
    """`forward / forward + backward ms, peak MiB` of a record, or why there is none."""
    if record is None:
        return "–"
    if "ms" not in record:
        return str(record["status"])
    forward, step = (record["ms"][kind]["median"] for kind in ("forward", "forward_backward"))
    return f"{_digits(forward)} / {_digits(step)} ms, {record['peak_bytes']['forward_backward'] / 2**20:,.0f} MiB"
