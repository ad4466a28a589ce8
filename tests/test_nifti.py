"""NIfTI as it comes: units, transforms and types are honoured or refused; damage is one sentence, without memory."""

import gzip
import os
import resource
import time
import warnings

import nibabel as nib
import numpy as np
import pytest

from aftersam.data.transforms import preprocess
from aftersam.data.volume import from_nifti, image_of, read_grid, read_image, read_labels, to_nifti
from aftersam.errors import SAID
from aftersam.inference.segmenter import load
from toy_scans import rotation

AFFINE = np.eye(4)
AFFINE[:3, :3] = rotation(5, 0) @ np.diag([-4.0, 3.9, 4.9])
AFFINE[:3, 3] = 70, -50, 12
SPACING = (2.5, 1.0, 1.0)  # the paper's, finer than the toy scans


def image(shape=(20, 18, 4), dtype=np.int16):
    array = np.random.default_rng(0).integers(-1000, 1000, shape)
    return nib.Nifti1Image(array.astype(dtype), AFFINE)


def edited(path, **fields):
    """The NIfTI file `path` with other values in its header."""
    raw = path.read_bytes()
    header = nib.Nifti1Header(raw[:348], check=False)
    for key, value in fields.items():
        header[key] = value
    path.write_bytes(header.binaryblock + raw[348:])
    return path


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1e3), ("mm", 1.0), ("micron", 1e-3), ("unknown", 1.0)])
def test_lengths_are_read_in_the_headers_unit_and_written_in_it(tmp_path, unit, mm):
    plain = from_nifti(image())
    scaled = nib.Nifti1Image(np.asarray(image().dataobj), np.diag([1 / mm] * 3 + [1]) @ AFFINE)
    scaled.header.set_xyzt_units(unit)
    nib.save(scaled, tmp_path / "a.nii.gz")
    volume = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(volume.affine, plain.affine, rtol=1e-5)
    assert read_grid(tmp_path / "a.nii.gz")[1] == pytest.approx(plain.spacing_mm, rel=1e-5)
    mask = to_nifti(np.zeros(volume.array.shape, np.uint8), volume)
    assert np.array_equal(mask.affine, nib.load(tmp_path / "a.nii.gz").affine)
    labels = nib.Nifti1Image(np.ones((20, 18, 4), np.uint8), AFFINE)  # in mm, on the same grid
    nib.save(labels, tmp_path / "b.nii.gz")
    read_labels(tmp_path / "b.nii.gz", like=volume)


def both_transforms(path, sform, qform):
    scan = image()
    scan.set_sform(sform, 1)
    scan.set_qform(qform, 1)
    nib.save(scan, path)
    return path


def test_transforms_that_disagree_are_told_of_in_one_line_and_kept(tmp_path):
    flipped = np.diag([-1.0, 1, 1, 1]) @ AFFINE
    path = both_transforms(tmp_path / "a.nii", AFFINE, flipped)
    with pytest.warns(UserWarning, match=r"a\.nii has an sform and a qform that differ .* the sform is used"):
        volume = read_image(path)
    np.testing.assert_allclose(volume.affine, from_nifti(image()).affine, rtol=1e-5)
    mask = to_nifti(np.zeros(volume.array.shape, np.uint8), volume)
    np.testing.assert_allclose(mask.get_sform(), AFFINE, rtol=1e-5)
    np.testing.assert_allclose(mask.get_qform(), flipped, atol=1e-3)
    read_grid(path)  # told of once a scan, where the voxels are read
    read_image(both_transforms(path, AFFINE, AFFINE))


