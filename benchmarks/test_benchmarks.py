"""The same cases through pytest-benchmark.    pytest benchmarks/ --benchmark-only -k axial

One test a provider and case, grouped by case; a provider that is wrong fails before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from typing import Any

import pytest
import torch

from benchmarks import harness, machine
from benchmarks.__main__ import SUBJECTS

DEVICE = machine.default_device()
DTYPE = machine.default_dtype(DEVICE)


@lru_cache(maxsize=1)
def case(subject: str, index: int) -> tuple[harness.Case, harness.Gate]:
    """One case at a time, so that inputs of others are not held."""
    found = next(islice(SUBJECTS[subject](DEVICE, DTYPE), index, None))
    return found, harness.Gate(found[1])


def listed() -> list[Any]:
    parameters = []
    for subject, cases in SUBJECTS.items():
        for index, (facts, _, providers) in enumerate(cases(DEVICE, DTYPE)):
            name = facts["name"] or " ".join(f"{k} {v}" for k, v in facts.items() if isinstance(v, int))
            parameters += [
                pytest.param(subject, index, provider, id=f"{subject}-{name}-{provider}")
                for provider in providers
            ]
    return parameters


@pytest.mark.parametrize("kind", ["forward", "forward_backward"])
@pytest.mark.parametrize(("subject", "index", "name"), listed())
def test_speed(benchmark: Callable[..., object], subject: str, index: int, name: str, kind: str) -> None:
    (facts, inputs, providers), gate = case(subject, index)
    provider = providers[name]
    if provider.call is None:
        pytest.skip(provider.missing)
    checked = gate.check(provider)
    assert checked["status"] == "ok", checked
    runners = harness.runners(provider.call, [inputs], forward_only=provider.forward_only)
    if kind not in runners:
        pytest.skip("it has no backward here")
    benchmark.group = f"{facts['subject']}, {facts['name']}, {kind}"  # type: ignore[attr-defined]

    def call() -> None:
        runners[kind][0]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark(call)
