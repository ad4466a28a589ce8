"""Data sets on disk: four layouts, seeded splits, spacings, sides."""

import json

import pytest

from aftersam.data.dataset import find_dataset, median_spacing, mirror_pairs, split
from toy_files import nnunet, save


def decathlon(root):
    for case in "ab":
        save(root / "imagesTr" / f"{case}.nii.gz")
        save(root / "labelsTr" / f"{case}.nii.gz")
    training = [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in "ab"]
    (root / "dataset.json").write_text(
        json.dumps({"name": "M", "labels": {"0": "background", "1": "liver"}, "training": training})
    )


def segthor(root):
    for number in (1, 2):
        folder = root / f"Patient_{number:02d}"
        save(folder / f"{folder.name}.nii.gz")
        save(folder / "GT.nii.gz")


def plain(root):
    for case in "ab":
        save(root / "images" / f"{case}.nii.gz")
        save(root / "labels" / f"{case}.nii.gz")


@pytest.mark.parametrize("layout", [nnunet, decathlon, segthor, plain], ids=lambda f: f.__name__)
def test_layouts_are_found(tmp_path, layout):
    layout(tmp_path)
    dataset = find_dataset(tmp_path)
    assert len(dataset.cases) == 2
    assert all(case.image.is_file() and case.label.is_file() for case in dataset.cases)
    assert 1 in dataset.labels
    if layout in (nnunet, decathlon):
        assert dataset.labels == {1: "liver"}


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        find_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match=str(tmp_path)):
        find_dataset(tmp_path)


def test_splits_are_seeded_written_and_read_back(tmp_path):
    for case in "abcdefg":
        save(tmp_path / "images" / f"{case}.nii.gz")
        save(tmp_path / "labels" / f"{case}.nii.gz")
    dataset = find_dataset(tmp_path)
    folds = [split(dataset, fold, 0) for fold in range(5)]
    assert sorted(i for _, held in folds for i in held) == list("abcdefg")
    assert all(not set(train) & set(held) for train, held in folds)
    assert split(dataset, 0, 0) == folds[0] != split(dataset, 0, 1)
    split(dataset, 0, 0, write_to=tmp_path / "splits_final.json")
    assert split(dataset, 0, 1) == folds[0]  # the file wins
    with pytest.raises(ValueError, match="fold is 9"):
        split(dataset, 9, 0)


def test_median_spacing_and_mirror_pairs(tmp_path):
    for case, mm in (("a", 1.0), ("b", 2.0), ("c", 5.0)):
        save(tmp_path / "images" / f"{case}.nii.gz", spacing=(1, mm, 3))
        save(tmp_path / "labels" / f"{case}.nii.gz", spacing=(1, mm, 3))
    assert median_spacing(find_dataset(tmp_path).cases) == (3.0, 2.0, 1.0)
    assert mirror_pairs({1: "heart", 2: "lung_left", 3: "lung_right"}) == {2: 3, 3: 2}
    assert mirror_pairs({3: "RightParotid", 4: "LeftParotid"}) == {3: 4, 4: 3}
    with pytest.raises(ValueError, match="kidney_L"):
        mirror_pairs({1: "kidney_L"})
