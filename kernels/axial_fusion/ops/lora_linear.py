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

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from axial_fusion.checks import (
    autocast_dtype,
    check_alike,
    check_shapes,
    dtype_name,
    no_second_derivative,
)
from axial_fusion.dispatch import no_derivative, plain_on, select_backend
from axial_fusion.gpu import lora as kernels
from axial_fusion.ops.row_norm import column_sums
from axial_fusion.reference import dropout_mask

_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
ALIGN = 8  # columns of a tail: the library's fast products want rows of a multiple of 16 bytes


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> x Wᵀ + bias (..., N) by the fastest library product.

    On CPUs, in fp32 and where nobody differentiates, that is oneDNN's, which torch itself leaves to half precision:
    on an AMD EPYC it is a sixth faster than MKL's. It is the operator that inductor emits."""
    if _by_onednn(x, weight, bias):
        return _onednn_linear(x, weight, bias, "none", [], "")  # type: ignore[no-any-return, misc]
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _onednn_linear is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()  # of modes that count FLOPs or trace, and know F.linear
        and autocast_dtype(x) is None
        and no_derivative(x, weight, *(() if bias is None else (bias,)))
    )


def _plain_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, seed: Tensor | None,
    scaling: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if a is None or b is None:
        return dense_linear(x, weight, bias), x.new_empty(0)
    xa = F.linear(_masked(x, seed, p), a)  # (T, r)
    if _by_onednn(x, weight, bias) and no_derivative(a, b):
        return dense_linear(x, weight, bias).addmm_(xa, b.t(), alpha=scaling), xa
    thin = xa @ (scaling * b).t() if bias is None else torch.addmm(bias, xa, b.t(), alpha=scaling)
    return thin.addmm_(x, weight.t()), xa


def _augmented_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, seed: Tensor | None,
    scaling: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if a is None or b is None:
        return F.linear(x, weight, bias), x.new_empty(0)
    xa = F.linear(_masked(x, seed, p), a)
    return F.linear(_joined(x, xa), _joined(weight, scaling * b), bias), xa


def _joined(wide: Tensor, thin: Tensor) -> Tensor:
    """[wide (T, K) | thin (T, r) | 0], the tail filled up to a multiple of ALIGN columns."""
    return torch.cat([wide, F.pad(thin, (0, -thin.shape[1] % ALIGN))], 1)


def _triton_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, seed: Tensor | None,
    scaling: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if a is None or b is None:
        return F.linear(x, weight, bias), x.new_empty(0)
    (rows, wide), rank = x.shape, a.shape[0]
    joined, xa = x.new_empty(rows, wide + kernels.tail_width(rank)), x.new_empty(rows, rank)
    kernels.launch_tail(x, a, joined, seed, p, xa)
    return F.linear(joined, kernels.launch_weight(weight, b, scaling), bias), xa


_FORWARD = {"torch": _plain_forward, "augmented": _augmented_forward, "triton": _triton_forward}

