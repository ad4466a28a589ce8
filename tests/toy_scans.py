"""Toy CT scans, and the tables.json of an ablation, for the tests of the accuracy table."""

import json

import nibabel as nib
import numpy as np

from aftersam.data.phantom import LABELS, make_phantom

STEPS = {"small": {"cases": 3, "columns": {
    "start": {"heart": {"mean": 0.8}, "esophagus": {"mean": 0.2}, "Average": {"mean": 0.5}},
    "+ more": {"heart": {"mean": 0.8}, "esophagus": {"mean": 0.4}, "Average": {"mean": 0.6}},
}}}  # fmt: skip


def write_scans(home):
    """Three phantoms of ten slices at the heart, two to train on, as an nnU-Net raw data set in `home`."""
    for seed in range(3):
        phantom = make_phantom(seed)
        for folder, array in (("imagesTr", phantom.hu), ("labelsTr", phantom.labels)):
            (home / folder).mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(array[12:22].transpose(2, 1, 0), np.diag([-4.0, -4.0, 5.0, 1.0]))
            nib.save(image, home / folder / f"case{seed}{'_0000' if folder == 'imagesTr' else ''}.nii.gz")
    labels = {"background": 0, **{name: value for value, name in LABELS.items()}}
    (home / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}))
    folds = [{"train": ["case0", "case1"], "val": ["case2"]}]
    (home / "splits_final.json").write_text(json.dumps(folds))
    return home
