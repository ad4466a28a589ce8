"""Correctness first, then time: what every benchmark shares.

A provider that the gate (gate.py) finds wrong is reported as wrong and not timed. The others are timed in turns, so
that a machine that slows down slows all of them; median, 20 % and 80 % quantiles are reported. Peak memory is what
torch allocates above the inputs. FLOPs are counted from shapes: two for each multiply-add of a matrix product, none
for recomputation. Bytes, where a case counts them, are what any implementation must read and write."""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aftersam.errors import counted
from aftersam.files import write_text
from benchmarks import clock, journal
from benchmarks.gate import LOST, Gate, Provider
from benchmarks.machine import RESULTS, default_device, default_dtype, environment, slug

TIMING = "(timing)"  # in the place of a provider: what is called while all of a case are timed in turns
COMPILED = ("compiled", "flex")  # in the names of providers that torch.compile makes
GROUPS = ("ours", "eager", "compiled")


def group(name: str, provider: Provider) -> str:
    """Which of GROUPS a provider is measured with."""
    if provider.role == "ours":
        return "ours"
    return "compiled" if any(word in name.lower() for word in COMPILED) else "eager"


def measure(
    case: Mapping[str, Any],
    inputs: Sequence[Tensor],
    providers: Mapping[str, Provider],
    *,
    budget_s: float,
    lines: Path | None = None,
) -> list[dict[str, Any]]:
    """One record for each provider: its errors, and its times and memory where the errors allow.

    The backward goes to the `inputs` that require a gradient; without any the forward alone is measured. `budget_s`
    bounds the seconds of timing of the whole case. `lines` is told of each provider before it is called."""
    gate = Gate(inputs)
    records: list[dict[str, Any]] = []
    right: dict[str, dict[str, list[clock.Call]]] = {}
    sets = clock.copies(inputs, clock.sets_needed(inputs))
    for name, provider in providers.items():
        record: dict[str, Any] = {
            **case, "provider": name, "role": provider.role, "flops": provider.flops
        }  # fmt: skip
        if provider.same_as:
            record["same_as"] = provider.same_as
        records.append(record)
        if provider.call is None:
            record |= {"status": "missing", "reason": provider.missing}
            continue
        journal.begin(lines, record)
        try:
            record |= gate.check(provider)
            if record["status"] == "ok":
                right[name] = runners(provider.call, sets, forward_only=provider.forward_only)
                record["peak_bytes"] = {kind: peak_bytes(of[0]) for kind, of in right[name].items()}
        except Exception as error:  # an error of one provider is its result, not the end of the run
            record |= _failure(error)
            right.pop(name, None)
            if LOST in record["reason"]:
                return records
        if record["status"] == "out of memory":
            _release()
    journal.begin(lines, {**case, "provider": TIMING, "role": "other", "flops": 0})
    for kind in ("forward", "forward_backward"):
        calls = {name: of[kind] for name, of in right.items() if kind in of}
        times = clock.times(
            calls,
            budget_s=budget_s / 3 if kind == "forward" else budget_s * 2 / 3,
            uncaptured=[name for name in calls if not providers[name].captured],
        )
        for record in records:
            if record["provider"] in times:
                measured, by = times[record["provider"]]
                record.setdefault("ms", {})[kind] = clock.summary(measured)
                record["clock"] = by
                if by == "graph" and clock.summary(measured)["median"] < 1:  # the host may bind
                    queued = clock.queued_times(calls[record["provider"]], budget_s=0.05)
                    record["ms"][f"{kind}_call"] = clock.summary(queued)
    return records


def runners(
    call: Callable[..., Tensor], sets: Sequence[Sequence[Tensor]], *, forward_only: bool = False
) -> dict[str, list[clock.Call]]:
    """For each input set, a forward without a graph, and a forward with backward to every input that requires a
    gradient."""

    def forward(inputs: Sequence[Tensor]) -> object:
        with torch.no_grad():
            return call(*inputs)

    found: dict[str, list[clock.Call]] = {"forward": [partial(forward, inputs) for inputs in sets]}
    if forward_only or not any(t.requires_grad for t in sets[0]):
        return found
    with torch.no_grad():
        grad_output = torch.randn_like(call(*sets[0]))

    def step(inputs: Sequence[Tensor]) -> object:
        wanted = [t for t in inputs if t.requires_grad]
        return torch.autograd.grad(call(*inputs), wanted, grad_output, allow_unused=True)

    return found | {"forward_backward": [partial(step, inputs) for inputs in sets]}


def _failure(error: BaseException) -> dict[str, str]:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    out_of_memory = isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)
    missing = isinstance(error, ModuleNotFoundError)
    status = "out of memory" if out_of_memory else "missing" if missing else "failed"
    return {"status": status, "reason": text}


