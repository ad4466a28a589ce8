"""Why a backend cannot run a call: what each of them needs of device, dtype and sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import PACKAGES, dtype_name, missing_package
from .cpu import compiled
from .gpu.common import INTERPRETED, MISSING

MAX_TRITON_SLICES = 64  # one tile holds every slice of a position
MAX_TRITON_HEAD_DIM = 128
SLICE_HEAD_DIMS = (16, 32, 64)  # of slice_attention on Triton
MAX_TRITON_RANK = 64
MAX_TRITON_CHANNELS = 4096  # one tile holds a row that is normalised
MAX_TRITON_COLUMNS = 128  # one tile holds a row of keys; half as many in fp32
MAX_FLASH_HEAD_DIM = 256  # of FlashAttention, the package's and torch's
HALF = (torch.float16, torch.bfloat16)


class Facts(NamedTuple):
    """Facts that decide the backend: device, dtype, and the sizes that limit a kernel."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int = 1
    slices: int = 1  # slices of queries or of keys, the larger number
    queries: int = 1  # slices of them
    columns: int = 1  # of keys in a row
    channels: int = 1
    rank: int = 0  # 0: no LoRA
    weights: tuple[torch.dtype, ...] = ()


def obstacle_to(op: str, backend: str, facts: Facts) -> str | None:
    """Why `backend` cannot run `op` on these facts, or None."""
    if backend == "triton":
        return triton_obstacle(op, facts)
    if backend in ("torch", "sdpa", "augmented", "flex"):
        return None
    if backend == "cpu":
        return cpu_obstacle(facts)
    kind, dtype = facts.device.type, facts.dtype
    if backend == "sdpa_flash" and kind == "cpu":
        return None
    missing = missing_package(backend) if backend in PACKAGES else None
    if missing:
        return missing
    if kind != "cuda":
        return f"it needs CUDA tensors, found {kind}"
    if backend in ("flash", "sdpa_flash", "sdpa_cudnn") and dtype not in HALF:
        return f"it needs float16 or bfloat16, found {dtype_name(dtype)}"
    if dtype not in (torch.float32, *HALF):
        return f"it needs float32, float16 or bfloat16, found {dtype_name(dtype)}"
    if backend in ("flash", "sdpa_flash") and facts.head_dim > MAX_FLASH_HEAD_DIM:
        return f"head dim {facts.head_dim} is above {MAX_FLASH_HEAD_DIM}"
    return None


def cpu_obstacle(facts: Facts) -> str | None:
    """Why a compiled kernel cannot run on these facts, or None."""
    if facts.device.type != "cpu":
        return f"it needs CPU tensors, found {facts.device.type}"
    if facts.dtype not in compiled.DTYPES:
        return f"it needs float32, float16 or bfloat16, found {dtype_name(facts.dtype)}"
    if facts.slices > compiled.MAX_SLICES:
        return f"{facts.slices} slices are above {compiled.MAX_SLICES}"
    return compiled.missing()


def triton_obstacle(op: str, facts: Facts) -> str | None:
    """Why the Triton kernels cannot run `op` on these facts, or None."""
    kind, dtype = facts.device.type, facts.dtype
    if MISSING:
        return MISSING
    if kind != "cuda" and not (INTERPRETED and kind == "cpu"):
        return f"it needs CUDA tensors, found {kind}"
    if dtype not in (torch.float32, *HALF):
        return f"it needs float32, float16 or bfloat16, found {dtype_name(dtype)}"
    if facts.channels > MAX_TRITON_CHANNELS:
        return f"{facts.channels} channels are above {MAX_TRITON_CHANNELS}"
    others = set(facts.weights) - {torch.float32, *HALF}
    if others:
        return f"its weights are {dtype_name(others.pop())}"
    if facts.rank > MAX_TRITON_RANK:
        return f"rank {facts.rank} is above {MAX_TRITON_RANK}"
    if op == "slice_attention":
        if dtype not in HALF:
            return f"it needs float16 or bfloat16, found {dtype_name(dtype)}"
        dims = ", ".join(map(str, SLICE_HEAD_DIMS))
        return None if facts.head_dim in SLICE_HEAD_DIMS else f"head dim {facts.head_dim} is not {dims}"
    if facts.head_dim > MAX_TRITON_HEAD_DIM:
        return f"head dim {facts.head_dim} is above {MAX_TRITON_HEAD_DIM}"
    columns = MAX_TRITON_COLUMNS if dtype in HALF else MAX_TRITON_COLUMNS // 2
    if facts.columns > columns:
        return f"{facts.columns} columns are above {columns}"
    if facts.slices > MAX_TRITON_SLICES:
        return f"{facts.slices} slices are above {MAX_TRITON_SLICES}"
    return None
