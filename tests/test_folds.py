"""Several runs as one model: the mean of their probabilities, from scans that are read and resampled once."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import aftersam
from aftersam.data import transforms, volume
from aftersam.inference.planes import Plane
from aftersam.inference.reference import divergence
from aftersam.inference.sliding import mean_planes
from aftersam.model import run_folder
from aftersam.predict import main
from toy_scans import GRIDS, scan

KINDS = ["probabilities.npy", "confidence.nii.gz"]


@pytest.fixture(scope="module")
def folds(run, tmp_path_factory):
    """Three runs in one folder whose weights differ."""
    home = tmp_path_factory.mktemp("folds")
    for number in range(3):
        fold = home / f"fold_{number}"
        shutil.copytree(run, fold, ignore=shutil.ignore_patterns("cache", "tensorboard"))
        weights, generator = load_file(fold / "best.safetensors"), torch.Generator().manual_seed(number)
        for name, value in weights.items():  # so few steps leave groups alike
            if name.startswith(("fusion.", "decoder.output_hypernetworks")):
                value += 0.2 * torch.randn(value.shape, generator=generator)
        save_file(weights, fold / "best.safetensors", metadata={"aftersam": "{}"})
    return home


def predict(source, mask, *models, more=()):
    command = ["-i", str(source), "-o", str(mask), "--device", "cpu", "--no-preview"]
    return main([*command, "-m", *map(str, models), *more])


def array(path):
    return np.load(path) if path.suffix == ".npy" else np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("grid", ["plain", "oblique", "larger than the window"])
@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_one_run_give_that_runs_masks_to_the_bit(folds, tmp_path, capsys, grid, copies):
    source, fold = scan(tmp_path / "scan.nii.gz", *GRIDS[grid]), folds / "fold_0"
    home = tmp_path / "copies"
    for i in range(copies):
        shutil.copytree(fold, home / f"{i}")
    more = ["--save-probabilities", "--confidence", "--parts", "all"]
    assert predict(source, tmp_path / "one.nii.gz", fold, more=more) == 0
    assert predict(source, tmp_path / "mean.nii.gz", home, more=more) == 0
    assert f"mean of {copies} runs: {home / '0'}, {home / '1'}" in capsys.readouterr().err.replace("\n", "")
    one, mean = (array(tmp_path / f"{name}.nii.gz") for name in ("one", "mean"))
    assert len(np.unique(one)) > 2
    np.testing.assert_array_equal(mean, one)
    ours, theirs = (array(tmp_path / f"{name}.confidence.nii.gz") for name in ("mean", "one"))
    np.testing.assert_allclose(ours, theirs, atol=1)
    ours, theirs = (array(tmp_path / f"{name}.probabilities.npy") for name in ("mean", "one"))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_masks_are_of_the_mean_of_the_runs_probabilities(folds, tmp_path):
    source = scan(tmp_path / "scan.nii.gz", *GRIDS["oblique"])
    runs, more = sorted(folds.iterdir()), ["--save-probabilities", "--parts", "all"]
    alone = []
    for i, run in enumerate(runs):
        assert predict(source, tmp_path / f"{i}.nii.gz", run, more=more) == 0
        alone.append(array(tmp_path / f"{i}.probabilities.npy").astype(np.float64))
    assert predict(source, tmp_path / "mean.nii.gz", *runs, more=more) == 0
    mean = np.mean(alone, axis=0)
    np.testing.assert_allclose(array(tmp_path / "mean.probabilities.npy"), mean, atol=2e-3)
    mask, best = array(tmp_path / "mean.nii.gz"), mean.argmax(0)
    clear = np.sort(mean, axis=0)[-1] - np.sort(mean, axis=0)[-2] > 1e-3
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(mask[clear], best[clear])
    assert (mask != array(tmp_path / "0.nii.gz")).mean() > 0.01
    by_api = aftersam.load(folds, device="cpu").predict(nib.load(source))
    assert predict(source, tmp_path / "main.nii.gz", folds) == 0
    np.testing.assert_array_equal(np.asarray(by_api.dataobj), array(tmp_path / "main.nii.gz"))


def test_disagreement_of_runs_lowers_the_confidence():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 4, 5, 6, generator=generator)
    within = torch.rand(3, 1, 5, 6, generator=generator)
    (found,) = mean_planes([iter([Plane(*pair)]) for pair in zip(logits, within, strict=True)], [1.0] * 3)
    among = divergence(logits.double().softmax(1))
    assert found.disagreement is not None
    torch.testing.assert_close(1 - found.disagreement, (1 - within.mean(0)) * (1 - among))
    torch.testing.assert_close(found.logits.softmax(0), logits.double().softmax(1).mean(0))
    sure = torch.tensor([[30.0, 0, 0], [0, 30.0, 0]])[..., None, None]
    (found,) = mean_planes([iter([Plane(one, torch.zeros(1, 1, 1))]) for one in sure], [1.0] * 2)
    assert float(found.disagreement) == pytest.approx(1)


def test_a_scan_is_read_once_and_resampled_once_a_spacing(folds, tmp_path, monkeypatch):
    source, calls = scan(tmp_path / "scan.nii.gz"), []
    for module, name in ((volume, "read_image"), (transforms, "preprocess")):
        usual = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, u=usual, n=name, **k: calls.append(n) or u(*a, **k))
    assert predict(source, tmp_path / "a.nii.gz", folds) == 0
    assert sorted(calls) == ["preprocess", "read_image"]
    other = tmp_path / "other"
    shutil.copytree(folds / "fold_1", other)
    facts = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**facts, "spacing_mm": [6.0, 5.0, 5.0]}))
    calls.clear()
    assert predict(source, tmp_path / "b.nii.gz", folds, other) == 0
    assert sorted(calls) == ["preprocess", "preprocess", "read_image"]
    assert array(tmp_path / "b.nii.gz").shape == (40, 36, 6)


def test_stored_embeddings_are_of_each_run(folds, tmp_path):
    source, store = scan(tmp_path / "scan.nii.gz"), ["--embeddings", str(tmp_path / "store")]
    for name, more in (("plain", []), ("first", store), ("again", store)):
        more = [*more, "--save-probabilities"]
        assert predict(source, tmp_path / f"{name}.nii.gz", folds, more=more) == 0
    plain, first, again = (array(tmp_path / f"{n}.probabilities.npy") for n in ("plain", "first", "again"))
    np.testing.assert_allclose(first, plain, atol=4e-3)  # features are fp16 between
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(array(tmp_path / "first.nii.gz"), array(tmp_path / "again.nii.gz"))


@pytest.mark.parametrize("change", ["name", "order", "number"])
def test_runs_of_other_labels_are_refused_in_one_sentence(folds, tmp_path, capsys, change):
    other = tmp_path / "other"
    shutil.copytree(folds / "fold_0", other)
    facts = json.loads((other / "run.json").read_text())
    names = list(facts["labels"].values())
    changed = {"name": ["gullet", *names[1:]], "order": names[::-1], "number": names[:-1]}[change]
    facts |= {"labels": {str(i + 1): name for i, name in enumerate(changed)}, "one_piece": []}
    (other / "run.json").write_text(json.dumps(facts))
    assert predict(scan(tmp_path / "scan.nii.gz"), tmp_path / "m.nii.gz", folds, other) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    value = 1 if change != "number" else len(names)
    theirs = changed[value - 1] if change != "number" else "nothing"
    needed = f"but {folds / 'fold_0'} has {names[value - 1]}; runs that are averaged need the same labels"
    assert f"{other} has {theirs} as label {value}, {needed}" in error


@pytest.mark.parametrize("lost", ["config.json", "run.json", "best.safetensors"])
def test_a_run_that_lacks_a_file_is_never_left_out_of_the_mean(folds, tmp_path, capsys, lost):
    home = tmp_path / "home"
    shutil.copytree(folds, home)
    (home / "fold_1" / lost).unlink()
    assert predict(scan(tmp_path / "scan.nii.gz"), tmp_path / "m.nii.gz", home) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert str(home / "fold_1") in error
    assert lost in error
    assert not (tmp_path / "m.nii.gz").exists()


def test_masks_of_cases_named_run_and_config_are_no_run(folds, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(folds, home)
    (home / "masks").mkdir()
    for name in ("run.json", "config.json", "run.nii.gz"):
        (home / "masks" / name).touch()
    assert run_folder.find_runs([home]) == [home / f"fold_{i}" for i in range(3)]


def test_a_folder_that_is_no_run_does_not_hide_a_model_that_comes_along(folds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "headneck" / "real").mkdir(parents=True)  # as `demo --real -o headneck` leaves it
    assert run_folder.find_run("headneck") == run_folder.WEIGHTS / "headneck"
    shutil.copytree(folds / "fold_0", tmp_path / "headneck" / "fold_0")
    assert run_folder.find_runs(["headneck"]) == [Path("headneck/fold_0")]


def test_where_one_run_is_needed_a_folder_of_runs_is_refused_with_their_names(folds):
    with pytest.raises(ValueError, match=f"give a run in it, such as {folds / 'fold_0'}$"):
        run_folder.read_run(folds)


def test_one_piece_organs_are_those_of_all_runs(folds, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folds / "fold_0", other)
    facts = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**facts, "one_piece": [2, 6]}))
    assert aftersam.load([folds, other], device="cpu").one_piece == (2, 6)


def test_no_model_lists_those_that_come_along(folds, tmp_path, capsys, monkeypatch):
    source = scan(tmp_path / "scan.nii.gz")
    command = ["-i", str(source), "-o", str(tmp_path / "m.nii.gz"), "--device", "cpu", "--no-preview"]
    assert main(command) == 2
    assert "no model is given" in capsys.readouterr().err
    shutil.copytree(folds / "fold_0", tmp_path / "weights" / "headneck")
    monkeypatch.setattr(run_folder, "WEIGHTS", tmp_path / "weights")
    assert main(command) == 2
    assert "a model that comes along: headneck (esophagus, trachea," in capsys.readouterr().err
    assert main([*command, "-m", "headneck"]) == 0
    assert predict(source, tmp_path / "same.nii.gz", folds / "fold_0") == 0
    np.testing.assert_array_equal(array(tmp_path / "m.nii.gz"), array(tmp_path / "same.nii.gz"))


def test_probabilities_are_of_the_runs_temperature_and_masks_are_not(folds, tmp_path):
    """Saved probabilities sharpen or flatten; those of several runs are flattened before they are averaged."""
    source, more = scan(tmp_path / "scan.nii.gz"), ["--save-probabilities", "--parts", "all"]
    runs = {temperature: tmp_path / f"run {temperature}" for temperature in (1.0, 3.0)}
    for temperature, run in runs.items():
        shutil.copytree(folds / "fold_0", run)
        facts = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**facts, "temperature": temperature}))
        assert predict(source, tmp_path / f"{temperature}.nii.gz", run, more=more) == 0
    cold, warm = (array(tmp_path / f"{t}.probabilities.npy").astype(np.float64) for t in runs)
    np.testing.assert_array_equal(*(array(tmp_path / f"{t}.nii.gz") for t in runs))
    np.testing.assert_allclose(cold, warm**3 / (warm**3).sum(0), atol=5e-3)
    assert abs(warm - cold).max() > 0.1
    assert predict(source, tmp_path / "mean.nii.gz", *runs.values(), more=more) == 0
    np.testing.assert_allclose(array(tmp_path / "mean.probabilities.npy"), (cold + warm) / 2, atol=2e-3)