def _release() -> None:
    """Free the memory that a failed call held, so that the allocator has some left for later cases."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    """Bytes a second of a large copy and FLOPs a second of a large square product on this device."""
    device = default_device()
    size, side = (2**31, 8192) if device.type == "cuda" else (2**27, 2048)
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=dtype)
    half = a.bfloat16()
    calls: dict[str, list[clock.Call]] = {
        "copy": [lambda: target.copy_(source)],
        "copy by a kernel": [lambda: torch.neg(source, out=target)],
        "matmul": [lambda: a @ a],
        "matmul_bfloat16": [lambda: half @ half],
    }
    times = {name: statistics.median(of) for name, (of, _) in clock.times(calls, budget_s=1.5).items()}
    copy = min(times["copy"], times["copy by a kernel"])  # the driver's own copy is not always the faster one
    return {"copy_bytes_per_s": 2e3 * size / copy, "launch_s": _launch_s(device)} | {
        f"{name}_flops_per_s": 2e3 * side**3 / times[name] for name in ("matmul", "matmul_bfloat16")
    }


def _launch_s(device: torch.device) -> float:
    """Seconds of the host for a call of torch on one element, without waiting for it."""
    one = torch.zeros(1, device=device)
    for count in (100, 900):  # the first ones warm up; a GPU's queue holds more than these
        began = time.perf_counter()
        for _ in range(count):
            one.neg_()
    return (time.perf_counter() - began) / count


Case = tuple[Mapping[str, Any], Sequence[Tensor], Mapping[str, Provider]]
"""What is measured: facts for the record, inputs, and the ways to compute it.

Facts are subject, name (empty for a point of a curve), sizes, and where they mean something `bytes` (of a forward),
`bytes_backward` and `items` with `unit` (what is counted a second, such as images)."""
Cases = Callable[..., Iterable[Case]]
"""cases(device, dtype, full=False), cheap to iterate: large models are made when a provider is first called."""


def run(
    cases: Iterable[Case] | Mapping[str, Iterable[Case]],
    *,
    dtype: torch.dtype,
    budget_s: float,
    total_s: float = math.inf,
    lines: Path | None = None,
    groups: Collection[str] = GROUPS,
) -> dict[str, Any]:
    """The result of all cases as JSON values: environment, ceilings, records, and what was skipped.

    Each case is timed for `budget_s` seconds. Several subjects are given as a mapping and share `total_s` seconds,
    checks and references included: each gets an equal part of the seconds that are left, and begins no further case
    once they are spent. Cases that were not begun are listed under `skipped`. Each record is appended to the file
    `lines` once it is measured, and what the file holds is not measured again, but ours beside rivals that are not in
    it. `groups`: which of GROUPS to measure."""
    end = time.perf_counter() + total_s
    clock.keep_freed_memory()
    head, known = read(lines) if lines else ({}, [])
    if not head:
        name, where = str(dtype).removeprefix("torch."), environment()
        head = {
            "environment": where, "dtype": name, "timing": clock.method(where["kind"]), "ceilings": ceilings(dtype),
        }  # fmt: skip
        if lines is not None:
            journal.end(lines, {"head": head})
    ceiling, where, name = head["ceilings"], head["environment"], head["dtype"]
    copy, matmul = ceiling["copy_bytes_per_s"], ceiling["matmul_flops_per_s"]
    print(f"{where['device']}, {name}: copy {copy / 1e9:.1f} GB/s, matmul {matmul / 1e12:.2f} TFLOP/s")
    subjects = cases if isinstance(cases, Mapping) else {"": cases}
    records: list[dict[str, Any]] = list(known)
    skipped: list[dict[str, str]] = []
    for i, (subject, of_subject) in enumerate(subjects.items()):
        now = time.perf_counter()
        until = now + max(end - now, 0.0) / (len(subjects) - i)
        try:
            for done, (case, inputs, providers) in enumerate(of_subject):
                if done and time.perf_counter() >= until:
                    reason = f"its {until - now:.0f} s were spent after {counted(done, 'case')}"
                    skipped.append({"subject": subject, "from": case["name"] or "curve", "reason": reason})
                    break
                chosen = _left(case, providers, known, groups)
                if chosen:
                    records += _measured(case, inputs, chosen, ceiling, budget_s, lines)
        except Exception as error:  # the other subjects are measured all the same
            if len(subjects) == 1 and lines is None:
                raise
            skipped.append({"subject": subject, "from": "", **_failure(error)})
    for line_of in skipped:
        if lines is not None:
            journal.append(lines, {"skipped": line_of})
        print(f"{line_of['subject']}: not measured from {line_of['from'] or 'here'} on: {line_of['reason']}")
    return {**head, "records": records, "skipped": skipped}


def read(lines: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The file `lines` of a run: its head with machine and ceilings, and its records, the last of each provider.

    Both are empty where the file holds none."""
    entries = journal.read(lines)
    head: dict[str, Any] = next((entry["head"] for entry in entries if "head" in entry), {})
    records = {place(entry): entry for entry in entries if "subject" in entry and "provider" in entry}
    return head, list(records.values())


