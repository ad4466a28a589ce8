"""y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ.    Source: LoRA, arXiv 2106.09685, eq. 3.

W and B A are never merged, which in bf16 would round a small B A away. Three engines:

torch       bias and the thin product first, onto which the library adds x Wᵀ up: y is written, read and written again
augmented   one library product [x | x Aᵀ] [W | s B]ᵀ of K + r: y is written once, x is copied for its tail
triton      the same product, its operands written in one pass each; dA and dB from one pass over dY and x
            (gpu/lora.py)

x and the thin x Aᵀ are saved. With d = scaling · dY B, the gradients are

    dX = dY W + dropout'(d A)        dA = dᵀ dropout(X)        dB = scaling · dYᵀ (dropout(X) Aᵀ)

The augmented engine takes dY W and d from one product dY [W | s B]. Dropout's mask is a hash of the element's index and
the seed, so no engine keeps it in memory for the backward.

On an H100 (bf16, 36,864 rows, 768 to 2304, r 4), frozen 199 us, the Triton engine takes 265 us forward, augmented 316,
torch 385; kernels that multiply x by A inside the large product took 287 to 453."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import (
    autocast_dtype,
    check_alike,
    check_shapes,
    no_second_derivative,
    number,
    torchs_own,
    under_transform,
)
from ..dispatch import plain_on, select_backend
from ..gpu import lora as kernels
from ..gpu.lora import NO_DROPOUT, Dropout
from ..reference import LoRA, dropout_mask
from ..registry import NAMESPACE, OPS, library
from .dense_linear import by_onednn, dense_linear
from .row_norm import column_sums

ALIGN = 8  # columns of a tail: the library's fast products want rows of a multiple of 16 bytes


class _Update(NamedTuple):
    """A low-rank update in the dtype that products are computed in: a (r, K), b (N, r)."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: Dropout


def _update(
    x: Tensor, a: Tensor | None, b: Tensor | None, seed: Tensor | None, scaling: float, p: float
) -> _Update | None:
    if a is None or b is None:
        return None
    dropout = NO_DROPOUT if seed is None else Dropout(seed, p)
    return _Update(a.to(x.dtype).contiguous(), b.to(x.dtype).contiguous(), scaling, dropout)


# The engines' forwards: x (T, K), weight (N, K), bias (N,) -> y (T, N), and x aᵀ (T, r) or nothing.


def _plain_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: _Update | None
) -> tuple[Tensor, Tensor]:
    if update is None:
        return dense_linear(x, weight, bias), x.new_empty((0,))
    a, b, scaling, dropout = update
    xa = F.linear(_dropped(x, dropout), a)  # (T, r)
    if by_onednn(x, weight, bias):
        return dense_linear(x, weight, bias).addmm_(xa, b.t(), alpha=scaling), xa
    thin = xa @ (scaling * b).t() if bias is None else torch.addmm(bias, xa, b.t(), alpha=scaling)
    return thin.addmm_(x, weight.t()), xa


def _augmented_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: _Update | None
) -> tuple[Tensor, Tensor]:
    if update is None:
        return F.linear(x, weight, bias), x.new_empty((0,))
    xa = F.linear(_dropped(x, update.dropout), update.a)
    return F.linear(_joined(x, xa), _joined(weight, update.scaling * update.b), bias), xa


def _triton_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: _Update | None
) -> tuple[Tensor, Tensor]:
    if update is None:
        return F.linear(x, weight, bias), x.new_empty((0,))
    (rows, wide), rank = x.shape, update.a.shape[0]
    joined, xa = x.new_empty((rows, wide + kernels.tail_width(rank))), x.new_empty((rows, rank))
    kernels.launch_tail(x, update.a, joined, update.dropout, xa)
    return F.linear(joined, kernels.launch_weight(weight, update.b, update.scaling), bias), xa


def _composed(x: Tensor, weight: Tensor, bias: Tensor | None, update: _Update | None) -> Tensor:
    """x (..., K) -> y (..., N) by F.linear alone, out of place: for transforms, and for tensors of any class."""
    y = F.linear(x, weight, bias)
    if update is None:
        return y
    xa = F.linear(_dropped(x, update.dropout), update.a)
    return y.add(F.linear(xa, update.b), alpha=update.scaling)


_FORWARD = {"torch": _plain_forward, "augmented": _augmented_forward, "triton": _triton_forward}


def _joined(wide: Tensor, thin: Tensor) -> Tensor:
    """[wide (T, K) | thin (T, r) | 0], the tail filled up to a multiple of ALIGN columns."""
    return torch.cat([wide, F.pad(thin, (0, -thin.shape[1] % ALIGN))], 1)


