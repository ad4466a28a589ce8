"""More than 255 organs: the mask, and all that is made of it, holds each of them as itself."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from aftersam.data.augment import swap_labels
from aftersam.evaluate import main as evaluate
from aftersam.predict import main as predict
from benchmarks.prediction_memory import write_run
from toy_scans import scan

ORGANS = 300


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An untrained run of 300 organs that sees all of them anywhere."""
    home = tmp_path_factory.mktemp("many") / "run"
    torch.manual_seed(0)
    write_run(home, ORGANS, noise=True)
    return home


def test_every_class_arrives_as_itself_in_every_file(many, tmp_path):
    source, mask = scan(tmp_path / "scan.nii.gz", (40, 36, 4)), tmp_path / "masks" / "a.nii.gz"
    options = ["--save-probabilities", "--statistics", "--confidence", "--parts", "all"]
    assert predict(["-i", str(source), "-o", str(mask), "-m", str(many), "--device", "cpu", *options]) == 0
    image = nib.load(mask)
    labels = np.asarray(image.dataobj)
    assert image.get_data_dtype() == np.int16
    assert labels.max() > 255
    assert labels.min() >= 0
    probabilities = np.load(tmp_path / "masks" / "a.probabilities.npy")
    chosen = np.take_along_axis(probabilities, labels[None].astype(int), 0)[0]
    assert (chosen == probabilities.max(0)).mean() > 0.99  # float16 has ties
    statistics = json.loads((tmp_path / "masks" / "a.statistics.json").read_text())
    for value in (1, 255, 256, ORGANS):
        expected = (labels == value).sum() * 80 / 1000  # voxels of 4 × 4 × 5 mm
        assert statistics[f"organ {value}"]["volume_ml"] == pytest.approx(expected)
    scores = tmp_path / "metrics.json"
    assert evaluate(["-p", str(mask.parent), "-l", str(mask.parent), "-o", str(scores)]) in (0, 1)
    found = json.loads(scores.read_text())["cases"]["a"]
    largest = int(labels.max())
    assert found[f"organ {largest}"]["dsc"] == 1
    assert found[f"organ {largest}"]["predicted_voxels"] == (labels == largest).sum()


def test_mirrored_labels_keep_values_above_255():
    labels = np.array([[[0, 5, 7]]], np.uint8)
    assert swap_labels(labels, {5: 300, 300: 5}).tolist() == [[[0, 300, 7]]]
