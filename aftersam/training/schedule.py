"""Where a training run stands, its learning rate there, and which groups each process computes at each step."""

from __future__ import annotations

import math
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aftersam.config import TrainConfig

if TYPE_CHECKING:
    from aftersam.data.slice_group import SliceGroups

GPU_WORKERS = 4  # a group of 9 slices at 1024 px takes a processor about as long as its step takes an H100


@dataclass
class Progress:
    """Where a run stands; all of it is stored in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    validated: int = 0
    best: float = -1.0

    def __post_init__(self) -> None:
        """Raises ValueError on values that no run reaches."""
        if min(self.step, self.seconds, self.validated) < 0 or not math.isfinite(self.seconds + self.best):
            raise ValueError(
                f"step is {self.step}, seconds {self.seconds} and best {self.best}, but no run gets there"
            )

    def fraction(self, config: TrainConfig, steps_per_epoch: int) -> float:
        """Share of the run that is done, by whichever limit comes first."""
        limits = []
        if config.max_steps is not None:
            limits.append(self.step / config.max_steps)
        if config.max_minutes is not None:
            limits.append(self.seconds / (60 * config.max_minutes))
        if not limits:
            limits.append(self.step / (config.epochs * steps_per_epoch))
        return min(max(limits), 1.0)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """The rate at `progress` in [0, 1] of the run: warm-up, then `schedule`."""
    rate = config.learning_rate
    if progress < config.warmup:
        return rate * (progress + 1e-3) / config.warmup
    if config.schedule == "step":
        return rate if progress < 500 / 550 else rate / 10
    return rate * (1 - progress) ** 0.9


def average_share(config: TrainConfig, progress: float, step: int) -> float:
    """Share by which the moving average goes to the weights of step `step`, which began at `progress` of the run.

    It is 1 / step at first, which gives a plain mean, and later constant. 0: no average."""
    if not config.average:
        return 0.0
    pace = progress / max(step - 1, 1)  # of a step so far, since minutes may be the limit
    return min(1.0, max(pace / config.average, 1 / step))


def batches(
    seed: int, cases: int, batch_size: int, *, rank: int, world: int, start: int, accumulate: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """Endless (epoch, case) lists for one process from optimiser step `start` on, `accumulate` of them a step.

    An epoch is a seeded permutation of the cases, so that any process at any step knows its groups. A step takes the
    same groups however they are spread over processes and batches."""
    import numpy as np

    share = batch_size * world * accumulate
    steps = steps_in_epoch(cases, share)
    step = start
    while True:
        epoch, index = divmod(step, steps)
        order = np.random.default_rng((seed, epoch)).permutation(cases)
        picked = [int(order[(index * share + i) % cases]) for i in range(share)]
        for first in range(rank * batch_size, share, world * batch_size):
            yield [(epoch, case) for case in picked[first : first + batch_size]]
        step += 1


def workers(config: TrainConfig, device: str) -> int:
    """Processes that load the groups of a training on a device of type `device`."""
    if config.num_workers is not None:
        return config.num_workers
    return GPU_WORKERS if device == "cuda" else 0


def group_batches(
    groups: SliceGroups, config: TrainConfig, *, rank: int, world: int, start: int, device: str = "cpu"
) -> Generator[dict[str, Any], None, None]:
    """Endless batches of `groups` for process `rank` of `world`, from optimiser step `start` on.

    For a `device` of type cuda they lie where the GPU copies from without the processor. Closing the generator ends
    the processes that load."""
    import torch

    order = batches(
        config.seed,
        len(groups),
        config.batch_size,
        rank=rank,
        world=world,
        start=start,
        accumulate=config.accumulate,
    )
    loader = torch.utils.data.DataLoader(
        groups,
        batch_sampler=order,  # an iterator serves: it is begun once
        num_workers=workers(config, device),
        persistent_workers=workers(config, device) > 0,
        pin_memory=device == "cuda",
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # its draws would shift the model's after a resume
    )
    source: Any = iter(loader)
    processes = getattr(source, "_workers", [])  # none where this process loads
    for process in processes:
        process.terminate = process.kill  # torch's last means, 5 s after it has asked: SIGTERM is ignored
    try:
        yield from source
    finally:
        if processes:
            source._shutdown_workers()  # now, not when the last traceback that holds `source` is gone


def _leave_signals(worker: int) -> None:
    """The training process alone decides when to stop: a terminal signals its workers too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def steps_in_epoch(cases: int, share: int) -> int:
    return math.ceil(cases / share)
