"""Preprocessed scans on disk: found again, made anew for new content, refused by name."""

import dataclasses
import resource
import shutil

import nibabel as nib
import numpy as np
import pytest

from aftersam.config import DataConfig, preset
from aftersam.data.cache import cache_cases
from aftersam.data.dataset import find_dataset
from aftersam.data.phantom import write_dataset
from aftersam.data.slice_group import SliceGroups
from toy_files import nnunet


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    write_dataset(root / "scans", cases=2, seed=0)
    dataset = find_dataset(root / "scans")
    ids = [case.id for case in dataset.cases]
    return (
        dataset,
        cache_cases(dataset, ids, preset("tiny").data, root / "cache", training=ids),
        root / "cache",
    )


def test_the_cache_is_found_again_and_made_anew_for_new_content(cached):
    dataset, cases, folder = cached
    ids = [case.id for case in dataset.cases]
    before = sorted(p.name for p in folder.iterdir())
    cache_cases(dataset, ids, preset("tiny").data, folder, training=ids)
    assert sorted(p.name for p in folder.iterdir()) == before
    cache_cases(
        dataset,
        ids,
        dataclasses.replace(preset("tiny").data, spacing_mm=(5.0, 4.0, 4.0)),
        folder,
        training=ids,
    )
    assert len(list(folder.iterdir())) == 2 * len(before)
    case = cases[ids[0]]
    assert case.hu.shape == case.labels.shape == case.shape
    assert not case.hu.flags.writeable


def test_bad_labels_end_the_preprocessing_by_name(tmp_path):
    nnunet(tmp_path)
    array = np.zeros((6, 5, 4), np.uint8)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 3, 1])), tmp_path / "labelsTr" / "b.nii.gz")
    dataset = find_dataset(tmp_path)
    config = DataConfig(spacing_mm="native")
    with pytest.raises(ValueError, match=r"b\.nii\.gz is empty"):
        cache_cases(dataset, ["a", "b"], config, tmp_path / "cache", training=["a"])
    nib.save(nib.Nifti1Image(array + 3, np.diag([2.0, 2, 3, 1])), tmp_path / "labelsTr" / "b.nii.gz")
    with pytest.raises(ValueError, match="label 3"):
        cache_cases(dataset, ["a", "b"], config, tmp_path / "cache", training=["a"])


DAMAGE = {
    "cut": lambda data: data[:-100],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "foreign": lambda data: b"PK\x03\x04" + data[4:],
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["hu.npy", "labels.npy", "foreground.npy", "case.json"])
def test_a_damaged_cache_is_made_again(cached, file, damage):
    dataset, cases, folder = cached
    ids = [case.id for case in dataset.cases]
    path, before = cases[ids[0]].folder / file, sorted(folder.iterdir())
    good = path.read_bytes()
    if DAMAGE[damage] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGE[damage](good))
    again = cache_cases(dataset, ids, preset("tiny").data, folder, training=ids)
    assert path.read_bytes() == good
    assert again == cases
    assert sorted(folder.iterdir()) == before


def test_a_folder_of_the_cache_that_is_a_link_is_replaced_and_what_it_points_at_left_alone(cached, tmp_path):
    dataset, cases, folder = cached
    ids = [case.id for case in dataset.cases]
    home = cases[ids[0]].folder
    shutil.move(home, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "hu.npy").write_bytes(b"mine")
    home.symlink_to(tmp_path / "elsewhere")
    assert cache_cases(dataset, ids, preset("tiny").data, folder, training=ids) == cases
    assert not home.is_symlink()
    assert (tmp_path / "elsewhere" / "hu.npy").read_bytes() == b"mine"


def test_labels_that_were_damaged_later_are_named_where_they_are_read(cached):
    dataset, cases, _ = cached
    case = cases[dataset.cases[1].id]
    groups = SliceGroups([case], model=preset("tiny").model, data=preset("tiny").data, seed=0, label_swap={})
    path = case.folder / "labels.npy"
    good = path.read_bytes()
    size = case.shape[0] * case.shape[1] * case.shape[2]
    path.write_bytes(good[:-size] + b"\xc8" * size)
    with pytest.raises(ValueError, match=rf"{case.folder} is damaged.*delete this folder"):
        groups[0]
    path.write_bytes(good)


def test_a_full_disk_is_one_sentence_leaves_nothing_and_goes_on_with_space(cached, tmp_path):
    dataset, cases, _ = cached
    ids, folder = [case.id for case in dataset.cases], tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=rf"{folder}/.*could not be written: File too large"):
            cache_cases(dataset, ids, preset("tiny").data, folder, training=ids)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(folder.iterdir()) == []
    again = cache_cases(dataset, ids, preset("tiny").data, folder, training=ids)
    assert [np.array_equal(again[i].hu, cases[i].hu) for i in ids] == [True] * len(ids)
