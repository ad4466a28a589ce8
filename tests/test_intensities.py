"""Whether values are Hounsfield units: real CT, cropped and padded, is never refused; the rest is refused or warned."""

import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aftersam.check import check_case
from aftersam.check import main as check
from aftersam.data.dataset import Case
from aftersam.data.intensities import check_intensities
from aftersam.data.phantom import make_phantom
from aftersam.data.volume import from_nifti, read_image
from aftersam.encode import main as encode
from aftersam.predict import main as predict
from aftersam.train import main as train
from toy_scans import write_scans

AFFINE = np.diag([-4.0, -4.0, 5.0, 1.0])
REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def hu():
    return make_phantom(0).hu


def verdict(array):
    """refused, warned or nothing."""
    volume = from_nifti(nib.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), AFFINE), name="a.nii")
    said = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_intensities(volume)
    except (UserWarning, ValueError) as judged:
        said = str(judged)
    verdicts = {"may not be": "warned", "is not": "refused"}
    found = [v for words, v in verdicts.items() if said.startswith(f"a.nii {words} in Hounsfield units: ")]
    assert bool(found) == said.endswith("convert it, or use --trust-intensities")
    return found[0] if found else None


def padded(array, value):
    """Outside of the scanner's field of view, a disc, everything is `value`."""
    y, x = (np.linspace(-1, 1, n) for n in array.shape[1:])
    return np.where(y[:, None] ** 2 + x**2 > 1, np.array(value, array.dtype), array)


OTHERS = {
    "1024 added": (lambda hu: hu + 1024, "refused"),
    "1024 added, cut at 0": (lambda hu: (hu + 1024).clip(0), "refused"),
    "1024 added, padded": (lambda hu: padded(hu + 1024, -2000), "refused"),
    "0 to 1": (lambda hu: ((hu + 1000) / 2000.0).clip(0, 1).astype(np.float32), "refused"),
    "-1 to 1": (lambda hu: (hu / 1000.0).clip(-1, 1).astype(np.float32), "refused"),
    "0 to 255": (lambda hu: ((hu + 160) / 400.0 * 255).clip(0, 255).astype(np.uint8), "refused"),
    "mean 0, deviation 1": (lambda hu: ((hu - hu.mean()) / hu.std()).astype(np.float32), "refused"),
    "a label map": (lambda hu: (hu > 0).astype(np.uint8), "refused"),
    "MR": (lambda hu: ((hu + 1000) // 2).clip(0), "warned"),
    "MR with undershoot": (lambda hu: ((hu + 1000) // 2).clip(0) - 3, "warned"),
    "a soft-tissue window": (lambda hu: hu.clip(-160, 240), "warned"),
    "1024 added, padding that looks like air": (lambda hu: padded(hu + 1024, -976), "warned"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_hounsfield_units_is_refused_or_warned_of(hu, kind):
    change, expected = OTHERS[kind]
    assert verdict(change(hu)) == expected


@pytest.mark.parametrize("value", [-2000, -3024, -32768, -1000, 0])
def test_padding_is_no_reason(hu, value):
    assert verdict(padded(hu, value)) is None


CROPS = {"a brain without its skull": (0, 90, 0.6), "a liver": (62, 160, 0), "a vertebra": (20, 800, 0)}


@pytest.mark.parametrize("crop", CROPS)
def test_a_crop_without_air_and_fat_is_warned_of_and_never_refused(crop):
    low, high, background = CROPS[crop]
    rng = np.random.default_rng(0)
    tissue = low + (high - low) * rng.beta(2, 4, (20, 40, 40))
    tissue[rng.random(tissue.shape) < background] = 0
    assert verdict(tissue.astype(np.int16)) == "warned"


def test_crops_and_empty_scans_are_taken(hu):
    assert verdict(hu) is None
    assert verdict(hu.clip(-1000, 1000)) is None
    assert verdict(hu[10:30, 30:60, 30:60]) is None
    assert verdict(np.zeros((20, 20, 20), np.int16)) is None
    assert verdict(np.full((20, 20, 20), -1000, np.int16)) is None
    assert verdict(np.arange(8, dtype=np.int16).reshape(2, 2, 2)) is None  # too few voxels to tell


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real CT sets beside the checkout")
def test_real_ct_is_never_refused_however_it_was_cropped():
    rng, seen = np.random.default_rng(0), []
    for path in sorted(REAL.glob("*/imagesTr/*.nii.gz")):
        whole = read_image(path).array
        assert [verdict(whole), *(verdict(padded(whole, v)) for v in (-2000, -3024))] == [None] * 3
        for _ in range(50):
            size = [rng.integers(n // 8, n) for n in whole.shape]
            start = [rng.integers(n - s + 1) for n, s in zip(whole.shape, size, strict=True)]
            seen.append(verdict(whole[tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))]))
    assert "refused" not in seen
    assert seen.count("warned") <= 0.01 * len(seen)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """A data set whose scans are stored with 1024 added."""
    home = write_scans(tmp_path_factory.mktemp("shifted"))
    for path in (home / "imagesTr").iterdir():
        scan = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(scan.dataobj) + 1024, scan.affine), path)
    return home


def test_every_command_refuses_such_scans_and_takes_them_when_told_to(run, shifted, tmp_path, capsys):
    scan, out = shifted / "imagesTr" / "case0_0000.nii.gz", tmp_path / "m.nii.gz"
    small = ["--preset", "tiny", "--image-size", "48", "--num-blocks", "1", "--max-steps", "1"]
    commands = {
        predict: ["-i", scan, "-o", out, "-m", run, "--device", "cpu", "--no-preview"],
        encode: ["--data", scan, "--output", tmp_path / "features", "-m", run, "--device", "cpu"],
        train: ["--data", shifted, "--output", tmp_path / "run", "--device", "cpu", *small],
    }
    for command, flags in commands.items():
        argv = [str(flag) for flag in flags]
        assert command(argv) in (1, 2)
        said = capsys.readouterr().err
        assert "case0_0000.nii.gz is not in Hounsfield units" in said
        assert command([*argv, "--trust-intensities"]) == 0
        assert "Hounsfield" not in capsys.readouterr().err
    assert check([str(shifted), "-p", "tiny"]) == 1
    assert check([str(shifted), "-p", "tiny", "--trust-intensities"]) == 0
    report = check_case(Case("case0", scan, None), {1: "heart"})
    assert report.problem is not None
    assert "is not in Hounsfield units" in report.problem
    assert report.hu_range is not None
