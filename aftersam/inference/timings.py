"""Measures the seconds of each stage of one scan's prediction, and the peak memory."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

STAGES = ("read", "resample", "encode", "fuse", "decode", "upsample", "write")
ON_DEVICE = STAGES[2:6]  # the other stages overlap with the GPU work of another scan and must not wait for it


class Timings:
    """Sums the wall seconds of each stage of one scan, over all threads.

    With a GPU as `device`, the stages in `ON_DEVICE` synchronise with the GPU at their start and end, which costs some
    speed. Without `device` there is no synchronisation."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.slices = 0
        self.device = device if device is not None and device.type == "cuda" else None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as part of the stage `name`, one of STAGES. Stages do not nest."""
        self._synchronise(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._synchronise(name)
            self.seconds[name] += time.perf_counter() - began

    def summary(self) -> dict[str, Any]:
        """JSON values: seconds of each stage and their sum, slices a second, peak memory of the process in MiB.

        Stages of consecutive scans overlap, so a folder takes less time than the sum over its scans."""
        total = sum(self.seconds.values())
        return {
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "total_seconds": round(total, 4),
            "slices": self.slices,
            "slices_per_second": round(self.slices / total, 3) if total else None,
            "peak_host_mib": peak_host_mib(),
            "peak_gpu_mib": self._peak_gpu_mib(),
        }

    def line(self) -> str:
        """The summary as one line of text."""
        facts = self.summary()
        parts = [f"{name} {value:.2f}" for name, value in facts["seconds"].items()]
        memory = [
            f"{facts[key]:.0f} MiB {what}"
            for key, what in (("peak_host_mib", "host"), ("peak_gpu_mib", "GPU"))
            if facts[key] is not None
        ]
        speed = f"{facts['slices_per_second'] or 0:.1f} slices/s"
        return f"{', '.join(parts)} s; {speed}; peak {', '.join(memory) or 'unknown'}"

    def _synchronise(self, name: str) -> None:
        if self.device is not None and name in ON_DEVICE:
            import torch

            torch.cuda.synchronize(self.device)

    def _peak_gpu_mib(self) -> float | None:
        if self.device is None:
            return None
        import torch

        return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)


def peak_host_mib() -> float | None:
    """Peak resident memory of this process in MiB. None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
