"""The gradients of a training step as one CUDA graph, which launches thousands of kernels at once.

Launching the kernels of a step from Python takes longer than an H100 needs to compute them at 512 px."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Batches = Sequence[dict[str, Any]]
Gradients = Callable[[Batches], Tensor]  # leaves .grad, and returns what the step says of its loss


class RecordedGradients:
    """`gradients` of batches, captured at the second call and replayed from then on. The results are the same.

    `parameters` are those that train. Batches of another shape than the first are launched kernel by kernel. So are
    all batches where the device refuses the capture, with a warning. A result is valid until the next call."""

    def __init__(
        self, gradients: Gradients, parameters: Iterable[nn.Parameter], device: torch.device
    ) -> None:
        self.gradients = gradients
        self.parameters = list(parameters)
        self.stream = torch.cuda.Stream(device)
        self.shapes: list[Any] = []  # of the batches that are captured
        self.recording: _Recording | Literal[False] | None = None  # False: not to be captured

    def __call__(self, batches: Batches) -> Tensor:
        shapes = [(t.shape, t.dtype) for t in _tensors(batches)]
        first, self.shapes = not self.shapes, self.shapes or shapes
        if first or shapes != self.shapes or self.recording is False:
            return self._launch(batches)
        if self.recording is None:
            try:
                self.recording = _Recording(self, batches)
            # no memory for a second set of activations, or a copy from the host
            except RuntimeError as error:
                torch.cuda.synchronize(self.stream.device)
                self.recording = False
                for p in self.parameters:
                    p.grad = None
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                warnings.warn(f"steps are launched kernel by kernel, which is slower: {reason}", stacklevel=2)
                return self._launch(batches)
        return self.recording.replay(batches)

    def _launch(self, batches: Batches) -> Tensor:
        """Run `gradients` on the stream of the capture: autograd binds what it sets up to the current stream."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.gradients(batches)
        current.wait_stream(self.stream)
        return result


class _Recording:
    """A CUDA graph of one step's gradients, the batches it reads and the gradients it writes."""

    def __init__(self, step: RecordedGradients, batches: Batches) -> None:
        device = step.stream.device
        self.parameters = step.parameters
        self.batches = [
            {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
            for batch in batches
        ]
        for p in self.parameters:  # so that the graph writes gradients of its own, and adds to none
            p.grad = None
        self.graph = torch.cuda.CUDAGraph()
        # other threads copy batches and write files meanwhile
        with torch.cuda.graph(self.graph, stream=step.stream, capture_error_mode="thread_local"):
            self.result = step.gradients(self.batches)
        self.gradients = [p.grad for p in self.parameters]

    def replay(self, batches: Batches) -> Tensor:
        for known, given in zip(_tensors(self.batches), _tensors(batches), strict=True):
            known.copy_(given, non_blocking=True)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return self.result


def _tensors(batches: Batches) -> list[Tensor]:
    return [value for batch in batches for value in batch.values() if isinstance(value, Tensor)]
