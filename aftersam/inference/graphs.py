"""Replays the steps of prediction as CUDA graphs: one launch for the hundreds of kernels of a step.

Without graphs Python launches the kernels one by one. For short kernels launching takes longer than computing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor

from aftersam.model.aftersam import AfterSAM

DEVICE = "cuda"  # only calls on this device type are captured
MOST_GRAPHS = 8  # of each step; further shapes, such as a scan's last batch, are launched kernel by kernel


def capture_steps(model: AfterSAM) -> None:
    """Replace `encode`, `fuse` and `decode` of `model`, in place, by versions that replay CUDA graphs.

    Results do not change. Calls with gradients enabled and calls on a CPU run as before."""
    shared = _Shared()
    for name in ("encode", "fuse", "decode"):
        setattr(model, name, Replayed(getattr(model, name), model, shared))


class _Shared:
    """The memory pool and the lock that all graphs of one model share; the lock lets one graph run at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool: Any = None


class Replayed:
    """`step` of `model` as CUDA graphs: the second call with inputs of the same shapes is captured, later calls replay
    it."""

    def __init__(self, step: Callable[..., Any], model: torch.nn.Module, shared: _Shared) -> None:
        self.step, self.model, self.shared = step, model, shared
        # None: seen once; False: cannot be captured
        self.recordings: dict[Hashable, _Recording | Literal[False] | None] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        tensors = [t for t in _leaves((args, tuple(options.values()))) if isinstance(t, Tensor)]
        if torch.is_grad_enabled() or not tensors or any(t.device.type != DEVICE for t in tensors):
            return self.step(*args, **options)
        key = (
            torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE),
            tuple(p.data_ptr() for p in self.model.parameters()),  # a graph reads weights by their address
            _signature((args, tuple(sorted(options.items())))),
        )
        with self.shared.lock:
            if key not in self.recordings:  # a first call may set up buffers, which must not be captured
                result = self.step(*args, **options)
                if len(self.recordings) < MOST_GRAPHS:
                    passed_on = all(any(r is t for t in tensors) for r in _leaves(result))
                    self.recordings[key] = False if passed_on else None
                return result
            if self.recordings[key] is None:
                self.recordings[key] = self._record(args, options)
            recording = self.recordings[key]
            if recording:
                return recording.replay(tensors)
        return self.step(*args, **options)

    def _record(self, args: tuple[Any, ...], options: dict[str, Any]) -> _Recording | Literal[False]:
        if self.shared.pool is None:
            self.shared.pool = torch.cuda.graph_pool_handle()
        try:
            return _Recording(self.step, args, options, self.shared.pool)
        except RuntimeError:  # the step copies from the host, which cannot be captured
            torch.cuda.synchronize()
            return False


class _Recording:
    """A CUDA graph of one call, the tensors it reads and the tensors it writes."""

    def __init__(
        self, step: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], pool: Any
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():  # `replay` writes to the tensors in any mode
            args, options = _map(args, torch.clone), {k: _map(v, torch.clone) for k, v in options.items()}
        self.inputs = [t for t in _leaves((args, tuple(options.values()))) if isinstance(t, Tensor)]
        self.graph = torch.cuda.CUDAGraph()
        device = self.inputs[0].device
        # The stream is on the model's device, which need not be the current device. Autocast must not cache casts: they
        # are freed when its context ends, before a later replay. Thread-local errors: other threads read and write
        # scans in the meantime.
        with (
            torch.cuda.device(device),
            torch.autocast(
                DEVICE,
                dtype=torch.get_autocast_dtype(DEVICE),
                enabled=torch.is_autocast_enabled(DEVICE),
                cache_enabled=False,
            ),
            torch.cuda.graph(
                self.graph, pool=pool, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"
            ),
        ):
            self.outputs = step(*args, **options)

    def replay(self, tensors: list[Tensor]) -> Any:
        """Results of the step for `tensors`, as copies, since the next replay overwrites the originals."""
        with torch.no_grad():
            for known, given in zip(self.inputs, tensors, strict=True):
                known.copy_(given)
            self.graph.replay()
            return _map(self.outputs, torch.clone)


def _leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (tuple, list)) else [value]


def _signature(value: Any) -> Hashable:
    """Key of a graph: shape, dtype and device of each tensor, and every other argument unchanged."""
    if isinstance(value, (tuple, list)):
        return tuple(_signature(part) for part in value)
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to every tensor in its nested lists and (named) tuples."""
    if isinstance(value, (tuple, list)):
        parts = [_map(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return function(value) if isinstance(value, Tensor) else value
