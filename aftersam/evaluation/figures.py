"""Pictures: masks over a scan, curves of a run, box plots of scores. Matplotlib without a display."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from aftersam.errors import counted, naming, one_line
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
    rich = _richness(guide)
    z, y = rich.richest(0), rich.richest(1)
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
            grey = np.asarray(plane, np.float32)
            axis.imshow(grey, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
            axis.imshow(_coloured(values, labels), extent=extent, interpolation="nearest")
            axis.set_title(f"{name}, {where}" if len(shown_masks) > 1 else where, color="#cfd8dc", fontsize=8)
            axis.set_axis_off()
    present = {*rich.values, *(rich if guide is mask else _richness(mask)).values}
    shown = [value for value in labels if value in present]
    figure.legend(
        handles=[Patch(color=colour(value), label=_name(labels[value])) for value in shown],
        loc="outside lower center", ncols=min(len(shown) or 1, 6), frameon=False, fontsize=8, labelcolor="#cfd8dc",
    )  # fmt: skip
    if title:
        figure.suptitle(_name(title), color="white", fontsize=10)
    return figure


def loss_figure(history: Path, path: Path) -> None:
    """Draw the loss and the validation DSC that `history` (JSON lines) holds into the PNG `path`."""
    _save(curves_figure(history), path)


def curves_figure(history: Path) -> Figure:
    """The figure of `loss_figure`."""
    from matplotlib.figure import Figure

    steps, scored = _curves(history)
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
        left.set(xlabel="step", ylabel=f"mean of {counted(window, 'step')}", ylim=(0, None))
        left.legend(frameon=False, fontsize=8)
    if scored:
        at = [step for step, _, _ in scored]
        right.plot(at, [mean for _, mean, _ in scored], color="#222222", lw=2, marker="o", ms=3, label="mean")
        for i, name in enumerate(scored[-1][2]):
            of_organ = [organs.get(name, np.nan) for _, _, organs in scored]
            right.plot(at, of_organ, color=colour(i + 1), lw=1, label=_name(name))
        right.legend(frameon=False, fontsize=7)
    right.set(xlabel="step", ylabel="validation DSC", ylim=(0, 1))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    return figure


def _curves(history: Path) -> tuple[list[list[float]], list[tuple[float, float, dict[str, float]]]]:
    """(step, loss, Dice term, cross-entropy) and (step, mean DSC, DSC of each organ) in `history`, NaN if no number.

    Lines that a killed training left unfinished are skipped. Raises ValueError on a file of anything else."""
    with naming(history, "is not the history of a training"):
        lines = history.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        steps = [[_number(r.get(k)) for k in ("step", "loss", "dice", "ce")] for r in records if "loss" in r]
        scored = [
            r for r in records if isinstance(r.get("val_dsc"), dict) and r.get("val_mean_dsc") is not None
        ]
        return steps, [
            (
                _number(r.get("step")),
                _number(r["val_mean_dsc"]),
                {k: _number(v) for k, v in r["val_dsc"].items()},
            )
            for r in scored
        ]


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


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
    axis.set_xticks(range(1, len(kept) + 1), [_name(organ) for organ in kept], rotation=20, fontsize=8)
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
        axis.errorbar(at, mean, deviation, fmt="o", ms=5, capsize=3, color=colour(i + 1), label=_name(name))
    axis.set_xticks(range(len(scores)), [_name(organ) for organ in scores], rotation=20, fontsize=8)
    axis.set(ylabel="DSC in %")
    axis.set_title(_name(title), fontsize=9)
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


class _Richness(NamedTuple):
    """How many labels, and how many labelled voxels, each plane of a mask (D, H, W) has."""

    values: list[int]
    kinds: tuple[np.ndarray, np.ndarray]  # (D,) and (H,)
    areas: tuple[np.ndarray, np.ndarray]

    def richest(self, axis: int) -> int:
        """Index along `axis` 0 or 1 of the plane with the most labels, then voxels; the middle if none has any."""
        kinds, area = self.kinds[axis], self.areas[axis]
        return int(np.lexsort((area, kinds))[-1]) if area.any() else len(area) // 2


def _richness(mask: np.ndarray) -> _Richness:
    """Slice by slice: a temporary array of the scan's size for each label would take more than the prediction."""
    depth, height, _ = mask.shape
    size = int(mask.max(initial=0)) + 1
    by_slice, by_row = np.zeros((depth, size), int), np.zeros((height, size), int)
    first = np.arange(height)[:, None] * size  # of a row's counts
    for d, plane in enumerate(mask):
        counts = np.bincount((first + plane).ravel(), minlength=height * size).reshape(height, size)
        by_slice[d] = counts.sum(0)
        by_row += counts
    found = [counts[:, 1:] for counts in (by_slice, by_row)]
    kinds, areas = zip(*(((counts > 0).sum(1), counts.sum(1)) for counts in found), strict=True)
    return _Richness((np.flatnonzero(found[0].any(0)) + 1).tolist(), kinds, areas)


def _occupied(image: np.ndarray, axis: int) -> slice:
    """The part of an in-plane axis that holds more than air, so that pictures are not mostly black."""
    profile = np.asarray(image[:: max(1, len(image) // 16)] > -500).sum(0).max(2 - axis)
    found = np.flatnonzero(profile)
    return slice(max(int(found[0]) - 3, 0), int(found[-1]) + 4) if len(found) else slice(None)


def _name(text: str) -> str:
    """A name out of a file as a picture shows it: one line of 60 characters, and none that matplotlib leaves out."""
    text = one_line(text)
    text = text if len(text) <= 60 else f"{text[:59]}…"
    return f" {text}" if text.startswith("_") else text or "–"


def _save(figure: Figure, path: Path) -> None:
    with renamed(path) as temporary:
        temporary.write_bytes(png_bytes(figure, dpi=130))


def png_bytes(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as PNG. Its texts are shown as they are, without formulas, since names out of files are among them."""
    import io

    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a Text
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands in its place
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # names that leave no room
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()
