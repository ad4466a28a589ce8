"""Names out of files, of cases and of organs: none is markup, a formula or a command."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from aftersam.errors import one_line
from aftersam.evaluate import main as evaluate
from aftersam.evaluation.figures import _richness, box_figure, curves_figure, overlay_figure, png_bytes
from aftersam.evaluation.scoring import score_folder
from aftersam.files import write_json
from aftersam.predict import main as predict
from aftersam.report import main as report
from toy_files import AFFINE, organs, save_mask
from toy_scans import scan

NASTY = [
    "[/b]",
    "[red]x",
    "x$^$y",
    "<script>alert(1)</script>",
    "_a",
    "\x1b[31mred",
    "肝臓",
    "a\nb",
    "",
    "n" * 300,
]


@pytest.fixture(scope="module")
def nasty_run(run, tmp_path_factory):
    """The run with organs of nasty names."""
    home = tmp_path_factory.mktemp("nasty") / "run"
    shutil.copytree(run, home)
    facts = json.loads((home / "run.json").read_text())
    facts["labels"] = dict(zip(facts["labels"], NASTY, strict=False))
    (home / "run.json").write_text(json.dumps(facts))
    return home


@pytest.mark.parametrize("name", [name for name in NASTY if 0 < len(name) < 99 and "/" not in name])
def test_predict_shows_names_as_they_are(nasty_run, tmp_path, capsys, name):
    home = tmp_path / "scans"
    home.mkdir()
    scan(home / f"{name}.nii.gz")
    (home / f"bad {name}.nii.gz").write_bytes(b"no scan")
    command = ["-i", str(home), "-o", str(tmp_path / "masks"), "-m", str(nasty_run), "--device", "cpu"]
    assert predict(command) == 1
    err = capsys.readouterr().err
    said = " ".join(err.split())
    for shown in (f"bad {name}.nii.gz", f"{tmp_path / 'masks' / name}.nii.gz:"):
        assert one_line(shown) in said
    assert "\x1b[31m" not in err
    assert (tmp_path / "masks" / f"{name}.png").stat().st_size > 5000


def test_evaluate_and_report_show_names_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    masks, labels = tmp_path / "masks", tmp_path / "labels"
    case = "[b] <i>x$^$y</i>".replace("/", "")
    for folder in (masks, labels):
        save_mask(folder / f"{case}.nii.gz", organs())
    (tmp_path / "images").mkdir()
    nib.save(nib.Nifti1Image(organs().astype(np.int16) * 60, AFFINE), tmp_path / "images" / f"{case}.nii.gz")
    (masks / "lost.nii.gz").write_bytes(b"")
    (labels / "lost.nii.gz").write_bytes(b"<b>")
    for names in (NASTY[0:2], NASTY[2:4], NASTY[4:6]):
        write_json(labels / "dataset.json", {"labels": {"background": 0, names[0]: 1, names[1]: 2}})
        command = ["-p", str(masks), "-l", str(labels), "-o", str(tmp_path / "metrics.json")]
        assert evaluate(command) == 1
        out = capsys.readouterr().out
        assert all(one_line(name) in out for name in names), out
        assert "\x1b[31m" not in out
        folders = ["--images", str(tmp_path / "images"), "--predictions", str(masks), "--labels", str(labels)]
        page = tmp_path / "report.html"
        assert report(["-m", str(tmp_path / "metrics.json"), "-o", str(page), *folders]) == 0
        text = page.read_text()
        assert "<script" not in text
        assert "<i>" not in text
        assert text.count("data:image/png;base64,") == 4


FIELDS = [
    ("num_cases",), ("convention",), ("nsd_tolerance_mm",), ("mean_dsc",), ("mean_dsc_interval",),
    ("interval_reliable",),
    ("organs",), ("organs", "liver"), ("organs", "liver", "missed"), ("organs", "liver", "gaps"),
    ("organs", "liver", "dsc"), ("organs", "liver", "dsc_interval"), ("organs", "liver", "nsd_3mm"), ("cases",),
    ("cases", "a"), ("cases", "a", "liver"), ("cases", "a", "liver", "dsc"), ("problems",), ("problems", "z"),
]  # fmt: skip


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """A result of one case."""
    home = tmp_path_factory.mktemp("scored")
    for folder in ("masks", "labels"):
        save_mask(home / folder / "a.nii.gz", organs())
    write_json(home / "labels" / "dataset.json", {"labels": {"background": 0, "liver": 1, "spleen": 2}})
    return json.loads(json.dumps(score_folder(home / "masks", home / "labels", quiet=True)))


@pytest.mark.parametrize("field", FIELDS, ids=".".join)
@pytest.mark.parametrize(
    "value", ["<script>", 10**400, None, [1], {"<b>": {"<b>": "<b>"}}, True], ids=lambda value: str(value)[:9]
)  # fmt: skip
def test_a_strangers_metrics_are_shown_or_refused_in_one_sentence(metrics, tmp_path, capsys, field, value):
    changed = json.loads(json.dumps(metrics))
    *way, last = field
    home = changed
    for key in way:
        home = home[key]
    home[last] = value
    path, page = tmp_path / "metrics.json", tmp_path / "report.html"
    path.write_text(json.dumps(changed))
    code = report(["-m", str(path), "-o", str(page)])
    said = capsys.readouterr().err
    if code:
        assert code == 2
        assert str(path) in said
        assert len(said.splitlines()) == 1
        assert not page.exists()
    else:
        assert "<script" not in page.read_text()
        assert "<b>" not in page.read_text()


@pytest.mark.parametrize("name", NASTY, ids=repr)
def test_every_picture_takes_every_name(tmp_path, name):
    history = tmp_path / "history.jsonl"
    records = [
        {"step": 1, "loss": 1.0, "dice": "<b>", "ce": 0.5},
        {"val_mean_dsc": 0.5, "val_dsc": {name: 0.5}},
    ]
    history.write_text("\n".join(map(json.dumps, [*records, [], {}])) + '\n{"step": 2, "lo')
    labels = np.zeros((4, 8, 8), np.uint8)
    labels[1:3, 2:6, 2:6] = 1
    image = labels.astype(np.int16) * 100
    for figure in (
        curves_figure(history), box_figure({name: [0.5, 0.6]}), box_figure({}),
        overlay_figure(image, labels, (3, 1, 1), {1: name, 2: "b"}, title=name),
    ):  # fmt: skip
        assert png_bytes(figure).startswith(b"\x89PNG")


@given(arrays.arrays(np.int16, (3, 4, 5), elements=st.integers(0, 300)))
def test_the_plane_with_the_most_labels_is_shown(mask):
    rich = _richness(mask)
    assert rich.values == [v for v in np.unique(mask).tolist() if v]
    for axis in (0, 1):
        planes = np.moveaxis(mask, axis, 0)
        scores = [(len(set(plane.ravel().tolist()) - {0}), int((plane > 0).sum())) for plane in planes]
        best = scores[rich.richest(axis)]
        assert best == max(scores) or not mask.any()
