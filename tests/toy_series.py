"""DICOM series made by hand, and segmentations read back."""

import base64

import numpy as np

HTJ2K = base64.b85decode(  # random_scan((1, 8, 7)) as OpenJPH encodes it, without loss
    "|4;u>04YEK000070000800000000000000700008000000000000EBy0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&kdTm&kdTmwh="
    "~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00000tpEZ4lfVEa`T$3C0002M0206e62JfwfW`oabO59Q2Xp|l0ta*ezyK9600mS40a8ySTVlBY"
    "qLct#P%Xat@BqP-05Lx6-O&J{lmNg0EqDM0y8r;Sz!?f<>~)+BM*(y^1rj000aHX`0Qk57VRsHqNsUvoG9BU<TvamrsX}Fe<o*bRWC1C+0MqiRIuN"
    "s6iqSI3ALTjhw-+KofxVXi|Je"
)


def random_scan(shape=(5, 8, 7)):
    """int16 HU (slices, rows, columns)."""
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def slice_file(plane, position, index, uids, orientation=(1, 0, 0, 0, 1, 0)):
    """pydicom's Dataset of one CT slice: plane (rows, columns) int16 HU, 3 mm between rows and 2 between columns."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    part = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    part.SOPClassUID, part.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    part.StudyInstanceUID, part.SeriesInstanceUID, part.FrameOfReferenceUID = uids
    part.Modality, part.PatientID, part.PatientName, part.PatientSex = "CT", "1", "Doe^Jane", "O"
    part.PatientBirthDate = part.StudyDate = part.StudyTime = part.AccessionNumber = part.StudyID = ""
    part.ReferringPhysicianName, part.PositionReferenceIndicator = "", ""
    part.InstanceNumber, part.SeriesNumber = index + 1, 1
    part.Rows, part.Columns = plane.shape
    part.PixelSpacing, part.SliceThickness = [3.0, 2.0], 4.0
    part.ImageOrientationPatient = list(orientation)
    part.ImagePositionPatient = [round(float(v), 6) for v in position]
    part.BitsAllocated = part.BitsStored = 16
    part.HighBit, part.PixelRepresentation, part.SamplesPerPixel = 15, 1, 1
    part.PhotometricInterpretation = "MONOCHROME2"
    part.RescaleSlope, part.RescaleIntercept = 1, 0
    part.PixelData = np.ascontiguousarray(plane).tobytes()
    return part


def series_files(array, orientation=(1, 0, 0, 0, 1, 0), step=(0, 0, 4.0)):
    """The Datasets of array (slices, rows, columns) int16 HU, along `step` in LPS mm."""
    from pydicom.uid import generate_uid

    uids = [generate_uid() for _ in range(3)]
    origin = np.array([-5.0, -9, 10])
    return [slice_file(p, origin + i * np.array(step), i, uids, orientation) for i, p in enumerate(array)]


def save_series(folder, files):
    """Write Datasets as 0.dcm, 1.dcm ... in random order of their names."""
    folder.mkdir(exist_ok=True)
    for part, name in zip(files, np.random.default_rng(1).permutation(len(files)), strict=True):
        part.save_as(folder / f"{name}.dcm", implicit_vr=False, little_endian=True)
    return folder


def write_series(folder, array, orientation=(1, 0, 0, 0, 1, 0), step=(0, 0, 4.0)):
    """array (slices, rows, columns) int16 HU as the files of one CT series, in random order of their names."""
    return save_series(folder, series_files(array, orientation, step))


def enhanced(files):
    """One enhanced multi-frame CT Dataset of single slices."""
    from pydicom.dataset import Dataset
    from pydicom.uid import EnhancedCTImageStorage

    whole, groups = files[0], []
    for part in files:
        group = Dataset()
        for macro, names in (
            ("PlanePositionSequence", ["ImagePositionPatient"]),
            ("PlaneOrientationSequence", ["ImageOrientationPatient"]),
            ("PixelMeasuresSequence", ["PixelSpacing", "SliceThickness"]),
            ("PixelValueTransformationSequence", ["RescaleSlope", "RescaleIntercept"]),
        ):
            item = Dataset()
            for name in names:
                setattr(item, name, part[name].value)
            setattr(group, macro, [item])
        groups.append(group)
    whole.PixelData = b"".join(part.PixelData for part in files)
    whole.NumberOfFrames, whole.PerFrameFunctionalGroupsSequence = len(files), groups
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(whole, name)
    del whole.RescaleSlope, whole.RescaleIntercept
    return whole


def jpeg_lossless(plane):
    """plane (rows, columns) int16 as a JPEG stream of process 14: differences to the left, sizes as codes of 5 bits."""
    values = plane.astype(np.int64) & 0xFFFF
    left = np.concatenate([np.concatenate([[1 << 15], values[:-1, 0]])[:, None], values[:, :-1]], axis=1)
    bits = ""
    for difference in ((values - left + (1 << 15)) % (1 << 16) - (1 << 15)).ravel().tolist():
        size = abs(difference).bit_length()
        bits += f"{size:05b}"
        if 0 < size < 16:
            bits += f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}"
    bits += "1" * (-len(bits) % 8)
    rows, columns = plane.shape
    parts = [
        (0xC3, bytes([16, *divmod(rows, 256), *divmod(columns, 256), 1, 1, 0x11, 0])),
        (0xC4, bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)])),
        (0xDA, bytes([1, 1, 0, 1, 0, 0])),
    ]
    head = b"".join(bytes([0xFF, mark, 0, len(data) + 2]) + data for mark, data in parts)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + head + data + b"\xff\xd9"


def encapsulated(part, syntax, stream):
    """The Dataset with `stream` as its compressed pixels."""
    from pydicom.encaps import encapsulate

    part.file_meta.TransferSyntaxUID = syntax
    part.PixelData = encapsulate([stream])
    part["PixelData"].is_undefined_length = True
    return part


def read_segmentation(path, folder, shape):
    """Labels by organ name: {name: (x, y, z) bool}, each frame put where its source slice lies."""
    import highdicom as hd
    import pydicom

    segmentation = hd.seg.segread(path)
    names = {n: segmentation.get_segment_description(n).segment_label for n in segmentation.segment_numbers}
    files = [pydicom.dcmread(p, stop_before_pixels=True) for p in folder.iterdir()]
    groups = files[0].get("PerFrameFunctionalGroupsSequence")
    if groups:
        planes = [g.PlanePositionSequence[0] for g in groups]
        for plane, group in zip(planes, groups, strict=True):
            plane.update(group.PlaneOrientationSequence[0])
        masks = segmentation.get_pixels_by_source_frame(
            files[0].SOPInstanceUID, list(range(1, len(groups) + 1)), assert_missing_frames_are_empty=True
        )
    else:
        planes = files
        masks = segmentation.get_pixels_by_source_instance(
            [s.SOPInstanceUID for s in files], assert_missing_frames_are_empty=True
        )  # (slices, rows, columns, segments)
    heights = []
    for plane in planes:
        along = np.array(plane.ImageOrientationPatient, float).reshape(2, 3)
        heights.append(np.cross(*along) @ np.array(plane.ImagePositionPatient, float))
    masks = masks[np.argsort(heights)]
    assert masks.shape[2::-1] == shape
    return {names[n]: masks[..., k].T.astype(bool) for k, n in enumerate(segmentation.segment_numbers)}
