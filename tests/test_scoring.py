"""Evaluation and report: files to numbers, one bad case does not stop the others, a page that stands alone."""

import json

import nibabel as nib
import numpy as np
import pytest

from aftersam.evaluate import main
from aftersam.evaluation.scoring import evaluate
from aftersam.report import main as report_main

AFFINE = np.diag([-2.0, -2.0, 4.0, 1.0])


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array, np.uint8), affine), path)


def organs(shift=0):
    mask = np.zeros((24, 24, 10), np.uint8)
    mask[4 + shift : 12 + shift, 4:12, 2:8] = 1
    mask[14:20, 14:20, 3:7] = 2
    return mask


@pytest.fixture
def folders(tmp_path):
    """Three cases: perfect, shifted by two voxels, one organ missed."""
    labels, masks = tmp_path / "set" / "labelsTr", tmp_path / "masks"
    for name, mask in {"a": organs(), "b": organs(2), "c": np.where(organs() == 2, 0, organs())}.items():
        save(labels / f"{name}.nii.gz", organs())
        save(masks / f"{name}.nii.gz", mask)
    (tmp_path / "set" / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}})
    )
    return masks, labels


def test_numbers_by_hand(folders, tmp_path):
    masks, labels = folders
    metrics = evaluate(masks, labels, output=tmp_path / "metrics.json", quiet=True)
    liver, spleen = metrics["organs"]["liver"], metrics["organs"]["spleen"]
    assert liver["dsc"] == pytest.approx((1 + 0.75 + 1) / 3, abs=1e-6)
    assert spleen["dsc"] == pytest.approx(2 / 3, abs=1e-6)
    assert metrics["mean_dsc"] == pytest.approx((liver["dsc"] + spleen["dsc"]) / 2, abs=1e-6)
    assert (spleen["missed"], spleen["hd95_infinite"]) == (1, 1)
    assert spleen["hd95_mm"] == 0
    assert spleen["hd95_mm_penalised"] == pytest.approx(np.linalg.norm([48, 48, 40]) / 3, abs=1e-3)
    assert not metrics["interval_reliable"]
    low, high = metrics["mean_dsc_interval"]
    assert low <= metrics["mean_dsc"] <= high
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert "NaN" not in (tmp_path / "metrics.json").read_text()


def test_the_convention_decides_on_empty_masks_and_on_the_order_of_means(folders):
    """a: both organs right. b: the liver has 0.75. c: the spleen is missed."""
    masks, labels = folders
    save(labels / "b.nii.gz", np.where(organs() == 2, 0, organs()))  # a spleen is found where none is
    spleen, total = {"nnunet": 1 / 3, "monai": 1 / 2, "transunet": 2 / 3}, {}
    for convention, dsc in spleen.items():
        metrics = evaluate(masks, labels, convention=convention, quiet=True)
        assert metrics["organs"]["spleen"]["dsc"] == pytest.approx(dsc, abs=1e-6)
        total[convention] = metrics["mean_dsc"]
    liver = 2.75 / 3
    assert total["nnunet"] == pytest.approx((liver + 1 / 3) / 2, abs=1e-6)
    assert total["transunet"] == pytest.approx((liver + 2 / 3) / 2, abs=1e-6)
    assert total["monai"] == pytest.approx((1 + 0.75 + 0.5) / 3, abs=1e-6)


def test_another_voxel_order_is_the_same_mask(folders):
    masks, labels = folders
    image = nib.load(masks / "b.nii.gz")
    turned = image.as_reoriented(nib.orientations.axcodes2ornt(("S", "R", "P")) * 1.0)
    before = evaluate(masks, labels, quiet=True)["organs"]
    nib.save(turned, masks / "b.nii.gz")
    assert evaluate(masks, labels, quiet=True)["organs"] == before


def test_paired_differences(folders, tmp_path):
    masks, labels = folders
    other = tmp_path / "other"
    for name in "abc":
        save(other / f"{name}.nii.gz", organs(2))
    paired = evaluate(masks, labels, against=other, quiet=True)["paired"]
    assert paired["num_cases"] == 3
    assert paired["organs"]["liver"]["dsc_difference"] == pytest.approx((0.25 + 0 + 0.25) / 3, abs=1e-6)
    assert (paired["organs"]["liver"]["won"], paired["organs"]["liver"]["lost"]) == (2, 0)


def test_bad_cases_are_reported_and_the_others_scored(folders, tmp_path, capsys):
    masks, labels = folders
    save(masks / "b.nii.gz", organs()[:-1])
    (masks / "c.nii.gz").unlink()
    output = tmp_path / "m.json"
    assert main(["-p", str(masks), "-l", str(labels), "-o", str(output)]) == 1
    error = capsys.readouterr().err
    assert "b.nii.gz" in error
    assert "no mask for the case c" in error
    metrics = json.loads(output.read_text())
    assert metrics["num_cases"] == 1
    assert set(metrics["problems"]) == {"b", "c"}


def test_a_label_outside_the_map_is_a_problem(folders):
    masks, labels = folders
    save(masks / "a.nii.gz", np.where(organs() == 1, 7, organs()))
    assert "label 7" in evaluate(masks, labels, quiet=True)["problems"]["a"]


def test_the_decathlon_and_the_masks_own_names_are_read(folders):
    masks, labels = folders
    description = labels.parent / "dataset.json"
    description.write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "spleen"}}))
    assert list(evaluate(masks, labels, quiet=True)["organs"]) == ["liver", "spleen"]
    description.unlink()
    assert list(evaluate(masks, labels, quiet=True)["organs"]) == ["label 1", "label 2"]


@pytest.mark.parametrize("case", ["no folder", "empty folder", "tolerance"])
def test_what_cannot_be_scored_is_one_line(folders, tmp_path, capsys, case):
    masks, labels = folders
    arguments = ["-p", str(masks), "-l", str(labels), "-o", str(tmp_path / "m.json")]
    if case == "no folder":
        arguments[1] = str(tmp_path / "none")
    elif case == "empty folder":
        (tmp_path / "void").mkdir()
        arguments[1] = str(tmp_path / "void")
    else:
        arguments += ["--nsd-tolerance-mm", "0"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("aftersam.evaluate: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "m.json").exists()


def test_the_report_is_one_page_with_pictures(folders, tmp_path, capsys):
    masks, labels = folders
    images = tmp_path / "set" / "imagesTr"
    for name in "abc":
        array = (organs().astype(np.int16) * 60 - 20).astype(np.int16)
        images.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, AFFINE), images / f"{name}_0000.nii.gz")
    evaluate(masks, labels, output=tmp_path / "metrics.json", quiet=True)
    page = tmp_path / "report.html"
    arguments = ["-m", str(tmp_path / "metrics.json"), "-o", str(page), "--images", str(images)]
    assert report_main([*arguments, "--predictions", str(masks), "--labels", str(labels)]) == 0
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 4  # box plot; best, median and worst case
    assert 'src="http' not in text
    assert "href=" not in text
    assert "spleen" in text
    (tmp_path / "metrics.json").write_text("{}")
    assert report_main(arguments) == 2
    assert "mean_dsc" in capsys.readouterr().err
