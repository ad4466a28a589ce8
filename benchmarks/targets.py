"""What the library sets out to reach on one H200 in bf16, beside what a result holds.

A target has a value where the records allow it, and otherwise the reason why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Value = Callable[[Mapping[str, Any]], float | None]


def ours_and_best(
    records: Sequence[Record],
    subject: str,
    *,
    kind: str = "forward",
    against: str | None = None,
    **facts: Any,
) -> tuple[float, float] | None:
    """Least ms of ours and of its best rival (or of the provider `against`), at the case where ours gains least."""
    pairs = []
    chosen = [
        r for r in records
        if r["subject"] == subject and kind in r.get("ms", {}) and all(r.get(k) == v for k, v in facts.items())
    ]  # fmt: skip
    for ours in (r for r in chosen if r["role"] == "ours"):
        same = [r for r in chosen if _place(r) == _place(ours)]
        rivals = [r for r in same if (r["role"] == "rival" if against is None else r["provider"] == against)]
        if rivals:
            best = min(r["ms"][kind]["median"] for r in rivals)
            pairs.append((ours["ms"][kind]["median"], best))
    return min(pairs, key=lambda pair: pair[1] / pair[0], default=None)


def _place(record: Record) -> list[tuple[str, Any]]:
    """What names a case: its facts that are not results."""
    results = ("provider", "role", "status", "flops", "error", "ms", "peak_bytes", "reason")
    return [(k, v) for k, v in record.items() if k not in results]


def gain(subject: str, kind: str = "forward", against: str | None = None, **facts: Any) -> Value:
    """How many times faster ours is, at the case where that is least."""

    def value(result: Mapping[str, Any]) -> float | None:
        pair = ours_and_best(result["records"], subject, kind=kind, against=against, **facts)
        return None if pair is None else pair[1] / pair[0]

    return value


def flop_share(subject: str, against: str, **facts: Any) -> Value:
    """How many times faster ours is than `against`, forward, over how many times fewer FLOPs it has; the least."""

    def value(result: Mapping[str, Any]) -> float | None:
        chosen = [
            r for r in result["records"]
            if r["subject"] == subject and "ms" in r and r["flops"] and all(r.get(k) == v for k, v in facts.items())
        ]  # fmt: skip
        found = [
            (theirs["ms"]["forward"]["median"] / theirs["flops"])
            / (ours["ms"]["forward"]["median"] / ours["flops"])
            for ours in chosen
            for theirs in chosen
            if ours["role"] == "ours" and theirs["provider"] == against and _place(ours) == _place(theirs)
        ]
        return min(found, default=None)

    return value


def copy_share(batch: int, *, backward: bool) -> Value:
    """Least part of the measured copy bandwidth that axial attention at N 9, P 4096 reaches."""

    def value(result: Mapping[str, Any]) -> float | None:
        found = []
        for r in result["records"]:
            if r["subject"] != "axial" or r["role"] != "ours" or "ms" not in r:
                continue
            if (r["slices"], r["positions"], r["batch"]) == (9, 4096, batch):
                forward, step = (r["ms"][kind]["median"] for kind in ("forward", "forward_backward"))
                ms, moved = (step - forward, r["bytes_backward"]) if backward else (forward, r["bytes"])
                found.append(1e3 * moved / ms / result["ceilings"]["copy_bytes_per_s"])
        return min(found, default=None)

    return value


def images_per_s(side: int) -> Value:
    def value(result: Mapping[str, Any]) -> float | None:
        found = [
            r for r in result["records"]
            if r["subject"] == "encoder" and r.get("model") == "vit_b" and r["role"] == "ours" and "ms" in r
        ]  # fmt: skip
        return max(
            (1e3 * r["items"] / r["ms"]["forward"]["median"] for r in found if r["image_size"] == side),
            default=None,
        )

    return value


def training_minutes(side: int) -> Value:
    """Minutes of 550 epochs over 30 scans, a group each, with a frozen encoder; the optimiser left out."""

    def value(result: Mapping[str, Any]) -> float | None:
        found = [
            r["ms"]["forward_backward"]["median"] for r in result["records"]
            if r["subject"] == "train step" and r["role"] == "ours" and "ms" in r
            and (r["image_size"], r["encoder"]) == (side, "frozen")
        ]  # fmt: skip
        return 550 * 30 * min(found) / 60e3 if found else None

    return value


def predict_seconds(side: int, depth: int = 200) -> Value:
    """Seconds of GPU from HU to logits of a scan of `depth` slices at `side` pixels."""

    def value(result: Mapping[str, Any]) -> float | None:
        found = [
            r["ms"]["forward"]["median"] for r in result["records"]
            if r["subject"] == "predict" and r["role"] == "ours" and "ms" in r
            and (r["image_size"], r["depth"]) == (side, depth)
        ]  # fmt: skip
        return min(found) / 1e3 if found else None

    return value


STEP = "forward_backward"
LORA: dict[str, Any] = {"rows": 36_864, "k": 768, "n": 2304, "rank": 4}
TARGETS: list[tuple[str, str, str, Value]] = [
    ("T1", "axial attention, B 4: part of copy bandwidth, forward", "≥ 0.85", copy_share(4, backward=False)),
    ("T1", "axial attention, B 4: part of copy bandwidth, backward", "≥ 0.75", copy_share(4, backward=True)),
    ("T1", "axial attention, B 1: part of copy bandwidth, forward", "≥ 0.70", copy_share(1, backward=False)),
    ("T1", "axial attention, B 1: part of copy bandwidth, backward", "≥ 0.65", copy_share(1, backward=True)),
    ("T1", "axial attention: times faster than SDPA", "≥ 3", gain("axial", against="SDPA", positions=4096)),
    ("T1", "axial attention: times faster than compiled multiply-sum", "≥ 1.5",
     gain("axial", against="multiply-sum, compiled")),
    ("T2", "axial half, C 256: times faster than the best library form, forward", "≥ 2",
     gain("axial half", channels=256)),
    ("T2", "axial half, C 256: the same, with backward", "≥ 1.5", gain("axial half", STEP, channels=256)),
    ("T3", "LoRA linear 768 to 2304: the frozen linear over ours, forward", "≥ 0.96",
     gain("lora", against="frozen", **LORA)),
    ("T3", "LoRA linear 768 to 2304: times faster than PEFT eager, with backward", "≥ 1.5",
     gain("lora", STEP, against="PEFT form", **LORA)),
    ("T4", "slice attention: the best library over auto", "≥ 0.97", gain("slice")),
    ("T5", "relative positions, global: times faster than the best rival, forward", "≥ 1.3", gain("rel_pos")),
    ("T5", "relative positions, global: the same, with backward", "≥ 1.2", gain("rel_pos", STEP)),
    ("T5", "relative positions, windowed: times faster than the best rival, forward", "≥ 1.3", gain("window")),
    ("T6", "SAM ViT-B encoder, 1024 px: images a second", "≥ 400", images_per_s(1024)),
    *[("T6", f"SAM ViT-B encoder, {side} px: times faster than SDPA with the bias, compiled", f"≥ {least}",
       gain("encoder", against="SDPA, bias, compiled", image_size=side, model="vit_b"))
      for side, least in ((1024, 1.25), (512, 1.2), (256, 1.4))],
    ("T7", "six blocks, 1024 px: times faster than naive 3D, forward", "≥ 30",
     gain("transformer", "forward", "naive 3D", side=64)),
    ("T7", "six blocks, 512 px: times faster than naive 3D, with backward", "≥ 30",
     gain("transformer", STEP, "naive 3D", side=32)),
    ("T7", "six blocks, 1024 px: times faster than SDPA 3D", "≥ 6", gain("transformer", STEP, "SDPA 3D", side=64)),
    ("T7", "six blocks, 1024 px: times faster than the best library form", "≥ 1.2",
     gain("transformer", STEP, side=64)),
    ("T8", "prediction of 200 slices at 1024 px: seconds", "≤ 2", predict_seconds(1024)),
    ("T8", "prediction of 200 slices at 512 px: seconds", "≤ 0.6", predict_seconds(512)),
    ("T8", "prediction: times faster than the re-encoding loop", "≥ 3", gain("predict", encoder="vit_b")),
    ("T9", "training, the paper's schedule on 30 scans at 1024 px: minutes", "≤ 30", training_minutes(1024)),
    ("T9", "training, the same at 512 px: minutes", "≤ 15", training_minutes(512)),
]  # fmt: skip
CPU_TARGETS: list[tuple[str, str, str, Value]] = [
    ("T10", "encoder, 256 px: times faster than segment_anything", "≥ 1.4",
     gain("encoder", against="segment-anything", image_size=256, dtype="float32")),
    ("T10", "encoder, 512 px: times faster than segment_anything", "≥ 1.15",
     gain("encoder", against="segment-anything", image_size=512, dtype="float32")),
    ("T10", "fusion at N 9: naive 3D's time over ours, part of their FLOP ratio", "≥ 0.7",
     flop_share("fusion", "naive 3D", slices=9, side=16)),
    ("T10", "prediction, ViT-B at 256 px: the re-encoding loop's time over ours, part of their FLOP ratio", "≥ 0.8",
     flop_share("predict", "re-encoding", encoder="vit_b")),
]  # fmt: skip


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every target with its value in this result, or None and why."""
    gpu = result["environment"]["kind"] == "gpu"
    listed = []
    for rows, here in ((TARGETS, gpu), (CPU_TARGETS, not gpu)):
        for number, what, target, value in rows:
            found = value(result) if here else None
            reason = "not measured in this run" if here else f"it is for a {'CPU' if gpu else 'GPU'}"
            entry = {"number": number, "what": what, "target": target, "value": found}
            listed.append(entry if found is not None else entry | {"reason": reason})
    return listed
