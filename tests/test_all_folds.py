"""`train --fold all`: a run a fold, masks of every scan by the run that has not seen it, and a kill anywhere."""

import json
import shutil
import time

import nibabel as nib
import numpy as np
import pytest

from aftersam.evaluate import main as evaluate
from aftersam.files import read_json, write_json
from aftersam.predict import main as predict
from aftersam.train import main
from toy_scans import write_scans
from training_children import FAST, assert_same, finish, hidden, kill, start

LIMITS = ["--max-steps", "4", "--checkpoint-steps", "2", "--validations", "1"]
FOLDS = range(3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three scans, each held out once, and all their folds trained without interruption."""
    home = tmp_path_factory.mktemp("whole")
    data = write_scans(home / "scans")
    for name, mm in (("case0", 4.5), ("case2", 5.5)):  # every fold has another median
        for path in (data / "imagesTr" / f"{name}_0000.nii.gz", data / "labelsTr" / f"{name}.nii.gz"):
            stored = np.asarray(nib.load(path).dataobj)
            nib.save(nib.Nifti1Image(stored, np.diag([-4.0, -4.0, mm, 1.0])), path)
    cases = [f"case{i}" for i in FOLDS]
    write_json(
        data / "splits_final.json",
        [{"train": [c for c in cases if c != held], "val": [held]} for held in cases],
    )
    began = time.monotonic()
    code, said = finish(data, home / "run", *LIMITS, "--fold", "all")
    assert code == 0, said
    return data, home / "run", time.monotonic() - began


def array(path):
    return np.asarray(nib.load(path).dataobj)


def test_each_scan_is_predicted_by_the_run_that_has_not_seen_it(whole, tmp_path, capsys):
    data, run, _ = whole
    for i in FOLDS:
        assert read_json(run / f"fold_{i}" / "run.json")["fold"] == i
        source, mask = data / "imagesTr" / f"case{i}_0000.nii.gz", tmp_path / f"case{i}.nii.gz"
        command = ["-i", str(source), "-o", str(mask), "--device", "cpu", "--no-preview"]
        assert predict([*command, "-m", str(run / f"fold_{i}")]) == 0
        np.testing.assert_array_equal(array(run / "masks" / mask.name), array(mask))
    output = tmp_path / "metrics.json"
    assert evaluate(["-p", str(run / "masks"), "-l", str(data / "labelsTr"), "-o", str(output)]) == 0
    ours, theirs = read_json(run / "metrics.json"), read_json(output)
    assert ours["cases"] == theirs["cases"]
    assert len(ours["cases"]) == len(FOLDS)
    source = str(data / "imagesTr")
    assert predict(["-i", source, "-o", str(tmp_path / "m"), "-m", str(run), "--device", "cpu"]) == 0


def test_folds_with_a_median_spacing_share_that_of_all_scans(whole):
    _, run, _ = whole
    for i in FOLDS:
        assert read_json(run / f"fold_{i}" / "run.json")["spacing_mm"] == [5.0, 4.0, 4.0]
        assert read_json(run / f"fold_{i}" / "config.json")["data"]["spacing_mm"] == [5.0, 4.0, 4.0]


def same(run, other):
    """Whether all folds, masks and scores of two folders are equal to the bit."""
    for i in FOLDS:
        assert_same(run / f"fold_{i}", other / f"fold_{i}")
    for mask in sorted((other / "masks").glob("*.nii.gz")):
        np.testing.assert_array_equal(array(run / "masks" / mask.name), array(mask))
    assert read_json(run / "metrics.json") == read_json(other / "metrics.json")
    assert hidden(run) == []


def again(run):
    return ["--fold", "all", *(["--resume"] if (run / "fold_0" / "last.safetensors").exists() else [])]


@pytest.mark.parametrize(
    "trials", [pytest.param(1, id="some"), pytest.param(20, id="all", marks=pytest.mark.long)]
)
def test_killed_at_random_and_resumed_equals_uninterrupted_to_the_bit(whole, tmp_path, trials):
    data, reference, seconds = whole
    rng, kills = np.random.default_rng(0), 0
    for trial in range(trials):
        run = tmp_path / f"{trial}"
        for share in rng.uniform(0.2, 0.9, rng.integers(2, 4)):
            child = start(data, run, *LIMITS, *again(run))
            child.join(share * seconds)
            kills += child.exitcode is None
            kill(child)
        code, said = finish(data, run, *LIMITS, *again(run))
        assert code == 0, said
        same(run, reference)
    assert kills >= trials


def test_a_resume_needs_no_choices_and_goes_on_with_those_of_the_first_fold(whole, tmp_path):
    """Killed in the second fold, before its first checkpoint; the third has not begun."""
    data, reference, _ = whole
    run = tmp_path / "run"
    shutil.copytree(reference, run, symlinks=True)
    for name in ("fold_2", "masks", "metrics.json"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "fold_1" / "last.safetensors").unlink()
    assert (
        main(["--data", str(data), "--output", str(run), "--device", "cpu", "--fold", "all", "--resume"]) == 0
    )
    same(run, reference)


def test_what_would_make_later_folds_differ_is_refused(whole, tmp_path, capsys):
    data, run, _ = whole
    command = ["--output", str(run), "--device", "cpu", "--fold", "all"]
    assert main(["--data", str(data), *command, *FAST, *LIMITS]) == 2
    assert "holds a run already; go on with --resume" in capsys.readouterr().err
    assert main(["--data", str(data), *command, "--resume", "--init", str(run / "fold_0")]) == 2
    assert "fold_0 began without --init, and so must the folds after it" in capsys.readouterr().err
    begun = tmp_path / "begun"
    shutil.copytree(run, begun, symlinks=True)
    facts = read_json(begun / "fold_0" / "run.json")
    write_json(begun / "fold_0" / "run.json", {**facts, "init_sha256": "0"})
    resume = ["--data", str(data), *command, "--output", str(begun), "--resume"]
    assert main(resume) == 0  # all folds have begun: none needs the weights any more
    (begun / "fold_2" / "last.safetensors").unlink()
    assert main(resume) == 2
    assert "fold_0 began with --init, and so must the folds after it" in capsys.readouterr().err
    other = write_scans(tmp_path / "other")
    splits = json.loads((data / "splits_final.json").read_text())
    write_json(other / "splits_final.json", splits[::-1])
    assert main(["--data", str(other), *command, "--resume"]) == 2
    assert "is split into other folds than" in capsys.readouterr().err


def test_a_data_set_that_has_moved_is_scored_where_it_is_now(whole, tmp_path):
    """Links to the scans of before are not followed."""
    data, reference, _ = whole
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(reference, run, symlinks=True)
    shutil.copytree(data, moved)
    for link in [*run.glob("labels/*"), *run.glob("validation/*/*/*")]:
        assert link.is_symlink()
        link.unlink()
        link.symlink_to(tmp_path / "before" / link.name)
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "masks")
    command = ["--data", str(moved), "--output", str(run), "--device", "cpu", "--fold", "all", "--resume"]
    assert main(command) == 0
    same(run, reference)


@pytest.mark.parametrize("there", ["masks", "images", "fold_2"])
def test_files_of_others_in_the_output_folder_are_not_written_over(whole, tmp_path, capsys, there):
    data, run = whole[0], tmp_path / "run"
    (run / there).mkdir(parents=True)
    command = ["--data", str(data), "--output", str(run), "--device", "cpu", "--fold", "all", *FAST, *LIMITS]
    assert main(command) == 2
    assert f"{run / there} exists" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == [there]
    assert main([*command, "--output", str(data)]) == 2
    assert "is the input" in capsys.readouterr().err