_OP = "axial_fusion::lora_linear"
_INPUTS = "Tensor? lora_a, Tensor? lora_b, Tensor? seed, float scaling, float dropout_p, str backend"
torch.library.define(_OP, f"(Tensor x, Tensor weight, Tensor? bias, {_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    f"{_OP}_backward",
    f"(Tensor grad, Tensor x, Tensor xa, Tensor weight, {_INPUTS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl(_OP, "CompositeExplicitAutograd")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (..., K) -> y (..., N) contiguous, and xa (T, r) or nothing."""
    rows = _rows_of(x)
    a, b = _thin_weights(x, lora_a, lora_b)
    shape = (*x.shape[:-1], weight.shape[0])
    if not rows.numel() or not weight.numel():
        y, xa = _plain_forward(rows, weight, bias, a, b, None, scaling, 0.0)
    else:
        y, xa = _FORWARD[backend](rows, weight.contiguous(), bias, a, b, seed, scaling, dropout_p)
    return y.view(shape), xa


@torch.library.register_fake(_OP)
def _(x, weight, bias, lora_a, lora_b, seed, scaling, dropout_p, backend):
    rows = x.numel() // max(1, x.shape[-1]) if lora_a is not None else 0
    xa = x.new_empty(0) if lora_a is None else x.new_empty(rows, lora_a.shape[0])
    return x.new_empty((*x.shape[:-1], weight.shape[0])), xa


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd")
def _backward_op(
    grad: Tensor, x: Tensor, xa: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float, backend: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, lora_a, lora_b; an empty tensor for each that is not needed."""
    empty = x.new_empty(0)
    dy, rows = _rows_of(grad), _rows_of(x)  # (T, N), (T, K)
    a, b = _thin_weights(x, lora_a, lora_b)
    fused = backend == "triton" and rows.numel() > 0 and weight.numel() > 0
    dx = da = db = empty
    sums: list[Tensor | None] = [None, None]  # dA and dB where the kernel gives them
    if a is None or b is None:
        dx = dy @ weight if needs[0] else empty
    elif needs[0] or needs[3] or needs[4]:
        rank = b.shape[1]
        if fused and rank <= kernels.MAX_REDUCED_RANK:
            d, *sums = kernels.launch_reduce(
                dy, rows, xa, b, seed, scaling, dropout_p, need_a=needs[3], need_b=needs[4]
            )
            a = F.pad(a, (0, 0, 0, d.shape[1] - rank))  # the library is slow on a rank of 4
        elif needs[0] and backend == "augmented":
            both = dy @ _joined(weight, scaling * b)
            dx, d = both[:, : x.shape[-1]], both[:, x.shape[-1] : x.shape[-1] + rank]
            dx = torch.addmm(dx, d, a) if seed is None else dx + _masked(d @ a, seed, dropout_p)
        else:
            d = scaling * (dy @ b)
        if needs[0] and backend != "augmented":
            dx = _masked(d @ a, seed, dropout_p).addmm_(dy, weight)
        if needs[3] and lora_a is not None:
            da = d.t() @ _masked(rows, seed, dropout_p) if sums[0] is None else sums[0]
            da = da.to(lora_a.dtype)
        if needs[4] and lora_b is not None:
            db = scaling * (dy.t() @ xa) if sums[1] is None else sums[1]
            db = db.to(lora_b.dtype).contiguous()
    dw = dy.t() @ rows if needs[1] else empty
    dbias = column_sums(dy) if needs[2] else empty
    return dx.reshape(x.shape) if needs[0] else empty, dw, dbias, da, db


@torch.library.register_fake(f"{_OP}_backward")
def _(grad, x, xa, weight, lora_a, lora_b, seed, scaling, dropout_p, backend, needs):
    def like(t: Tensor | None, shape: Any, need: bool) -> Tensor:
        return x.new_empty(shape, dtype=x.dtype if t is None else t.dtype) if need else x.new_empty(0)

    return (
        like(x, x.shape, needs[0]),
        like(weight, weight.shape, needs[1]),
        like(weight, (weight.shape[0],), needs[2]),
        like(lora_a, () if lora_a is None else lora_a.shape, needs[3]),
        like(lora_b, () if lora_b is None else lora_b.shape, needs[4]),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, seed, *ctx.options = inputs
    ctx.save_for_backward(x, output[1], weight, lora_a, lora_b, seed)
    ctx.set_materialize_grads(False)  # no zeros for x aᵀ, which nobody differentiates


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    grads = torch.ops.axial_fusion.lora_linear_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_save)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("lora_linear"))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x (..., K), weight (N, K), bias (N,), lora_a (r, K), lora_b (N, r) -> (..., N), in x's dtype.

    Without lora_a and lora_b it is the plain linear layer. `dropout_p` drops elements of the x that A sees, by
    an int64 `seed` of one element, drawn from torch's generator where it is not given; the same seed draws the
    same mask. lora_a and lora_b may be fp32 beside a half-precision x. Autocast casts x and the weights. `backend`
    is auto, torch, augmented or triton. Raises ValueError on a shape, dtype, device or backend mismatch."""
    _check(x, weight, bias, lora_a, lora_b, dropout_p, seed)
    given = (x, weight) if lora_a is None else (x, weight, lora_a)
    chosen = select_backend("lora_linear", *given, backend=backend).backend
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if lora_a is None or dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), device=x.device)
    if chosen == "torch" and plain_on(x):
        a, b = _thin_weights(x, lora_a, lora_b)
        y, _ = _plain_forward(
            x.reshape(-1, x.shape[-1]), weight, bias, a, b, seed, float(scaling), float(dropout_p)
        )
        return y.view(*x.shape[:-1], weight.shape[0])
    y, _ = torch.ops.axial_fusion.lora_linear(
        x, weight, bias, lora_a, lora_b, seed, float(scaling), float(dropout_p), chosen
    )
    return y


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    sizes = check_shapes("lora_linear", {"weight": (weight, "N K")})
    if x.dim() < 1 or x.shape[-1] != sizes["K"]:
        raise ValueError(
            f"lora_linear: x must be (..., K) with K = {sizes['K']}, found shape {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"lora_linear: bias must be (N,) with N = {sizes['N']}, found shape {tuple(bias.shape)}"
        )
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_linear: lora_a and lora_b come together; one of them is None")
    if lora_a is not None and lora_b is not None:
        if lora_a.dim() != 2 or lora_a.shape[1] != sizes["K"]:
            raise ValueError(
                f"lora_linear: lora_a must be (r, K) with K = {sizes['K']}, found shape {tuple(lora_a.shape)}"
            )
        if lora_b.shape != (sizes["N"], lora_a.shape[0]):
            raise ValueError(
                f"lora_linear: lora_b must be (N, r) = ({sizes['N']}, {lora_a.shape[0]}), found {tuple(lora_b.shape)}"
            )
        check_alike("lora_linear", lora_a=lora_a, lora_b=lora_b)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"lora_linear: dropout_p must lie in [0, 1), found {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(
            f"lora_linear: seed must be one int64, found {tuple(seed.shape)} of {dtype_name(seed.dtype)}"
        )
    if autocast_dtype(x) is None:
        check_alike("lora_linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    others = {"weight": weight, "bias": bias, "lora_a": lora_a, "seed": seed}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"lora_linear: {name} is on {tensor.device} but x is on {x.device}")


def _rows_of(x: Tensor) -> Tensor:
    """x (..., K) as (T, K) with contiguous rows; copied only where no strides say that."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _thin_weights(x: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A and B in the dtype that products are computed in."""
    if a is None or b is None:
        return None, None
    return a.to(x.dtype).contiguous(), b.to(x.dtype).contiguous()


def _masked(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dropout(x (T, K)), which is also its own derivative applied to x."""
    if seed is None or p == 0:
        return x
    return x * (dropout_mask(x.shape, p, seed).to(x.dtype) / (1 - p))
