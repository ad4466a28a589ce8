"""Data sets of a few voxels that tests write."""

import json

import nibabel as nib
import numpy as np

AFFINE = np.diag([-2.0, -2.0, 4.0, 1.0])


def save(path, shape=(6, 5, 4), value=0, spacing=(2.0, 2.0, 3.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full(shape, value, np.int16)
    array[0] -= 1000 if value == 0 and "label" not in str(path) and "GT" not in path.name else 0
    array[1:3, 1:3, 1:3] += 1
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


def nnunet(root):
    for case in "ab":
        save(root / "imagesTr" / f"{case}_0000.nii.gz")
        save(root / "labelsTr" / f"{case}.nii.gz")
    (root / "dataset.json").write_text(json.dumps({"name": "N", "labels": {"background": 0, "liver": 1}}))


def save_mask(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array, np.uint8), AFFINE), path)


def organs(shift=0):
    mask = np.zeros((24, 24, 10), np.uint8)
    mask[4 + shift : 12 + shift, 4:12, 2:8] = 1
    mask[14:20, 14:20, 3:7] = 2
    return mask


def scored_folders(root):
    """Masks and references of three cases: perfect, shifted by two voxels, one organ missed."""
    labels, masks = root / "set" / "labelsTr", root / "masks"
    for name, mask in {"a": organs(), "b": organs(2), "c": np.where(organs() == 2, 0, organs())}.items():
        save_mask(labels / f"{name}.nii.gz", organs())
        save_mask(masks / f"{name}.nii.gz", mask)
    (root / "set" / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}})
    )
    return masks, labels
