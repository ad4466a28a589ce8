"""DICOM series as scanners, archives and anonymisers leave them: read right, or refused by file and attribute."""

import os
import pickle

import numpy as np
import pytest

from aftersam.data.dicom import read_series
from aftersam.data.volume import read_image
from toy_series import (
    enhanced,
    random_scan,
    save_series,
    series_files,
    write_series,
)

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")


def read(folder):
    """The HU (slices, rows, columns) of a series."""
    image = read_series(folder)
    return np.asarray(image.dataobj).T


@pytest.fixture
def files():
    return series_files(random_scan())


def at(files, **values):
    """The files with attributes of the third set, or deleted where the value is ...; None is an empty value."""
    for name, value in values.items():
        if value is ...:
            delattr(files[2], name)
        else:
            with pydicom.config.disable_value_validation():
                setattr(files[2], name, value)
    return files


NEEDED = [
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImageOrientationPatient",
    "SamplesPerPixel",
    "ImagePositionPatient",
]


@pytest.mark.parametrize("name", [*NEEDED, "SeriesInstanceUID", "PhotometricInterpretation"])
@pytest.mark.parametrize(("value", "has"), [(..., "no"), (None, "an empty|no")], ids=["missing", "empty"])
def test_a_missing_attribute_is_told_with_its_file(tmp_path, files, name, value, has):
    save_series(tmp_path / "ct", at(files, **{name: value}))
    with pytest.raises(ValueError, match=rf"ct/\d\.dcm has ({has}) {name}") as caught:
        read_series(tmp_path / "ct")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"RescaleSlope": None}, "has an empty RescaleSlope"),
        ({"RescaleIntercept": None}, "has an empty RescaleIntercept"),
        ({"RescaleIntercept": ...}, "has no RescaleIntercept"),
        ({"RescaleSlope": 0}, "has the RescaleSlope 0"),
        ({"RescaleType": "ED"}, "has the RescaleType ED; the type HU is needed"),
        ({"PixelSpacing": [0, 1]}, "has the PixelSpacing"),
        ({"PixelSpacing": [1, 1, 1]}, "has PixelSpacing .*; 2 numbers are needed"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "two unit vectors at a right angle"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0.8, 0.6]}, "differ in ImageOrientationPatient"),
        ({"Modality": "MR"}, "has the Modality MR; only CT can be read"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "is a colour image"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "is a colour image"),
        ({"NumberOfFrames": 4}, "has 4 frames, but PerFrameFunctionalGroupsSequence places 0"),
        ({"BitsAllocated": ...}, "Bits Allocated"),
        ({"PixelData": ...}, "is truncated or damaged: .*Pixel Data"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_a_slice_that_cannot_be_used_is_named(tmp_path, files, values, says):
    save_series(tmp_path / "ct", at(files, **values))
    with pytest.raises(ValueError, match=rf"ct/\d\.dcm .*{says}|ct/\d\.dcm {says}") as caught:
        read_series(tmp_path / "ct")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("modality", ["MR", "PT", "RTDOSE", "US"])
def test_a_series_that_is_not_ct_is_refused_by_its_modality(tmp_path, files, modality):
    from pydicom.uid import MRImageStorage

    for part in files:
        part.Modality, part.SOPClassUID = modality, MRImageStorage
    save_series(tmp_path / "x", files)
    with pytest.raises(ValueError, match=rf"x holds DICOM, but no slices of a CT series: {modality}$"):
        read_series(tmp_path / "x")


SPOILT = {
    "empty": lambda b: b"",
    "zeros": lambda b: bytes(len(b)),
    "noise": lambda b: np.random.default_rng(0).bytes(len(b)),
    "cut in the preamble": lambda b: b[:100],
    "cut in the meta header": lambda b: b[:150],
    "cut in the header": lambda b: b[:700],
    "cut in the pixels": lambda b: b[:-5],
    "no pixels": lambda b: b[: b.index(b"\xe0\x7f\x10\x00")],
}


@pytest.mark.parametrize("place", [0, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("name", ["IM{:03}", "1.2.840.113619.{}", "slice{}.dcm"])
def test_a_damaged_file_anywhere_in_the_series_is_named(tmp_path, files, name, spoil, place):
    paths = [tmp_path / name.format(i) for i in range(5)]
    for part, path in zip(files, paths, strict=True):
        part.save_as(path, implicit_vr=False, little_endian=True)
    paths[place].write_bytes(spoil(paths[place].read_bytes()))
    with pytest.raises(ValueError, match=paths[place].name) as caught:
        read_series(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere"), os.mkfifo], ids=["link", "pipe"])
def test_what_is_named_like_a_slice_and_no_file_is_named(tmp_path, files, make):
    folder = save_series(tmp_path / "ct", files)
    make(folder / "99.dcm")
    with pytest.raises(ValueError, match=r"ct/99\.dcm is truncated or damaged: it is named like a slice"):
        read_series(folder)
    (folder / "99.dcm").rename(folder / "notes")
    with pytest.warns(UserWarning, match=r"left out .* notes \(not DICOM\)"):
        assert len(read(folder)) == len(files)


@pytest.mark.parametrize("spoil", [SPOILT["empty"], SPOILT["noise"], SPOILT["cut in the meta header"]])
def test_a_damaged_file_that_is_the_whole_series_is_named(tmp_path, files, spoil):
    path = save_series(tmp_path / "ct", [enhanced(files)]) / "0.dcm"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"ct/0\.dcm is truncated or damaged"):
        read_series(tmp_path / "ct")


def test_what_is_no_slice_is_left_out_with_one_line(tmp_path, files):
    folder = save_series(tmp_path / "ct", files)
    (folder / "._0.dcm").write_bytes(b"\0\5\x16\7")
    (folder / "notes.txt").write_text("hello")
    (folder / "Thumbs.db").touch()
    localizer, structures, screenshot, dose = series_files(random_scan((4, 8, 7)))
    localizer.ImageType, localizer.ImageOrientationPatient = (
        ["ORIGINAL", "PRIMARY", "LOCALIZER"],
        [1, 0, 0, 0, 0, -1],
    )
    structures.Modality, structures.SOPClassUID = "RTSTRUCT", pydicom.uid.RTStructureSetStorage
    dose.Modality, dose.SOPClassUID, dose.NumberOfFrames = "RTDOSE", pydicom.uid.RTDoseStorage, 4
    screenshot.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    del screenshot.ImagePositionPatient, structures.PixelData
    for part in (localizer, structures, screenshot, dose):
        part.SeriesInstanceUID = files[0].SeriesInstanceUID
    for name, part in (("loc", localizer), ("rs", structures), ("sc", screenshot), ("rd", dose)):
        part.save_as(folder / f"{name}.dcm", implicit_vr=False, little_endian=True)
    with pytest.warns(UserWarning, match="left out") as caught:
        assert np.array_equal(read(folder), random_scan())
    (line,) = [str(w.message) for w in caught]
    assert "loc.dcm (localizer)" in line
    assert "rs.dcm (RTSTRUCT)" in line
    assert "and 1 more" in line
    assert "._0" not in line


def test_copies_of_slices_are_left_out_with_one_line(tmp_path, files):
    folder = save_series(tmp_path / "ct", files)
    (folder / "again.dcm").write_bytes((folder / "3.dcm").read_bytes())
    with pytest.warns(UserWarning, match=r"again\.dcm \(a copy of 3\.dcm\)|3\.dcm \(a copy of again\.dcm\)"):
        assert np.array_equal(read(folder), random_scan())


def test_two_slices_at_one_position_are_refused_by_name(tmp_path, files):
    files[3].ImagePositionPatient = files[2].ImagePositionPatient
    with pytest.raises(ValueError, match=r"\d\.dcm and \d\.dcm lie at one position"):
        read_series(save_series(tmp_path / "ct", files))


def test_two_series_and_folders_of_series_are_refused(tmp_path, files):
    with pytest.raises(ValueError, match="of 2 DICOM series"):
        read_series(save_series(tmp_path / "two", files[:3] + series_files(random_scan())[:2]))
    (tmp_path / "patient" / "study").mkdir(parents=True)
    save_series(tmp_path / "patient" / "study" / "ct", files)
    with pytest.raises(ValueError, match=r"patient holds no scan.*name a folder inside it.*patient/study/ct"):
        read_series(tmp_path / "patient")


@pytest.mark.parametrize(("spacing", "digits"), [(0.625, 1), (2 / 3, 2), (1.25, 1), (0.3, 1)])
@pytest.mark.parametrize("count", [16, 200])
def test_positions_rounded_by_the_archive_are_read(tmp_path, spacing, digits, count):
    files = series_files(random_scan((count, 4, 4)))
    for i, part in enumerate(files):
        part.ImagePositionPatient = [-5.0, -9.0, round(-100.37 + spacing * i, digits)]
    image = read_series(save_series(tmp_path / "ct", files))
    assert image.affine[2, 2] == pytest.approx(spacing, abs=0.2 / count)
    ends = image.affine @ np.array([[0, 0, 0, 1], [0, 0, count - 1, 1]]).T
    assert ends[2] == pytest.approx([-100.37, -100.37 + spacing * (count - 1)], abs=0.1)


@pytest.mark.parametrize(
    ("heights", "says"),
    [
        (
            [0, 5, 10, 20, 25],
            r"missing or misplaced slice: \d.dcm and \d.dcm lie 10 mm apart, the others 5 mm",
        ),
        ([0, 5, 15], "uneven distances"),
        ([0, 0.6, 1.3, 1.9, 3.1, 3.8, 4.4], "missing or misplaced"),  # 0.625 mm, rounded, one missing
        ([0, 5, 10.3, 15, 20], "uneven distances"),
        ([0, 1, 2, 3.3, 4.6, 6], "uneven distances"),
    ],
)
def test_missing_and_uneven_slices_are_refused(tmp_path, heights, says):
    files = series_files(random_scan((len(heights), 4, 4)))
    for height, part in zip(heights, files, strict=True):
        part.ImagePositionPatient = [0, 0, height]
    with pytest.raises(ValueError, match=says):
        read_series(save_series(tmp_path / "ct", files))


def test_a_slice_shifted_within_its_plane_is_refused(tmp_path, files):
    files[2].ImagePositionPatient[0] += 0.5
    with pytest.raises(ValueError, match="uneven"):
        read_series(save_series(tmp_path / "ct", files))


def test_one_slice_takes_its_thickness(tmp_path, files):
    assert read_image(save_series(tmp_path / "ct", files[:1])).spacing_mm == pytest.approx((4, 3, 2))
    files[0].SliceThickness = None
    with pytest.raises(ValueError, match="SliceThickness"):
        read_series(save_series(tmp_path / "ct", files[:1]))


@pytest.mark.parametrize("step", [(0, 0, 4.0), (0, 0, -4.0), (0, 0.9, 4.0)], ids=["up", "down", "gantry"])
def test_every_first_pixel_lies_at_its_position(tmp_path, step):
    files = series_files(random_scan(), step=step)
    image = read_series(save_series(tmp_path / "ct", files))
    array = np.asarray(image.dataobj).T
    for part in files:
        voxel = np.linalg.solve(image.affine, [*np.array(part.ImagePositionPatient, float) * [-1, -1, 1], 1])
        assert voxel == pytest.approx(np.rint(voxel), abs=1e-4)
        assert array[round(voxel[2]), 0, 0] == part.pixel_array[0, 0]


def without_preamble(data):
    length = int.from_bytes(data[140:144], "little")
    return data[144 + length :]


FORMS = {
    "implicit little endian": lambda part, path: part.save_as(path, implicit_vr=True, little_endian=True),
    "explicit big endian": lambda part, path: pydicom.dcmwrite(
        path, part, implicit_vr=False, little_endian=False, enforce_file_format=True
    ),
    "no preamble": lambda part, path: (
        part.save_as(path, enforce_file_format=True),
        path.write_bytes(without_preamble(path.read_bytes())),
    ),
}


@pytest.mark.parametrize("kind", FORMS)
def test_every_encoding_of_a_file_is_read(tmp_path, files, kind):
    for i, part in enumerate(files):
        syntax = {"i": "1.2.840.10008.1.2", "e": "1.2.840.10008.1.2.2", "n": "1.2.840.10008.1.2.1"}[kind[0]]
        part.file_meta.TransferSyntaxUID = syntax
        if kind[0] == "e":
            part.PixelData = np.frombuffer(part.PixelData, "<i2").astype(">i2").tobytes()
        FORMS[kind](part, tmp_path / f"{i}.dcm")
    assert np.array_equal(read(tmp_path), random_scan())


def test_monochrome1_and_stored_bits_leave_the_hu(tmp_path, files):
    for part in files:
        part.PhotometricInterpretation, part.BitsStored, part.HighBit = "MONOCHROME1", 12, 11
        stored = np.frombuffer(part.PixelData, "<i2") & 0x0FFF  # signed in 12 bits, the others 0
        part.PixelData = stored.astype("<u2").tobytes()
    assert np.array_equal(read(save_series(tmp_path / "ct", files)), random_scan())


@pytest.mark.parametrize(
    ("slope", "intercept", "kind"), [(1, -1024, np.int16), (2, 0, np.int16), (0.5, -3.5, np.float32)]
)
def test_each_slice_is_scaled_by_its_own_slope(tmp_path, files, slope, intercept, kind):
    files[1].RescaleSlope, files[1].RescaleIntercept = slope, intercept
    expected = random_scan().astype(kind)
    expected[1] = random_scan()[1] * slope + intercept
    found = read(save_series(tmp_path / "ct", files))
    assert found.dtype == kind
    assert np.array_equal(found, expected)


def test_values_beyond_int16_are_clipped_like_a_nifti_files(tmp_path, files):
    for part in files:
        part.PixelRepresentation, part.PixelData = 0, np.full((8, 7), 65000, np.uint16).tobytes()
    found = read(save_series(tmp_path / "ct", files))
    assert found.dtype == np.int16
    assert (found == 2**15 - 1).all()


@pytest.mark.parametrize("order", [1, -1])
def test_an_enhanced_multi_frame_ct_is_the_same_volume(tmp_path, order):
    single = read_series(save_series(tmp_path / "single", series_files(random_scan())))
    whole = read_series(save_series(tmp_path / "whole", [enhanced(series_files(random_scan())[::order])]))
    assert np.array_equal(single.dataobj, whole.dataobj)
    np.testing.assert_allclose(single.affine, whole.affine)


def test_an_enhanced_ct_may_share_what_its_frames_have_alike(tmp_path):
    whole = enhanced(series_files(random_scan()))
    groups = whole.PerFrameFunctionalGroupsSequence
    shared = pickle.loads(pickle.dumps(groups[0]))
    del shared.PlanePositionSequence
    for group in groups:
        del (
            group.PlaneOrientationSequence,
            group.PixelMeasuresSequence,
            group.PixelValueTransformationSequence,
        )
    whole.SharedFunctionalGroupsSequence = [shared]
    assert np.array_equal(read(save_series(tmp_path / "ct", [whole])), random_scan())
    del groups[3].PlanePositionSequence
    with pytest.raises(ValueError, match=r"0\.dcm has no ImagePositionPatient"):
        read_series(save_series(tmp_path / "ct", [whole]))


def test_without_pydicom_one_sentence_names_the_extra(tmp_path, files, monkeypatch):
    import sys

    folder = save_series(tmp_path / "ct", files)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"needs pydicom: pip install 'aftersam\[dicom\]'"):
        read_series(folder)


def test_a_series_needs_little_more_memory_than_its_volume(tmp_path):
    import subprocess
    import sys

    array = random_scan((80, 256, 256))  # 10 MiB
    write_series(tmp_path / "ct", array)
    code = (
        "import resource, sys, nibabel, pydicom.pixels, numpy\n"
        "from pathlib import Path\n"
        "from aftersam.data.dicom import read_series\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); read_series(Path(sys.argv[1])); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "ct"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 2.5 * array.nbytes / 2**20
