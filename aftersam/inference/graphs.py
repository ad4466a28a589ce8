"""The steps of prediction through CUDA graphs: hundreds of kernels a step, launched at once.

Python launches the kernels of a step one by one; where they are short, launching takes longer than computing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor

from aftersam.model.aftersam import AfterSAM

DEVICE = "cuda"  # device type whose calls are captured
MOST_GRAPHS = 8  # of a step: shapes beyond these, such as a scan's last batch, are launched kernel by kernel


def capture_steps(model: AfterSAM) -> None:
    """Replace `encode`, `fuse` and `decode` of `model` by versions that replay CUDA graphs, in place.

    Results are those of the steps themselves. Calls that want gradients, and calls on a CPU, run as before."""
    shared = _Shared()
    for name in ("encode", "fuse", "decode"):
        setattr(model, name, Replayed(getattr(model, name), model, shared))


class _Shared:
    """What the graphs of one model have in common: memory, and that one of them runs at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool: Any = None


class Replayed:
    """`step` of `model`, captured at the second call with inputs of the same shapes and replayed from then on."""

    def __init__(self, step: Callable[..., Any], model: torch.nn.Module, shared: _Shared) -> None:
        self.step, self.model, self.shared = step, model, shared
        self.recordings: dict[Hashable, _Recording | Literal[False] | None] = {}  # False: not to be captured

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
            if key not in self.recordings:  # what a first call sets up is not captured
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
        except RuntimeError:  # it copies from the host, which a capture refuses: launched kernel by kernel
            torch.cuda.synchronize()
            return False


class _Recording:
    """A CUDA graph of one call, the tensors it reads and the tensors it writes."""

    def __init__(
        self, step: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], pool: Any
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():  # tensors that any later mode may write
            args, options = _map(args, torch.clone), {k: _map(v, torch.clone) for k, v in options.items()}
        self.inputs = [t for t in _leaves((args, tuple(options.values()))) if isinstance(t, Tensor)]
        self.graph = torch.cuda.CUDAGraph()
        device = self.inputs[0].device
        # The stream lies on the model's device, which need not be the current one. Casts that autocast keeps for its
        # own context would be freed before a later replay. Other threads read and write scans meanwhile.
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
        """The step's results for `tensors`, as copies that outlive the next replay."""
        with torch.no_grad():
            for known, given in zip(self.inputs, tensors, strict=True):
                known.copy_(given)
            self.graph.replay()
            return _map(self.outputs, torch.clone)


def _leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (tuple, list)) else [value]


def _signature(value: Any) -> Hashable:
    """What a graph is fixed to: shapes, dtypes and devices of tensors, everything else as it is."""
    if isinstance(value, (tuple, list)):
        return tuple(_signature(part) for part in value)
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor of its (named) tuples and lists replaced by `function` of it."""
    if isinstance(value, (tuple, list)):
        parts = [_map(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return function(value) if isinstance(value, Tensor) else value