def _dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """dropout(x (T, K)), which is also its own derivative applied to x."""
    if dropout.seed is None or dropout.p == 0:
        return x
    return x * (dropout_mask(x.shape, dropout.p, dropout.seed).to(x.dtype) / (1 - dropout.p))


def rows_of(x: Tensor) -> Tensor:
    """x (..., K) as (T, K) with contiguous rows; copied only where no strides say that."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


_LIB = library("lora_linear")
_OP = f"{NAMESPACE}::lora_linear"
_INPUTS = "Tensor? lora_a, Tensor? lora_b, Tensor? seed, float scaling, float dropout_p, str backend"
torch.library.define(_OP, f"(Tensor x, Tensor weight, Tensor? bias, {_INPUTS}) -> (Tensor, Tensor)", lib=_LIB)
torch.library.define(
    f"{_OP}_backward",
    f"(Tensor grad, Tensor x, Tensor xa, Tensor weight, {_INPUTS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lib=_LIB,
)


@torch.library.impl(_OP, "CompositeExplicitAutograd", lib=_LIB)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (..., K) -> y (..., N) contiguous, and xa (T, r) or nothing."""
    rows = rows_of(x)
    update = _update(x, lora_a, lora_b, seed, scaling, dropout_p)
    if not rows.numel() or not weight.numel():
        update = None if update is None else update._replace(dropout=NO_DROPOUT)
        y, xa = _plain_forward(rows, weight, bias, update)
    else:
        y, xa = _FORWARD[backend](rows, weight.contiguous(), bias, update)
    return y.view(*x.shape[:-1], weight.shape[0]), xa


