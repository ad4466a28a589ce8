"""Volumes: any voxel order in, the same grid out to the bit; bad files in one sentence that names them."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest

from aftersam.data.volume import from_nifti, read_image, read_labels, to_nifti, write_labels


def save(path, array, affine=None, header=None):
    nib.save(
        nib.Nifti1Image(array, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine, header), path
    )
    return path


def scan(shape=(5, 6, 7)):
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


ORDERS = ["RAS", "LPS", "LPI", "SRA", "PIR", "ASL"]


@pytest.mark.parametrize("order", ORDERS)
def test_every_voxel_order_is_one_volume_and_goes_back(tmp_path, order):
    plain = nib.Nifti1Image(scan(), np.diag([2.0, 3.0, 4.0, 1.0]))
    change = nib.orientations.ornt_transform(
        nib.io_orientation(plain.affine), nib.orientations.axcodes2ornt(tuple(order))
    )
    turned = plain.as_reoriented(change)
    expected, volume = from_nifti(plain), from_nifti(turned)
    assert np.array_equal(volume.array, expected.array)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)
    assert volume.array.shape == (7, 6, 5)
    assert volume.spacing_mm == pytest.approx((4, 3, 2))
    labels = (volume.array > 0).astype(np.uint8)
    back = to_nifti(labels, volume)
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(turned.dataobj) > 0)
    assert np.array_equal(back.affine, turned.affine)


def test_canonical_axes_point_to_head_back_and_left():
    volume = from_nifti(
        nib.Nifti1Image(scan(), np.diag([2.0, 3.0, 4.0, 1.0]))
    )  # x to the right, y to the front
    directions = volume.affine[:3, :3]
    assert directions[2, 0] > 0  # d: up
    assert directions[1, 1] < 0  # h: to the back
    assert directions[0, 2] < 0  # w: to the patient's left


def test_both_transforms_units_and_codes_survive(tmp_path):
    angle = np.deg2rad(20)
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:2, :2] = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * [2, 3]
    affine[:3, 3] = 0.1, -7.3, 11.7
    image = nib.Nifti1Image(scan(), affine)
    image.set_sform(affine, code=2)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "scan.nii.gz")
    volume = read_image(tmp_path / "scan.nii.gz")
    write_labels(tmp_path / "mask.nii.gz", np.zeros(volume.array.shape, np.uint8), volume, {1: "heart"})
    mask = nib.load(tmp_path / "mask.nii.gz")
    source = nib.load(tmp_path / "scan.nii.gz")
    for key in (
        "srow_x",
        "srow_y",
        "srow_z",
        "qform_code",
        "sform_code",
        "pixdim",
        "quatern_b",
        "xyzt_units",
        "dim",
    ):
        assert np.array_equal(mask.header[key], source.header[key]), key
    assert json.loads((tmp_path / "mask.json").read_text())["labels"]["heart"] == 1
    assert b"heart" in mask.header.extensions[0].get_content()


def test_slope_and_intercept_are_applied(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(scan(), np.diag([2.0, 3, 4, 1]), header)
    image.header.set_slope_inter(2, -24)
    nib.save(image, tmp_path / "a.nii")
    expected = from_nifti(nib.Nifti1Image(scan() * 2 - 24, np.diag([2.0, 3, 4, 1])))
    np.testing.assert_allclose(read_image(tmp_path / "a.nii").array, expected.array)


@pytest.mark.parametrize(
    "kind", ["missing", "text", "truncated", "2d", "4d", "zero spacing", "nan affine", "singular"]
)
def test_bad_files_are_one_sentence(tmp_path, kind):
    path = tmp_path / "scan.nii.gz"
    if kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        whole = save(path, scan((40, 40, 40))).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "2d":
        save(path, scan((5, 6)))
    elif kind == "4d":
        save(path, scan((5, 6, 7, 2)))
    elif kind == "zero spacing":
        save(path, scan())
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[80:84] = np.float32(0).tobytes()  # pixdim[1]
        path.write_bytes(gzip.compress(bytes(raw)))
    elif kind == "nan affine":
        affine = np.diag([2.0, 3, 4, 1])
        affine[0, 3] = np.nan
        image = nib.Nifti1Image(scan(), None)
        image.header.set_sform(affine, code=1)
        image.header["srow_x"][3] = np.nan
        image.header["sform_code"] = 1
        raw = image.to_bytes()
        path.write_bytes(gzip.compress(raw))
    elif kind == "singular":
        save(path, scan(), np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    with pytest.raises(ValueError, match=r"scan\.nii\.gz") as refusal:
        read_image(path)
    assert len(str(refusal.value).splitlines()) == 1


def test_labels_are_integers_on_the_images_grid(tmp_path):
    image = read_image(save(tmp_path / "scan.nii.gz", scan()))
    good = read_labels(save(tmp_path / "good.nii.gz", (scan() > 0).astype(np.float32)), like=image)
    assert good.array.dtype == np.uint8
    for name, array, affine in (
        ("halves", np.full((5, 6, 7), 0.5, np.float32), None),
        ("negative", np.full((5, 6, 7), -1, np.int16), None),
        ("smaller", np.zeros((5, 6, 6), np.uint8), None),
        ("elsewhere", np.zeros((5, 6, 7), np.uint8), np.diag([2.0, 3, 5, 1])),
    ):
        with pytest.raises(ValueError, match=name):
            read_labels(save(tmp_path / f"{name}.nii.gz", array, affine), like=image)


def test_a_dicom_series_becomes_the_same_volume(tmp_path):
    pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    from toy_series import write_series

    array = scan((4, 6, 5))  # (d, h, w), slices upwards
    volume = read_image(write_series(tmp_path / "ct", array))
    assert np.array_equal(volume.array, array)
    assert volume.spacing_mm == pytest.approx((4, 3, 2))
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], [5, 9, 10, 1])
