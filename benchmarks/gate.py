"""Correctness before timing: output and gradients of every provider of a case against an fp64 reference.

Two errors are compared: the relative L2 error, and that of the worst element, which the L2 error of a large tensor
hides. A provider is run on the inputs as they are, and on the same values in a strided layout. Any NaN is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

LOST = "CUDA error"  # after which no other call of this process works
# Largest relative L2 error of an output; a gradient may have twice that, a single element ELEMENT times that.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
ELEMENT = 5


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
    """ours: the public call. rival: another way to compute the same function. other: another function, or a named
    backend of ours, shown beside them."""
    checked: Callable[..., Tensor] | None = None
    """Compared with the reference in place of `call`: the same without autocast, or on fewer slices."""
    captured: bool = True
    """Whether `call` can be captured in a CUDA graph: it copies nothing to or from the host."""
    forward_only: bool = False
    """The backward does not fit on this machine; the output alone is compared and timed."""
    same_as: str = ""
    """The rival whose call this one makes on these inputs."""


class Gate:
    """Compares providers with fp64 references, each of which is computed once a case."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.grad_outputs: dict[torch.Size, Tensor] = {}  # one a shape: a part of the output may be compared
        self.known: dict[Callable[..., Tensor], list[Tensor | None]] = {}

    def check(self, provider: Provider) -> dict[str, Any]:
        """Status, and errors relative to the reference: L2 of the output and of the worst gradient, worst element.

        A provider that refuses the strided layout is judged by the inputs as they are."""
        found = self._compared(provider, self.inputs)
        if found["status"] == "ok":
            try:
                strided = self._compared(provider, [_strided(t) for t in self.inputs])
            except Exception as error:
                if LOST in str(error):
                    raise
                return found
            if strided["status"] == "wrong":
                return strided | {
                    "reason": f"wrong on strided input alone: relative error {strided['error']}"
                }
        return found

    def _compared(self, provider: Provider, inputs: Sequence[Tensor]) -> dict[str, Any]:
        call = provider.checked or provider.call
        assert call is not None
        expected = self._expected(provider)
        with torch.backends.cudnn.flags(
            allow_tf32=False
        ):  # by default cuDNN rounds fp32 convolutions to TF32
            found = self._outputs(call, inputs, forward_only=provider.forward_only)
        pairs = list(zip(found, expected[: len(found)], strict=True))
        # A tensor's maximum is NaN where any value is, wherever it stands.
        error = torch.tensor([_relative_errors(a, b) for a, b in pairs], dtype=torch.float64)
        limit = TOLERANCE[self.inputs[0].dtype] * torch.tensor([[1.0], *[[2.0]] * (len(pairs) - 1)])
        right = bool((error <= limit * torch.tensor([1.0, ELEMENT])).all())  # not `>`: a NaN must fail
        gradients = torch.cat([torch.zeros(1), error[1:, 0]])
        errors = {"forward": error[0, 0], "backward": gradients.max(), "element": error[:, 1].max()}
        return {
            "status": "ok" if right else "wrong",
            "error": {name: value.item() for name, value in errors.items()},
        }

    def _expected(self, provider: Provider) -> list[Tensor | None]:
        """Output and gradients of the provider's reference in fp64."""
        if provider.reference not in self.known:
            doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in self.inputs]
            self.known[provider.reference] = self._outputs(provider.reference, doubles)
        return self.known[provider.reference]

    def _outputs(
        self, call: Callable[..., Tensor], inputs: Sequence[Tensor], *, forward_only: bool = False
    ) -> list[Tensor | None]:
        """The output, then the gradient of every input that requires one; None for an input without influence."""
        wanted = [] if forward_only else [t for t in inputs if t.requires_grad]
        with torch.set_grad_enabled(bool(wanted)):
            y = call(*inputs)
        if not wanted:
            return [y.detach()]
        if y.shape not in self.grad_outputs:
            generator = torch.Generator().manual_seed(1)
            self.grad_outputs[y.shape] = torch.randn(y.shape, generator=generator).to(self.inputs[0])
        grad_output = self.grad_outputs[y.shape].to(y)
        return [y.detach(), *torch.autograd.grad(y, wanted, grad_output, allow_unused=True)]


def _relative_errors(found: Tensor | None, expected: Tensor | None) -> tuple[float, float]:
    """|found − expected| / |expected| in L2, and that of the worst element, relative to it plus the root mean square.

    Where an input has no influence, a missing gradient equals one of zeros."""
    if expected is None:
        return (0.0, 0.0) if found is None or not found.any() else (math.inf, math.inf)
    if found is None or found.shape != expected.shape:
        return math.inf, math.inf
    if not found.numel():
        return 0.0, 0.0
    off, scale = found.double() - expected, expected.norm().item() or 1.0
    return off.norm().item() / scale, (off.abs() / (expected.abs() + scale / off.numel() ** 0.5)).max().item()


def _strided(t: Tensor) -> Tensor:
    """The same values with a gap of other numbers after each row, or after each element of a vector."""
    if not t.dim():
        return t
    gap = 1 if t.dim() == 1 else 8
    columns = t if t.dim() > 1 else t.unsqueeze(-1)
    wide = torch.cat(
        [columns.detach(), torch.full_like(columns[..., :1], 7).expand(*columns.shape[:-1], gap)], -1
    )
    return wide[..., : columns.shape[-1]].view(t.shape).requires_grad_(t.requires_grad)
