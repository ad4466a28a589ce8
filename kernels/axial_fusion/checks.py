"""Argument checks that all ops share: shapes, dtypes, devices, autocast, and whether a derivative will be taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PACKAGES = {  # backends that are packages -> the function that is called
    "flash": ("flash_attn", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}
F = TypeVar("F", bound=Callable[..., Any])
_TORCHS_OWN = frozenset((Tensor, torch.nn.Parameter))


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on this tensor's device; None where it is off or the tensor is fp64."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, or as they are where it is off."""
    dtype = autocast_dtype(tensors[0])
    return tensors if dtype is None else tuple(t.to(dtype) for t in tensors)


def check_dense(what: str, tensor: object) -> None:
    """Raises ValueError unless `tensor`, which the message calls `what`, is a tensor with strides."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{what} must be a tensor, found {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{what} must be a dense tensor, found a {kind} one")


def check_shapes(op: str, expected: Mapping[str, tuple[Tensor, tuple[str | int, ...]]]) -> dict[str, int]:
    """Match tensors with their axes, {"q": (q, ("B", "N", "P", "M", "D")), ...}, and give each letter's size.

    A number in place of a letter must be matched too. Raises ValueError naming the tensor that does not fit."""
    sizes: dict[str, int] = {}
    fitting: dict[tuple[str | int, ...], torch.Size] = {}
    for name, (tensor, axes) in expected.items():
        check_dense(f"{op}: {name}", tensor)
        shape = tensor.shape
        if fitting.get(axes) == shape:
            continue
        if len(shape) != len(axes):
            raise ValueError(f"{op}: {name} must be ({_listed(axes)}), found shape {tuple(shape)}")
        for axis, size in zip(axes, shape, strict=True):
            want = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            if want != size:
                raise ValueError(
                    f"{op}: {name} must be ({_listed(axes)}) with {axis} = {want}, found shape {tuple(shape)}"
                )
        fitting[axes] = shape
    return sizes


def _listed(axes: tuple[str | int, ...]) -> str:
    return ", ".join(map(str, axes))


def check_alike(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless the tensors share one of FLOATS and one device."""
    (name, first), *rest = tensors.items()
    dtype, device = first.dtype, first.device
    if dtype not in FLOATS:
        known = ", ".join(map(dtype_name, FLOATS[:-1]))
        raise ValueError(
            f"{op}: {name} must be floating point ({known} or {dtype_name(FLOATS[-1])}), found {dtype_name(dtype)}"
        )
    for other, tensor in rest:
        if tensor.dtype != dtype:
            raise ValueError(
                f"{op}: {other} is {dtype_name(tensor.dtype)} but {name} is {dtype_name(dtype)}; cast one of them"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: {other} is on {tensor.device} but {name} is on {device}")


def number(name: str, value: object) -> float:
    """`value` as a float. Raises ValueError for a tensor, whose gradient would be lost silently."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name} is a tensor, but must be a number: it would get no gradient")
    return float(value)  # type: ignore[arg-type]  # float raises where it is no number


def torchs_own(*tensors: Tensor) -> bool:
    """Whether every tensor is a torch.Tensor or Parameter and not of another subclass."""
    # one by one: torch 2.11 compiles a set of their types wrongly where one is a parameter's alias
    for tensor in tensors:  # noqa: SIM110  half the time of all()
        if type(tensor) not in _TORCHS_OWN:
            return False
    return True


def ordinary(*tensors: Tensor) -> bool:
    """Whether nothing looks on or stands in for the tensors: no compiler, trace, mode, transform, tangent or subclass.

    A function can then be called in place of its op. Forward mode anywhere counts, which is cheaper to ask."""
    c = torch._C
    if (
        torch.compiler.is_compiling()
        or c._get_tracing_state() is not None
        or c._len_torch_dispatch_stack()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    if c._functorch.peek_interpreter_stack() is not None:
        return False
    for tensor in tensors:  # noqa: SIM110  half the time of all()
        if type(tensor) not in _TORCHS_OWN or not c._has_storage(tensor):
            return False
    return True


def wrapped(tensors: tuple[Tensor, ...]) -> bool:
    """Whether one of the tensors is of a subclass that computes its own operators: distributed, quantised, nested."""
    if torchs_own(*tensors):
        return False
    own = (t for t in tensors if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__)
    return any(not isinstance(t, (FakeTensor, FunctionalTensor)) for t in own)


def under_transform(tensors: tuple[Tensor, ...]) -> bool:
    """Whether plain products alone are right: a torch.func transform is active, one of the tensors is a batch that
    autograd makes of gradients, carries a forward-mode tangent, or is `wrapped`."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or wrapped(tensors):
        return True
    if not all(map(torch._C._has_storage, tensors)):
        return True
    ad = torch.autograd.forward_ad
    return ad._current_level >= 0 and any(ad.unpack_dual(t).tangent is not None for t in tensors)


def no_derivative(*tensors: Tensor) -> bool:
    """Whether no derivative will be taken through these tensors, by autograd or by a transform."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not wanted and not under_transform(tensors)


def softmax_scale(op: str, scale: float | None, head_dim: int) -> float:
    """`scale`, or D^-½ where it is None. Raises ValueError for a tensor, whose gradient would be lost, and D = 0."""
    if isinstance(scale, Tensor):
        raise ValueError(
            f"{op}: scale must be a number, found a tensor; multiply q by it and give scale=1.0, for its gradient"
        )
    if head_dim == 0:
        raise ValueError(f"{op}: the head dim D must be at least 1, found 0")
    return 1.0 / math.sqrt(head_dim) if scale is None else float(scale)


def check_whole(op: str, **values: Any) -> None:
    """Raises ValueError unless the values are integers of at least 1."""
    for name, value in values.items():
        whole = hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))
        if not whole or value < 1:
            raise ValueError(f"{op}: {name} must be an integer of at least 1, found {value!r}")


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast leaves products of fp32 tensors on this tensor's device alone."""
    if autocast_dtype(tensor) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def without_overlap(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (..., D), copied where rows of D values start less than D elements from each other in memory.

    torch's fused attention writes into memory laid out like q. On a CPU its values are wrong for such a q, in every
    dtype and without an error, and in bf16 oneDNN refuses the backward."""
    q, k, v = (t.contiguous() if any(0 < s < t.shape[-1] for s in t.stride()[:-1]) else t for t in (q, k, v))
    return q, k, v


def dtype_name(dtype: torch.dtype) -> str:
    """float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")


def constant_when_traced(function: F) -> F:
    """torch.compiler.assume_constant_result, for what torch.compile cannot trace: imports and queries of a device.

    That decorator imports torch's compiler, which takes a second and fails where triton is broken."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what torch.compile reads
    return function


def import_failure(package: str, error: Exception) -> str:
    """Why a package cannot be used, from what its import raised."""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"the package {package} is not installed"
    return f"the package {package} does not import: {type(error).__name__}: {error}"


@constant_when_traced
def missing_package(backend: str) -> str | None:
    """Why the package of a backend cannot be used, or None; it is imported where the backend is first named."""
    module, function = PACKAGES[backend]
    try:
        getattr(import_module(module), function)
    except Exception as error:  # an installation that does not fit the machine raises any error
        return import_failure(module.partition(".")[0], error)
    return None


def no_second_derivative(op: str) -> Callable[..., None]:
    """Backward of a backward, which raises: without it autograd would drop second derivatives silently."""

    def refuse(*_: object) -> None:
        raise NotImplementedError(
            f"{op} on this backend has no second derivative; backend='torch' on a CPU has"
        )

    return refuse
