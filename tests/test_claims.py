"""Claims: one of many processes gets a scan, the living keep theirs, those of the dead are taken over."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from aftersam.inference import claims
from aftersam.inference.claims import Claims, remove_old_leases
from aftersam.inference.storage import Store

MASK = "site/a.nii.gz"


@pytest.fixture(params=["disk", "disk of machines that see no locks", "url"])
def store(request, tmp_path, monkeypatch):
    """A folder on disk or at a URL; another machine's lock tells nothing, only its heartbeat does."""
    if request.param.endswith("no locks"):
        monkeypatch.setattr(claims, "fcntl", None)
    if request.param == "url":
        return Store(f"memory://claims{tmp_path}")
    return Store(tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """Leases that are renewed and given up in fractions of a second."""
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(claims, "DEAD_SECONDS", 0.6)


def test_one_of_many_gets_a_scan(store):
    several = [Claims(store) for _ in range(8)]
    start, got = threading.Barrier(8), []

    def take(one):
        start.wait()
        got.append(one.take(MASK))

    threads = [threading.Thread(target=take, args=(one,)) for one in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]
    for one in several:
        one.release_all()
    assert store.names() == set()


def test_a_scan_that_is_given_back_can_be_claimed_again(store):
    first, second = Claims(store), Claims(store)
    assert first.take(MASK)
    assert not second.take(MASK)
    assert first.keeps(MASK)
    first.release(MASK)
    assert second.take(MASK)
    assert first.take("b.nii.gz")
    first.release_all()
    second.release_all()
    assert store.names() == set()


def test_a_living_process_keeps_its_scan_however_long_it_takes(store, quick):
    first, second = Claims(store), Claims(store)
    assert first.take(MASK)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        assert not second.take(MASK)
        time.sleep(0.05)
    assert second.alive(MASK)
    assert first.keeps(MASK)


def test_the_scan_of_a_dead_process_is_taken_over_by_one(store, quick, monkeypatch):
    dead, others = Claims(store), [Claims(store) for _ in range(3)]
    assert dead.take(MASK)
    dead._ended.set()  # its heart stops
    if dead._held[MASK][1] > 2:
        os.close(dead._held[MASK][1])  # and its lock with it
    got, until = [], time.monotonic() + 5
    while not any(got) and time.monotonic() < until:
        time.sleep(0.05)
        got = [one.take(MASK) for one in others]
    assert sum(got) == 1
    winner = others[got.index(True)]
    assert winner.keeps(MASK)
    assert not dead.keeps(MASK)  # it drops what it computed, should it live after all
    assert not any(one.take(MASK) for one in others)
    winner.release(MASK)
    assert store.names() == set()


def test_two_that_find_one_dead_do_not_both_have_its_scan(store, quick):
    """Also where the second looked before the first took over."""
    dead, first, second = (Claims(store) for _ in range(3))
    assert dead.take(MASK)
    dead._ended.set()
    if dead._held[MASK][1] > 2:
        os.close(dead._held[MASK][1])
    for one in (first, second):
        one.take("other.nii.gz")
        one.release("other.nii.gz")
    until = time.monotonic() + 5
    while not first.take(MASK) and time.monotonic() < until:
        second._dead(MASK, claims._lease(MASK, 0))
        time.sleep(0.05)
    assert not second.take(MASK)
    assert first.keeps(MASK)


def test_a_killed_process_of_this_machine_is_known_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from aftersam.inference.claims import Claims; from aftersam.inference.storage import Store\n"
        f"assert Claims(Store(Path({str(tmp_path)!r}))).take({MASK!r}); print('taken', flush=True); time.sleep(60)"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert holder.stdout.readline() == "taken\n"
    ours = Claims(Store(tmp_path))
    assert not ours.take(MASK)
    assert ours.alive(MASK)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    began = time.monotonic()
    assert ours.take(MASK)
    assert time.monotonic() - began < 5  # and not after a minute without its heartbeat


def test_a_store_without_atomic_creation_is_shared_by_parts_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("aftersam.inference.storage.ATOMIC", frozenset())
    store = Store("memory://no-claims")
    assert not store.atomic
    assert all(Claims(store).take(MASK) for _ in range(2))
    assert store.names() == set()


def test_leases_of_finished_scans_go_and_others_stay(tmp_path):
    names = {"a.nii.gz", ".a.nii.gz.claim-0", "x/.b.nii.gz.claim-1"}
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_old_leases(Store(Path(tmp_path)), names)
    assert Store(Path(tmp_path)).names() == names - {".a.nii.gz.claim-0"}
