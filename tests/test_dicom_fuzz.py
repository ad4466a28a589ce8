"""Mutated files in DICOM series: a volume or one sentence that names the file, at once, and nothing left behind."""

import resource
import time
import warnings

import numpy as np
import pytest

from aftersam.data.dicom_segmentation import check_segmentation, write_segmentation
from aftersam.data.volume import read_image
from aftersam.errors import SAID
from toy_series import encapsulated, enhanced, jpeg_lossless, random_scan, series_files

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")
pytest.importorskip("highdicom", reason="the extra dicom is not installed")

HOSTILE = [
    "",
    None,
    "0",
    "-1",
    "nan",
    "inf",
    "1e300",
    "9" * 40,
    "\\" * 9,
    "1\\2\\3",
    "A" * 70,
    "\x1b[31m",
    "1.2.3",
    "MR",
]


def base_files():
    """Series of three slices in the forms they come in, as lists of Datasets."""
    array = random_scan((3, 16, 16))
    rle, jpeg_ls, jpeg = series_files(array), series_files(array), series_files(array)
    for part in rle:
        part.compress(pydicom.uid.RLELossless)
    for part in jpeg_ls:
        part.compress(pydicom.uid.JPEGLSLossless)
    for part, plane in zip(jpeg, array, strict=True):
        encapsulated(part, pydicom.uid.JPEGLosslessSV1, jpeg_lossless(plane))
    return [series_files(array), [enhanced(series_files(array))], rle, jpeg_ls, jpeg]


def mutated(path, rng):
    """The bytes of the file with one mutation of its elements or of its bytes."""
    data = bytearray(path.read_bytes())
    header = data.find(b"\xe0\x7f\x10\x00")
    end = header if rng.random() < 0.8 else len(data)  # mostly what is parsed
    at = int(rng.integers(128, end))
    kind = rng.integers(7)
    if kind == 0:
        return data[: int(rng.integers(0, len(data)))]
    if kind == 1:
        for i in rng.integers(128, end, rng.integers(1, 9)):
            data[i] = rng.integers(256)
    elif kind == 2:
        data[at : at + 4] = [b"\xff" * 4, bytes(4), b"\0\0\0\x80", b"\xff\xff\xff\x7f"][rng.integers(4)]
    elif kind == 3:
        del data[at : at + int(rng.integers(1, 60))]
    elif kind == 4:
        data[at:at] = rng.bytes(int(rng.integers(1, 60)))
    elif kind == 5:
        start = int(rng.integers(128, end))
        data[at:at] = data[start : start + int(rng.integers(1, 400))]
    else:
        dataset = pydicom.dcmread(path)
        holders = [dataset, dataset.file_meta]
        groups = dataset.get("PerFrameFunctionalGroupsSequence")
        if groups:
            holders += [item for group in groups for element in group for item in element.value]
        holder = holders[rng.integers(len(holders))]
        element = holder[list(holder.keys())[rng.integers(len(holder))]]
        if rng.random() < 0.2 or element.VR in ("SQ", "OW", "OB", "US", "UL"):
            del holder[element.tag]
        else:
            element.value = HOSTILE[rng.integers(len(HOSTILE))]
        dataset.save_as(path)
        return bytearray(path.read_bytes())
    return data


def series_with_a_mutation(folder, base, rng):
    """A series in `folder` of which one file is mutated; the file, None where pydicom could not write it."""
    folder.mkdir()
    paths = [folder / f"{i}.dcm" for i in range(len(base))]
    for part, path in zip(base, paths, strict=True):
        part.save_as(path, enforce_file_format=True)
    path = paths[rng.integers(len(paths))]
    try:
        with pydicom.config.disable_value_validation():
            data = mutated(path, rng)
    except (ValueError, TypeError, AttributeError, OverflowError):
        return None
    path.write_bytes(data)
    return path


NAMES = {1: "heart", 2: "liver"}


def look(folder, path):
    """Read the series and check that it can be segmented; why not, else "", and then it can be."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            volume = read_image(folder)
            check_segmentation(folder, NAMES)
        except SAID as error:
            refusal = str(error)
        else:
            assert volume.array.shape[0] == 3 or any(path.name in str(w.message) for w in said)
            write_segmentation(folder / "mask.dcm", np.ones(volume.grid.shape, np.uint8), folder, NAMES)
            return ""
    assert str(folder) in refusal
    return refusal


def fuzz(tmp_path, trials, seed):
    """Run `trials` mutations, each in a folder of its own; how many series were refused."""
    rng = np.random.default_rng(seed)
    bases = base_files()
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for trial in range(trials):
        folder = tmp_path / f"trial{trial}"
        path = series_with_a_mutation(folder, bases[trial % len(bases)], rng)
        began = time.process_time()  # a loaded machine is no hang
        if path is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                refused += look(folder, path) != ""
        assert time.process_time() - began < 5, f"trial {trial} hangs"
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 200
    return refused


def test_twenty_mutated_files(tmp_path):
    assert 0 < fuzz(tmp_path, 20, seed=0) <= 20


@pytest.mark.long
def test_two_thousand_mutated_files(tmp_path):
    refused = fuzz(tmp_path, 2000, seed=1)
    print(f"{refused} of 2000 series were refused")
    assert refused > 1000


@pytest.mark.long
def test_the_command_leaves_one_line_and_nothing_else(run, tmp_path, capsys):
    from aftersam.predict import main

    rng, bases = np.random.default_rng(2), base_files()
    output = tmp_path / "masks"
    output.mkdir()
    for trial in range(200):
        folder, mask = tmp_path / f"trial{trial}", output / f"mask{('.dcm', '.nii.gz')[trial % 2]}"
        if series_with_a_mutation(folder, bases[trial % len(bases)], rng) is None:
            continue
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(
                ["-i", str(folder), "-o", str(mask), "-m", str(run), "--device", "cpu", "--no-preview"]
            )
        if code:
            assert code == 2
            assert len(capsys.readouterr().err.strip().splitlines()) == 1
            assert not list(output.iterdir())
        for left in output.iterdir():
            left.unlink()
