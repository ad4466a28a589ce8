"""Which backend runs a call, and why.

`auto` picks by device, dtype and head size, never by how many tokens there are on a GPU, so that a compiled
model is not compiled again for each image size. A backend that is named and cannot run raises ValueError."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from axial_fusion.checks import autocast_dtype, dtype_name

Op = Literal[
    "axial_attention",
    "slice_attention",
    "rel_pos_attention",
    "window_attention",
    "row_norm",
    "lora_linear",
    "lora_qkv",
    "axial_fusion_attention",
]
BACKENDS: dict[str, tuple[str, ...]] = {
    "axial_attention": ("triton", "torch"),
    "slice_attention": (
        "triton",
        "sdpa",
        "sdpa_flash",
        "sdpa_cudnn",
        "sdpa_efficient",
        "flash",
        "xformers",
        "flex",
        "torch",
    ),
    "rel_pos_attention": ("triton", "torch"),
    "window_attention": ("triton", "torch"),
    "row_norm": ("triton", "torch"),
    "lora_linear": ("augmented", "triton", "torch"),
    "lora_qkv": ("augmented", "triton"),
    "axial_fusion_attention": ("composed", "torch"),
}
INSTALLED = {name: find_spec(name) is not None for name in ("triton", "flash_attn", "xformers")}
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")  # Triton reads it once, as we do
MAX_TRITON_SLICES = 64  # one tile holds every slice of a position
MAX_TRITON_HEAD_DIM = 128
SLICE_HEAD_DIMS = (16, 32, 64)  # of slice_attention on Triton
MAX_TRITON_RANK = 64
MAX_TRITON_CHANNELS = 4096  # one tile holds a row that is normalised
MAX_TRITON_COLUMNS = 128  # one tile holds a row of keys; half as many in fp32
HALF = (torch.float16, torch.bfloat16)


class SliceKey(NamedTuple):
    """What slice_attention's fastest backend is looked up by; `capability` is (9, 0) for sm_90, (0, 0) off a GPU."""

    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int


# slice_attention's, as axial_fusion.tune prints it. H100, bf16: 1.09 (D 64) to 1.41 times (D 32) as fast as cuDNN.
FASTEST: dict[SliceKey, str] = {
    SliceKey((9, 0), torch.bfloat16, 32): "triton",
    SliceKey((9, 0), torch.bfloat16, 64): "triton",
}


class Choice(NamedTuple):
    """Which backend runs an op, and why."""

    backend: str
    reason: str


def select_backend(op: Op, *tensors: Tensor, backend: str = "auto") -> Choice:
    """The backend that `op` takes for these tensors (its inputs in order; the first one decides), and why.

    Raises ValueError for an op or a backend that does not exist, or a named backend that cannot run here."""
    if op not in BACKENDS:
        raise ValueError(f"op is {op!r}; there are {', '.join(BACKENDS)}")
    if not tensors:
        raise ValueError(f"select_backend({op!r}) needs the op's tensors")
    if backend == "auto":
        return _fastest(op, tensors)
    if backend not in BACKENDS[op]:
        raise ValueError(f"backend is {backend!r}; {op} has auto, {', '.join(BACKENDS[op])}")
    obstacle = _obstacle(op, backend, tensors)
    if obstacle:
        raise ValueError(f"backend {backend!r} cannot run {op} here: {obstacle}")
    return Choice(backend, "named by the caller")


def _fastest(op: str, tensors: tuple[Tensor, ...]) -> Choice:
    first = tensors[0]
    if op in (
        "axial_attention",
        "rel_pos_attention",
        "window_attention",
        "row_norm",
    ):
        if first.device.type == "cpu":
            return Choice("torch", "a CPU tensor: library matmuls are fastest there")
        obstacle = _obstacle(op, "triton", tensors)
        if obstacle:
            return Choice("torch", obstacle)
        if op == "row_norm":
            return Choice("triton", "a row is read once: 15.7 us against 48.9 us on an H100")
        return Choice("triton", "no score leaves the chip")
    if op == "axial_fusion_attention":
        if first.device.type == "cpu":
            return Choice("torch", "a CPU tensor: library matmuls are fastest there")
        if under_transform(tensors):
            return Choice("torch", "plain products alone have a forward-mode derivative and every transform")
        return Choice("composed", "library products between our kernels, each of which picks its own backend")
    if op == "slice_attention":
        if under_transform(tensors):
            return Choice("torch", "plain products alone have a forward-mode derivative and every transform")
        key = slice_key(first)
        measured = FASTEST.get(key)
        if measured and not _obstacle(op, measured, tensors):
            device = "sm_{}{}".format(*key.capability)
            return Choice(
                measured, f"measured fastest on {device} for {dtype_name(key.dtype)}, D {key.head_dim}"
            )
        most = {torch.float16: 512, torch.bfloat16: 128}.get(first.dtype, 0)
        if first.device.type == "cpu" and first.shape[2] <= most and not no_derivative(*tensors):
            return Choice(
                "torch", f"a gradient of at most {most} positions on a CPU: plain products are faster"
            )
        return Choice("sdpa", "torch picks the fastest fused attention for the device")
    if op == "lora_linear" and len(tensors) > 2 and not under_transform(tensors):
        if first.device.type == "cuda":
            if _triton_obstacle(op, tensors) is None:
                return Choice(
                    "triton", "x is read and joined with its update in one pass: 265 us on an H100, not 316"
                )
            return Choice("augmented", "one product of K + r writes y once")
        if (autocast_dtype(first) or first.dtype) in HALF:
            return Choice("augmented", "one product rounds y once; a small update added to it after is lost")
    if op == "lora_qkv":
        if first.device.type == "cuda" and _obstacle(op, "triton", tensors) is None:
            return Choice(
                "triton", "a row is normalised in one pass: 62 us on an H100, without LoRA 87 us by torch"
            )
        return Choice("augmented", "the library's one product of K + 2r")
    return Choice("torch", "library products, nothing to fuse with them here")


