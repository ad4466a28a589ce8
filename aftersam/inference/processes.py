"""Splits a cohort into parts for several processes, and lets the processes of torchrun end together."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from aftersam.errors import counted
from aftersam.files import normal_form

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = timedelta(days=1)  # to wait for the slowest process to start
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Part:
    """One of `count` parts into which the scans are split."""

    index: int
    count: int
    source: str = "--part-id"
    """Name of the flag or variable that gave the number."""

    def has(self, case: str) -> bool:
        """Whether the case is in this part. Only a hash of its id decides, so it stays there as the list grows."""
        digest = hashlib.sha256(normal_form(case).encode(errors="surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index


@dataclass(frozen=True)
class Scheduler:
    """Names of the environment variables in which a scheduler numbers the tasks of an array."""

    index: str
    count: str | None
    first: str = ""


SCHEDULERS = (
    Scheduler("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    Scheduler("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    Scheduler("JOB_COMPLETION_INDEX", None),
)


def part_of_this_process(num_parts: int | None, part_id: int | None, env: Mapping[str, str]) -> Part:
    """The part of this process, from the flags or else from the scheduler's variables in `env`.

    Processes of torchrun split the part further. Raises ValueError where one of the two numbers is missing, and where
    the part's number is not below the number of parts."""
    part = _given_part(num_parts, part_id, env)
    rank, world = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
    if world > 1:
        source = "RANK" if part.count == 1 else f"{part.source} and RANK"
        part = Part(part.index * world + rank, part.count * world, source)
    if part.index >= part.count:
        raise ValueError(
            f"{part.source} gives part {part.index} of {part.count}, but parts are numbered from 0 to "
            f"{part.count - 1}; give --num-parts and --part-id"
        )
    return part


def _given_part(num_parts: int | None, part_id: int | None, env: Mapping[str, str]) -> Part:
    if part_id is not None:
        if num_parts is None:
            raise ValueError(f"--part-id is {part_id}, but --num-parts is not given")
        return Part(part_id, num_parts)
    if num_parts == 1:
        return Part(0, 1)
    scheduler = next((s for s in SCHEDULERS if s.index in env), None)
    if scheduler is None:
        if num_parts is None:
            return Part(0, 1)
        known = ", ".join(s.index for s in SCHEDULERS)
        raise ValueError(f"--num-parts is {num_parts}, but neither --part-id nor one of {known} is given")
    if num_parts is None and scheduler.count is None:
        raise ValueError(
            f"{scheduler.index} is {env[scheduler.index]}, but --num-parts is not given; it is the job's number of "
            "completions, or 1 for all scans"
        )
    index = _number(env, scheduler.index, 0) - _number(env, scheduler.first, 0)
    count = num_parts if num_parts is not None else _number(env, scheduler.count or "", 1)
    return Part(index, count, scheduler.index)


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    """The number in an environment variable, or `default` if unset. Raises ValueError where it is no number."""
    text = env.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} is {text!r}, but a number from 0 up is needed")
    return int(text)


@dataclass(frozen=True)
class Processes:
    """This process and the others of its torchrun. `store` holds their shared counters; None without torchrun."""

    rank: int
    count: int
    store: Store | None

    def wait_for_the_others(self, failed: int, say: Callable[[str], None]) -> None:
        """Wait until all processes have finished. `failed` is the number of scans that failed in this process.

        torchrun kills all processes as soon as one exits with an error, so no process may exit while another
        computes."""
        if self.store is None:
            return
        self.store.add("failed", failed)
        self.store.add("finished", 1)
        while self.store.add("finished", 0) < self.count:
            time.sleep(POLL_SECONDS)
        if self.rank == 0 and (total := self.store.add("failed", 0)):
            scans = counted(total, "scan has", "scans have")
            say(f"{scans} no mask, for the reasons above; torchrun therefore ends with an error")
        self.store.add("gone", 1)
        while self.rank == 0 and self.store.add("gone", 0) < self.count:  # rank 0 may host the store
            time.sleep(POLL_SECONDS)


def sharing_processes() -> Processes:
    """The processes that torchrun started, or only this one."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return Processes(rank, count, None)
    from torch.distributed import rendezvous

    store, *_ = next(rendezvous("env://", timeout=PATIENCE))
    return Processes(rank, count, store)
