"""Processes that share a folder of scans: torchrun starts them, and each takes every n-th scan."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store

Job = TypeVar("Job")
PATIENCE = timedelta(days=1)  # for the slowest process to start
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Processes:
    """This process and those beside it; `store` is where they count, None where torchrun does not watch over them."""

    rank: int
    count: int
    store: Store | None

    def share(self, jobs: Sequence[Job]) -> list[Job]:
        """Every `count`-th of the jobs, this process's own."""
        return list(jobs[self.rank :: self.count])

    def wait_for_the_others(self, failed: int, say: Callable[[str], None]) -> None:
        """Return when all processes have done their share, `failed` scans of this one's without success.

        torchrun kills all processes as soon as one ends with an error, so none may end while another computes."""
        if self.store is None:
            return
        self.store.add("failed", failed)
        self.store.add("finished", 1)
        while self.store.add("finished", 0) < self.count:
            time.sleep(POLL_SECONDS)
        if self.rank == 0 and (total := self.store.add("failed", 0)):
            scans = "1 scan has" if total == 1 else f"{total} scans have"
            say(f"{scans} no mask, for the reasons above; torchrun ends with an error for that")
        self.store.add("gone", 1)
        while self.rank == 0 and self.store.add("gone", 0) < self.count:  # rank 0 may keep the store
            time.sleep(POLL_SECONDS)


def sharing_processes() -> Processes:
    """The processes that torchrun started, or this one alone."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return Processes(rank, count, None)
    from torch.distributed import rendezvous

    store, *_ = next(rendezvous("env://", timeout=PATIENCE))
    return Processes(rank, count, store)
