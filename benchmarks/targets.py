"""The targets of the library on one H200 in bf16, and their values in a result.

A target has a value, its best rival and a verdict where the records allow it, and otherwise a reason. An absolute
target is for an H200; on another GPU it is scaled by that GPU's measured copy or matmul ceiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from benchmarks.harness import RESULTS_OF

Record = Mapping[str, Any]
H200 = {"copy": 4.3e12, "matmul": 788e12}  # bytes and FLOPs a second, as measured on one


class Found(NamedTuple):
    """What a result holds of a target."""

    value: float
    rival: str = ""
    case: str = ""
    """The case with the least value, where a target covers several."""


Value = Callable[[Mapping[str, Any]], Found | None]


class Target(NamedTuple):
    number: str
    what: str
    kind: Literal["≥", "≤"]
    bound: float
    found: Value
    scaled_by: Literal["", "copy", "matmul"] = ""
    """The ceiling that an absolute bound is scaled by."""


def ours_and_best(
    records: Sequence[Record],
    subject: str,
    *,
    kind: str = "forward",
    against: str | None = None,
    **facts: Any,
) -> list[tuple[Record, Record]]:
    """Our record and that of its best rival (or of the provider `against`), for every case that has both."""
    pairs = []
    chosen = [
        r for r in records
        if r["subject"] == subject and kind in r.get("ms", {}) and all(r.get(k) == v for k, v in facts.items())
    ]  # fmt: skip
    for ours in (r for r in chosen if r["role"] == "ours"):
        same = [r for r in chosen if _place(r) == _place(ours)]
        rivals = [r for r in same if (r["role"] == "rival" if against is None else r["provider"] == against)]
        if rivals:
            pairs.append((ours, min(rivals, key=lambda r: r["ms"][kind]["median"])))
    return pairs


def _place(record: Record) -> list[tuple[str, Any]]:
    """The facts of a record that identify its case."""
    return [(k, v) for k, v in record.items() if k not in ("provider", *RESULTS_OF)]


def gain(subject: str, kind: str = "forward", against: str | None = None, **facts: Any) -> Value:
    """How many times faster ours is, at the case where the gain is least."""

    def found(result: Mapping[str, Any]) -> Found | None:
        pairs = ours_and_best(result["records"], subject, kind=kind, against=against, **facts)
        gains = [
            Found(best["ms"][kind]["median"] / ours["ms"][kind]["median"], best["provider"], ours["name"])
            for ours, best in pairs
        ]
        return min(gains, default=None)

    return found


def flop_share(subject: str, against: str, **facts: Any) -> Value:
    """The gain of ours over `against`, forward, as a fraction of their FLOP ratio, at the case where it is least."""

    def found(result: Mapping[str, Any]) -> Found | None:
        pairs = ours_and_best(result["records"], subject, against=against, **facts)
        shares = [
            Found(
                (theirs["ms"]["forward"]["median"] / theirs["flops"])
                / (ours["ms"]["forward"]["median"] / ours["flops"]),
                against,
                ours["name"],
            )
            for ours, theirs in pairs
            if ours["flops"] and theirs["flops"]
        ]
        return min(shares, default=None)

    return found


def copy_share(batch: int, *, backward: bool) -> Value:
    """Least part of the measured copy bandwidth that axial attention at N 9, P 4096 reaches, in GPU time."""

    def found(result: Mapping[str, Any]) -> Found | None:
        shares = []
        for r in result["records"]:
            if r["subject"] != "axial" or r["role"] != "ours" or "forward_backward" not in r.get("ms", {}):
                continue
            if (r["slices"], r["positions"], r["batch"]) == (9, 4096, batch):
                forward, step = (r["ms"][kind]["median"] for kind in ("forward", "forward_backward"))
                ms, moved = (step - forward, r["bytes_backward"]) if backward else (forward, r["bytes"])
                share = 1e3 * moved / ms / result["ceilings"]["copy_bytes_per_s"]
                shares.append(Found(share, "", r["name"]))
        return min(shares, default=None)

    return found


def images_per_s(side: int) -> Value:
    def found(result: Mapping[str, Any]) -> Found | None:
        speeds = [
            Found(1e3 * r["items"] / r["ms"]["forward"]["median"], "", r["provider"])
            for r in result["records"]
            if r["subject"] == "encoder" and r.get("model") == "vit_b" and r["role"] == "ours" and "ms" in r
            and r["image_size"] == side
        ]  # fmt: skip
        return max(speeds, default=None)

    return found


def training_minutes(side: int) -> Value:
    """Minutes of 550 epochs over 30 scans, a group each, with a frozen encoder; the optimiser left out."""

    def found(result: Mapping[str, Any]) -> Found | None:
        steps = [
            r["ms"]["forward_backward"]["median"] for r in result["records"]
            if r["subject"] == "train step" and r["role"] == "ours" and "ms" in r
            and (r["image_size"], r["encoder"]) == (side, "frozen")
        ]  # fmt: skip
        return Found(550 * 30 * min(steps) / 60e3) if steps else None

    return found


def predict_seconds(side: int, depth: int = 200) -> Value:
    """Seconds from HU in the host's memory to logits on the GPU, of a scan of `depth` slices at `side` pixels."""

    def found(result: Mapping[str, Any]) -> Found | None:
        times = [
            r["ms"]["forward"]["median"] for r in result["records"]
            if r["subject"] == "predict" and r["role"] == "ours" and "ms" in r
            and (r["image_size"], r["depth"]) == (side, depth)
        ]  # fmt: skip
        return Found(min(times) / 1e3) if times else None

    return found


