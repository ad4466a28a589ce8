"""Correctness first, then time: what every benchmark shares.

Each provider of a case is compared with an fp64 reference, output and gradients, before anything is timed;
one that is wrong is reported as wrong and not timed. The others are timed in turns, so that a machine that
slows down slows all of them, and reported as median and 20 % and 80 % quantiles. Peak memory is what torch
allocates above the inputs. FLOPs are counted from shapes: two for each multiply-add of a matrix product,
nothing for recomputation."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

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


def measure(
    case: Mapping[str, Any], inputs: Sequence[Tensor], providers: Mapping[str, Provider], *, budget_s: float
) -> list[dict[str, Any]]:
    """One record for each provider: its errors, and its times and memory where the errors allow.

    `inputs` that require a gradient get one; `budget_s` bounds the seconds of timing for the whole case."""
    gate = _Gate(inputs)
    records, right = [], {}
    for name, provider in providers.items():
        record: dict[str, Any] = {**case, "provider": name, "flops": provider.flops}
        records.append(record)
        if provider.call is None:
            record |= {"status": "missing", "reason": provider.missing}
            continue
        expected = gate.expected(provider)
        try:
            record |= gate.check(provider.call, expected)
            if record["status"] == "ok":
                forward, step = _runners(provider.call, inputs)
                record["peak_bytes"] = {"forward": peak_bytes(forward), "forward_backward": peak_bytes(step)}
                right[name] = (forward, step)
        except Exception as error:  # whatever a rival raises is its result, not the end of the run
            record |= _failure(error)
    for i, kind in enumerate(("forward", "forward_backward")):
        times = interleave(
            {name: runners[i] for name, runners in right.items()}, budget_s=budget_s * (1 + i) / 3
        )
        for record in records:
            if record["provider"] in times:
                record.setdefault("ms", {})[kind] = summary(times[record["provider"]])
    return records


class _Gate:
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


def _runners(
    call: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward without a graph, and forward with backward to every input that wants a gradient."""
    wanted = [t for t in inputs if t.requires_grad]
    grad_output = torch.randn_like(call(*inputs))

    def forward() -> object:
        with torch.no_grad():
            return call(*inputs)

    def step() -> object:
        return torch.autograd.grad(call(*inputs), wanted, grad_output, allow_unused=True)

    return forward, step


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
    times = interleave({"copy": lambda: target.copy_(source), "matmul": lambda: a @ a}, budget_s=1.0)
    return {
        "copy_bytes_per_s": 2e3 * size / statistics.median(times["copy"]),
        "matmul_flops_per_s": 2e3 * side**3 / statistics.median(times["matmul"]),
    }


Case = tuple[Mapping[str, Any], Sequence[Tensor], Mapping[str, Provider]]
"""What is measured: facts for the record (subject, name, sizes), inputs, and the ways to compute it."""


def run(cases: Iterable[Case], *, dtype: torch.dtype, budget_s: float) -> dict[str, Any]:
    """Measure cases one after the other, `budget_s` seconds of timing each, printing as it goes; ready for JSON."""
    ceiling, where, name = ceilings(dtype), environment(), str(dtype).removeprefix("torch.")
    copy, matmul = ceiling["copy_bytes_per_s"], ceiling["matmul_flops_per_s"]
    print(f"{where['device']}, {name}: copy {copy / 1e9:.1f} GB/s, matmul {matmul / 1e12:.2f} TFLOP/s")
    records: list[dict[str, Any]] = []
    for case, inputs, providers in cases:
        sizes = ", ".join(f"{k} {v}" for k, v in case.items() if k not in ("subject", "name"))
        print(f"{case['subject']}, {case['name'] or 'curve'}: {sizes}")
        for record in measure(case, inputs, providers, budget_s=budget_s):
            print(line(record, matmul), flush=True)
            records.append(record)
    return {"environment": where, "dtype": name, "ceilings": ceiling, "records": records}


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit: what a number means nothing without."""
    try:
        import triton

        triton_version: str | None = triton.__version__
    except ImportError:
        triton_version = None
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name()
        if gpu
        else f"{cpu_model()}, {torch.get_num_threads()} threads",
        "kind": "gpu" if gpu else "cpu",
        "cpu": cpu_model(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        # What this very command and `make figure` write does not make a commit another one.
        "dirty": bool(
            _output(
                "git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs", ":!README.md"
            )
        ),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """First line that a command prints, empty where it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def slug(text: str) -> str:
    """`text` as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((?:r|tm)\)", "", text.lower())).strip("-")


def write(result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result to <device>-<date>.json in `folder`, whole or not at all."""
    where = result["environment"]
    path = folder / f"{slug(where['device'])}-{where['date'][:10]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
    return path


def line(record: Mapping[str, Any], matmul_flops_per_s: float) -> str:
    """One provider of a case, for the terminal."""
    name = f"  {record['provider']:<28}"
    if "ms" not in record:
        reason = record.get("reason") or f"relative error {record['error']}"
        return f"{name} {record['status']}: {reason}"
    forward, step = record["ms"]["forward"], record["ms"]["forward_backward"]
    share = record["flops"] / (forward["median"] / 1e3) / matmul_flops_per_s
    return (
        f"{name} forward {forward['median']:9.2f} ms ({forward['q20']:.2f}…{forward['q80']:.2f}, "
        f"{share:.0%} of matmul)   with backward {step['median']:9.2f} ms   "
        f"peak {record['peak_bytes']['forward_backward'] / 2**20:8.1f} MiB"
    )
