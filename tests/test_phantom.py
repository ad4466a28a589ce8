"""The phantom: repeatable, varied, anatomically in order, and no task for a threshold."""

import resource

import numpy as np
import pytest

from aftersam.data.dataset import find_dataset
from aftersam.data.phantom import LABELS, make_phantom
from aftersam.phantom import main


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(seed) for seed in range(4)]


def test_a_seed_is_a_patient(phantoms):
    again = make_phantom(0)
    assert np.array_equal(again.hu, phantoms[0].hu)
    assert np.array_equal(again.labels, phantoms[0].labels)
    assert not np.array_equal(phantoms[0].labels[:40], phantoms[1].labels[:40])


def test_every_organ_is_there_and_on_its_side(phantoms):
    for phantom in phantoms:
        assert set(np.unique(phantom.labels)) == {0, *LABELS}
        columns = {value: np.argwhere(phantom.labels == value)[:, 2].mean() for value in LABELS}
        rows = {value: np.argwhere(phantom.labels == value)[:, 1].mean() for value in LABELS}
        assert columns[5] < columns[4]  # the right lung is at low w, the patient's right
        assert rows[6] < rows[3]  # the heart lies before the spine


def test_no_hu_classifier_solves_it(phantoms):
    """The best label for each HU value, fitted on the very scans it is scored on, stays below 0.6 mean DSC.

    Each class's DSC is maximised by itself over thresholds on the class's share at a value: a bound from above
    on what any per-voxel classifier of HU reaches."""
    scores = []
    for phantom in phantoms:
        values, index = np.unique(phantom.hu, return_inverse=True)
        total = np.bincount(index.ravel(), minlength=len(values))
        for value in LABELS:
            inside = np.bincount(
                index.ravel(), weights=(phantom.labels == value).ravel(), minlength=len(values)
            )
            order = np.argsort(-inside / total)
            overlap, size = np.cumsum(inside[order]), np.cumsum(total[order])
            scores.append(float((2 * overlap / (size + inside.sum())).max()))
    per_class = np.array(scores).reshape(len(phantoms), -1)
    assert per_class.mean() < 0.6
    assert per_class[:, 0].max() < 0.2  # the esophagus least of all


def test_one_slice_does_not_tell_the_esophagus_from_a_node(phantoms):
    """Grey tissue of the esophagus's mean HU lies in other places of its slices too."""
    for phantom in phantoms:
        tube = phantom.labels == 1
        mean = phantom.hu[tube].mean()
        near = np.abs(phantom.hu - mean) < 30
        assert (near & ~tube).sum() > 5 * tube.sum()


def test_the_command_writes_a_data_set_that_is_found(tmp_path, capsys):
    assert main(["-o", str(tmp_path), "--cases", "2", "--seed", "5"]) == 0
    dataset = find_dataset(tmp_path)
    assert dataset.labels == LABELS
    assert [case.id for case in dataset.cases] == ["phantom_00005", "phantom_00006"]
    assert main(["-o", str(tmp_path)]) == 2  # never overwritten
    assert main(["-o", str(tmp_path / "x"), "--cases", "0"]) == 2
    assert "cases is 0" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        assert main(["-o", str(tmp_path / "scans"), "--cases", "1"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file = tmp_path / "scans" / "imagesTr" / "phantom_00000_0000.nii.gz"
    assert capsys.readouterr().err == f"aftersam.phantom: {file} could not be written: File too large\n"
    assert not [path for path in (tmp_path / "scans").rglob("*") if path.is_file()]
