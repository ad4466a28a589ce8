"""Toy CT scans, on grids of every kind, and the tables.json of an ablation."""

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


def scan(path, shape=(40, 36, 6), affine=None, four_d=False):
    """Write a scan of noise, in voxels of 4 × 4 × 5 mm without `affine`; give its path."""
    rng = np.random.default_rng(0)
    array = rng.integers(-1000, 1000, shape).astype(np.int16)
    affine = np.diag([4.0, 4.0, 5.0, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(array[..., None] if four_d else array, affine), path)
    return path


def rotation(degrees, axis):
    a = np.deg2rad(degrees)
    matrix = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(a), -np.sin(a), np.sin(a), np.cos(a)
    return matrix


def oblique():
    affine = np.eye(4)
    affine[:3, :3] = rotation(17, 0) @ rotation(-9, 2) @ np.diag([4.0, 4.5, 6.0])
    affine[:3, 3] = -80, 30, 12
    return affine


GRIDS = {
    "plain": ((40, 36, 6), np.diag([4.0, 4.0, 5.0, 1.0])),
    "flipped": ((40, 36, 6), np.diag([-4.0, 4.0, -5.0, 1.0])),
    "permuted": ((6, 40, 36), np.array([[0, 4, 0, 0], [0, 0, 4, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]])),
    "oblique": ((30, 28, 7), oblique()),
    "anisotropic": ((24, 60, 5), np.diag([7.0, 2.0, 8.0, 1.0])),
    "one slice": ((40, 36, 1), np.diag([4.0, 4.0, 5.0, 1.0])),
    "larger than the window": ((70, 66, 3), np.diag([4.0, 4.0, 5.0, 1.0])),
}
