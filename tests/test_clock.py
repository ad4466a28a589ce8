"""Calls are timed on the input sets that they were given, in a CUDA graph where one can be made of them."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import clock


class Event:
    """Stands for torch.cuda.Event on a clock that moves a millisecond a call."""

    now = 0.0

    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


class Graph:
    """Stands for torch.cuda.CUDAGraph: it repeats the calls that were made while it was captured."""

    capturing: Graph | None = None

    def __init__(self):
        self.recorded = 0

    def replay(self):
        Event.now += self.recorded


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 1 KiB of L2 cache, of which only the clock is looked at."""

    @contextlib.contextmanager
    def capture(graph):
        Graph.capturing = graph
        try:
            yield
        finally:
            Graph.capturing = None

    for name, stub in {
        "is_available": lambda: True,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "synchronize": lambda: None,
        "memory_reserved": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1024, total_memory=1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)


def taking(milliseconds, log, name, *, captured=True):
    """A call that takes so long, alone or in a graph."""

    def call():
        log.append((name, Graph.capturing is not None))
        if Graph.capturing is None:
            Event.now += milliseconds
        elif captured:
            Graph.capturing.recorded += milliseconds
        else:
            raise RuntimeError("operation not permitted when stream is capturing")

    return call


def test_a_graph_holds_every_input_set_and_its_time_is_divided_by_its_calls(gpu):
    log = []
    found = clock.times({"a": [taking(1, log, i) for i in range(3)]}, budget_s=0.0)
    measured, by = found["a"]
    assert by == "graph"
    assert measured == [1.0] * len(measured)
    assert len(measured) >= 3
    assert [name for name, captured in log if captured] == [0, 1, 2]


def test_what_cannot_be_captured_is_timed_from_python_and_named_so(gpu):
    log = []
    calls = {"refuses": [taking(2, log, "refuses", captured=False)], "named": [taking(3, log, "named")]}
    found = clock.times(calls, budget_s=0.0, uncaptured=["named"])
    assert {name: by for name, (_, by) in found.items()} == {"refuses": "events", "named": "events"}
    assert clock.summary(found["refuses"][0])["median"] == 2
    assert clock.summary(found["named"][0])["median"] == 3
    assert ("named", True) not in log


def test_a_long_call_is_timed_on_one_set_and_not_for_longer_than_it_must(gpu):
    log = []
    found = clock.times({"long": [taking(2000, log, i) for i in range(4)]}, budget_s=60.0)
    assert clock.summary(found["long"][0])["median"] == 2000
    assert {name for name, _ in log} == {0}
    assert len(log) < 8


def test_input_sets_exceed_the_cache_and_keep_strides_views_and_wishes(gpu):
    packed = torch.randn(2, 3, 3, 5)
    inputs = [t.requires_grad_() for t in packed.unbind(2)]  # 3 views of 30 elements
    assert clock.sets_needed(inputs) == clock.PLACES  # tensors on a CPU
    assert clock.sets_needed([torch.empty(2**27, dtype=torch.int8)]) == 2
    assert clock.sets_needed([torch.empty(2**30, dtype=torch.int8)]) == 1
    sets = clock.copies(inputs, 3)
    assert sets[0] == inputs
    for of in sets[1:]:
        for copy, original in zip(of, inputs, strict=True):
            torch.testing.assert_close(copy, original)
            assert copy.stride() == original.stride()
            assert copy.requires_grad
            assert copy.is_leaf
        assert of[0].untyped_storage().data_ptr() == of[1].untyped_storage().data_ptr()
    assert len({of[0].untyped_storage().data_ptr() for of in sets}) == 3


def test_on_a_cpu_the_wall_clock_takes_turns():
    log = []
    found = clock.times({"a": [lambda: log.append("a")], "b": [lambda: log.append("b")]}, budget_s=0.0)
    assert {by for _, by in found.values()} == {"wall"}
    assert all(sorted(log[i : i + 2]) == ["a", "b"] for i in (2, 4, 6))


def test_on_a_cpu_every_turn_takes_the_next_copy_of_the_inputs():
    log = []
    calls = [functools.partial(log.append, i) for i in range(2)]
    clock.times({"a": calls}, budget_s=0.0)
    assert log == [0, 0, 1, 0]  # warm-up, then three rounds


def test_the_method_says_whether_the_process_has_real_time_priority():
    command = [
        sys.executable,
        "-c",
        "from benchmarks import clock; print(clock.method('cpu'), clock.method('gpu'))",
    ]
    ordinary = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "real-time" not in ordinary
    first = subprocess.run(["chrt", "-f", "1", *command], check=False, capture_output=True, text=True)
    if first.returncode:
        pytest.skip(f"no real-time priority here: {first.stderr.strip()}")
    assert first.stdout == ordinary.replace(
        clock.METHOD["cpu"], clock.METHOD["cpu"] + "; at real-time priority"
    )


def test_summary_is_the_median_and_quantiles():
    assert clock.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q20": 1.8, "q80": 4.2, "n": 5}
    assert clock.summary([7.0]) == {"median": 7.0, "q20": 7.0, "q80": 7.0, "n": 1}


KEPT = """
import ctypes, resource, sys
from benchmarks import clock
if sys.argv[1] == "kept":
    clock.keep_freed_memory()
libc, size = ctypes.CDLL(None), ctypes.c_size_t(40 << 20)
libc.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = ctypes.c_void_p(libc.malloc(size))
    libc.memset(memory, 1, size)
    libc.free(memory)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_memory_that_a_call_frees_has_no_page_faults_in_the_next():
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", KEPT, how], check=True, capture_output=True, text=True
            ).stdout
        )
        for how in ("kept", "returned")
    ]
    assert faults[0] < 1000 < faults[1]  # 40 MiB are 10,240 pages
