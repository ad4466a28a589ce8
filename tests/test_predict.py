"""Prediction: the input's own grid comes back, options keep their promises, every refusal is one line."""

import json
import shutil
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import aftersam
from aftersam.inference.postprocess import drop_small_parts
from aftersam.model.image_encoder import ImageEncoder
from aftersam.predict import main
from aftersam.training.checkpoint import save_weights
from toy_scans import GRIDS, scan


@pytest.mark.parametrize("name", GRIDS)
def test_the_mask_has_the_scans_grid(run, tmp_path, name):
    shape, affine = GRIDS[name]
    source = scan(tmp_path / "scan.nii.gz", shape, affine)
    assert (
        main(["-i", str(source), "-o", str(tmp_path / "mask.nii.gz"), "-m", str(run), "--device", "cpu"]) == 0
    )
    image, mask = nib.load(source), nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == image.shape
    assert np.array_equal(mask.affine, image.affine)
    assert mask.header.get_zooms() == image.header.get_zooms()
    assert mask.get_data_dtype() == np.uint8
    assert mask.get_fdata().max() <= 6
    assert (tmp_path / "mask.png").stat().st_size > 5000
    names = json.loads((tmp_path / "mask.json").read_text())
    assert "esophagus" in json.dumps(names)
    assert mask.header.extensions


def test_a_volume_of_four_dimensions_comes_back_as_one(run, tmp_path):
    source = scan(tmp_path / "scan.nii.gz", four_d=True)
    assert (
        main(["-i", str(source), "-o", str(tmp_path / "mask.nii.gz"), "-m", str(run), "--device", "cpu"]) == 0
    )
    assert nib.load(tmp_path / "mask.nii.gz").shape == (40, 36, 6, 1)


def test_flipping_the_file_flips_the_mask(run, tmp_path):
    """The same anatomy stored in two voxel orders gets the same mask, voxel for voxel."""
    source = nib.load(scan(tmp_path / "a.nii.gz"))
    flipped = source.as_reoriented(
        nib.orientations.ornt_transform(
            nib.io_orientation(source.affine), nib.orientations.axcodes2ornt(("P", "S", "L"))
        )
    )
    model = aftersam.load(run, device="cpu")
    first, second = model.predict(source), model.predict(flipped)
    back = second.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(second.affine), nib.io_orientation(first.affine))
    )
    assert np.array_equal(np.asarray(first.dataobj), np.asarray(back.dataobj))
    assert np.allclose(first.affine, back.affine)


def test_the_api_equals_the_command_and_takes_arrays(run, tmp_path):
    source = scan(tmp_path / "scan.nii.gz", *GRIDS["oblique"])
    assert (
        main(["-i", str(source), "-o", str(tmp_path / "mask.nii.gz"), "-m", str(run), "--device", "cpu"]) == 0
    )
    written = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    image = nib.load(source)
    model = aftersam.load(run, device="cpu")
    assert np.array_equal(np.asarray(model.predict(image).dataobj), written)
    by_array = model.predict(np.asarray(image.dataobj), image.affine)
    assert np.array_equal(np.asarray(by_array.dataobj), written)
    with pytest.raises(ValueError, match="affine"):
        model.predict(np.asarray(image.dataobj))


def test_a_subset_of_the_labels(run, tmp_path, capsys):
    source = scan(tmp_path / "scan.nii.gz")
    command = ["-i", str(source), "-m", str(run), "--device", "cpu", "--no-preview"]
    assert main([*command, "-o", str(tmp_path / "all.nii.gz")]) == 0
    assert main([*command, "-o", str(tmp_path / "some.nii.gz"), "--labels", "heart,trachea"]) == 0
    everything = np.asarray(nib.load(tmp_path / "all.nii.gz").dataobj)
    some = np.asarray(nib.load(tmp_path / "some.nii.gz").dataobj)
    assert np.array_equal(some, np.where(np.isin(everything, [2, 6]), everything, 0))
    assert main([*command, "-o", str(tmp_path / "x.nii.gz"), "--labels", "hart"]) == 2
    assert "did you mean 'heart'" in capsys.readouterr().err


def test_small_parts_of_organs_of_one_piece_are_dropped_unless_all_are_wanted(run, tmp_path):
    pieces = json.loads((run / "run.json").read_text())["one_piece"]
    assert pieces == [1, 2, 3, 4, 5, 6]  # every phantom organ is one
    source = scan(tmp_path / "scan.nii.gz")
    masks = {}
    for parts in ("main", "all"):
        path = tmp_path / f"{parts}.nii.gz"
        flags = ["--parts", parts, "--device", "cpu", "--no-preview"]
        assert main(["-i", str(source), "-o", str(path), "-m", str(run), *flags]) == 0
        masks[parts] = np.asarray(nib.load(path).dataobj).astype(np.uint8)
    assert (masks["main"] != masks["all"]).any()  # noise has many parts
    drop_small_parts(masks["all"], pieces)
    np.testing.assert_array_equal(masks["main"], masks["all"])


