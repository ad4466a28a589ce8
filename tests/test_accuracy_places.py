"""Where attention across slices gains: DSC at the ends of organs and between, and the difference of two systems."""

import json

import nibabel as nib
import numpy as np
import pytest

from benchmarks.accuracy.places import NEAR, gains, place_scores, section, write_sparse

NAMES = {"background": 0, "cord": 1, "heart": 2}


def write(folder, name, array):
    folder.mkdir(exist_ok=True)
    affine = np.diag([-4.0, -4.0, 2.5, 1.0])
    nib.save(nib.Nifti1Image(array.transpose(2, 1, 0).astype(np.uint8), affine), folder / f"{name}.nii.gz")


@pytest.fixture
def folders(tmp_path):
    truth = np.zeros((12, 8, 8))
    truth[2:10, 2:6, 2:6] = 1  # slices 2 to 9: 2, 3, 8, 9 are the ends
    write(tmp_path / "labels", "a", truth)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": NAMES}))
    return truth, tmp_path / "masks", tmp_path / "labels"


def test_an_error_counts_where_it_lies(folders):
    truth, masks, labels = folders
    assert NEAR == 2
    mask = truth.copy()
    mask[9], mask[1] = 0, truth[2]  # its last slice missed, one before its first marked
    mask[5, 2:6, 2:4] = 0  # half of a slice between
    write(masks, "a", mask)
    scores = place_scores(masks, labels)
    assert scores["ends"]["a"]["cord"]["dsc"] == pytest.approx(2 * 3 / (4 + 4))
    assert scores["between"]["a"]["cord"]["dsc"] == pytest.approx(2 * 3.5 / (4 + 3.5))
    assert scores["ends"]["a"]["heart"] == scores["between"]["a"]["heart"] == {"dsc": None}


def test_a_mark_on_an_organ_that_is_not_there_is_an_error_at_its_ends(folders):
    truth, masks, labels = folders
    mask = truth.copy()
    mask[3, 0, 0] = 2
    write(masks, "a", mask)
    scores = place_scores(masks, labels)
    assert scores["ends"]["a"]["heart"] == {"dsc": 0.0}
    assert scores["between"]["a"]["heart"] == {"dsc": None}


def test_an_organ_of_few_slices_has_none_between(tmp_path):
    truth = np.zeros((6, 4, 4))
    truth[2:5] = 1
    write(tmp_path / "labels", "a", truth)
    write(tmp_path / "masks", "a", truth)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": NAMES}))
    scores = place_scores(tmp_path / "masks", tmp_path / "labels")
    assert scores["ends"]["a"]["cord"] == {"dsc": 1.0}
    assert scores["between"]["a"]["cord"] == {"dsc": None}


def test_a_scan_of_one_slice_keeps_it(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / "scans").mkdir(exist_ok=True)
        write(tmp_path / "scans" / folder, "a", np.ones((1, 4, 4)))
    (tmp_path / "scans" / "dataset.json").write_text(json.dumps({"labels": NAMES}))
    write_sparse(tmp_path / "scans", tmp_path / "sparse")
    assert nib.load(tmp_path / "sparse" / "labels" / "a.nii.gz").shape == (4, 4, 1)


def test_a_difference_is_of_cases_that_both_have_scored():
    one = {"ends": {"a": {"cord": {"dsc": 0.9}}, "b": {"cord": {"dsc": 0.2}}}}
    other = {"ends": {"a": {"cord": {"dsc": 0.8}}, "b": {"cord": {"dsc": None}}}}
    row = gains({"aftersam": [one], "aftersam_2d": [other]}, ["a", "b"], ["cord"])[0]
    assert (row["with"], row["alone"], row["difference"]) == (0.55, 0.8, pytest.approx(0.1))


def test_the_same_masks_gain_nothing_and_better_ends_show_as_such(folders):
    truth, masks, labels = folders
    write(masks, "a", truth)
    right = place_scores(masks, labels)
    short = truth.copy()
    short[[2, 9]] = 0
    write(masks, "a", short)
    wrong = place_scores(masks, labels)
    organs = list(NAMES)[1:]
    by = {
        (row["place"], row["organ"]): row
        for row in gains({"aftersam": [right, right], "aftersam_2d": [wrong]}, ["a"], organs)
    }
    assert by["ends", "all"]["difference"] == pytest.approx(1 - 2 / 3, abs=1e-6)
    assert by["between", "cord"]["difference"] == 0
    assert by["ends", "heart"]["difference"] is None
    text = "\n".join(section(list(by.values())))
    assert "| **all** | 66.7 | 100.0 | +33.3 (+33.3 … +33.3) | 100.0 | 100.0 | +0.0 (+0.0 … +0.0) |" in text
    assert "every third slice" not in text.partition("|")[2]  # which these rows were not asked for
    assert "| heart | – | – | – | – | – | – |" in text


def test_without_both_systems_there_is_no_section():
    assert section(gains({"aftersam": [{}]}, ["a"], ["cord"])) == []


@pytest.mark.parametrize("axis", [0, 2])
def test_sparse_scans_keep_the_middle_of_every_three_slices_where_it_lay(tmp_path, axis):
    affine = np.diag([-4.0, -4.0, 2.5, 1.0])
    array = np.arange(8, dtype=np.uint8).reshape(1, 1, 8) + np.zeros((5, 6, 1), np.uint8)
    if axis == 0:
        array, affine = array.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]
    for folder in ("images", "labels"):
        (tmp_path / "scans" / folder).mkdir(parents=True)
        nib.save(nib.Nifti1Image(array, affine), tmp_path / "scans" / folder / "a.nii.gz")
    (tmp_path / "scans" / "dataset.json").write_text(json.dumps({"labels": NAMES}))
    write_sparse(tmp_path / "scans", tmp_path / "sparse")
    for folder in ("images", "labels"):
        sparse = nib.load(tmp_path / "sparse" / folder / "a.nii.gz")
        assert np.unique(sparse.get_fdata()).tolist() == [1, 4, 7]
        voxel = [0, 0, 0]
        voxel[axis] = 1  # slice 4 of the scan
        assert (sparse.affine @ [*voxel, 1])[2] == pytest.approx(4 * 2.5)
    assert (
        place_scores(tmp_path / "sparse" / "labels", tmp_path / "sparse" / "labels")["ends"]["a"]["cord"][
            "dsc"
        ]
        == 1
    )