def slice_key(q: Tensor) -> SliceKey:
    """The key of q (..., D)."""
    return SliceKey(_capability(q.device), q.dtype, q.shape[-1])


@torch.compiler.assume_constant_result  # torch.compile cannot trace a query of the device
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _obstacle(op: str, backend: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why `backend` cannot run `op` on these tensors, or None."""
    first = tensors[0]
    if backend in ("torch", "sdpa", "composed"):
        return None  # torch differentiates these, or says itself what it cannot
    if under_transform(tensors):
        return "it has no forward-mode derivative and no torch.func transform; the torch backend has both"
    if backend == "augmented":
        return None
    if backend == "triton":
        return _triton_obstacle(op, tensors)
    if backend == "flex":
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return "FlexAttention has no gradient on a CPU" if first.device.type == "cpu" and needs_grad else None
    if backend == "sdpa_flash" and first.device.type == "cpu":
        return None
    package = {"flash": "flash_attn", "xformers": "xformers"}.get(backend)
    if package and not INSTALLED[package]:
        return f"the package {package} is not installed"
    if first.device.type != "cuda":
        return f"it needs CUDA tensors, found {first.device.type}"
    if backend in ("flash", "sdpa_flash", "sdpa_cudnn") and first.dtype not in HALF:
        return f"it needs float16 or bfloat16, found {dtype_name(first.dtype)}"
    return None


def _triton_obstacle(op: str, tensors: tuple[Tensor, ...]) -> str | None:
    first = tensors[0]
    if not INSTALLED["triton"]:
        return "the package triton is not installed"
    if first.device.type != "cuda" and not (INTERPRETED and first.device.type == "cpu"):
        return f"it needs CUDA tensors, found {first.device.type}"
    if first.dtype not in (torch.float32, *HALF):
        return f"it needs float32, float16 or bfloat16, found {dtype_name(first.dtype)}"
    if op in ("row_norm", "lora_qkv") and first.shape[-1] > MAX_TRITON_CHANNELS:
        return f"{first.shape[-1]} channels are above {MAX_TRITON_CHANNELS}"
    others = {t.dtype for t in tensors} - {torch.float32, *HALF}
    if op in ("row_norm", "lora_qkv") and others:
        return f"its weights are {dtype_name(others.pop())}"
    if op == "row_norm":
        return None
    if op in ("lora_linear", "lora_qkv"):
        rank = tensors[2].shape[0] if len(tensors) > 2 else 1
        return f"rank {rank} is above {MAX_TRITON_RANK}" if rank > MAX_TRITON_RANK else None
    if op == "slice_attention":
        if first.dtype not in HALF:
            return f"it needs float16 or bfloat16, found {dtype_name(first.dtype)}"
        dims = ", ".join(map(str, SLICE_HEAD_DIMS))
        return f"head dim {first.shape[-1]} is not {dims}" if first.shape[-1] not in SLICE_HEAD_DIMS else None
    if first.shape[-1] > MAX_TRITON_HEAD_DIM:
        return f"head dim {first.shape[-1]} is above {MAX_TRITON_HEAD_DIM}"
    if op in ("rel_pos_attention", "window_attention"):
        columns = tensors[-1].shape[-1]  # of rel_w
        most = MAX_TRITON_COLUMNS if first.dtype in HALF else MAX_TRITON_COLUMNS // 2
        return f"{columns} columns are above {most}" if columns > most else None
    slices = max(t.shape[1] for t in tensors)
    return f"{slices} slices are above {MAX_TRITON_SLICES}" if slices > MAX_TRITON_SLICES else None


def plain_on(tensor: Tensor) -> bool:
    """Whether the torch backend runs as a composition that autograd sees through, not as a registered op.

    On a CPU a composition costs less a call and autograd's saved activations save a recomputation; elsewhere the
    registered op saves its inputs alone. Transforms of torch.func and forward-mode AD need the composition."""
    return tensor.device.type in ("cpu", "meta") or under_transform((tensor,))


def under_transform(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a torch.func transform is active or one of the tensors carries a forward-mode tangent."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    ad = torch.autograd.forward_ad
    return ad._current_level >= 0 and any(ad.unpack_dual(t).tangent is not None for t in tensors)


def no_derivative(*tensors: Tensor) -> bool:
    """Whether nobody will differentiate what is computed from these tensors, by autograd or by a transform."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not wanted and not under_transform(tensors)
