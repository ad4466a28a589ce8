"""Names of files and organs stand as they are in the terminal, whatever it can show."""

import io
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from aftersam.check import main as check
from aftersam.errors import one_line, plain_console
from aftersam.predict import main as predict
from toy_scans import scan, write_scans

NAMES = [
    "x[red]y",
    "b[",
    "red]c",
    "a:smile:b",
    "50%",
    "x$^$y",
    "fall_ü_日本",
    "esc\x1b[31m",
    "two\nlines",
    "-dash",
]


@given(st.text(st.characters(categories=["L", "N", "P", "S"], max_codepoint=0x2FF), min_size=1, max_size=40))
def test_a_console_shows_text_as_it_is(text):
    console = plain_console()
    console.file = io.StringIO()
    grid = Table(text, box=None)
    grid.add_row(text)
    console.print(text, soft_wrap=True)
    console.print(grid, soft_wrap=True)
    assert [line.strip() for line in console.file.getvalue().splitlines()] == [text] * 3


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    home = tmp_path_factory.mktemp("scans")
    for name in NAMES:
        scan(home / f"{name}.nii.gz", shape=(12, 12, 2))
    return home


def test_scans_of_any_name_are_segmented_and_told_of_in_a_line_each(run, scans, tmp_path, capsys):
    argv = ["-i", str(scans), "-o", str(tmp_path / "c[/b]"), "-m", str(run), "--device", "cpu"]
    assert predict([*argv, "--no-preview"]) == 0
    assert {p.name for p in (tmp_path / "c[/b]").glob("*.nii.gz")} == {f"{name}.nii.gz" for name in NAMES}
    lines = capsys.readouterr().err.splitlines()
    for name in NAMES:
        assert any(line.startswith(one_line(tmp_path / "c[/b]" / f"{name}.nii.gz: ")) for line in lines), name
    assert len(lines) == len(NAMES)


@pytest.mark.parametrize("encoding", ["ascii", "cp1251"])
def test_a_console_of_few_characters_stops_nothing(run, scans, tmp_path, encoding):
    bad = tmp_path / "in"
    bad.mkdir()
    (bad / "ü_日本.nii.gz").write_text("no scan")
    scan(bad / "ж_日本.nii.gz", shape=(12, 12, 2))
    done = subprocess.run(
        [sys.executable, "-m", "aftersam.predict", "-i", str(bad), "-o", str(tmp_path / "out"), "-m", str(run),
         "--device", "cpu"],
        env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False,
    )  # fmt: skip
    said = done.stderr.decode(encoding)
    assert done.returncode == 1, said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 2
    assert "_??.nii.gz is truncated or damaged: Not a gzipped file" in said
    assert (tmp_path / "out" / "ж_日本.nii.gz").exists()


def test_organs_of_any_name_are_checked(tmp_path, capsys):
    home = write_scans(tmp_path / "data")
    description = json.loads((home / "dataset.json").read_text())
    organs = ["[/b]", "x$^$y", "a[red]b", "$", ":smile:", "50%"]
    description["labels"] = {"background": 0, **{name: k for k, name in enumerate(organs, start=1)}}
    (home / "dataset.json").write_text(json.dumps(description))
    assert check([str(home), "-p", "tiny"]) == 0
    assert "1 [/b], 2 x$^$y, 3 a[red]b, 4 $, 5 :smile:, 6 50%" in " ".join(capsys.readouterr().out.split())
