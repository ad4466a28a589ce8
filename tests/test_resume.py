"""Resuming: a run's own split and choices, limits that may change, signals that end a run at a step, links refused."""

import os
import re
import signal

import numpy as np
import pytest

from aftersam.data.slice_group import SliceGroups
from aftersam.files import read_json, write_json
from aftersam.train import main
from toy_scans import write_scans
from training_children import assert_same, records

FAST = ["--preset", "tiny", "--image-size", "48", "--num-blocks", "1", "--precision", "fp32"]
LIMIT = ["--max-steps", "4", "--checkpoint-steps", "100"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="module")
def whole(scans, tmp_path_factory):
    """A run that was never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(scans, run, *FAST, *LIMIT) == 0
    return run


def train(scans, run, *more):
    cache = ["--cache", str(scans.parent / f"{scans.name}-cache")]
    return main(["--data", str(scans), "--output", str(run), "--device", "cpu", *cache, *more])


def signalled(monkeypatch, number, at, times):
    """Send this process `number` when `at` (an object and the name of its method) is called for the n-th time."""
    owner, name = at
    usual, calls = getattr(owner, name), []

    def called(*args, **keys):
        calls.append(1)
        if len(calls) == times:
            os.kill(os.getpid(), number)
        return usual(*args, **keys)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("where", ["step", "validation"])
def test_a_signal_ends_a_run_at_its_step_and_the_resumed_run_equals_the_uninterrupted(
    scans, whole, tmp_path, monkeypatch, capsys, number, code, where
):
    from aftersam.training import run as module

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at = (SliceGroups, "__getitem__") if where == "step" else (module, "validate_scans")
        signalled(patch, number, at, {"step": 2 * 2 + 1, "validation": 1}[where])  # two groups a step
        assert train(scans, run, *FAST, *LIMIT) == code
    step = 3 if where == "step" else 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"aftersam.train: stopped at step {step}, which {run} keeps; go on with --resume"
    )
    assert [r["step"] for r in records(run) if "loss" in r] == [*range(1, step + 1)]
    assert not [path for path in run.rglob(".*")]
    assert train(scans, run, "--resume") == 0
    assert_same(run, whole)


def test_the_same_command_again_goes_on_and_a_later_limit_is_used(scans, whole, tmp_path):
    run = tmp_path / "run"
    assert train(scans, run, *FAST, "--max-steps", "2") == 0
    assert train(scans, run, *FAST, "--max-steps", "2", "--resume") == 0
    assert len([r for r in records(run) if "loss" in r]) == 2
    assert train(scans, run, "--resume", "--max-steps", "3", "--validations", "3") == 0
    assert [r["step"] for r in records(run) if "loss" in r] == [1, 2, 3]
    assert [r["step"] for r in records(run) if "val_dsc" in r][-1] == 3
    assert read_json(run / "config.json")["train"]["max_steps"] == 3


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--learning-rate", "0.5"], "learning_rate is 0.5, but the run in .* has 0.001"),
        (["--preset", "paper"], "image_encoder is vit_b, but the run in .* has tiny"),
        (["--seed", "3"], "seed is 3"),
        (["--num-blocks", "2"], "num_blocks is 2"),
        (["--spacing-mm", "native"], "spacing_mm is native"),
        (["--fold", "1"], "--fold is 1, but the run in .* is on fold 0"),
        (["--sam-checkpoint", "missing.pth"], "missing.pth"),
    ],
    ids=str,
)
def test_what_a_resume_cannot_change_is_refused_by_name(scans, whole, capsys, more, says):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert train(scans, whole, "--resume", *more) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(says, error), error
    assert before == {path: path.stat().st_mtime_ns for path in whole.iterdir()}


@pytest.fixture
def grown(tmp_path):
    """Scans without splits of their own, a run of two steps on them, and one scan more."""
    data = write_scans(tmp_path / "scans")
    (data / "splits_final.json").unlink()
    assert train(data, tmp_path / "run", *FAST, "--max-steps", "2") == 0
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        file = data / folder / f"case0{ending}"
        file.with_name(f"a{ending}").write_bytes(file.read_bytes())
    return data, tmp_path / "run"


def test_a_resumed_run_keeps_its_split_when_cases_are_added_and_misses_one_by_name(grown, capsys):
    data, run = grown
    before = (run / "splits_final.json").read_bytes()
    assert train(data, run, "--resume", "--max-steps", "3") == 0
    assert (run / "splits_final.json").read_bytes() == before
    assert "2 training scans and 1 validation scan of 4, " in capsys.readouterr().out
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (data / folder / f"case1{ending}").unlink()
    assert train(data, run, "--resume", "--max-steps", "4") == 2
    assert "the case 'case1', which the data set does not have" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["history.jsonl", "loss.png", "overlay.png", "tensorboard", "cache"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_nothing_is_written_through_what_stands_in_a_run_folder(scans, tmp_path, capsys, name, kind):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    if kind == "fifo":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(outside if kind == "dangling" else tmp_path)
    assert train(scans, run, *FAST, *LIMIT) == 2
    assert f"{run / name} is a link or a device" in capsys.readouterr().err
    assert not outside.exists()
    assert list(run.iterdir()) == [run / name]


def test_a_history_that_others_are_linked_to_is_left_alone(scans, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.write_text('{"step": 0}\nnot ours\n')
    (run / "history.jsonl").hardlink_to(other)
    assert train(scans, run, *FAST, "--max-steps", "1") == 0
    assert other.read_text() == '{"step": 0}\nnot ours\n'
    assert records(run)[0]["step"] == 1


def test_a_class_that_no_training_scan_has_is_said_before_training(tmp_path, capsys):
    data = write_scans(tmp_path / "scans")
    labels = read_json(data / "dataset.json")["labels"]
    write_json(data / "dataset.json", {"labels": {**labels, "aorta": len(labels)}})
    assert train(data, tmp_path / "run", *FAST, "--max-steps", "1") == 0
    said = capsys.readouterr().out.splitlines()[1]  # the first line names the preset
    assert said == "no training scan has trachea, aorta: it will not be learned"


def test_a_scan_read_in_another_spacing_does_not_move_a_resumed_run(grown):
    """The median spacing is the run's own: case.json of the cache says which was used."""
    data, run = grown
    spacing = read_json(run / "run.json")["spacing_mm"]
    facts = read_json(run / "run.json")
    write_json(run / "run.json", {**facts, "spacing_mm": [6.0, 5.0, 5.0]})
    assert train(data, run, "--resume", "--max-steps", "3") == 0
    found = {tuple(read_json(path)["spacing_mm"]) for path in data.parent.glob("scans-cache/*/case.json")}
    assert found == {tuple(np.round(spacing, 4)), (6.0, 5.0, 5.0)}
