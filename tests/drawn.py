"""Drawn inputs for tests by property: tensors in any memory layout, and which of them need gradients.

50 cases an op in every run; 1,000 with `pytest -m drawn`."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FEW = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=1000, derandomize=False)


@st.composite
def tensors(draw, shape, dtype=torch.float32, scale=1.0, dense=False):
    """A tensor of `shape` with normal values in a drawn layout: any order of axes, an offset, and axes that are
    packed, padded, expanded (stride 0) or overlapping. The memory between its elements is NaN. `dense`: contiguous."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    if dense or draw(st.integers(0, 3)) == 0:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)
    strides, extent = [0] * len(shape), 1
    for axis in draw(st.permutations(range(len(shape)))):  # the innermost first
        kind = draw(st.sampled_from(["packed", "packed", "padded", "expanded", "overlapping"]))
        strides[axis] = {"packed": extent, "padded": 2 * extent + 1, "expanded": 0}.get(kind, extent // 2 + 1)
        extent += strides[axis] * max(shape[axis] - 1, 0)
    offset = draw(st.integers(0, 3))
    storage = (scale * torch.randn(offset + extent + 3, generator=generator)).to(dtype)
    outside = torch.ones(len(storage), dtype=torch.bool)
    outside.as_strided(shape, strides, offset).fill_(False)
    return storage.masked_fill(outside, torch.nan).as_strided(shape, strides, offset)


@st.composite
def asked(draw, *given):
    """The tensors as leaves that share their memory, each needing a gradient or not; None stays None."""
    return [t if t is None else t.detach().requires_grad_(draw(st.booleans())) for t in given]


def exact(*given):
    """The tensors as dense leaves in fp64, needing the same gradients."""
    return [
        t if t is None else t.detach().double().contiguous().requires_grad_(t.requires_grad) for t in given
    ]
