"""Claims on scans that several processes have before them: a lease beside each mask, with a heartbeat.

A lease is a hidden file that only one process can create. Its holder renews it; a lease that is not renewed any more
belongs to a process that died, and the scan is taken over by creating the lease of the next generation. No two clocks
are compared: each process watches, on its own clock, whether a lease changes. On one machine a lock on the lease tells
at once."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from aftersam.files import fcntl, machine
from aftersam.inference.storage import Store

BEAT_SECONDS = 10.0  # between renewals
DEAD_SECONDS = 60.0  # without a renewal, after which a holder counts as dead
MARK = ".claim-"


class TakenOver(Exception):
    """Another process has a scan that this one had claimed: it looked dead for too long."""


@dataclass
class _Lease:
    """A lease of another process, as it was watched."""

    token: object
    since: float  # on this process's clock
    alive: bool = False


class Claims:
    """The scans that this process has claimed, by the names of their masks in `store`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._held: dict[
            str, tuple[int, int]
        ] = {}  # mask -> generation, and the lease's file handle or beats
        self._watched: dict[str, _Lease] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self, mask: str) -> bool:
        """Claim a scan; False where a living process has it."""
        if not self.store.atomic:
            return True
        generation = 0
        while True:
            handle = self._create(_lease(mask, generation))
            if handle is not None:
                with self._lock:
                    self._held[mask] = generation, handle
                    self._beat_from_now_on()
                return True
            if self.store.exists(_lease(mask, generation + 1)) or self._dead(mask, _lease(mask, generation)):
                generation += 1
            else:
                return False

    def keeps(self, mask: str) -> bool:
        """Whether a claimed scan is still this process's, and no other took it over in the meantime."""
        if not self.store.atomic or mask not in self._held:
            return True
        return not self.store.exists(_lease(mask, self._held[mask][0] + 1))

    def release(self, mask: str) -> None:
        """Give a scan back, finished or not. Leases of the dead go first, so that none is newer than this one."""
        with self._lock:
            generation, handle = self._held.pop(mask, (-1, -1))
        if generation < 0:
            return
        if not self.store.exists(_lease(mask, generation + 1)):
            for number in range(generation + 1):
                self.store.delete(_lease(mask, number))
        if self.store.local is not None:
            os.close(handle)

    def release_all(self) -> None:
        """Give back all scans, and renew nothing any more."""
        self._ended.set()
        for mask in list(self._held):
            self.release(mask)

    def alive(self, mask: str) -> bool:
        """Whether the process that has the scan was seen to live since this one came across its lease."""
        return mask in self._watched and self._watched[mask].alive

    def _create(self, lease: str) -> int | None:
        """The handle of a new lease, None where there is one."""
        if self.store.local is None:
            return 0 if self.store.create(lease, b"0") else None
        path = self.store.local / lease
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return None
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: only its heartbeat tells
                fcntl.flock(handle, fcntl.LOCK_EX)
                os.write(handle, machine())
        return handle

    def _dead(self, mask: str, lease: str) -> bool:
        """Whether the holder of a lease is dead; it is watched from the first time on."""
        try:
            held = self._locked(self.store.local / lease) if self.store.local is not None else None
            token = self._token(lease)
        except (OSError, ValueError):  # given back meanwhile
            self._watched.pop(mask, None)
            return False
        seen = self._watched.setdefault(mask, _Lease((lease, token), time.monotonic()))
        if seen.token != (lease, token):
            self._watched[mask] = _Lease((lease, token), time.monotonic(), alive=True)
            return False
        if held is not None:
            seen.alive = held
            return not held
        return time.monotonic() - seen.since > DEAD_SECONDS

    def _token(self, lease: str) -> object:
        """What each renewal of a lease changes."""
        if self.store.local is None:
            return self.store.read(lease)
        return os.stat(self.store.local / lease).st_mtime_ns

    def _locked(self, path: Path) -> bool | None:
        """Whether a process of this machine holds the lease; None where it is another machine's."""
        with path.open("rb") as file:
            if fcntl is None or file.read() != machine() or not machine():
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
            return False

    def _beat_from_now_on(self) -> None:
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._heart.start()

    def _beat(self) -> None:
        """Renew every lease that is held, until the end."""
        number = 0
        while not self._ended.wait(BEAT_SECONDS):
            number += 1
            for mask, (generation, _) in list(self._held.items()):
                lease = _lease(mask, generation)
                with contextlib.suppress(Exception):  # the next beat may get through
                    if self.store.local is not None:
                        os.utime(self.store.local / lease)
                    elif mask in self._held:
                        self.store.write(lease, str(number).encode())


def _lease(mask: str, generation: int) -> str:
    folder, separator, name = mask.rpartition("/")
    return f"{folder}{separator}.{name}{MARK}{generation}"


def remove_old_leases(store: Store, names: set[str]) -> None:
    """Delete the leases among `names` whose scan is finished: their process died right after its mask."""
    for lease in [name for name in names if MARK in name]:
        folder, separator, name = lease.rpartition("/")
        mask = f"{folder}{separator}{name[1:].rpartition(MARK)[0]}"
        if mask in names:
            store.delete(lease)
