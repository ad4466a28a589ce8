"""Correctness first, then time: what every benchmark shares.

Each provider of a case is compared with an fp64 reference, output and gradients, before anything is timed;
one that is wrong is reported as wrong and not timed. The others are timed in turns, so that a machine that
slows down slows all of them, and reported as median and 20 % and 80 % quantiles. Peak memory is what torch
allocates above the inputs. FLOPs are counted from shapes: two for each multiply-add of a matrix product,
nothing for recomputation. Bytes, where a case counts them, are what any implementation must read and write."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, default_device, default_dtype, environment, slug

# Largest relative L2 error of an output; a gradient may have twice that.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Provider:
    """One way to compute a case: `call` takes the inputs as they are, `reference` takes them in fp64."""

    call: Callable[..., Tensor] | None
    reference: Callable[..., Tensor]
    flops: int
    """Of one forward."""
    missing: str = ""
    """Why `call` is None on this machine."""
    role: Literal["ours", "rival", "other"] = "rival"
    """The public call, another way to the same function, or what is only to be seen beside them: another
    function, or a named backend of ours."""
    checked: Callable[..., Tensor] | None = None
    """What is compared with the reference in place of `call`: the same without autocast."""


def measure(
    case: Mapping[str, Any], inputs: Sequence[Tensor], providers: Mapping[str, Provider], *, budget_s: float
) -> list[dict[str, Any]]:
    """One record for each provider: its errors, and its times and memory where the errors allow.

    `inputs` that require a gradient get one, and where none does the forward alone is measured; `budget_s` bounds
    the seconds of timing for the whole case."""
    gate = Gate(inputs)
    records, right = [], {}
    for name, provider in providers.items():
        record: dict[str, Any] = {
            **case, "provider": name, "role": provider.role, "flops": provider.flops
        }  # fmt: skip
        records.append(record)
        if provider.call is None:
            record |= {"status": "missing", "reason": provider.missing}
            continue
        expected = gate.expected(provider)
        try:
            record |= gate.check(provider.checked or provider.call, expected)
            if record["status"] == "ok":
                right[name] = runners(provider.call, inputs)
                record["peak_bytes"] = {kind: peak_bytes(call) for kind, call in right[name].items()}
        except Exception as error:  # whatever a rival raises is its result, not the end of the run
            record |= _failure(error)
            right.pop(name, None)
    for kind in ("forward", "forward_backward"):
        calls = {name: of[kind] for name, of in right.items() if kind in of}
        share = budget_s / 3 if kind == "forward" else budget_s * 2 / 3
        times = interleave(calls, budget_s=share)
        for record in records:
            if record["provider"] in times:
                record.setdefault("ms", {})[kind] = summary(times[record["provider"]])
                if torch.cuda.is_available() and kind == "forward" and record["ms"][kind]["median"] < 1:
                    record["ms"]["forward_warm"] = summary(warm_times(calls[record["provider"]]))
    return records


class Gate:
    """Compares providers with fp64 references, each of which is computed once a case."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.grad_output: Tensor | None = None
        self.known: dict[Callable[..., Tensor], list[Tensor | None]] = {}

    def expected(self, provider: Provider) -> list[Tensor | None]:
        """Output and gradients of the provider's reference in fp64."""
        if provider.reference not in self.known:
            doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in self.inputs]
            self.known[provider.reference] = self._outputs(provider.reference, doubles)
        return self.known[provider.reference]

    def check(self, call: Callable[..., Tensor], expected: Sequence[Tensor | None]) -> dict[str, Any]:
        """Status and relative L2 errors of the output and of the worst gradient."""
        found = self._outputs(call, self.inputs)
        errors = [_relative_error(a, b) for a, b in zip(found, expected, strict=True)]
        tolerance = TOLERANCE[self.inputs[0].dtype]
        forward, backward = errors[0], max(errors[1:], default=0.0)
        # Not `>`: a NaN must fail.
        right = forward <= tolerance and backward <= 2 * tolerance
        return {"status": "ok" if right else "wrong", "error": {"forward": forward, "backward": backward}}

    def _outputs(self, call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The output, then the gradient of every input that wants one; None where it has no influence."""
        y = call(*inputs)
        if self.grad_output is None:
            generator = torch.Generator().manual_seed(1)
            self.grad_output = torch.randn(y.shape, generator=generator).to(self.inputs[0])
        wanted = [t for t in inputs if t.requires_grad]
        if not wanted:
            return [y.detach()]
        grad_output = self.grad_output.to(y)
        return [y.detach(), *torch.autograd.grad(y, wanted, grad_output, allow_unused=True)]


def _relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    """|found − expected| / |expected| in L2; an absent gradient is a zero one."""
    if expected is None:
        return 0.0 if found is None or not found.any() else float("inf")
    if found is None or found.shape != expected.shape:
        return float("inf")
    scale = expected.norm().item()
    return (found.double() - expected).norm().item() / (scale if scale > 0 else 1.0)


def runners(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """Forward without a graph, and forward with backward to every input that wants a gradient, if one does."""
    wanted = [t for t in inputs if t.requires_grad]

    def forward() -> object:
        with torch.no_grad():
            return call(*inputs)

    if not wanted:
        return {"forward": forward}
    grad_output = torch.randn_like(call(*inputs))

    def step() -> object:
        return torch.autograd.grad(call(*inputs), wanted, grad_output, allow_unused=True)

    return {"forward": forward, "forward_backward": step}


def _failure(error: BaseException) -> dict[str, str]:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    out_of_memory = isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)
    return {"status": "out of memory" if out_of_memory else "failed", "reason": text}


def interleave(calls: Mapping[str, Callable[[], object]], *, budget_s: float) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turns within `budget_s` seconds but at least three times each.

    On a GPU triton's do_bench times with events after emptying the L2 cache; the launch overhead of a call
    below some 100 µs hides behind that."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    if not calls:
        return times
    if torch.cuda.is_available():
        from triton.testing import do_bench

        for _ in range(3):
            for name, call in calls.items():
                share = 1e3 * budget_s / 3 / len(calls)
                times[name] += do_bench(call, warmup=share / 4, rep=share, return_mode="all")
        return times
    began = time.perf_counter()
    for call in calls.values():  # warm-up, and how long a round is
        call()
    rounds = min(max(int(budget_s / (time.perf_counter() - began)), 3), 50)
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


def warm_times(call: Callable[[], object], *, calls: int = 20, rounds: int = 5) -> list[float]:
    """GPU milliseconds of a call among calls queued back to back: caches stay filled and launches overlap."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantiles and number of `times`."""
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    return {"median": statistics.median(times), "q20": cuts[1], "q80": cuts[7], "n": len(times)}


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that torch holds at once during `call`, above what it held before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints two lines a profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches: bytes a second of a large copy, FLOPs a second of a large square product."""
    device = default_device()
    size, side = (2**30, 8192) if device.type == "cuda" else (2**27, 2048)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=dtype)
    half = a.bfloat16()
    calls = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: a @ a,
        "matmul_bfloat16": lambda: half @ half,
    }
    times = {name: statistics.median(of) for name, of in interleave(calls, budget_s=1.5).items()}
    return {"copy_bytes_per_s": 2e3 * size / times["copy"]} | {
        f"{name}_flops_per_s": 2e3 * side**3 / times[name] for name in ("matmul", "matmul_bfloat16")
    }


Case = tuple[Mapping[str, Any], Sequence[Tensor], Mapping[str, Provider]]
"""What is measured: facts for the record, inputs, and the ways to compute it.

Facts are subject, name (empty for a point of a curve), sizes, and where they mean something `bytes` (of a forward),
`bytes_backward` and `items` with `unit` (what is counted a second, such as images)."""
Cases = Callable[..., Iterable[Case]]
"""cases(device, dtype, full=False), cheap to iterate: what is large is made when a provider is first called."""


TIMING = {
    "gpu": "cold: triton.testing.do_bench, L2 emptied before each call; forward_warm: 20 calls queued back to back",
    "cpu": "wall clock, providers in turns; caches are as the call before left them",
}


def run(
    cases: Iterable[Case] | Mapping[str, Iterable[Case]],
    *,
    dtype: torch.dtype,
    budget_s: float,
    total_s: float = math.inf,
) -> dict[str, Any]:
    """Measure cases one after the other, `budget_s` seconds of timing each, printing as it goes; ready for JSON.

    Several subjects come as a mapping and share `total_s` seconds, checks and references included: each has an
    equal part of what is left when its turn comes, and begins no further case once that is spent. What was not
    begun is named under `skipped`."""
    end = time.perf_counter() + total_s
    ceiling, where, name = ceilings(dtype), environment(), str(dtype).removeprefix("torch.")
    copy, matmul = ceiling["copy_bytes_per_s"], ceiling["matmul_flops_per_s"]
    print(f"{where['device']}, {name}: copy {copy / 1e9:.1f} GB/s, matmul {matmul / 1e12:.2f} TFLOP/s")
    subjects = cases if isinstance(cases, Mapping) else {"": cases}
    records: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for i, (subject, of_subject) in enumerate(subjects.items()):
        now = time.perf_counter()
        until = now + max(end - now, 0.0) / (len(subjects) - i)
        try:
            for done, (case, inputs, providers) in enumerate(of_subject):
                if done and time.perf_counter() >= until:
                    reason = f"its {until - now:.0f} s were spent after {done} cases"
                    skipped.append({"subject": subject, "from": case["name"] or "curve", "reason": reason})
                    break
                records += _measured(case, inputs, providers, ceiling, budget_s)
        except Exception as error:  # a subject that cannot be set up is a result, not the end of the others
            if len(subjects) == 1:
                raise
            skipped.append({"subject": subject, "from": "", **_failure(error)})
    for line_of in skipped:
        print(f"{line_of['subject']}: not measured from {line_of['from'] or 'here'} on: {line_of['reason']}")
    return {
        "environment": where, "dtype": name, "timing": TIMING[where["kind"]], "ceilings": ceiling,
        "records": records, "skipped": skipped,
    }  # fmt: skip


def _measured(
    case: Mapping[str, Any],
    inputs: Sequence[Tensor],
    providers: Mapping[str, Provider],
    ceiling: Mapping[str, float],
    budget_s: float,
) -> list[dict[str, Any]]:
    """The records of one case, each printed."""
    hidden = ("subject", "name", "bytes", "bytes_backward", "items", "unit")
    sizes = ", ".join(f"{k} {v}" for k, v in case.items() if k not in hidden)
    print(f"{case['subject']}, {case['name'] or 'curve'}: {sizes}")
    records = measure(case, inputs, providers, budget_s=budget_s)
    for record in records:
        print(line(record, ceiling), flush=True)
    return records


def main(cases: Cases, *, budget_s: float = 3.0) -> int:
    """Measure one subject in full and leave the JSON; 1 where ours was not right."""
    device = default_device()
    dtype = default_dtype(device)
    result = run(cases(device, dtype, full=True), dtype=dtype, budget_s=budget_s)
    print(write(result))
    return failed(result)


def failed(result: Mapping[str, Any]) -> int:
    """1 where a record of ours is not right, else 0."""
    return int(any(r["role"] == "ours" and r["status"] != "ok" for r in result["records"]))


def write(result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result to <device>-<date>.json in `folder`, <device>-<date>-<subject>.json where it has only one,
    whole or not at all."""
    where = result["environment"]
    subjects = {r["subject"] for r in result["records"]}
    ending = f"-{slug(subjects.pop())}" if len(subjects) == 1 else ""
    path = folder / f"{slug(where['device'])}-{where['date'][:10]}{ending}.json"
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
    return path


def line(record: Mapping[str, Any], ceiling: Mapping[str, float]) -> str:
    """One provider of a case, for the terminal."""
    name = f"  {record['provider']:<28}"
    if "ms" not in record:
        reason = record.get("reason") or f"relative error {record['error']}"
        return f"{name} {record['status']}: {reason}"
    forward, step = record["ms"]["forward"], record["ms"].get("forward_backward")
    notes = [f"{forward['q20']:.2f}…{forward['q80']:.2f}"]
    shared = share(record, ceiling)
    if shared is not None:
        notes.append(f"{shared:.0%} of {'copy' if 'bytes' in record else 'matmul'}")
    if "forward_warm" in record["ms"]:
        notes.append(f"warm {record['ms']['forward_warm']['median']:.3f}")
    if "items" in record:
        notes.append(f"{1e3 * record['items'] / (step or forward)['median']:.3g} {record['unit']}/s")
    text = f"{name} forward {forward['median']:9.2f} ms ({', '.join(notes)})"
    if step is not None:
        text += f"   with backward {step['median']:9.2f} ms"
    errors = f"{record['error']['forward']:.0e}" + (f", {record['error']['backward']:.0e}" if step else "")
    return f"{text}   peak {max(record['peak_bytes'].values()) / 2**20:8.1f} MiB   error {errors}"


def share(record: Mapping[str, Any], ceiling: Mapping[str, float]) -> float | None:
    """Part of a ceiling of the same run that a forward reaches: copy where bytes are counted, else matmul."""
    seconds = record["ms"]["forward"]["median"] / 1e3
    if "bytes" in record:
        return float(record["bytes"] / seconds / ceiling["copy_bytes_per_s"])
    of_dtype = f"matmul_{record.get('dtype')}_flops_per_s"  # of a case in another dtype than the run's
    matmul = ceiling.get(of_dtype, ceiling["matmul_flops_per_s"])
    return float(record["flops"] / seconds / matmul) if record["flops"] else None