@pytest.mark.parametrize("broken", [0.0, np.nan, np.inf])
def test_a_qform_stands_in_for_an_sform_that_is_no_grid(tmp_path, broken):
    path = both_transforms(tmp_path / "a.nii", AFFINE, AFFINE)
    edited(path, srow_x=broken, srow_y=broken, srow_z=broken)
    with pytest.warns(UserWarning, match="its qform is used"):
        volume = read_image(path)
    np.testing.assert_allclose(volume.affine, from_nifti(image()).affine, atol=1e-4)
    mask = to_nifti(np.zeros(volume.array.shape, np.uint8), volume)
    np.testing.assert_allclose(mask.affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", ["srow_x", "srow_y", "srow_z"])
def test_an_affine_of_no_numbers_is_refused_as_that(tmp_path, row, broken):
    for entry in range(4):
        nib.save(image(), tmp_path / "a.nii")
        values = nib.load(tmp_path / "a.nii").header[row].copy()
        values[entry] = broken
        edited(tmp_path / "a.nii", qform_code=0, **{row: values})
        with pytest.raises(ValueError, match=r"a\.nii has an affine with NaN or infinite entries$"):
            read_image(tmp_path / "a.nii")


def test_a_file_without_transforms_is_told_of(tmp_path):
    nib.save(image(), tmp_path / "a.nii")
    with pytest.warns(UserWarning, match="neither sform nor qform"):
        volume = read_image(edited(tmp_path / "a.nii", sform_code=0, qform_code=0))
    assert np.array_equal(volume.array, np.asarray(image().dataobj).transpose(2, 1, 0)[:, ::-1])


@pytest.mark.parametrize("excess", [1e-6, 1e-4, 4e-3])
def test_a_quaternion_that_was_rounded_is_read(tmp_path, excess):
    turned = np.diag([-4.0, -4.0, 5.0, 1.0])  # half a turn: w is 0, which rounding makes imaginary
    scan = nib.Nifti1Image(np.asarray(image().dataobj), None)
    scan.set_qform(turned, 1)
    nib.save(scan, tmp_path / "a.nii")
    edited(tmp_path / "a.nii", quatern_d=np.float32(1 + excess))
    np.testing.assert_allclose(read_image(tmp_path / "a.nii").grid.affine, turned, atol=1e-3)


def test_a_wrong_checksum_is_damage_and_a_header_alone_is_read_without_it(tmp_path):
    raw = bytearray(gzip.compress(image().to_bytes()))
    raw[-6] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(raw)
    for read in (read_image, read_labels):
        with pytest.raises(ValueError, match=r"a\.nii\.gz is truncated or damaged: CRC check failed"):
            read(tmp_path / "a.nii.gz")
    assert read_grid(tmp_path / "a.nii.gz")[0] == (4, 18, 20)


@pytest.mark.parametrize("slip", [0.0, 9e-4, -9e-4])
def test_label_values_near_integers_are_these_integers(tmp_path, slip):
    labels = np.random.default_rng(0).integers(0, 5, (20, 18, 4))
    nib.save(nib.Nifti1Image((labels + slip).astype(np.float32), AFFINE), tmp_path / "a.nii")
    assert np.array_equal(
        read_labels(tmp_path / "a.nii").array,
        from_nifti(nib.Nifti1Image(labels.astype(np.int16), AFFINE)).array,
    )
    nib.save(nib.Nifti1Image((labels + 2e-3).astype(np.float32), AFFINE), tmp_path / "b.nii")
    with pytest.raises(ValueError, match="labels must be integers"):
        read_labels(tmp_path / "b.nii")


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int64", "uint64", "float16", "float64", "longdouble", "bool", ">i2", ">f4"]
)
def test_an_array_of_any_type_is_a_scan(dtype):
    array = (np.random.default_rng(0).integers(0, 100, (20, 18, 4)) > 50).astype(dtype)
    volume = from_nifti(image_of(array, AFFINE))
    assert np.array_equal(volume.array, from_nifti(nib.Nifti1Image(array.astype(np.int16), AFFINE)).array)
    for wrong in (array.astype(complex), array.astype(str)):
        with pytest.raises(ValueError, match="integers or floats are needed"):
            image_of(wrong, AFFINE)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "is truncated: its header promises"),
        ({"dim": [3, -4, 18, 4, 1, 1, 1, 1]}, "has no voxels"),
        ({"vox_offset": np.inf}, "is truncated or damaged"),
        ({"vox_offset": 1e30}, "is truncated: its header promises"),
        ({"magic": b"ni1"}, "is not one whole NIfTI file"),
        ({"srow_x": [1e4, 0, 0, 0]}, "m long by its voxel spacing of"),
        ({"srow_x": [90, 0, 0, 0], "srow_y": [0, 90, 0, 0], "srow_z": [0, 0, 600, 0]}, None),
    ],
    ids=str,
)
def test_an_absurd_header_is_refused_before_memory_is_taken(tmp_path, fields, said):
    nib.save(image(), tmp_path / "a.nii")
    edited(tmp_path / "a.nii", **fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"a\.nii.*" + (said or "would have .* at the model's spacing")):
        preprocess(read_image(tmp_path / "a.nii"), (0.5, 0.5, 0.5))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").mkdir()
    (tmp_path / "c.nii.gz").symlink_to(tmp_path / "c.nii.gz")
    for path in sorted(tmp_path.iterdir()):
        for read in (read_labels, read_grid):
            with pytest.raises(ValueError, match=r"is not a file|does not exist"):
                read(path)


