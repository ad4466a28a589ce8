"""Training: exact resume after a real kill, refusals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aftersam.config import Config, from_dict, preset
from aftersam.data.phantom import write_dataset
from aftersam.data.slice_group import SliceGroups
from aftersam.files import read_json
from aftersam.model.aftersam import AfterSAM
from aftersam.model.build import build_aftersam
from aftersam.train import main, train
from aftersam.training import run as training_run
from aftersam.training.arguments import TrainArgs, parse

FAST = ["--image-size", "48", "--num-blocks", "1", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    write_dataset(root, cases=4, seed=0)
    return root


def arguments(data, output, *more):
    return ["--data", str(data), "--output", str(output), "--preset", "tiny", *FAST, *more]


def test_a_run_leaves_what_its_docstring_says(phantoms, tmp_path):
    run = tmp_path / "run"
    assert main(arguments(phantoms, run, "--max-steps", "4")) == 0
    assert {p.name for p in run.iterdir()} >= {
        "config.json", "run.json", "best.safetensors", "last.safetensors", "history.jsonl", "loss.png",
        "overlay.png", "splits_final.json",
    }  # fmt: skip
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [r["step"] for r in history if "loss" in r] == [1, 2, 3, 4]
    assert sum("val_mean_dsc" in r for r in history) == 2
    config = from_dict(Config, read_json(run / "config.json"))
    assert config.model.encoder == "full"
    facts = read_json(run / "run.json")
    assert list(facts["labels"].values()) == [
        "esophagus",
        "trachea",
        "spinal_cord",
        "lung_left",
        "lung_right",
        "heart",
    ]
    assert main(arguments(phantoms, run, "--max-steps", "4")) == 2  # never overwritten


def logged(run):
    lines = (run / "history.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def run_command(phantoms, run, *more, processes=1, **how):
    launcher = (
        ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        if processes > 1
        else []
    )
    command = [sys.executable, "-m", *launcher, "aftersam.train", *arguments(phantoms, run, *more)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **how
    )


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(phantoms, tmp_path):
    """kill -9 between checkpoints; weights, their averages, moments and the logged losses are the same to the bit."""
    steps = ["--max-steps", "12", "--checkpoint-steps", "3", "--average", "0.5"]
    whole = run_command(phantoms, tmp_path / "whole", *steps)
    killed = run_command(phantoms, tmp_path / "killed", *steps)
    history = tmp_path / "killed" / "history.jsonl"
    deadline = time.monotonic() + 240
    while not (history.exists() and history.read_text().count('"loss"') >= 5):
        assert killed.poll() is None, killed.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    resumed = run_command(phantoms, tmp_path / "killed", *steps, "--resume")
    for process in (whole, resumed):
        error = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 0, error
    for file in ("last.safetensors", "best.safetensors"):
        ours, theirs = (load_file(tmp_path / name / file) for name in ("killed", "whole"))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name

    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert len(logged(tmp_path / "killed")) == 12


def stopped_after(phantoms, run, number, *more, processes=1, whom=os.killpg):
    """The exit code and stderr of a training in a session of its own that is sent `number` after two steps."""
    process = run_command(phantoms, run, *more, processes=processes, start_new_session=True)
    deadline, history = time.monotonic() + 240, run / "history.jsonl"
    try:
        while not (history.exists() and history.read_text().count('"loss"') >= 2):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        whom(process.pid, number)
        error = process.communicate(timeout=120)[1].decode()
    except BaseException:  # a training that goes on would slow all later tests
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, error


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_terminal_that_signals_workers_too_gets_one_line_and_a_checkpoint(phantoms, tmp_path, number, code):
    run = tmp_path / "run"
    found, error = stopped_after(phantoms, run, number, "--max-steps", "500", "--num-workers", "2")
    assert found == code
    step = len(logged(run))
    assert error == f"aftersam.train: stopped at step {step}, which {run} keeps; go on with --resume\n"
    assert (
        main(["--data", str(phantoms), "--output", str(run), "--resume", "--max-steps", f"{step + 1}"]) == 0
    )
    assert len(logged(run)) == step + 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's list of child processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_that_loads_outlives_its_training(phantoms, tmp_path, number):
    loading = []

    def alone(pid, number):
        loading.extend(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        os.kill(pid, number)

    stopped_after(phantoms, tmp_path / "run", number, "--max-steps", "500", "--num-workers", "2", whom=alone)
    assert len(loading) >= 2
    deadline = time.monotonic() + 120
    while any(Path("/proc", pid).exists() for pid in loading):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_one_of_two_processes_that_is_stopped_stops_both_at_the_same_step(phantoms, tmp_path):
    def second(pid, number):
        ranks = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        os.kill(ranks[-1], number)

    run = tmp_path / "run"
    more = ["--max-steps", "500", "--batch-size", "1"]
    code, error = stopped_after(phantoms, run, signal.SIGTERM, *more, processes=2, whom=second)
    assert code != 0
    step = len(logged(run))
    assert f"aftersam.train: stopped at step {step}, which {run} keeps" in error
    asked = ["--data", str(phantoms), "--output", str(run), "--resume", "--device", "cpu"]
    assert main([*asked, "--max-steps", f"{step + 1}"]) == 0


@pytest.mark.slow
def test_processes_and_accumulation_equal_one_large_batch(phantoms, tmp_path):
    """Two groups a step as one batch of two, two batches of one, and on two processes, whole and sharded: one loss."""
    steps = ["--max-steps", "4", "--validations", "1", "--average", "0.5"]
    losses = {}
    for name, size, processes in (
        ("batch", ["--batch-size", "2"], 1),
        ("accumulate", ["--batch-size", "1", "--accumulate", "2"], 1),
        ("processes", ["--batch-size", "1"], 2),
        ("sharded", ["--batch-size", "1", "--shard"], 2),
    ):
        process = run_command(phantoms, tmp_path / name, *steps, *size, processes=processes)
        error = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 0, error
        losses[name] = logged(tmp_path / name)
        assert len(losses[name]) == 4
        assert_averages_are_kept(tmp_path / name)
    assert losses["accumulate"] == pytest.approx(losses["batch"], rel=1e-5)
    assert losses["processes"] == pytest.approx(losses["batch"], rel=1e-5)
    assert losses["sharded"] == pytest.approx(losses["batch"], rel=1e-5)
    ours, theirs = (load_file(tmp_path / name / "best.safetensors") for name in ("sharded", "processes"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def assert_averages_are_kept(run):
    """best.safetensors has the averages that last.safetensors holds beside the weights and moments."""
    last, best = (load_file(run / f"{name}.safetensors") for name in ("last", "best"))
    config = from_dict(Config, read_json(run / "config.json"))
    trained = [name for name, _ in build_aftersam(config.model, 7).named_parameters()]
    for number, name in enumerate(trained):
        assert torch.equal(best[name], last[f"optimizer/{number}/average"]), name
    assert any(not torch.equal(best[name], last[name]) for name in trained)


def test_without_validations_the_last_weights_are_the_best(phantoms, tmp_path):
    plain = ["--max-steps", "2", "--validations", "0", "--average", "0"]
    process = run_command(phantoms, tmp_path / "run", *plain)
    error = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, error
    last, best = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("last", "best"))
    for name, value in best.items():
        assert torch.equal(last[name], value), name


def test_without_validations_the_last_average_is_the_best(phantoms, tmp_path):
    kept = ["--max-steps", "3", "--validations", "0", "--average", "0.9"]
    train(parse(arguments(phantoms, tmp_path / "run", *kept), TrainArgs, None))
    assert_averages_are_kept(tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(phantoms, tmp_path, monkeypatch, capsys):
    item, steps = SliceGroups.__getitem__, 2

    def broken(self, index):
        found = item(self, index)
        broken.given += 1
        if broken.given > steps * preset("tiny").train.batch_size:
            found["hu"].fill_(float("nan"))
        return found

    broken.given = 0
    monkeypatch.setattr(SliceGroups, "__getitem__", broken)
    run = tmp_path / "run"
    assert main(arguments(phantoms, run, "--max-steps", "4", "--checkpoint-steps", "1")) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 3" in message
    assert "phantom" in message
    weights = load_file(run / "last.safetensors")
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


def test_running_out_of_memory_names_the_knobs(phantoms, tmp_path, monkeypatch, capsys):
    def full(self, *_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation."
        )

    monkeypatch.setattr(AfterSAM, "forward", full)
    assert main(arguments(phantoms, tmp_path / "run", "--max-steps", "1")) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    for knob in ("--activation-checkpointing", "--batch-size", "--image-size", "--num-slices", "2.00 GiB"):
        assert knob in message


def test_a_stored_configuration_repeats_the_run_to_the_bit(phantoms, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(arguments(phantoms, first, "--max-steps", "2", "--seed", "5", "--num-slices", "5")) == 0
    asked = ["--data", str(phantoms), "--output", str(again), "--device", "cpu"]
    assert main([*asked, "--config", str(first / "config.json")]) == 0
    assert read_json(again / "config.json") == read_json(first / "config.json")
    assert logged(again) == logged(first)
    ours, theirs = (load_file(run / "last.safetensors") for run in (again, first))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_training_says_what_it_left(phantoms, tmp_path):
    args = parse(arguments(phantoms, tmp_path / "run", "--max-steps", "3"), TrainArgs, None)
    result = train(args)
    assert (result.run, result.steps) == (tmp_path / "run", 3)
    records = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert result.mean_dsc == max(r["val_mean_dsc"] for r in records if "val_mean_dsc" in r)
    assert result.minutes >= records[-1]["minutes"] > 0


def test_processor_minutes_are_those_of_the_steps(phantoms, tmp_path, monkeypatch):
    def busy(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    def checkpoint(_):
        busy(0.3)  # what comes after the steps

    monkeypatch.setattr(training_run.Run, "_steps", lambda *_: busy(0.2))
    monkeypatch.setattr(training_run.Run, "_checkpoint", checkpoint)
    args = parse(arguments(phantoms, tmp_path / "run", "--validations", "0"), TrainArgs, None)
    assert 0.19 < 60 * train(args).cpu_minutes < 0.29


def test_any_tracker_that_accelerate_knows_gets_the_curves(phantoms, tmp_path, monkeypatch):
    from accelerate import tracking

    seen = {}

    class Recorder(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "recorder", False, None

        def __init__(self, run_name, **_):
            super().__init__()

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **_):
            seen.setdefault(step, {}).update(values)

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    more = ["--max-steps", "10", "--validations", "1", "--tracker", "recorder"]
    assert main(arguments(phantoms, tmp_path / "run", *more)) == 0
    assert seen[10].keys() == {"loss", "dice", "ce", "lr", "val_mean_dsc"}
    assert seen[10]["loss"] == logged(tmp_path / "run")[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tracker", "nonsense"], "nonsense"),
        (["--tracker", "swanlab"], "tracker is 'swanlab', whose package is not installed"),
        (["--precision", "fp16"], "fp16 needs a GPU"),
        (["--encoder", "frozen"], "random weights"),
        (["--output-stride", "3"], "output_stride"),
        (["--sam-checkpoint", "missing.pth"], "missing.pth"),
        (["--fold", "9"], "fold"),
        (["--resume"], "config.json"),
        (["--shard"], "torchrun"),
        (["--config", "missing.json"], "missing.json"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_line(phantoms, tmp_path, capsys, more, message):
    assert main(arguments(phantoms, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert error.startswith("aftersam.train: ")


def test_a_missing_data_set_is_one_line(tmp_path, capsys):
    assert main(arguments(tmp_path / "nothing", tmp_path / "run")) == 2
    assert "nothing" in capsys.readouterr().err
