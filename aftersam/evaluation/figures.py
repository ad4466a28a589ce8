"""Pictures: masks over a scan, curves of a run, box plots of scores. Matplotlib without a display."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aftersam.files import renamed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aftersam.evaluation.statistics import AblationTable

SOFT_TISSUE = (-160.0, 240.0)
COLOURS = (
    "#e6550d", "#31a3dd", "#f2c12e", "#4daf4a", "#b07cd8", "#e7298a", "#66c2a5", "#a6761d",
    "#8da0cb", "#fb9a99", "#b3de69", "#1f9e89",
)  # fmt: skip
DARK = "#101418"


def overlay_png(
    path: Path,
    image: np.ndarray,
    mask: np.ndarray,
    spacing_mm: Sequence[float],
    labels: Mapping[int, str],
    *,
    reference: np.ndarray | None = None,
    title: str = "",
) -> None:
    """Draw `mask` over `image`, both (D, H, W) in canonical axes, into the PNG `path`.

    One axial and one coronal plane, where the labels are richest; with `reference` a second row shows it. In mm,
    so that anisotropic voxels look as they are. The patient's right is on the left, as radiologists read."""
    figure = overlay_figure(image, mask, spacing_mm, labels, reference=reference, title=title)
    _save(figure, path)


def overlay_figure(
    image: np.ndarray,
    mask: np.ndarray,
    spacing_mm: Sequence[float],
    labels: Mapping[int, str],
    *,
    reference: np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """The figure of `overlay_png`."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    guide = mask if reference is None or not np.any(reference) else reference
    rows, columns = (_occupied(image, axis) for axis in (1, 2))
    image, mask, guide = (array[:, rows, columns] for array in (image, mask, guide))
    reference = None if reference is None else reference[:, rows, columns]
    z, y = _richest(guide, 0), _richest(guide, 1)
    d, h, w = (n * s for n, s in zip(image.shape, spacing_mm, strict=True))
    shown_masks = (
        [("prediction", mask)] if reference is None else [("prediction", mask), ("reference", reference)]
    )
    width = 8.6
    height = width * max(h, d) / (2 * w) * len(shown_masks) + 0.9
    figure = Figure(figsize=(width, min(max(height, 3.2), 12)), facecolor=DARK, layout="constrained")
    axes = figure.subplots(len(shown_masks), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 1]})
    for row, (name, labelled) in zip(axes, shown_masks, strict=True):
        planes = (
            (image[z], labelled[z], (0, w, h, 0), f"axial, slice {z}"),
            (image[::-1, y], labelled[::-1, y], (0, w, d, 0), f"coronal, row {y}"),
        )
        for axis, (plane, values, extent, where) in zip(row, planes, strict=True):
            low, high = SOFT_TISSUE
            axis.imshow(np.asarray(plane, np.float32), cmap="gray", vmin=low, vmax=high, extent=extent)
            axis.imshow(_coloured(values, labels), extent=extent, interpolation="nearest")
            axis.set_title(f"{name}, {where}" if len(shown_masks) > 1 else where, color="#cfd8dc", fontsize=8)
            axis.set_axis_off()
    shown = [value for value in labels if np.any(guide == value) or np.any(mask == value)]
    figure.legend(
        handles=[Patch(color=colour(value), label=labels[value]) for value in shown],
        loc="outside lower center", ncols=min(len(shown) or 1, 6), frameon=False, fontsize=8, labelcolor="#cfd8dc",
    )  # fmt: skip
    if title:
        figure.suptitle(title, color="white", fontsize=10)
    return figure


def loss_figure(history: Path, path: Path) -> None:
    """Draw the loss and the validation DSC that `history` (JSON lines) holds into the PNG `path`."""
    _save(curves_figure(history), path)


def curves_figure(history: Path) -> Figure:
    """The figure of `loss_figure`."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in history.read_text().splitlines() if line.endswith("}")]
    steps = [(r["step"], r["loss"], r["dice"], r["ce"]) for r in records if "loss" in r]
    scored = [r for r in records if r.get("val_mean_dsc") is not None]
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    if steps:
        values = np.array(steps)
        window = max(1, len(values) // 60)
        for column, name, tint in (
            (1, "loss", "#222222"),
            (2, "Dice term", COLOURS[0]),
            (3, "cross-entropy", COLOURS[1]),
        ):
            smooth = np.convolve(values[:, column], np.ones(window) / window, mode="valid")
            left.plot(values[window - 1 :, 0], smooth, color=tint, lw=1.2, label=name)
        left.set(xlabel="step", ylabel=f"mean of {window} steps", ylim=(0, None))
        left.legend(frameon=False, fontsize=8)
    if scored:
        at = [r["step"] for r in scored]
        right.plot(
            at, [r["val_mean_dsc"] for r in scored], color="#222222", lw=2, marker="o", ms=3, label="mean"
        )
        for i, name in enumerate(scored[-1]["val_dsc"]):
            right.plot(
                at, [r["val_dsc"].get(name) or np.nan for r in scored], color=colour(i + 1), lw=1, label=name
            )
        right.legend(frameon=False, fontsize=7)
    right.set(xlabel="step", ylabel="validation DSC", ylim=(0, 1))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    return figure


def box_figure(scores: Mapping[str, Sequence[float]]) -> Figure:
    """DSC of every organ: a box over the cases and each case as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axis = figure.subplots()
    kept = {name: [v for v in values if np.isfinite(v)] for name, values in scores.items()}
    axis.boxplot(list(kept.values()), showfliers=False, widths=0.5, medianprops={"color": "#222222"})
    rng = np.random.default_rng(0)
    for i, values in enumerate(kept.values(), start=1):
        axis.plot(i + rng.uniform(-0.12, 0.12, len(values)), values, "o", ms=4, color=colour(i), alpha=0.8)
    axis.set_xticks(range(1, len(kept) + 1), list(kept), rotation=20, fontsize=8)
    axis.set(ylabel="DSC", ylim=(0, 1.02))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.2)
    return figure


def ablation_figure(table: AblationTable, path: Path, *, title: str) -> None:
    """Draw a table of `aftersam.ablate` into the PNG `path`: organs across, a dot and its deviation a variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axis = figure.subplots()
    columns = table["columns"]
    for i, (column, scores) in enumerate(columns.items()):
        at = np.arange(len(scores)) + 0.15 * (i - (len(columns) - 1) / 2)
        mean, deviation = (
            np.array([100 * score[key] for score in scores.values()]) for key in ("mean", "std")
        )
        name = f"{column}, prompted by the labels" if column in table["prompted"] else column
        axis.errorbar(at, mean, deviation, fmt="o", ms=5, capsize=3, color=colour(i + 1), label=name)
    axis.set_xticks(range(len(scores)), list(scores), rotation=20, fontsize=8)
    axis.set(ylabel="DSC in %")
    axis.set_title(title, fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.2)
    _save(figure, path)


def colour(value: int) -> str:
    """The colour of label `value`, the same in every picture."""
    return COLOURS[(value - 1) % len(COLOURS)]


def _coloured(values: np.ndarray, labels: Mapping[int, str]) -> np.ndarray:
    """RGBA picture of a label plane: a light fill and a strong rim."""
    from matplotlib.colors import to_rgb

    picture = np.zeros((*values.shape, 4))
    for value in labels:
        there = np.asarray(values) == value
        if there.any():
            inside = np.pad(there, 1)
            inside = (
                inside[1:-1, 1:-1]
                & inside[:-2, 1:-1]
                & inside[2:, 1:-1]
                & inside[1:-1, :-2]
                & inside[1:-1, 2:]
            )
            picture[there, :3] = to_rgb(colour(value))
            picture[there, 3] = 0.85
            picture[inside, 3] = 0.4
    return picture


def _richest(mask: np.ndarray, axis: int) -> int:
    """Index along `axis` of the plane with the most labels, then the most labelled voxels; the middle if none."""
    others = tuple(i for i in range(3) if i != axis)
    mask = np.asarray(mask)
    area = (mask > 0).sum(others)
    if not area.any():
        return mask.shape[axis] // 2
    kinds = sum(
        ((mask == value).any(others).astype(int) for value in np.unique(mask) if value), np.zeros(1, int)
    )
    return int(np.lexsort((area, kinds))[-1])


def _occupied(image: np.ndarray, axis: int) -> slice:
    """The part of an in-plane axis that holds more than air, so that pictures are not mostly black."""
    profile = np.asarray(image[:: max(1, len(image) // 16)] > -500).sum(0).max(2 - axis)
    found = np.flatnonzero(profile)
    return slice(max(int(found[0]) - 3, 0), int(found[-1]) + 4) if len(found) else slice(None)


def _save(figure: Figure, path: Path) -> None:
    with renamed(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor=figure.get_facecolor())


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG."""
    import io

    buffer: Any = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor=figure.get_facecolor())
    data: bytes = buffer.getvalue()
    return data
