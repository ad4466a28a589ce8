"""A DICOM segmentation read back is the labels that were written, slice by slice, on the series it came from."""

import numpy as np
import pytest

from aftersam.data.dicom import read_series, write_segmentation

hd = pytest.importorskip("highdicom", reason="the extra dicom is not installed")


def write_series(folder, array, orientation=(1, 0, 0, 0, 1, 0), step=(0, 0, 4.0)):
    """array (slices, rows, columns) int16 HU as the files of one CT series, in random order of their names."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(exist_ok=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for i, name in enumerate(np.random.default_rng(1).permutation(len(array))):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        part = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        part.SOPClassUID, part.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        part.StudyInstanceUID, part.SeriesInstanceUID, part.FrameOfReferenceUID = study, series, frame
        part.Modality, part.PatientID, part.PatientName, part.PatientSex = "CT", "1", "Doe^Jane", "O"
        part.PatientBirthDate = part.StudyDate = part.StudyTime = part.AccessionNumber = part.StudyID = ""
        part.ReferringPhysicianName, part.PositionReferenceIndicator = "", ""
        part.InstanceNumber, part.SeriesNumber = i + 1, 1
        part.Rows, part.Columns = array.shape[1:]
        part.PixelSpacing, part.SliceThickness = [3.0, 2.0], 4.0
        part.ImageOrientationPatient = list(orientation)
        part.ImagePositionPatient = [round(v, 6) for v in np.array([-5.0, -9, 10]) + i * np.array(step)]
        part.BitsAllocated = part.BitsStored = 16
        part.HighBit, part.PixelRepresentation, part.SamplesPerPixel = 15, 1, 1
        part.PhotometricInterpretation = "MONOCHROME2"
        part.RescaleSlope, part.RescaleIntercept = 1, 0
        part.PixelData = array[i].tobytes()
        part.save_as(folder / f"{name}.dcm", enforce_file_format=True)


def read_segmentation(path, folder, shape):
    """Labels by organ name: {name: (x, y, z) bool}, each frame put where its source slice lies."""
    import pydicom

    segmentation = hd.seg.segread(path)
    names = {n: segmentation.get_segment_description(n).segment_label for n in segmentation.segment_numbers}
    slices = [pydicom.dcmread(p, stop_before_pixels=True) for p in folder.iterdir()]
    slices.sort(key=lambda s: s.InstanceNumber)
    masks = segmentation.get_pixels_by_source_instance(
        [s.SOPInstanceUID for s in slices], assert_missing_frames_are_empty=True
    )  # (slices, rows, columns, segments)
    assert masks.shape[2::-1] == shape
    return {names[n]: masks[..., k].T.astype(bool) for k, n in enumerate(segmentation.segment_numbers)}


@pytest.mark.parametrize(
    ("orientation", "step"),
    [((1, 0, 0, 0, 1, 0), (0, 0, 4.0)), ((1, 0, 0, 0, 0.8, 0.6), (0, -2.4, 3.2))],
    ids=["axial", "tilted"],
)
def test_a_segmentation_reads_back(tmp_path, orientation, step):
    rng = np.random.default_rng(0)
    write_series(tmp_path / "ct", rng.integers(-1000, 1000, (5, 8, 7)).astype(np.int16), orientation, step)
    shape = read_series(tmp_path / "ct").shape
    assert shape == (7, 8, 5)
    labels = rng.integers(0, 4, shape).astype(np.uint8)
    labels[..., 2] = 0  # an empty slice, and an organ (5) without a voxel
    names = {1: "heart", 3: "trachea", 5: "liver"}
    write_segmentation(tmp_path / "mask.dcm", labels, tmp_path / "ct", names)
    back = read_segmentation(tmp_path / "mask.dcm", tmp_path / "ct", shape)
    assert set(back) == {"heart", "trachea"}
    assert np.array_equal(back["heart"], labels == 1)
    assert np.array_equal(back["trachea"], labels == 3)


def test_no_organ_is_no_segmentation(tmp_path):
    write_series(tmp_path / "ct", np.zeros((3, 8, 7), np.int16))
    with pytest.raises(ValueError, match="no organ"):
        write_segmentation(tmp_path / "m.dcm", np.zeros((7, 8, 3), np.uint8), tmp_path / "ct", {1: "heart"})
    assert not (tmp_path / "m.dcm").exists()
