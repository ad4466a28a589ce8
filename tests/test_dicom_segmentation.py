"""A DICOM segmentation read back is the labels that were written; what could not be written is told before."""

import numpy as np
import pytest

from aftersam.data.dicom import read_series
from aftersam.data.dicom_segmentation import MAY_BE_EMPTY, check_segmentation, write_segmentation
from toy_series import enhanced, random_scan, read_segmentation, save_series, series_files, write_series

pytest.importorskip("highdicom", reason="the extra dicom is not installed")

NAMES = {1: "heart", 3: "trachea", 5: "liver"}


def written(folder, path, names=NAMES):
    """Labels on the series in `folder`, checked and written as `path`, and the segmentation read back."""
    shape = read_series(folder).shape
    labels = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)
    labels[..., -1] = 0  # an empty slice
    check_segmentation(folder, names)
    write_segmentation(path, labels, folder, names)
    return labels, read_segmentation(path, folder, shape)


@pytest.mark.parametrize(
    ("orientation", "step"),
    [
        ((1, 0, 0, 0, 1, 0), (0, 0, 4.0)),
        ((1, 0, 0, 0, 1, 0), (0, 0, -4.0)),
        ((1, 0, 0, 0, 0.8, 0.6), (0, -2.4, 3.2)),
        ((-1, 0, 0, 0, -1, 0), (0, 0, 4.0)),
        ((1, 0, 0, 0, 1, 0), (0, 0.8, 4.0)),
    ],
    ids=["axial", "downwards", "tilted", "prone", "gantry"],
)
@pytest.mark.parametrize("form", [list, lambda files: [enhanced(files)]], ids=["slices", "frames"])
def test_a_segmentation_reads_back(tmp_path, form, orientation, step):
    folder = save_series(tmp_path / "ct", form(series_files(random_scan(), orientation, step)))
    labels, back = written(folder, tmp_path / "mask.dcm")
    assert set(back) == {"heart", "trachea"}  # liver has no voxel
    assert np.array_equal(back["heart"], labels == 1)
    assert np.array_equal(back["trachea"], labels == 3)


def test_slices_that_differ_by_a_rounding_get_a_segmentation(tmp_path):
    files = series_files(random_scan())
    files[1].ImageOrientationPatient[4], files[3].PixelSpacing[0] = 0.99999, 3.00001
    files[2].ImagePositionPatient[2] += 0.04
    labels, back = written(save_series(tmp_path / "ct", files), tmp_path / "mask.dcm")
    assert np.array_equal(back["heart"], labels == 1)


@pytest.mark.parametrize("missing", [*MAY_BE_EMPTY, "SliceThickness", "PositionReferenceIndicator", "all"])
def test_an_anonymised_series_gets_a_segmentation_with_empty_attributes(tmp_path, missing):
    import pydicom

    files = series_files(random_scan())
    gone = [*MAY_BE_EMPTY, "SliceThickness"] if missing == "all" else [missing]
    for part in files:
        for name in gone:
            delattr(part, name)
    _, back = written(save_series(tmp_path / "ct", files), tmp_path / "mask.dcm")
    assert set(back) == {"heart", "trachea"}
    segmentation = pydicom.dcmread(tmp_path / "mask.dcm")
    for name in set(gone) & set(MAY_BE_EMPTY):
        assert name in segmentation
        assert not segmentation[name].value


@pytest.mark.parametrize(
    ("name", "value"),
    [("PatientSex", "MALE"), ("PatientBirthDate", "unknown"), ("StudyTime", "25h"), ("PatientID", "x" * 80)],
)
def test_a_patient_attribute_that_dicom_does_not_allow_is_left_empty(tmp_path, name, value):
    import pydicom

    folder = write_series(tmp_path / "ct", random_scan())
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        with pydicom.config.disable_value_validation():
            setattr(data, name, value)
            data.save_as(path)
    with pydicom.config.disable_value_validation():
        written(folder, tmp_path / "mask.dcm")
    assert not pydicom.dcmread(tmp_path / "mask.dcm")[name].value


@pytest.mark.parametrize(
    ("letters", "patient"),
    [("ISO_IR 100", "Müller^Zoë"), (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"), (None, "Doe^Jane")],
)
@pytest.mark.parametrize("name", ["Öse 心臓", "heart; left = right", "h" * 64, "心" * 64])
def test_segment_and_patient_names_keep_their_letters(tmp_path, name, letters, patient):
    import pydicom

    files = series_files(random_scan())
    for part in files:
        if letters:
            part.SpecificCharacterSet = letters
        part.PatientName, part.StudyDescription = patient, patient.split("=")[-1]
    _, back = written(save_series(tmp_path / "ct", files), tmp_path / "mask.dcm", {1: name, 3: "b"})
    assert set(back) == {name, "b"}
    segmentation = pydicom.dcmread(tmp_path / "mask.dcm")
    assert (segmentation.PatientName, segmentation.StudyDescription) == (patient, patient.split("=")[-1])


@pytest.mark.parametrize("name", ["a\\b", "h" * 65, " ", "a\nb"])
def test_a_name_that_dicom_cannot_hold_is_refused_before_computing(tmp_path, name):
    write_series(tmp_path / "ct", random_scan())
    with pytest.raises(ValueError, match="cannot be a DICOM segment") as caught:
        check_segmentation(tmp_path / "ct", {1: name})
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["SOPInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "SOPClassUID"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_slice_without_what_a_segmentation_refers_to_is_refused_before_computing(tmp_path, name, how):
    files = series_files(random_scan())
    if how == "missing":
        delattr(files[2], name)
    else:
        setattr(files[2], name, "")
    folder = save_series(tmp_path / "ct", files)
    read_series(folder)  # the scan itself can be read
    with pytest.raises(ValueError, match=rf"\d\.dcm has no {name}"):
        check_segmentation(folder, NAMES)


def test_slices_of_one_instance_uid_are_refused_before_computing(tmp_path):
    files = series_files(random_scan())
    files[4].SOPInstanceUID = files[1].SOPInstanceUID
    with pytest.raises(ValueError, match=r"\d\.dcm and \d\.dcm have one SOPInstanceUID"):
        check_segmentation(save_series(tmp_path / "ct", files), NAMES)


def test_a_series_that_changed_is_refused(tmp_path):
    folder = write_series(tmp_path / "ct", random_scan())
    with pytest.raises(ValueError, match="has changed"):
        write_segmentation(tmp_path / "m.dcm", np.ones((7, 8, 4), np.uint8), folder, NAMES)


def test_no_organ_is_no_segmentation(tmp_path):
    write_series(tmp_path / "ct", np.zeros((3, 8, 7), np.int16))
    with pytest.raises(ValueError, match="no organ"):
        write_segmentation(tmp_path / "m.dcm", np.zeros((7, 8, 3), np.uint8), tmp_path / "ct", {1: "heart"})
    assert not (tmp_path / "m.dcm").exists()


def test_more_organs_than_a_byte_counts(tmp_path):
    folder = write_series(tmp_path / "ct", random_scan((3, 16, 16)))
    labels = np.arange(1, 16 * 16 * 3 + 1, dtype=np.int16).reshape(16, 16, 3) % 301
    names = {value: f"organ {value}" for value in range(1, 301)}
    check_segmentation(folder, names)
    write_segmentation(tmp_path / "m.dcm", labels, folder, names)
    back = read_segmentation(tmp_path / "m.dcm", folder, labels.shape)
    assert len(back) == 300
    assert all(np.array_equal(back[name], labels == value) for value, name in names.items())
