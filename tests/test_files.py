"""Files: whole or not there, one sentence where they are broken."""

import json
import os
from pathlib import Path

import pytest

from aftersam.files import (
    case_id,
    read_json,
    remove_leftovers,
    renamed,
    renamed_folder,
    write_json,
    write_text,
)


def test_json_refuses_nan_and_names_broken_files(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"dsc": float("nan")})
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not valid JSON"):
        read_json(tmp_path / "b.json")


def interrupted(writing, name):
    """Ctrl-C while `name` in the temporary folder, or the temporary file itself, is half written."""
    with writing as temporary:
        (temporary / name).write_text("half")
        raise KeyboardInterrupt


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first ×")
    with pytest.raises(KeyboardInterrupt):
        interrupted(renamed(path), "")
    assert path.read_text(encoding="utf-8") == "first ×"
    write_json(path, {"dsc": None})
    assert json.loads(path.read_text()) == {"dsc": None}
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(OSError, match=r"nowhere/b\.txt could not be written: No such file"):
        write_text(tmp_path / "nowhere" / "b.txt", "")


def test_a_folder_appears_whole_or_not_at_all_and_the_quicker_wins(tmp_path):
    home = tmp_path / "sub" / "home"
    with pytest.raises(KeyboardInterrupt):
        interrupted(renamed_folder(home), "half")
    assert list(home.parent.iterdir()) == []
    with renamed_folder(home) as temporary:
        (temporary / "slow").write_text("")
        home.mkdir()
        (home / "quick").write_text("")
    assert [p.name for p in home.iterdir()] == ["quick"]
    assert [p.name for p in home.parent.iterdir()] == ["home"]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="file/home could not be written"),
        renamed_folder(tmp_path / "file" / "home"),
    ):
        pass


def test_only_what_a_dead_process_left_of_a_case_is_removed(tmp_path):
    others = [".1.other.nii.gz", "1.case.nii.gz", f".{os.getpid()}.case.nii.gz", ".x.case.nii.gz"]
    for name in (".1.case.nii.gz", ".22.case.png", *others):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, "case")
    assert {p.name for p in tmp_path.iterdir()} == set(others)


def test_a_case_is_a_name_without_endings_and_channel():
    names = ["a.nii.gz", "a_0000.nii.gz", "a.nii", "a_0000", "a"]
    assert {case_id(Path("folder") / name) for name in names} == {"a"}