RESULTS_OF = ("role", "status", "flops", "error", "ms", "clock", "peak_bytes", "reason", "lost", "same_as")


def place(record: Mapping[str, Any]) -> str:
    """The case and the provider of a record, without what was found."""
    return json.dumps({key: value for key, value in record.items() if key not in RESULTS_OF}, default=str)


def _left(
    case: Mapping[str, Any],
    providers: Mapping[str, Provider],
    known: Sequence[Mapping[str, Any]],
    groups: Collection[str],
) -> dict[str, Provider]:
    """The providers of `groups` that are not `known` at this case; ours again where it is right, beside rivals.

    None where the timing of this case did not end before. A provider that hung or crashed its process at a case is not
    called at other cases of the subject."""
    lost = {r["provider"] for r in known if r.get("lost") and r["subject"] == case["subject"]}
    status = {r["provider"]: r["status"] for r in known if all(r.get(k) == v for k, v in case.items())}
    if TIMING in status:
        return {}
    left = [
        name for name, p in providers.items()
        if group(name, p) in groups and name not in status and name not in lost
    ]  # fmt: skip
    if any(providers[name].call is not None for name in left):
        left += [name for name, p in providers.items() if p.role == "ours" and status.get(name) == "ok"]
    return {name: providers[name] for name in left}


def _measured(
    case: Mapping[str, Any],
    inputs: Sequence[Tensor],
    providers: Mapping[str, Provider],
    ceiling: Mapping[str, float],
    budget_s: float,
    lines: Path | None,
) -> list[dict[str, Any]]:
    """The records of one case, each printed and kept in `lines`."""
    hidden = ("subject", "name", "bytes", "bytes_backward", "items", "unit")
    sizes = ", ".join(f"{k} {v}" for k, v in case.items() if k not in hidden)
    print(f"{case['subject']}, {case['name'] or 'curve'}: {sizes}")
    records = measure(case, inputs, providers, budget_s=budget_s, lines=lines)
    for record in records:
        print(line(record, ceiling), flush=True)
    journal.end(lines, *records)
    if any(LOST in record.get("reason", "") for record in records):
        print("CUDA gave this process up; the same command with --lines goes on after this case", flush=True)
        raise SystemExit(3)
    return records


def main(cases: Cases, *, budget_s: float = 3.0) -> int:
    """Measure one subject in full and write the JSON; the exit code is 1 where a result of ours was wrong."""
    device = default_device()
    dtype = default_dtype(device)
    result = run(cases(device, dtype, full=True), dtype=dtype, budget_s=budget_s)
    print(write(result))
    return failed(result)


def failed(result: Mapping[str, Any]) -> int:
    """1 where a record of ours is not ok, else 0."""
    return int(any(r["role"] == "ours" and r["status"] != "ok" for r in result["records"]))


def write(result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result atomically to <device>-<date>.json in `folder`, <device>-<date>-<subject>.json with one alone."""
    where = result["environment"]
    subjects = {r["subject"] for r in result["records"]}
    ending = f"-{slug(subjects.pop())}" if len(subjects) == 1 else ""
    path = folder / f"{slug(where['device'])}-{where['date'][:10]}{ending}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")  # a wrong provider's error may be NaN
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
    if "forward_call" in record["ms"]:
        notes.append(f"call {record['ms']['forward_call']['median']:.3f}")
    if "items" in record:
        notes.append(f"{1e3 * record['items'] / (step or forward)['median']:.3g} {record['unit']}/s")
    text = f"{name} forward {forward['median']:9.2f} ms ({', '.join(notes)})"
    if step is not None:
        text += f"   with backward {step['median']:9.2f} ms"
    errors = f"{record['error']['forward']:.0e}" + (f", {record['error']['backward']:.0e}" if step else "")
    return f"{text}   peak {max(record['peak_bytes'].values()) / 2**20:8.1f} MiB   error {errors}"


def share(record: Mapping[str, Any], ceiling: Mapping[str, float]) -> float | None:
    """The fraction of the run's own ceiling that a forward reaches: copy where bytes are counted, else matmul."""
    seconds = record["ms"]["forward"]["median"] / 1e3
    if "bytes" in record:
        return float(record["bytes"] / seconds / ceiling["copy_bytes_per_s"])
    of_dtype = f"matmul_{record.get('dtype')}_flops_per_s"  # of a case in another dtype than the run's
    matmul = ceiling.get(of_dtype, ceiling["matmul_flops_per_s"])
    return float(record["flops"] / seconds / matmul) if record["flops"] else None
