"""Training that is killed anywhere, or whose disk is full: the next run leaves what an uninterrupted one leaves."""

import os
import shutil
import subprocess
import time

import numpy as np
import pytest

from toy_scans import write_scans
from training_children import assert_same, finish, hidden, kill, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Scans, and a run on them that was never interrupted."""
    home = tmp_path_factory.mktemp("whole")
    data = write_scans(home / "scans")
    finish_well(data, home / "run")
    return data, home / "run"


def finish_well(data, run):
    """Train to the end; the seconds that it took."""
    began = time.monotonic()
    code, said = finish(data, run)
    assert code == 0, said
    return time.monotonic() - began


@pytest.mark.parametrize(
    "trials", [pytest.param(1, id="some"), pytest.param(50, id="all", marks=pytest.mark.long)]
)
def test_killed_at_random_and_resumed_equals_uninterrupted_to_the_bit(whole, tmp_path, trials):
    data, reference = whole
    rng, kills = np.random.default_rng(0), 0
    seconds = finish_well(
        data, tmp_path / "timed"
    )  # without the start of the server that processes are forked from
    for trial in range(trials):
        run = tmp_path / f"{trial}"
        for _ in range(rng.integers(1, 4)):
            child = start(data, run)
            child.join(rng.uniform(0.05, 0.9) * seconds)
            kills += child.exitcode is None
            kill(child)
        finish_well(data, run)
        assert_same(run, reference)
        assert hidden(run) == []
    assert kills >= trials // 2


@pytest.mark.parametrize(
    "every", [pytest.param(12, id="some"), pytest.param(1, id="all", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_a_rename_leaves_nothing_after_the_next_run(whole, tmp_path, every, before):
    data, reference = whole
    number = every
    while True:
        run = tmp_path / f"{number}"
        code, _ = finish(data, run, fault=("rename", number, before))
        if code == 0:  # there are fewer renames
            break
        assert code == -9
        finish_well(data, run)
        assert_same(run, reference)
        assert hidden(run) == []
        number += every
    assert number > 12


@pytest.mark.parametrize(
    "count", [pytest.param(2, id="some"), pytest.param(24, id="all", marks=pytest.mark.long)]
)
def test_a_file_that_cannot_be_written_is_one_sentence_and_the_next_run_goes_on(whole, tmp_path, count):
    """No file may be larger than a limit, from bytes to megabytes: cache, history, pictures, checkpoints fail."""
    data, reference = whole
    largest, refused = (reference / "last.safetensors").stat().st_size, 0
    for limit in np.geomspace(100, largest - 1, count).astype(int).tolist():
        run = tmp_path / f"{limit}"
        code, said = finish(data, run, fault=("limit", limit))
        assert code == 2, said
        assert said.startswith("aftersam.train: "), said
        assert str(run) in said, said
        assert "File too large" in said, said
        assert hidden(run) == []
        refused += 1
        finish_well(data, run)
        assert_same(run, reference)
    assert refused == count


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 160 MiB in memory."""
    home = tmp_path / "disk"
    home.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "none", home], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    yield home
    subprocess.run(["umount", "-l", home], check=True)


@pytest.mark.parametrize(
    "count", [pytest.param(1, id="some"), pytest.param(16, id="all", marks=pytest.mark.long)]
)
def test_a_full_disk_is_one_sentence_keeps_what_there_is_and_the_next_run_goes_on(whole, small_disk, count):
    data, reference = whole
    needed = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    for share in np.linspace(0.02, 0.9, count):
        run = small_disk / "run"
        free = int(needed * share)
        stat = os.statvfs(small_disk)
        with (small_disk / "ballast").open("wb") as ballast:
            ballast.write(bytes(max(stat.f_bavail * stat.f_frsize - free, 0)))
        code, said = finish(data, run)
        assert code == 2, said
        assert said.startswith("aftersam.train: "), said
        assert "No space left on device" in said, said
        assert str(run) in said, said
        assert hidden(run) == []
        (small_disk / "ballast").unlink()
        finish_well(data, run)
        assert_same(run, reference)
        shutil.rmtree(run)
