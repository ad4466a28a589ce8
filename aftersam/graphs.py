"""The steps of prediction through CUDA graphs: hundreds of kernels a step, launched at once.

At 512 px a step's kernels are shorter than Python takes to launch them, so that the host and not the GPU would decide
how long a scan takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from aftersam.model.aftersam import AfterSAM

DEVICE = "cuda"  # whose tensors graphs are made of
MOST_GRAPHS = 8  # of a step: shapes beyond these, such as a scan's last batch, are launched one by one


def capture_steps(model: AfterSAM) -> None:
    """Let `encode`, `fuse` and `decode` of `model` replay CUDA graphs where no gradient is wanted, in place.

    The results are those of the steps themselves. On a CPU nothing changes."""
    pool: list[Any] = []
    for name in ("encode", "fuse", "decode"):
        setattr(model, name, Replayed(getattr(model, name), model, pool))


class Replayed:
    """`step` of `model`, captured at the second call with inputs of the same shapes and replayed from then on."""

    def __init__(self, step: Callable[..., Any], model: torch.nn.Module, pool: list[Any]) -> None:
        self.step, self.model, self.pool = step, model, pool
        self.recordings: dict[Hashable, _Recording | None] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        tensors = [t for value in (*args, *options.values()) for t in _leaves(value) if isinstance(t, Tensor)]
        if torch.is_grad_enabled() or not tensors or any(t.device.type != DEVICE for t in tensors):
            return self.step(*args, **options)
        key = (
            torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE),
            tuple(p.data_ptr() for p in self.model.parameters()),  # weights that moved are other weights
            _signature((*args, tuple(sorted(options.items())))),
        )
        if key not in self.recordings:  # what a first call sets up is not captured
            if len(self.recordings) < MOST_GRAPHS:
                self.recordings[key] = None
            return self.step(*args, **options)
        recording = self.recordings[key]
        if recording is None:
            recording = self.recordings[key] = _Recording(self.step, args, options, self._pool())
        return recording.replay(tensors)

    def _pool(self) -> Any:
        """One memory pool for all graphs of a model: a graph's results are copied before another runs."""
        if not self.pool:
            self.pool.append(torch.cuda.graph_pool_handle())
        return self.pool[0]


class _Recording:
    """A CUDA graph of one call, the tensors it reads and the tensors it writes."""

    def __init__(
        self, step: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], pool: Any
    ) -> None:
        args, options = _map(args, torch.clone), {k: _map(v, torch.clone) for k, v in options.items()}
        self.inputs = [t for v in (*args, *options.values()) for t in _leaves(v) if isinstance(t, Tensor)]
        self.graph = torch.cuda.CUDAGraph()
        # other threads read the next scan and write the last one meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = step(*args, **options)

    def replay(self, tensors: list[Tensor]) -> Any:
        for known, given in zip(self.inputs, tensors, strict=True):
            known.copy_(given)
        self.graph.replay()
        return _map(self.outputs, torch.clone)


def _leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, tuple) else [value]


def _signature(value: Any) -> Hashable:
    """What a graph is fixed to: shapes, dtypes and devices of tensors, everything else as it is."""
    if isinstance(value, tuple):
        return tuple(_signature(part) for part in value)
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor of its (named) tuples replaced by `function` of it."""
    if isinstance(value, tuple):
        parts = [_map(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return function(value) if isinstance(value, Tensor) else value