def memory_ratio(subject: str, against: str, **facts: Any) -> Value:
    """How many times less memory a forward of ours takes, at the case where that is least."""

    def found(result: Mapping[str, Any]) -> Found | None:
        pairs = ours_and_best(result["records"], subject, against=against, **facts)
        ratios = [
            Found(theirs["peak_bytes"]["forward"] / ours["peak_bytes"]["forward"], against, ours["name"])
            for ours, theirs in pairs
        ]
        return min(ratios, default=None)

    return found


STEP = "forward_backward"
LORA: dict[str, Any] = {"rows": 36_864, "k": 768, "n": 2304, "rank": 4}
_COPY = "axial attention, N 9, P 4096: part of the copy bandwidth"
_HALF = "axial half, C 256: times faster than the best library form"
_REL_POS = "relative positions, global: times faster than the best rival"
_BLOCKS = "six blocks"
TARGETS = [
    Target("T1", f"{_COPY}, B 4, forward", "≥", 0.85, copy_share(4, backward=False)),
    Target("T1", f"{_COPY}, B 4, backward", "≥", 0.75, copy_share(4, backward=True)),
    Target("T1", f"{_COPY}, B 1, forward", "≥", 0.70, copy_share(1, backward=False)),
    Target("T1", f"{_COPY}, B 1, backward", "≥", 0.65, copy_share(1, backward=True)),
    Target("T1", "axial attention: times faster than SDPA", "≥", 3, gain("axial", against="SDPA", positions=4096)),
    Target("T1", "axial attention: times faster than compiled multiply-sum", "≥", 1.5,
           gain("axial", against="multiply-sum, compiled")),
    Target("T2", f"{_HALF}, forward", "≥", 2, gain("axial half", channels=256)),
    Target("T2", f"{_HALF}, with backward", "≥", 1.5, gain("axial half", STEP, channels=256)),
    Target("T3", "LoRA linear 768 to 2304: the frozen linear over ours, forward", "≥", 0.96,
           gain("lora", against="frozen", **LORA)),
    Target("T3", "LoRA linear 768 to 2304: times faster than PEFT eager, with backward", "≥", 1.5,
           gain("lora", STEP, against="PEFT form", **LORA)),
    Target("T4", "slice attention, D 32 and 64: times faster than the best library, forward", "≥", 0.97,
           gain("slice")),
    Target("T4", "slice attention, D 32: the same at the case where ours gains least", "≥", 1.15,
           gain("slice", head_dim=32)),
    Target("T5", f"{_REL_POS}, forward", "≥", 1.3, gain("rel_pos")),
    Target("T5", f"{_REL_POS}, with backward", "≥", 1.2, gain("rel_pos", STEP)),
    Target("T5", "relative positions, windowed: times faster than the best rival, forward", "≥", 1.3, gain("window")),
    Target("T6", "SAM ViT-B encoder, 1024 px: images a second", "≥", 400, images_per_s(1024), "matmul"),
    *[Target("T6", f"SAM ViT-B encoder, {side} px: times faster than SDPA with the bias, compiled", "≥", least,
             gain("encoder", against="SDPA, bias, compiled", image_size=side, model="vit_b"))
      for side, least in ((1024, 1.25), (512, 1.2), (256, 1.4))],
    Target("T7", f"{_BLOCKS}, 1024 px: times faster than naive 3D, forward", "≥", 30,
           gain("transformer", "forward", "naive 3D", side=64)),
    Target("T7", f"{_BLOCKS}, 1024 px: times less memory than naive 3D, forward", "≥", 100,
           memory_ratio("transformer", "naive 3D", side=64)),
    Target("T7", f"{_BLOCKS}, 512 px: times faster than naive 3D, with backward", "≥", 30,
           gain("transformer", STEP, "naive 3D", side=32)),
    Target("T7", f"{_BLOCKS}, 1024 px: times faster than SDPA 3D, with backward", "≥", 6,
           gain("transformer", STEP, "SDPA 3D", side=64)),
    Target("T7", f"{_BLOCKS}, 1024 px: times faster than the best library form, with backward", "≥", 1.2,
           gain("transformer", STEP, side=64)),
    Target("T8", "prediction of 200 slices at 1024 px: seconds", "≤", 2, predict_seconds(1024), "copy"),
    Target("T8", "prediction of 200 slices at 512 px: seconds", "≤", 0.6, predict_seconds(512), "copy"),
    Target("T8", "prediction: times faster than the re-encoding loop", "≥", 3, gain("predict", encoder="vit_b")),
    Target("T9", "training, the paper's schedule on 30 scans at 1024 px: minutes", "≤", 30,
           training_minutes(1024), "copy"),
    Target("T9", "training, the same at 512 px: minutes", "≤", 15, training_minutes(512), "copy"),
]  # fmt: skip
CPU_TARGETS = [
    Target("T10", "encoder, 256 px: times faster than segment_anything", "≥", 1.4,
           gain("encoder", against="segment-anything", image_size=256, dtype="float32")),
    Target("T10", "encoder, 512 px: times faster than segment_anything", "≥", 1.15,
           gain("encoder", against="segment-anything", image_size=512, dtype="float32")),
    Target("T10", "fusion at N 9: naive 3D's time over ours, part of their FLOP ratio", "≥", 0.7,
           flop_share("fusion", "naive 3D", slices=9, side=16)),
    Target("T10", "prediction, ViT-B at 256 px: the re-encoding loop's time over ours, part of their FLOP ratio",
           "≥", 0.8, flop_share("predict", "re-encoding", encoder="vit_b")),
]  # fmt: skip


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every target with its value, best rival and verdict in this result, or with None and the reason."""
    gpu = result["environment"]["kind"] == "gpu"
    listed = []
    for rows, here in ((TARGETS, gpu), (CPU_TARGETS, not gpu)):
        for target in rows:
            entry: dict[str, Any] = {
                "number": target.number,
                "what": target.what,
                "target": f"{target.kind} {target.bound:g}",
            }
            found = target.found(result) if here else None
            if found is None:
                reason = "not measured in this run" if here else f"it is for a {'CPU' if gpu else 'GPU'}"
                listed.append(entry | {"value": None, "reason": reason})
                continue
            bound = _scaled(target, result) if gpu else target.bound
            met = found.value >= bound if target.kind == "≥" else found.value <= bound
            if bound != target.bound:
                entry["scaled"] = f"{target.kind} {bound:.3g}"
            listed.append(entry | found._asdict() | {"verdict": "met" if met else "missed"})
    return listed


def _scaled(target: Target, result: Mapping[str, Any]) -> float:
    """The bound; an absolute one is scaled by this GPU's ceiling over an H200's."""
    if not target.scaled_by:
        return target.bound
    ceilings = result["ceilings"]
    key = "copy_bytes_per_s" if target.scaled_by == "copy" else "matmul_bfloat16_flops_per_s"
    ratio = ceilings[key] / H200[target.scaled_by]
    return target.bound * ratio if target.kind == "≥" else target.bound / ratio


def line(entry: Mapping[str, Any]) -> str:
    """One target for the terminal."""
    if entry["value"] is None:
        return f"{entry['number']}  {entry['what']}: {entry['reason']}"
    scaled = f", on this GPU {entry['scaled']}" if "scaled" in entry else ""
    rival = f" (rival: {entry['rival']})" if entry["rival"] else ""
    case = f" at {entry['case']}" if entry["case"] else ""
    return (
        f"{entry['number']}  {entry['verdict']}  {entry['what']}: {entry['value']:.3g}{case}{rival},"
        f" target {entry['target']}{scaled}"
    )