def files():
    """Whole NIfTI files of each kind, to be damaged, and the sizes of their headers."""
    plain, turned = image(), nib.Nifti1Image(np.asarray(image(dtype=np.float32).dataobj), None)
    turned.set_qform(np.diag([-4.0, -4.0, 5.0, 1.0]), 1)
    second = nib.Nifti2Image(np.asarray(image().dataobj), AFFINE)
    return [(plain.to_bytes(), 348), (turned.to_bytes(), 348), (second.to_bytes(), 540)]


def damaged(whole, size, rng):
    """A file's bytes with some of header or body replaced, cut short, or with floats that are none; maybe as gzip."""
    raw = bytearray(whole)
    if (kind := rng.integers(4)) == 0:
        raw = raw[: rng.integers(len(raw))]
    elif kind == 1:
        at = 4 * rng.integers(size // 4)
        odd = np.array([np.inf, -np.inf, np.nan, 0, -1, 1e30, 1e-30, 1e4], np.float32)
        raw[at : at + 4] = rng.choice(odd).tobytes()
    else:
        for at in rng.integers(0, (size, len(raw))[kind - 2], rng.integers(1, 5)):
            raw[at] = rng.integers(256)
    if rng.random() < 0.6:
        return ".nii", raw
    raw = bytearray(gzip.compress(bytes(raw), 1))
    for at in rng.integers(0, len(raw), rng.integers(3)):
        raw[at] = rng.integers(256)
    return ".nii.gz", raw


def refusal(read, path):
    """What is said where `read` refuses a file, None where it does not; any other exception is raised."""
    try:
        read(path)
    except SAID as error:
        return str(error)


@pytest.mark.parametrize(
    "count", [200, pytest.param(20_000, marks=[pytest.mark.long, pytest.mark.timeout(3000)])]
)
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, count):
    """Reading, labels, headers and preprocessing: no other exception, none above 5 s, memory bounded."""
    rng, whole = np.random.default_rng(count), files()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    readers = (lambda path: preprocess(read_image(path), SPACING), read_labels, read_grid)
    for k in range(count):
        ending, raw = damaged(*whole[k % len(whole)], rng)
        path = tmp_path / f"a{ending}"
        path.write_bytes(raw)
        for read in readers:
            began = time.monotonic()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                said = refusal(read, path)
            assert said is None or (str(path) in said and len(said.splitlines()) == 1)
            assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**21  # kB


def test_a_grid_far_from_the_training_scans_is_warned_of(run):
    segmenter = load(run, device="cpu")
    assert segmenter.longest_mm is not None
    shortest, longest = segmenter.longest_mm
    assert 0 < shortest <= longest < 1000

    def prepare(shape, spacing):
        scan = nib.Nifti1Image(np.full(shape, -1000, np.int16), np.diag([*spacing, 1.0]))
        return segmenter.prepare(from_nifti(scan, name="a.nii"))

    prepare((40, 36, 6), (4, 4, 5))
    prepare((400, 400, 100), (0.8, 0.8, 2))
    for shape, spacing, said in (
        ((96, 96, 24), (0.05, 0.05, 0.0625), "has voxels of"),
        ((10, 10, 4), (70, 70, 5), "has voxels of"),
        ((4, 4, 2), (4, 4, 5), "mm long, but the training scans"),
        ((40, 36, 400), (4, 4, 5), "mm long, but the training scans"),
    ):
        with pytest.warns(UserWarning, match=rf"^a\.nii .*{said}.*is its spacing right"):
            prepare(shape, spacing)
