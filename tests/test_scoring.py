"""Scores of folders: numbers by hand, conventions, names, paired differences."""

import json

import nibabel as nib
import numpy as np
import pytest

from aftersam.evaluation.scoring import ScoringOptions, score_folder
from aftersam.files import read_json, write_json
from toy_files import organs, save_mask, scored_folders


@pytest.fixture
def folders(tmp_path):
    return scored_folders(tmp_path)


def test_numbers_by_hand(folders, tmp_path):
    masks, labels = folders
    metrics = score_folder(masks, labels, quiet=True)
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
    write_json(tmp_path / "metrics.json", metrics)  # which refuses NaN
    assert read_json(tmp_path / "metrics.json") == metrics


def test_the_convention_decides_on_empty_masks_and_on_the_order_of_means(folders):
    """a: both organs right. b: the liver has 0.75. c: the spleen is missed."""
    masks, labels = folders
    save_mask(labels / "b.nii.gz", np.where(organs() == 2, 0, organs()))  # a spleen is found where none is
    spleen, total = {"nnunet": 1 / 3, "monai": 1 / 2, "transunet": 2 / 3}, {}
    for convention, dsc in spleen.items():
        metrics = score_folder(masks, labels, ScoringOptions(convention=convention), quiet=True)
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
    before = score_folder(masks, labels, quiet=True)["organs"]
    nib.save(turned, masks / "b.nii.gz")
    assert score_folder(masks, labels, quiet=True)["organs"] == before


def test_maps_of_confidence_beside_masks_are_no_cases(folders):
    masks, labels = folders
    expected = score_folder(masks, labels, quiet=True)
    for folder in (masks, labels):
        save_mask(folder / "a.confidence.nii.gz", organs())
    assert score_folder(masks, labels, quiet=True) == expected


def test_paired_differences(folders, tmp_path):
    masks, labels = folders
    other = tmp_path / "other"
    for name in "abc":
        save_mask(other / f"{name}.nii.gz", organs(2))
    paired = score_folder(masks, labels, against=other, quiet=True)["paired"]
    assert paired["num_cases"] == 3
    assert paired["organs"]["liver"]["dsc_difference"] == pytest.approx((0.25 + 0 + 0.25) / 3, abs=1e-6)
    assert (paired["organs"]["liver"]["won"], paired["organs"]["liver"]["lost"]) == (2, 0)


def test_a_folder_does_not_differ_from_itself(folders):
    masks, labels = folders
    paired = score_folder(masks, labels, against=masks, quiet=True)["paired"]
    assert paired["num_cases"] == 3
    assert paired["mean"]["dsc_difference"] == 0


@pytest.mark.parametrize(
    "labels",
    [
        '{"0": "background", "1": "liver", "2": "liver"}', '{"liver": 1, "spleen": 1}', '{"liver": 1e999, "spleen": 2}',
        '{"liver": NaN}', '{"liver": 1.7, "spleen": 2}', '{"liver": true, "spleen": 2}', '{"liver": [1, 2]}',
        '{"1": null}', "[1, 2]", "7",
    ],
)  # fmt: skip
def test_names_that_cannot_be_right_are_refused_where_asked_for_and_unused_otherwise(
    folders, tmp_path, labels
):
    masks, references = folders
    path = references.parent / "dataset.json"
    path.write_text(f'{{"labels": {labels}}}')
    with pytest.raises(ValueError, match=r"dataset\.json"):
        score_folder(masks, references, ScoringOptions(label_names=path), quiet=True)
    for other in masks.glob("*.json"):
        other.unlink()
    assert list(score_folder(masks, references, quiet=True)["organs"]) == ["label 1", "label 2"]


def test_a_label_outside_the_map_is_a_problem(folders):
    masks, labels = folders
    save_mask(masks / "a.nii.gz", np.where(organs() == 1, 7, organs()))
    assert "label 7" in score_folder(masks, labels, quiet=True)["problems"]["a"]


def test_the_decathlon_and_the_masks_own_names_are_read(folders):
    masks, labels = folders
    description = labels.parent / "dataset.json"
    description.write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "spleen"}}))
    assert list(score_folder(masks, labels, quiet=True)["organs"]) == ["liver", "spleen"]
    description.unlink()
    assert list(score_folder(masks, labels, quiet=True)["organs"]) == ["label 1", "label 2"]
