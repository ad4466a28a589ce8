"""Claims on scans that several processes share: a lease beside each mask, with a heartbeat.

A lease is a hidden file that only one process can create. The process that holds the lease renews it. A lease that is
no longer renewed belongs to a process that died; another process takes the scan over by creating the lease of the next
generation. Clocks of different machines are not compared: each process measures by its own clock how long a lease has
not changed. Between processes of one machine, a file lock on the lease shows at once whether the holder is alive."""

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
DEAD_SECONDS = 60.0  # a holder without a renewal for this long counts as dead
MARK = ".claim-"


class TakenOver(Exception):
    """Raised where another process took over a scan because this process did not renew its lease in time."""


@dataclass
class _Lease:
    """What this process has seen of another process's lease."""

    token: object
    since: float  # when the token was first seen, by this process's clock
    alive: bool = False  # whether the holder was seen to be alive


class Claims:
    """The scans that this process has claimed, by the names of their masks in `store`.

    Where `store` cannot create a file atomically, there are no leases and every claim succeeds."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._held: dict[str, tuple[int, int]] = {}  # mask -> generation, file handle (0 at a URL)
        self._watched: dict[str, _Lease] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self, mask: str) -> bool:
        """Claim a scan. Returns False where a living process holds it."""
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
        """Whether no other process has taken over a scan that this process claimed."""
        if not self.store.atomic or mask not in self._held:
            return True
        return not self.store.exists(_lease(mask, self._held[mask][0] + 1))

    def release(self, mask: str) -> None:
        """Give a claimed scan back, finished or not.

        Leases of dead holders are deleted oldest first: a lease of a lower generation must not outlive a higher one."""
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
        """Stop the heartbeat and give back all claimed scans."""
        self._ended.set()
        for mask in list(self._held):
            self.release(mask)

    def alive(self, mask: str) -> bool:
        """Whether the holder of the scan's lease was seen to be alive since this process first met the lease."""
        return mask in self._watched and self._watched[mask].alive

    def _create(self, lease: str) -> int | None:
        """The file handle of a newly created lease, 0 at a URL, None where the lease exists."""
        if self.store.local is None:
            return 0 if self.store.create(lease, b"0") else None
        path = self.store.local / lease
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return None
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: only the heartbeat is left
                fcntl.flock(handle, fcntl.LOCK_EX)
                os.write(handle, machine())
        return handle

    def _dead(self, mask: str, lease: str) -> bool:
        """Whether the holder of a lease is dead. The first call starts to watch the lease."""
        try:
            held = self._locked(self.store.local / lease) if self.store.local is not None else None
            token = self._token(lease)
        except (OSError, ValueError):  # the lease was given back in the meantime
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
        """A value that every renewal of the lease changes: the file's time, or the content at a URL."""
        if self.store.local is None:
            return self.store.read(lease)
        return os.stat(self.store.local / lease).st_mtime_ns

    def _locked(self, path: Path) -> bool | None:
        """Whether a process of this machine holds the lease. None where the lease comes from another machine."""
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
        """Renew every held lease until `release_all`."""
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
    """Delete the leases among `names` of scans whose mask exists: a process that died after writing it left them."""
    for lease in [name for name in names if MARK in name]:
        folder, separator, name = lease.rpartition("/")
        mask = f"{folder}{separator}{name[1:].rpartition(MARK)[0]}"
        if mask in names:
            store.delete(lease)
