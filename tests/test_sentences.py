"""Every user-facing error is one sentence: what was done, and all that is said. New errors get a row of a table."""

import errno
from importlib import import_module
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from error_rows import ALL, FULL, READING, two_scans
from error_rows_training import TRAINING

TABLE = [*READING, *TRAINING]


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.command}: {row.id}" for row in TABLE])
def test_an_error_is_its_sentence(run, tmp_path, capsys, monkeypatch, row):
    row.make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    row.patch(monkeypatch)

    def real(text):
        return text.replace("HOME", str(tmp_path)).replace("RUN", str(run))

    assert import_module(f"aftersam.{row.command}").main(list(map(real, row.argv.split()))) == row.code
    name = f"aftersam.{row.command.rpartition('.')[2]}: "
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(name)]
    assert said
    assert matches(said[-1].removeprefix(name), real(row.says)), said
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in before} == before
    assert not [path for path in tmp_path.rglob(".*")]


def matches(line, pattern):
    """Whether the pieces of `pattern` between stars stand in `line` in this order, the first and last at its ends."""
    first, *others = pattern.split("*")
    at = len(first)
    if not line.startswith(first) or not (line.endswith(others[-1]) if others else line == first):
        return False
    for piece in others:
        at = line.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def test_stars_stand_for_what_differs():
    assert matches("a is 3 b", "a is * b")
    assert not matches("a is 3 b!", "a is * b")
    assert not matches("a is b", "a is b*c")
    assert matches("a", "a")
    assert not matches("ab", "a")


def test_a_scan_of_many_that_finds_the_disk_full_costs_itself_alone(run, tmp_path, capsys, monkeypatch):
    two_scans(tmp_path)
    write = nib.Nifti1Image.to_filename

    def full_for_a(image, name, **options):
        if Path(name).name == "a.nii.gz":
            Path(name).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(image, name, **options)

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", full_for_a)
    predict = import_module("aftersam.predict").main
    argv = [part.replace("HOME", str(tmp_path)).replace("RUN", str(run)) for part in ALL.split()]
    assert predict(argv) == 1
    assert f"aftersam.predict: {tmp_path}/masks/a.nii.gz {FULL}" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "masks").iterdir()} == {"b.json", "b.nii.gz"}
    monkeypatch.undo()
    assert predict(argv) == 0
    said = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/masks: 1 of 2 masks exist and are kept; --overwrite replaces existing masks" in said
    assert predict(argv) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/masks: 2 of 2 masks exist and are kept; --overwrite replaces existing masks"
    ]
    assert np.asarray(nib.load(tmp_path / "masks" / "a.nii.gz").dataobj).shape == (24, 20, 3)
