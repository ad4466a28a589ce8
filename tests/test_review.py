"""Scans by the DSC that their probabilities let expect: the formula, the order, the table and the page."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from aftersam.evaluation.review import HEADINGS, reviewed, write_review
from aftersam.evaluation.scoring import score_folder
from aftersam.files import read_json, write_json
from aftersam.inference.inputs import PredictOptions
from aftersam.inference.planes import Plane
from aftersam.inference.sliding import Sink, fill
from aftersam.inference.timings import Timings
from aftersam.predict import main
from aftersam.report import main as report
from toy_scans import scan


def table(folder):
    with (folder / "review.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_the_expected_dsc_is_that_of_truths_drawn_from_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 4, 40, 50, generator=generator)  # (slices, K+1, H, W)
    logits[:, 3] = -30.0  # in no mask
    sink = Sink((3, 40, 50), Timings())
    found = fill(iter([Plane(one) for one in logits]), 4, PredictOptions(expected_dsc=True), sink)
    assert found.expected_dsc is not None
    shares = logits.softmax(1).numpy().cumsum(1)
    rng, scores = np.random.default_rng(0), []
    for _ in range(20):
        truth = (rng.random((3, 1, 40, 50)) > shares).sum(1)
        pairs = [(found.labels == k, truth == k) for k in (1, 2)]
        scores.append([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs])
    np.testing.assert_allclose(found.expected_dsc[:2], np.mean(scores, axis=0), atol=0.005)
    assert np.isnan(found.expected_dsc[2])
    plain = fill(iter([Plane(one) for one in logits]), 4, PredictOptions(), sink)
    assert plain.expected_dsc is None
    np.testing.assert_array_equal(plain.labels, found.labels)


def test_a_folder_is_listed_least_certain_first_in_csv_and_in_the_report(run, tmp_path, capsys):
    home, masks = tmp_path / "scans", tmp_path / "masks"
    home.mkdir()
    for i in range(3):
        rng = np.random.default_rng(i)
        image = nib.Nifti1Image(
            rng.normal(-300 * i, 200, (40, 36, 6)).astype(np.int16), np.diag([4, 4, 5, 1.0])
        )
        nib.save(image, home / f"case{i}.nii.gz")
    command = ["-i", str(home), "-o", str(masks), "-m", str(run), "--device", "cpu", "--no-preview"]
    assert main(command) == 0
    plain = {path.name: np.asarray(nib.load(path).dataobj) for path in masks.glob("*.nii.gz")}
    assert main([*command, "--review"]) == 0  # masks that were finished before say nothing of themselves
    assert "lists 0 of 3 masks, least certain first; the others were made without" in capsys.readouterr().err
    assert main([*command, "--review", "--overwrite", "--confidence"]) == 0
    assert (
        "lists 3 of 3 masks, least certain first\n" in capsys.readouterr().err
    )  # no confidence map is a mask
    for name, mask in plain.items():
        np.testing.assert_array_equal(np.asarray(nib.load(masks / name).dataobj), mask)
    headings, *rows = table(masks)
    assert headings == HEADINGS
    assert sorted(row[0] for row in rows) == ["case0", "case1", "case2"]
    values = [float(row[1]) for row in rows]
    assert values == sorted(values)
    for case, mean, worst, value, _ in rows:
        stored = read_json(masks / f"{case}.json")["expected_dsc"]
        present = {name: dsc for name, dsc in stored.items() if dsc is not None}
        assert float(mean) == pytest.approx(sum(present.values()) / len(stored), abs=1e-4)
        assert float(value) == pytest.approx(min(present.values()), abs=1e-4)
        assert present[worst] == min(present.values())
    write_json(tmp_path / "metrics.json", score_folder(masks, masks, quiet=True))
    page = tmp_path / "report.html"
    given = ["-m", str(tmp_path / "metrics.json"), "-o", str(page), "--predictions", str(masks)]
    assert report(given) == 0
    text = page.read_text()
    assert "Least certain first" in text
    places = [text.index(f"<td>{row[0]}</td><td>{row[1]}</td>") for row in rows]
    assert places == sorted(places)


def test_review_is_of_a_folder(run, tmp_path, capsys):
    command = ["-i", str(scan(tmp_path / "a.nii.gz")), "-o", str(tmp_path / "m.nii.gz"), "-m", str(run)]
    assert main([*command, "--device", "cpu", "--review"]) == 2
    assert "--review lists the scans of a folder" in capsys.readouterr().err


def test_strangers_files_and_names_are_no_formulas_and_no_failures(tmp_path):
    write_json(tmp_path / "=1+1.json", {"labels": {}, "expected_dsc": {"@organ": 0.25, "\x1b[31m": None}})
    write_json(tmp_path / "b.json", {"expected_dsc": {"heart": 0.5, "lung": None}})
    write_json(tmp_path / "none.json", {"expected_dsc": {"heart": None}})
    for i, stranger in enumerate(
        [{"expected_dsc": 3}, {"expected_dsc": {"a": 7}}, {"expected_dsc": {"a": "b"}}, [], 3]
    ):
        (tmp_path / f"stranger{i}.json").write_text(json.dumps(stranger))
    (tmp_path / "broken.json").write_text("{")
    for path in list(tmp_path.glob("*.json")):
        path.with_suffix(".nii.gz").touch()
    write_json(tmp_path / "deleted.json", {"expected_dsc": {"heart": 0.1}})  # its mask is gone
    assert [one.case for one in reviewed(tmp_path)] == ["none", "=1+1", "b"]
    assert "lists 3 of 9 masks" in write_review(tmp_path, [tmp_path])
    assert table(tmp_path)[1:] == [
        ["none", "0.0000", "", "", "heart"],
        ["'=1+1", "0.1250", "'@organ", "0.2500", "[31m"],
        ["b", "0.2500", "heart", "0.5000", "lung"],
    ]


def test_a_scan_with_one_certain_organ_and_others_missing_comes_before_an_uncertain_one(tmp_path):
    organs = [f"organ {i}" for i in range(7)]
    write_json(tmp_path / "all.json", {"expected_dsc": dict.fromkeys(organs, 0.6)})
    write_json(tmp_path / "one.json", {"expected_dsc": {**dict.fromkeys(organs), "organ 3": 0.99}})
    for name in ("all", "one"):
        (tmp_path / f"{name}.nii.gz").touch()
    assert [(one.case, round(one.mean, 4)) for one in reviewed(tmp_path)] == [("one", 0.1414), ("all", 0.6)]


@pytest.mark.parametrize("cohort", ["a tree", "a list"])
def test_masks_in_folders_below_are_listed(run, tmp_path, capsys, cohort):
    for site in ("north", "south"):
        (tmp_path / "scans" / site).mkdir(parents=True)
        scan(tmp_path / "scans" / site / "a.nii.gz", (24, 20, 3))
    listed = tmp_path / "scans.csv"
    listed.write_text("image,case_id\nscans/north/a.nii.gz,north/a\nscans/south/a.nii.gz,south/a\n")
    masks = tmp_path / "masks"
    (masks / "other").mkdir(parents=True)  # of no scan of this cohort
    for name in ("other/c.json", "other/c.nii.gz"):
        write_json(masks / name, {"expected_dsc": {"heart": 0.0}})
    source = ["-i", str(listed)] if cohort == "a list" else ["-i", str(tmp_path / "scans"), "--recursive"]
    command = [*source, "-o", str(masks), "-m", str(run), "--device", "cpu", "--no-preview", "--review"]
    assert main(command) == 0
    assert "lists 2 of 2 masks, least certain first\n" in capsys.readouterr().err
    cases = [row[0] for row in table(masks)[1:]]
    assert sorted(cases) == ["north/a", "south/a"]
    (row,) = {tuple(row[1:]) for row in table(masks)[1:]}
    rows = [
        json.loads(line) for path in masks.glob("manifest/*.jsonl") for line in path.read_text().splitlines()
    ]
    assert [one["expected_dsc"] for one in rows] == [float(row[0])] * 2
    assert [one.case for one in reviewed(masks)] == ["other/c", *cases]  # as the report lists them
