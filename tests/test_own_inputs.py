"""No command writes over what it reads: refused before anything is computed, whatever the name it goes by."""

import shutil

import pytest

from aftersam.ablate import main as ablate
from aftersam.encode import main as encode
from aftersam.evaluate import main as evaluate
from aftersam.predict import main as predict
from aftersam.report import main as report
from aftersam.train import main as train
from toy_scans import write_scans


def contents(home):
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


@pytest.fixture
def home(tmp_path, run):
    """A data set, a run and a link to each."""
    write_scans(tmp_path / "data")
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("cache", "tensorboard"))
    for name in ("data", "run"):
        (tmp_path / f"link-{name}").symlink_to(tmp_path / name)
    return tmp_path


COMMANDS = {
    "predict onto its folder": (predict, "-i data/imagesTr -o data/imagesTr -m run --overwrite"),
    "predict through a link": (predict, "-i data/imagesTr -o link-data/imagesTr -m run --overwrite"),
    "predict onto its scan": (
        predict,
        "-i data/imagesTr/case0_0000.nii.gz -o link-data/imagesTr/case0_0000.nii.gz -m run --overwrite",
    ),
    "predict into the run": (predict, "-i data/imagesTr -o link-run -m run --overwrite"),
    "predict onto its prompts": (
        predict,
        "-i data/imagesTr -o data/labelsTr -m run --overwrite --prompt-labels data/labelsTr",
    ),
    "encode into its data": (encode, "--data data/imagesTr --output link-data/imagesTr -m run"),
    "evaluate onto a mask": (
        evaluate,
        "-p data/labelsTr -l data/labelsTr -o link-data/labelsTr/case0.nii.gz",
    ),
    "evaluate onto the names": (evaluate, "-p data/labelsTr -l data/labelsTr -o data/dataset.json"),
    "report onto its scores": (report, "-m run/run.json -o link-run/run.json"),
    "report onto the run": (report, "-m data/dataset.json --run run -o run/config.json"),
    "train into its data": (train, "--data data --output link-data --preset tiny --max-steps 1"),
    "ablate into its data": (ablate, "--data data --output data"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_is_read_is_refused(home, monkeypatch, capsys, name):
    monkeypatch.chdir(home)
    before = contents(home)
    command, flags = COMMANDS[name]
    assert command(flags.split()) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "is the input" in said[0]
    assert contents(home) == before
