"""How a call is timed: CUDA graphs on a GPU, the wall clock on a CPU.

On a GPU a call is captured in a CUDA graph, several times over, each time on an input set of its own, and the graph
is replayed. The time is that of the GPU alone, without Python. The sets together exceed the L2 cache several times, so
that every call reads its inputs from memory. Calls queued back to back from Python are timed as well: that time
includes the host's share, which a user without a CUDA graph pays."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

Call = Callable[[], object]
METHOD = {
    "gpu": "GPU time of a CUDA graph of calls on input sets that exceed the L2 cache; *_call: calls queued from"
    " Python, the host's share included; clock 'events' where a call cannot be captured",
    "cpu": "wall clock, providers in turns of random order, each turn on another copy of the inputs; caches are as the"
    " call before left them; malloc returns no memory to the system; huge pages asked for",
}
L2_SIZES = 5  # the input sets of a graph together are larger than this many L2 caches
MOST_SETS = 16
PLACES, PLACES_BYTES = 8, 2**28  # on a CPU: most sets, and bytes of all together
ROUNDS = 200  # most turns of a provider on a CPU
GRAPH_MS = 4.0  # of GPU work in a graph, so that its launch hardly counts
OWN_MS = 20.0  # a longer call is timed on one input set
LONG_MS = 1000.0  # of measurements, after which no further one is taken


def method(kind: str) -> str:
    """How times are measured on a device of this kind, a GPU or a CPU, in words."""
    return METHOD[kind] + ("; at real-time priority" if kind == "cpu" and _at_real_time() else "")


def sets_needed(inputs: Sequence[Tensor]) -> int:
    """How many sets of these inputs exceed the L2 cache of their GPU, or show how places in memory matter to a CPU.

    Where the pages of a tensor lie changes a call by up to 20 % until the tensor is freed."""
    held = max(1, sum(t.numel() * t.element_size() for t in inputs))
    if inputs[0].device.type != "cuda":
        return max(1, min(PLACES, PLACES_BYTES // held))
    l2 = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    return max(1, min(MOST_SETS, -(-L2_SIZES * l2 // held)))


def copies(inputs: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """The inputs and `count` − 1 copies of them, with the same strides and `requires_grad`."""
    sets = [list(inputs)]
    for _ in range(count - 1):
        bases: dict[int, Tensor] = {}  # views of one tensor stay views of one tensor

        def copy(t: Tensor, bases: dict[int, Tensor] = bases) -> Tensor:
            base = t._base if t._base is not None else t
            if id(base) not in bases:
                bases[id(base)] = base.detach().clone()
            if t._base is None:
                return bases[id(base)]
            return bases[id(base)].as_strided(t.shape, t.stride(), t.storage_offset())

        sets.append([copy(t).detach().requires_grad_(t.requires_grad) for t in inputs])
    return sets


def times(
    calls: Mapping[str, Sequence[Call]], *, budget_s: float, uncaptured: Collection[str] = ()
) -> dict[str, tuple[list[float], str]]:
    """Milliseconds of each call, and by which clock. A call is given as one function for each input set.

    Calls are timed in turns within `budget_s` seconds, at least three times each. Calls named in `uncaptured` are
    timed without a CUDA graph."""
    if not calls:
        return {}
    if torch.cuda.is_available():
        return _gpu_times(calls, budget_s, uncaptured)
    return {name: (of, "wall") for name, of in _wall_times(calls, budget_s).items()}


def _gpu_times(
    calls: Mapping[str, Sequence[Call]], budget_s: float, uncaptured: Collection[str]
) -> dict[str, tuple[list[float], str]]:
    found: dict[str, tuple[list[float], str]] = {
        name: ([], "events" if name in uncaptured else "graph") for name in calls
    }
    graphs: dict[str, _Graph] = {}
    share = budget_s / 2 / len(calls)
    for _ in range(2):  # in turns, so that a GPU that slows down slows all of them
        for name, of in calls.items():
            known, clock = found[name]
            if sum(known) > LONG_MS:
                continue
            if clock == "graph":
                try:
                    graph = graphs.get(name) or _Graph(of)
                except RuntimeError:  # it synchronises or copies from the host
                    torch.cuda.synchronize()
                    clock = "events"
                else:
                    known += _events(graph.replay, budget_s=share, calls=graph.calls)
                    graphs[name] = graph
                    if torch.cuda.memory_reserved() > torch.cuda.get_device_properties(0).total_memory // 2:
                        graphs.clear()  # the graphs hold their results, which would not fit together
                        del graph
                        torch.cuda.empty_cache()
            if clock == "events":
                known += queued_times(of, budget_s=share)
            found[name] = (known, clock)
    return found


class _Graph:
    """A CUDA graph of calls on every input set in turn, long enough that its launch hardly counts."""

    def __init__(self, calls: Sequence[Call]) -> None:
        calls = _worth(calls)
        one = max(_events(calls[0], budget_s=0.0, calls=1)[0], 1e-3)
        rounds = max(1, min(16, int(GRAPH_MS / (one * len(calls)))))
        self.calls = rounds * len(calls)
        for call in calls:  # what a first call sets up is not captured
            call()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(rounds):
                self.kept = [call() for call in calls]  # results have memory of their own, as inputs do
        self.replay()
        torch.cuda.synchronize()

    def replay(self) -> None:
        self.graph.replay()


def queued_times(calls: Sequence[Call], *, budget_s: float) -> list[float]:
    """Milliseconds of a call among calls queued back to back from Python: the longer of GPU and host time."""
    calls = _worth(calls)

    def in_turn() -> None:
        for call in calls:
            call()

    return _events(in_turn, budget_s=budget_s, calls=len(calls))


def _worth(calls: Sequence[Call]) -> Sequence[Call]:
    """The calls, or the first one alone where a call is so long that it evicts its own inputs from the cache."""
    return calls[:1] if _events(calls[0], budget_s=0.0, calls=1)[-1] > OWN_MS else calls


def _events(run: Call, *, budget_s: float, calls: int) -> list[float]:
    measured: list[float] = []
    end = time.perf_counter() + budget_s
    while len(measured) < 3 or (time.perf_counter() < end and len(measured) < 100):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        measured.append(start.elapsed_time(stop) / calls)
        if sum(measured) * calls > LONG_MS:
            break
    return measured


def _wall_times(calls: Mapping[str, Sequence[Call]], budget_s: float) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {name: [] for name in calls}
    turns, order = list(calls), random.Random(0)
    began = time.perf_counter()
    for of in calls.values():  # warm-up, and the duration of a round
        of[0]()
    rounds = min(max(int(budget_s / (time.perf_counter() - began)), 3), ROUNDS)
    for number in range(rounds):
        order.shuffle(turns)  # a call is slower after one that needs more memory
        for name in turns:
            call = calls[name][number % len(calls[name])]
            began = time.perf_counter()
            call()
            measured[name].append(1e3 * (time.perf_counter() - began))
    return measured


def _at_real_time() -> bool:
    return hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) == os.SCHED_FIFO


def keep_freed_memory() -> None:
    """Let glibc's malloc return no memory to the system, and torch put tensors of 2 MiB and more into huge pages.

    Otherwise a result whose memory was returned costs a page fault for every 4 KiB, and which results these are changes
    from run to run. Torch reads its setting at its first tensor."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-1, 2**31 - 1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
            ctypes.CDLL(None).mallopt(option, value)


def summary(measured: Sequence[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantiles and number of times."""
    cuts = (
        statistics.quantiles(measured, n=10, method="inclusive") if len(measured) > 1 else [measured[0]] * 9
    )
    return {"median": statistics.median(measured), "q20": cuts[1], "q80": cuts[7], "n": len(measured)}
