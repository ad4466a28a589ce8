"""One self-contained HTML page of a result: curves, the table of organs, a box plot, overlays of three cases."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aftersam.errors import SAID, counted, one_line, sentence
from aftersam.evaluation.result import Result, read_result
from aftersam.evaluation.review import HEADINGS, reviewed
from aftersam.evaluation.statistics import mean_of, shown, span
from aftersam.files import read_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; color: #1b1f24; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .8rem; text-align: right; }
td:first-child, th:first-child { text-align: left; }
tr { border-bottom: 1px solid #e3e6ea; } tr.mean { font-weight: 600; }
img { max-width: 100%; border-radius: 4px; } p.facts { color: #57606a; margin-top: .2rem; }
"""


def write_report(
    output: Path,
    metrics: Path,
    *,
    run: Path | None = None,
    images: Path | None = None,
    predictions: Path | None = None,
    labels: Path | None = None,
) -> Path:
    """Write the page to `output`; parts whose files are not given are left out. Raises ValueError on bad files."""
    from aftersam.evaluation.figures import box_figure, curves_figure

    result = read_result(metrics)
    parts = [f"<h1>AFTer-SAM: {shown(result.mean_dsc)} mean DSC</h1>"]
    parts.append(f'<p class="facts">{_text(_facts(result, run))}</p>')
    parts += ["<h2>Organs</h2>", _table(result)]
    per_organ: dict[str, list[float]] = {organ: [] for organ in result.organs}
    for case in result.cases.values():
        for organ, score in case.items():
            if organ in per_organ and score.dsc is not None:
                per_organ[organ].append(score.dsc)
    parts.append(_picture(box_figure(per_organ), "DSC of each organ and case"))
    if run is not None and (run / "history.jsonl").is_file():
        parts += [
            "<h2>Training</h2>",
            _picture(curves_figure(run / "history.jsonl"), "loss and validation DSC"),
        ]
    if images is not None and predictions is not None and labels is not None:
        parts.append("<h2>Cases</h2>")
        parts += _overlays(result, images, predictions, labels)
    if predictions is not None and (found := reviewed(predictions)):
        parts += ["<h2>Least certain first</h2>", _rows([HEADINGS, *(one.cells for one in found)])]
    if result.problems:
        lines = "".join(f"<li>{_text(text)}</li>" for text in result.problems.values())
        parts.append(f"<h2>Not scored</h2><ul>{lines}</ul>")
    page = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>AFTer-SAM</title><style>{STYLE}</style>\n'
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page + "\n".join(parts) + "\n</html>\n")
    return output


def _overlays(result: Result, images: Path, predictions: Path, labels: Path) -> list[str]:
    """Pictures of the best, the median and the worst case; the reason where one cannot be drawn."""
    from aftersam.evaluation.scoring import label_names_near, masks_in

    files = [masks_in(folder) for folder in (images, predictions, labels)]
    names = label_names_near(None, labels, predictions)
    means = {
        case: mean_of([organ.dsc for organ in organs.values() if organ.dsc is not None])
        for case, organs in result.cases.items()
        if all(case in found for found in files)
    }
    ranked = sorted(means, key=lambda case: -means[case])
    chosen = (
        dict(zip(["best", "median", "worst"], [ranked[0], ranked[len(ranked) // 2], ranked[-1]], strict=True))
        if ranked
        else {}
    )
    pictures = []
    for rank, case in chosen.items():
        pictures.append(f"<h3>{rank}: {_text(case)}, mean DSC {shown(means[case])}</h3>")
        try:
            pictures.append(_overlay([found[case] for found in files], names, rank))
        except SAID as error:
            pictures.append(f"<p>{_text(sentence(error))}</p>")
    return pictures


def _overlay(files: list[Path], names: dict[int, str], rank: str) -> str:
    """The picture of a scan, its mask and its reference."""
    from aftersam.data.volume import read_image, read_labels
    from aftersam.evaluation.figures import overlay_figure

    scan = read_image(files[0])
    mask, truth = (read_labels(path, like=scan).array for path in files[1:])
    known = names or {
        value: f"label {value}" for value in np.union1d(np.unique(truth), np.unique(mask)).tolist() if value
    }
    figure = overlay_figure(scan.array, mask, scan.spacing_mm, known, reference=truth)
    return _picture(figure, f"{rank} case, prediction and reference")


def _table(result: Result) -> str:
    nsd = f"nsd {result.nsd_tolerance_mm:g}mm"
    headings = ["organ", "DSC", "95 % interval", "HD95 mm", "missed", nsd, "ICE", "gaps"]
    rows = ["<tr>" + "".join(f"<th>{text}</th>" for text in headings) + "</tr>"]
    for organ, row in result.organs.items():
        cells = [
            organ, shown(row.dsc), span(row.dsc_interval), shown(row.hd95_mm, 1), row.missed, shown(row.nsd),
            shown(row.ice), row.gaps,
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    mean = [shown(result.mean_dsc), span(result.mean_dsc_interval)]
    rows.append(
        '<tr class="mean"><td>mean</td>'
        + "".join(f"<td>{cell}</td>" for cell in mean)
        + "<td></td>" * 5
        + "</tr>"
    )
    over = counted(result.num_cases, "case")
    note = "" if result.interval_reliable else f"<p>Intervals over {over} are unreliable.</p>"
    return f"<table>{''.join(rows)}</table>{note}"


def _rows(rows: list[list[str]]) -> str:
    """A table of text, the first row its headings."""
    lines = [
        "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    ]
    return f"<table>{''.join(lines)}</table>"


def _facts(result: Result, run: Path | None) -> str:
    facts = f"{counted(result.num_cases, 'case')}, DSC of empty masks by the convention {result.convention}"
    if run is None or not (run / "run.json").is_file():
        return facts
    from aftersam.model.run_folder import read_run

    model = read_run(run)[0].model
    return (
        f"{facts}; trained on {read_json(run / 'run.json').get('dataset')}: {model.image_encoder} encoder, attention "
        f"{model.attention}, {counted(model.num_slices, 'slice')}, {counted(model.num_blocks, 'block')}, "
        f"{model.image_size} px"
    )


def _text(value: object) -> str:
    """`value` as text of the page: no name out of a file is markup."""
    return html.escape(one_line(value))


def _picture(figure: Figure, alt: str) -> str:
    from aftersam.evaluation.figures import png_bytes

    data = base64.b64encode(png_bytes(figure)).decode()
    return f'<p><img alt="{_text(alt)}" src="data:image/png;base64,{data}"></p>'