def test_timings_are_printed_and_left_beside_the_mask(run, tmp_path, capsys):
    source = scan(tmp_path / "scan.nii.gz")
    command = ["-i", str(source), "-o", str(tmp_path / "mask.nii.gz"), "-m", str(run), "--device", "cpu"]
    assert main([*command, "--timings"]) == 0
    facts = json.loads((tmp_path / "mask.timings.json").read_text())
    assert all(seconds > 0 for seconds in facts["seconds"].values()), facts
    assert facts["slices"] == 6
    assert "encode" in capsys.readouterr().err


def test_options_leave_their_files_and_default_to_the_exact_mask(run, tmp_path):
    source = scan(tmp_path / "scan.nii.gz", *GRIDS["oblique"])
    command = ["-i", str(source), "-m", str(run), "--device", "cpu", "--no-preview"]
    assert main([*command, "-o", str(tmp_path / "plain.nii.gz")]) == 0
    extra = ["--keep", "1", "--overlap", "none", "--tta", "none", "--save-probabilities", "--statistics"]
    assert main([*command, "-o", str(tmp_path / "mask.nii.gz"), *extra]) == 0
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    assert np.array_equal(mask, np.asarray(nib.load(tmp_path / "plain.nii.gz").dataobj))
    probabilities = np.load(tmp_path / "mask.probabilities.npy")
    assert probabilities.shape == (7, *mask.shape)
    assert probabilities.dtype == np.float16
    assert (probabilities.argmax(0) == mask).mean() > 0.99  # float16 has ties
    statistics = json.loads((tmp_path / "mask.statistics.json").read_text())
    names = json.loads((tmp_path / "mask.json").read_text())["labels"]
    image = nib.load(source)
    for name, facts in statistics.items():
        inside = mask == names[name]
        volume = inside.sum() * abs(np.linalg.det(image.affine[:3, :3])) / 1000
        assert facts["volume_ml"] == pytest.approx(volume, abs=1e-3)
        if inside.any():
            assert facts["mean_hu"] == pytest.approx(image.get_fdata()[inside].mean(), abs=0.01)
        else:
            assert facts["mean_hu"] is None


@pytest.mark.parametrize(
    "option",
    [["--keep", "2"], ["--overlap", "average"], ["--tta", "mirror"], ["--roi", "body"]],
    ids=" ".join,
)
def test_options_run_from_the_command_line(run, tmp_path, option):
    source = scan(tmp_path / "scan.nii.gz")
    command = ["-i", str(source), "-m", str(run), "--device", "cpu", "--no-preview", *option]
    assert main([*command, "-o", str(tmp_path / "mask.nii.gz")]) == 0
    assert nib.load(tmp_path / "mask.nii.gz").shape == (40, 36, 6)


def test_confidence_lies_on_the_scans_grid_and_leaves_the_mask_alone(run, tmp_path):
    model = tmp_path / "run"
    shutil.copytree(run, model)
    weights = load_file(model / "best.safetensors")
    rng = torch.Generator().manual_seed(0)
    for name, value in weights.items():  # so few steps leave groups alike
        if name.startswith("fusion."):
            value += torch.randn(value.shape, generator=rng)
        elif "hypernetworks" in name:
            value *= 4
    save_file(weights, model / "best.safetensors", metadata={"aftersam": "{}"})
    source = scan(tmp_path / "scan.nii.gz", *GRIDS["oblique"])
    command = ["-i", str(source), "-m", str(model), "--device", "cpu", "--no-preview"]
    assert main([*command, "-o", str(tmp_path / "plain.nii.gz")]) == 0
    assert main([*command, "-o", str(tmp_path / "mask.nii.gz"), "--confidence"]) == 0
    mask, plain = (np.asarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj) for name in ("mask", "plain"))
    assert np.array_equal(mask, plain)
    image, confidence = nib.load(source), nib.load(tmp_path / "mask.confidence.nii.gz")
    assert confidence.shape == image.shape
    assert np.array_equal(confidence.affine, image.affine)
    values = confidence.get_fdata()
    assert 0 <= values.min() < values.max() <= 1 + 1e-6
    assert not (tmp_path / "plain.confidence.nii.gz").exists()


def test_stored_embeddings_spare_the_encoder_and_change_no_mask(run, tmp_path, monkeypatch):
    source, store = scan(tmp_path / "scan.nii.gz", (40, 36, 12)), tmp_path / "store"
    command = ["-i", str(source), "-m", str(run), "--device", "cpu", "--no-preview"]
    seen, forward = [], ImageEncoder.forward
    monkeypatch.setattr(ImageEncoder, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    masks = []
    for name, more in (
        ("plain", []),
        ("first", ["--embeddings", str(store)]),
        ("again", ["--embeddings", str(store)]),
    ):
        seen.clear()
        assert main([*command, "-o", str(tmp_path / f"{name}.nii.gz"), *more]) == 0
        assert sum(seen) == (0 if name == "again" else 12)
        masks.append(np.asarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj))
    assert (masks[0] == masks[1]).mean() > 0.999  # fp16 between
    assert np.array_equal(masks[1], masks[2])