@torch.library.register_fake(_OP, lib=_LIB)
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    xa = x.new_empty((0,)) if lora_a is None else x.new_empty((x.shape[:-1].numel(), lora_a.shape[0]))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), xa


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd", lib=_LIB)
def _backward_op(
    grad: Tensor, x: Tensor, xa: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float, backend: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, lora_a, lora_b; an empty tensor for each that is not needed."""
    dy, rows = rows_of(grad), rows_of(x)  # (T, N), (T, K)
    update = _update(x, lora_a, lora_b, seed, scaling, dropout_p)
    dx = da = db = None
    if update is None:
        dx = dy @ weight if needs[0] else None
    elif needs[0] or needs[3] or needs[4]:
        dx, da, db = _lora_backward(dy, rows, xa, weight, update, backend, needs)
    dw = dy.t() @ rows if needs[1] else None
    dbias = None
    if needs[2]:
        dbias = dy.sum(0) if backend == "torch" else column_sums(dy)
    if da is not None and lora_a is not None:
        da = da.to(lora_a.dtype)
    if db is not None and lora_b is not None:
        db = db.to(lora_b.dtype).contiguous()
    dx = None if dx is None else dx.reshape(x.shape)
    empty = x.new_empty((0,))
    dx, dw, dbias, da, db = (empty if g is None else g for g in (dx, dw, dbias, da, db))
    return dx, dw, dbias, da, db


def _lora_backward(
    dy: Tensor, rows: Tensor, xa: Tensor, weight: Tensor, update: _Update, backend: str, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of dx (T, K), da (r, K) and db (N, r) that are needed."""
    a, b, scaling, dropout = update
    rank = b.shape[1]
    dx = da = db = None
    present = rows.numel() > 0 and weight.numel() > 0
    if backend == "triton" and present and rank <= kernels.MAX_REDUCED_RANK:
        need = {"need_a": needs[3], "need_b": needs[4]}
        d, da, db = kernels.launch_reduce(dy, rows, xa, b, scaling, dropout, **need)
        a = F.pad(a, (0, 0, 0, d.shape[1] - rank))  # the library is slow on a rank of 4
    elif backend == "augmented" and needs[0]:
        both = dy @ _joined(weight, scaling * b)
        dx, d = both[:, : rows.shape[1]], both[:, rows.shape[1] : rows.shape[1] + rank]
        dx = torch.addmm(dx, d, a) if dropout.seed is None else dx + _dropped(d @ a, dropout)
    else:
        d = scaling * (dy @ b)
    if needs[0] and dx is None:
        dx = _dropped(d @ a, dropout).addmm_(dy, weight)
    if needs[3] and da is None:
        da = d.t() @ _dropped(rows, dropout)
    if needs[4] and db is None:
        db = scaling * (dy.t() @ xa)
    return dx, da, db


@torch.library.register_fake(f"{_OP}_backward", lib=_LIB)
def _(
    grad: Tensor, x: Tensor, xa: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float, backend: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    bias = weight.new_empty(weight.shape[:1])
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty((0,))
        for t, need in zip((x, weight, bias, lora_a, lora_b), needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, seed, *ctx.options = inputs
    ctx.save_for_backward(x, output[1], weight, lora_a, lora_b, seed)
    ctx.set_materialize_grads(False)  # no zeros for x aᵀ, which nobody differentiates


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    grads = OPS.lora_linear_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("lora_linear"), lib=_LIB)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """x (..., K), weight (N, K), bias (N,), lora_a (r, K), lora_b (N, r) -> (..., N), in x's dtype.

    Without lora_a and lora_b it is the plain linear layer. `dropout_p` drops elements of the x that A sees; the mask
    follows torch's generator on x's device, so checkpointing draws it again. lora_a and lora_b may be fp32 beside a
    half-precision x. Autocast casts x and the weights. `backend` is auto, torch, augmented or triton.
    Raises ValueError on a shape, dtype, device or backend mismatch."""
    lora = _checked_lora(weight, lora_a, lora_b, scaling)
    _check(x, weight, bias, lora, dropout_p)
    chosen = select_backend("lora_linear", *_tensors(x, weight, bias, lora), backend=backend).backend
    return run(x, weight, bias, lora, dropout_p, chosen)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None, dropout_p: float, backend: str
) -> Tensor:
    """`lora_linear` of arguments that are checked, on a backend that is decided."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    a, b, scaling = (None, None, 1.0) if lora is None else lora
    seed = None if a is None or dropout_p == 0 else torch.randint(2**62, (), device=x.device)
    scaling, p = number("lora_linear: scaling", scaling), float(dropout_p)
    if backend == "torch":
        given = _tensors(x, weight, bias, lora)
        if not torchs_own(*given) or under_transform(given):
            return _composed(x, weight, bias, _update(x, a, b, seed, scaling, p))
        if plain_on(x):
            rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
            plain, _ = _plain_forward(rows, weight, bias, _update(x, a, b, seed, scaling, p))
            return plain.view(*x.shape[:-1], weight.shape[0])
    y: Tensor = OPS.lora_linear(x, weight, bias, a, b, seed, scaling, p, backend)[0]
    return y


def _tensors(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None) -> tuple[Tensor, ...]:
    """The op's inputs that are there, in its order."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return given if lora is None else (*given, lora.a, lora.b)


def _checked_lora(weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float) -> LoRA | None:
    """The low-rank update of weight (N, K), or None. Raises ValueError where one half is missing or does not fit."""
    if weight.dim() != 2:
        check_shapes("lora_linear", {"weight": (weight, ("N", "K"))})
    if (a is None) != (b is None):
        raise ValueError("lora_linear: lora_a and lora_b come together; one of them is None")
    if a is None or b is None:
        return None
    count, wide = weight.shape
    if a.dim() != 2 or a.shape[1] != wide:
        raise ValueError(f"lora_linear: lora_a must be (r, K) with K = {wide}, found shape {tuple(a.shape)}")
    if b.shape != (count, a.shape[0]):
        raise ValueError(
            f"lora_linear: lora_b must be (N, r) = ({count}, {a.shape[0]}), found {tuple(b.shape)}"
        )
    check_alike("lora_linear", lora_a=a, lora_b=b)
    return LoRA(a, b, scaling)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None, dropout_p: float) -> None:
    count, wide = weight.shape
    if x.is_nested and (x.layout is torch.strided or (dropout_p and lora is not None)):
        raise ValueError("lora_linear: a nested x must have layout torch.jagged, and no dropout_p")
    if x.dim() < 1 or x.shape[-1] != wide:
        raise ValueError(f"lora_linear: x must be (..., K) with K = {wide}, found shape {tuple(x.shape)}")
    if bias is not None and bias.shape != (count,):
        raise ValueError(f"lora_linear: bias must be (N,) with N = {count}, found shape {tuple(bias.shape)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"lora_linear: dropout_p must lie in [0, 1), found {dropout_p}")
    if autocast_dtype(x) is None:
        check_alike("lora_linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    device = x.device
    lora_a = None if lora is None else lora.a
    for name, tensor in (("weight", weight), ("bias", bias), ("lora_a", lora_a)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"lora_linear: {name} is on {tensor.device} but x is on {device}")
