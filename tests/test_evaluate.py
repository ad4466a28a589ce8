"""The command evaluate: one bad case does not stop the others, what cannot be scored is one line."""

import json

import pytest

from aftersam.evaluate import main
from toy_files import organs, save_mask, scored_folders


@pytest.fixture
def folders(tmp_path):
    return scored_folders(tmp_path)


def test_bad_cases_are_reported_and_the_others_scored(folders, tmp_path, capsys):
    masks, labels = folders
    save_mask(masks / "b.nii.gz", organs()[:-1])
    (masks / "c.nii.gz").unlink()
    output = tmp_path / "m.json"
    assert main(["-p", str(masks), "-l", str(labels), "-o", str(output)]) == 1
    error = capsys.readouterr().err
    assert "b.nii.gz" in error
    assert "no mask for the case c" in error
    metrics = json.loads(output.read_text())
    assert metrics["num_cases"] == 1
    assert set(metrics["problems"]) == {"b", "c"}


@pytest.mark.parametrize("case", ["no folder", "empty folder", "tolerance"])
def test_what_cannot_be_scored_is_one_line(folders, tmp_path, capsys, case):
    masks, labels = folders
    arguments = ["-p", str(masks), "-l", str(labels), "-o", str(tmp_path / "m.json")]
    if case == "no folder":
        arguments[1] = str(tmp_path / "none")
    elif case == "empty folder":
        (tmp_path / "void").mkdir()
        arguments[1] = str(tmp_path / "void")
    else:
        arguments += ["--nsd-tolerance-mm", "0"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("aftersam.evaluate: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "m.json").exists()
