"""Preprocessed scans on disk: found again, made anew for new content, refused by name."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest

from aftersam.config import DataConfig, preset
from aftersam.data.cache import cache_cases
from aftersam.data.dataset import find_dataset
from aftersam.data.phantom import write_dataset
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
