"""Compressed DICOM slices are read, a truncated stream is named, and so is the package that a decoder comes in."""

import numpy as np
import pytest

from aftersam.data.dicom import read_series
from toy_series import HTJ2K, encapsulated, jpeg_lossless, random_scan, save_series, series_files

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")


def read(folder):
    """The HU (slices, rows, columns) of a series."""
    return np.asarray(read_series(folder).dataobj).T


@pytest.fixture
def files():
    return series_files(random_scan())


COMPRESSED = {  # the module that decodes it, and how a slice is compressed so
    "1.2.840.10008.1.2.5": (None, "RLE", None),
    "1.2.840.10008.1.2.4.57": ("gdcm", "JPEG lossless", jpeg_lossless),
    "1.2.840.10008.1.2.4.70": ("gdcm", "JPEG lossless, first order", jpeg_lossless),
    "1.2.840.10008.1.2.4.80": ("gdcm", "JPEG-LS", None),
    "1.2.840.10008.1.2.4.90": ("openjpeg", "JPEG 2000", None),
    "1.2.840.10008.1.2.4.201": ("openjpeg", "HTJ2K", lambda plane: HTJ2K),
    "1.2.840.10008.1.2.4.203": ("openjpeg", "HTJ2K, maybe lossy", lambda plane: HTJ2K),
}


@pytest.fixture(params=COMPRESSED, ids=[name for _, name, _ in COMPRESSED.values()])
def compressed(request):
    """One compressed slice, and what it holds: (1, rows, columns)."""
    module, _, encode = COMPRESSED[request.param]
    if module:
        pytest.importorskip(module, reason="the decoders of the extra dicom are not installed")
    array = random_scan((1, 8, 7) if module == "openjpeg" and encode else (1, 40, 36))
    (part,) = series_files(array)
    if encode is None:
        part.compress(request.param)
    else:
        encapsulated(part, request.param, encode(array[0]))
    return part, array


def test_compressed_slices_are_read(tmp_path, compressed):
    part, array = compressed
    assert np.array_equal(read(save_series(tmp_path / "ct", [part])), array)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_a_truncated_compressed_stream_is_named(tmp_path, compressed, kept):
    part, _ = compressed
    stream = pydicom.encaps.get_frame(part.PixelData, 0, number_of_frames=1)
    encapsulated(part, part.file_meta.TransferSyntaxUID, stream[: int(kept * len(stream))])
    with pytest.raises(ValueError, match=r"ct/0\.dcm is truncated or damaged") as caught:
        read_series(save_series(tmp_path / "ct", [part]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("syntax", [s for s in COMPRESSED if COMPRESSED[s][0]])
def test_without_a_decoder_one_sentence_names_the_packages(tmp_path, files, monkeypatch, syntax):
    decoder = pydicom.pixels.get_decoder(syntax)
    monkeypatch.setattr(type(decoder), "is_available", property(lambda decoder: False))
    save_series(tmp_path / "ct", [encapsulated(part, syntax, b"\xff\xd8\xff\xd9") for part in files])
    with pytest.raises(
        ValueError, match=r"ct/\d\.dcm is compressed as .*python-gdcm or pylibjpeg: pip install"
    ):
        read_series(tmp_path / "ct")


def test_an_unknown_transfer_syntax_is_refused_by_name(tmp_path, files):
    save_series(tmp_path / "ct", [encapsulated(part, "1.2.3.4.5", b"\xff\xd8\xff\xd9") for part in files])
    with pytest.raises(ValueError, match=r"ct/\d\.dcm has the transfer syntax 1\.2\.3\.4\.5"):
        read_series(tmp_path / "ct")
