"""Files: whole or not there, one sentence where they are broken."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aftersam.files import (
    by_case,
    case_id,
    check_place,
    masks_of,
    read_json,
    refuse_input,
    remove_leftovers,
    renamed,
    renamed_folder,
    reserve,
    scans_in,
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


HOLD = """
import sys, time
from pathlib import Path
from aftersam.files import renamed, renamed_folder
writing = {"file": renamed, "folder": renamed_folder}[sys.argv[1]]
with writing(Path(sys.argv[2])) as temporary:
    (temporary / "half" if sys.argv[1] == "folder" else temporary).write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(kind, path):
    """A process that is in the middle of writing `path`."""
    command = [sys.executable, "-c", HOLD, kind, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_living_process_writes_is_left_alone_and_what_a_killed_one_left_is_removed(tmp_path, kind):
    living, killed = holder(kind, tmp_path / "1.2.840.1"), holder(kind, tmp_path / "1.2.840.1.7")
    killed.kill()
    killed.communicate()
    strangers = [
        ".aftersam-notes",
        ".aftersam-0123456789abcdef",
        "aftersam-0123456789ab",
        ".1.1.2.840.1.nii.gz",
    ]
    for name in strangers:
        (tmp_path / name).mkdir()
    assert len(list(tmp_path.iterdir())) == len(strangers) + 2
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(strangers) + 1
    living.communicate("")
    assert living.returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {*strangers, "1.2.840.1"}


def test_the_next_writer_in_a_folder_removes_leftovers_without_being_asked(tmp_path):
    killed = holder("file", tmp_path / "a.json")
    killed.kill()
    killed.communicate()
    (place,) = tmp_path.iterdir()
    for file in place.iterdir():  # killed before it could lock
        file.unlink()
    write_json(tmp_path / "b.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_a_leftover_that_is_a_link_leads_nowhere(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for made in (outside, folder, folder / ".aftersam-0123456789ac"):
        made.mkdir()
    (outside / "kept").write_text("")
    (folder / ".aftersam-0123456789ab").symlink_to(outside)
    (folder / ".aftersam-0123456789ac" / ".lock").symlink_to(outside / "made")
    remove_leftovers(folder)
    assert [p.name for p in outside.iterdir()] == ["kept"]


@pytest.mark.parametrize("system", ["posix_fallocate", "none"])
def test_a_reserved_file_has_its_disk_space_and_its_content(tmp_path, monkeypatch, system):
    if system == "none":  # macOS, Windows
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif not hasattr(os, "posix_fallocate"):
        pytest.skip("this system has no posix_fallocate")
    path, size = tmp_path / "a.npy", 3 * 2**20 + 12345
    with path.open("wb") as file:
        file.write(b"header")
        file.seek(size - 1)
        file.write(b"!")
    before = path.read_bytes()
    assert path.stat().st_blocks * 512 < size
    reserve(path)
    assert path.stat().st_blocks * 512 >= size
    assert path.read_bytes() == before


def test_a_long_name_has_room(tmp_path):
    path = tmp_path / ("n" * 248 + ".json")
    write_json(path, {})
    assert path.read_text() == "{}\n"


def test_a_sentence_about_another_file_stays_what_it_is(tmp_path):
    with pytest.raises(OSError, match=r"^/b: gone$"), renamed(tmp_path / "a"):
        raise OSError("/b: gone")
    with pytest.raises(OSError, match="a could not be written: No space left"), renamed(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_case_is_a_name_without_endings_and_channel():
    names = ["a.nii.gz", "a_0000.nii.gz", "a.nii", "a_0000", "a", "a.NII.GZ", "a_0000.Nii", "a.dcm"]
    assert {case_id(Path("folder") / name) for name in names} == {"a"}


def test_scans_are_nifti_files_in_any_case_that_are_not_hidden(tmp_path):
    scans = ["a.nii.gz", "b.NII.GZ", "c.nii", "d.Nii"]
    for name in [*scans, "._a.nii.gz", ".1.a.nii.gz", "a.nrrd", "a.nii.gz.txt", "dataset.json"]:
        (tmp_path / name).write_text("")
    assert [path.name for path in scans_in(tmp_path)] == scans
    masks = [mask.name for _, mask in masks_of(scans_in(tmp_path), tmp_path / "out")]
    assert masks == ["a.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii.gz"]


@pytest.mark.parametrize(
    "pair",
    [
        ("a.nii", "a.nii.gz"),
        ("a.nii.gz", "a_0000.nii.gz"),
        ("a.nii.gz", "a.NII.GZ"),
        ("centreA/ct.nii.gz", "centreB/ct.nii.gz"),
        ("u\u0308.nii.gz", "\xfc.nii.gz"),
    ],
    ids=str,
)
def test_two_scans_of_one_mask_are_refused_naming_both(pair, tmp_path):
    for clash in (by_case, lambda scans: masks_of(scans, tmp_path)):
        with pytest.raises(ValueError, match="are both the case") as caught:
            clash([Path("b.nii"), *map(Path, pair)])
        assert all(name in str(caught.value) for name in pair)


def test_an_output_that_is_an_input_is_refused_by_any_name(tmp_path):
    scan = tmp_path / "a.nii.gz"
    scan.write_text("scan")
    (tmp_path / "soft").symlink_to(scan)
    (tmp_path / "hard").hardlink_to(scan)
    (tmp_path / "there").symlink_to(tmp_path)
    for output in (scan, tmp_path / "soft", tmp_path / "hard", tmp_path / "x" / ".." / "there" / scan.name):
        with pytest.raises(ValueError, match=r"is the input .*a\.nii\.gz"):
            refuse_input(output, [tmp_path / "missing", scan])
    refuse_input(tmp_path / "new.nii.gz", [scan])
    with pytest.raises(ValueError, match="is the input"):
        masks_of([tmp_path / "b_0000.nii.gz", scan], tmp_path)


@pytest.mark.parametrize("folder", [False, True])
def test_a_place_that_nothing_can_be_written_to_is_refused_and_no_other(tmp_path, folder):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in (
        "new",
        "new/new",
        "folder/new",
        "folder" if folder else "file",
        *([] if folder else ["link"]),
    ):
        check_place(tmp_path / name, folder=folder)
    for name in ("file" if folder else "folder", "pipe"):
        with pytest.raises(ValueError, match=f"{name} exists, but is not a {'folder' if folder else 'file'}"):
            check_place(tmp_path / name, folder=folder)
    for name in ("file/new", "file/new/new", "pipe/new"):
        with pytest.raises(
            ValueError, match=f"cannot be written, since {tmp_path / name[:4]} is not a folder"
        ):
            check_place(tmp_path / name, folder=folder)
    with pytest.raises(OSError, match="too long"):
        check_place(tmp_path / ("n" * 300), folder=folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(ValueError, match=f"since {tmp_path} is read-only"):
        check_place(tmp_path / "new" / "new")


def test_naming_the_masks_of_a_folder_asks_for_each_file_once(tmp_path, monkeypatch):
    scans = [tmp_path / f"{i}.nii.gz" for i in range(200)]
    asked, plain = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: asked.append(path) or plain(path))
    assert len(masks_of(scans, tmp_path / "out")) == 200
    assert len(asked) == 400


@pytest.mark.parametrize(
    ("machine", "age", "left"), [(b"", 0, True), (b"another", 0, True), (b"another", 2, False)]
)
def test_what_another_machine_left_is_removed_after_a_day(tmp_path, machine, age, left):
    place = tmp_path / ".aftersam-0123456789ab"
    place.mkdir()
    (place / "half").touch()
    (place / ".lock").write_bytes(machine)
    then = time.time() - age * 86400
    os.utime(place / ".lock", (then, then))
    remove_leftovers(tmp_path)
    assert place.exists() == left


def test_a_folder_that_a_full_disk_stops_is_said_to_be_even_where_one_stands(tmp_path):
    (tmp_path / "home").mkdir()
    with (
        pytest.raises(OSError, match="home could not be written: No space left"),
        renamed_folder(tmp_path / "home"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