def test_compile_prepares_each_step(run, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__)
    )
    command = ["-i", str(scan(tmp_path / "scan.nii.gz")), "-m", str(run), "--device", "cpu", "--no-preview"]
    assert main([*command, "-o", str(tmp_path / "mask.nii.gz"), "--compile"]) == 0
    assert compiled == ["ImageEncoder", "AxialFusionTransformer", "MaskDecoder"]


def test_options_that_the_model_cannot_have_are_refused(run, tmp_path, capsys):
    source = scan(tmp_path / "scan.nii.gz")
    onesided = tmp_path / "run"
    shutil.copytree(run, onesided)
    text = (onesided / "run.json").read_text()
    (onesided / "run.json").write_text(text.replace("heart", "kidney_left"))
    output = tmp_path / "mask.nii.gz"
    command = ["-i", str(source), "-o", str(output), "--device", "cpu"]
    assert main([*command, "-m", str(onesided), "--tta", "mirror"]) == 2
    assert "'kidney_left' has no counterpart" in capsys.readouterr().err
    assert main([*command, "-m", str(run), "--keep", "0"]) == 2
    assert "keep is 0, but must be at least 1" in capsys.readouterr().err
    assert not output.exists()


def test_a_dicom_series_gets_a_dicom_segmentation(run, tmp_path, capsys):
    pytest.importorskip("highdicom", reason="the extra dicom is not installed")
    from toy_series import read_segmentation, write_series

    series = tmp_path / "ct"
    write_series(series, np.random.default_rng(0).integers(-1000, 1000, (6, 36, 40)).astype(np.int16))
    command = ["-i", str(series), "-m", str(run), "--device", "cpu", "--no-preview"]
    assert main([*command, "-o", str(tmp_path / "mask.nii.gz")]) == 0
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    names = json.loads((tmp_path / "mask.json").read_text())["labels"]
    output = tmp_path / "seg.dcm"
    assert main([*command, "-o", str(output)]) == (0 if mask.any() else 2)
    if mask.any():
        for name, found in read_segmentation(output, series, mask.shape).items():
            assert np.array_equal(found, mask == names[name])
    source = scan(tmp_path / "scan.nii.gz")
    assert main(["-i", str(source), "-m", str(run), "-o", str(tmp_path / "x.dcm"), "--device", "cpu"]) == 2
    assert "is not a folder of a DICOM series" in capsys.readouterr().err


def test_help_waits_for_no_heavy_import():
    code = "import sys, aftersam.predict; print(*sys.modules)"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "aftersam.predict", "--help"], capture_output=True, check=True
    )
    assert time.monotonic() - began < 10  # a tenth of it on an idle machine
    assert b"--timings" in done.stdout
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert not {"torch", "monai", "nibabel", "matplotlib"} & set(done.stdout.decode().split())


def test_nan_voxels_become_air_with_a_warning(run, tmp_path):
    array = np.zeros((40, 36, 4), np.float32)
    array[3, 4, 1] = np.nan
    nib.save(nib.Nifti1Image(array, np.diag([4.0, 4, 5, 1])), tmp_path / "scan.nii.gz")
    with pytest.warns(UserWarning, match="1 voxel"):
        code = main(
            [
                "-i",
                str(tmp_path / "scan.nii.gz"),
                "-o",
                str(tmp_path / "m.nii.gz"),
                "-m",
                str(run),
                "--device",
                "cpu",
            ]
        )
    assert code == 0


@pytest.mark.parametrize(
    "case", ["missing", "not nifti", "2d", "4d", "no run", "exists", "truncated weights"]
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, capsys, case):
    source, model, output = tmp_path / "scan.nii.gz", run, tmp_path / "mask.nii.gz"
    if case == "not nifti":
        source.write_text("hello")
    elif case == "2d":
        scan(source, (40, 36))
    elif case == "4d":
        scan(source, (40, 36, 6, 2))
    elif case != "missing":
        scan(source)
    if case == "no run":
        model = tmp_path
    if case == "exists":
        output.write_text("mine")
    if case == "truncated weights":
        model = tmp_path / "run"
        model.mkdir()
        for name in ("config.json", "run.json"):
            (model / name).write_bytes((run / name).read_bytes())
        (model / "best.safetensors").write_bytes((run / "best.safetensors").read_bytes()[:-100])
    assert main(["-i", str(source), "-o", str(output), "-m", str(model), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("aftersam.predict: ")
    assert len(error.splitlines()) == 1
    assert str(tmp_path) in error
    assert output.exists() == (case == "exists")


def test_weights_of_another_architecture_are_refused(run, tmp_path, capsys):
    from torch import nn

    model = tmp_path / "run"
    model.mkdir()
    for name in ("config.json", "run.json"):
        (model / name).write_bytes((run / name).read_bytes())
    save_weights(model / "best.safetensors", nn.Linear(2, 2), {})
    source = scan(tmp_path / "scan.nii.gz")
    assert (
        main(["-i", str(source), "-o", str(tmp_path / "m.nii.gz"), "-m", str(model), "--device", "cpu"]) == 2
    )
    assert "another architecture" in capsys.readouterr().err
