"""LayerNorm, then q, k and v with LoRA on q and v, as one op and one large product.

    z = LN(x);   [q k v] = z Wᵀ + b + s_q (z A_Qᵀ) B_Qᵀ in q's columns + s_v (z A_Vᵀ) B_Vᵀ in v's
                         = [z | z A_Qᵀ | z A_Vᵀ] [W | s_q B_Q in q's rows | s_v B_V in v's rows]ᵀ + b

The kernel that normalises a row writes the thin products into the row's tail, so that the augmented product of
K + 2r costs no copy: on an H100 (bf16, 36,864 rows of 256, r 4) 62 us with the weight at hand, where torch's LayerNorm
and linear without LoRA take 87 us. The weight's tail is written anew in each call, from the parameters as they are.
Row statistics are fp32. x alone is saved; z and its tail are made again. In the backward, with d the gradient, one
product d [W | ...] gives dz's base and the gradients of both thin products, D (T, 2r):

    dz = d W + D [A_Q; A_V]     [dA_Q; dA_V] = Dᵀ z     dB = s dᵀ (z Aᵀ)     dW = dᵀ z     dx = LN'(dz)"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import autocast_dtype, check_shapes, dtype_name, no_second_derivative, number
from ..dispatch import select_backend
from ..gpu import lora as kernels
from ..gpu.row_norm import launch_backward, launch_forward
from ..gpu.tiles import thin_in_norm
from ..reference import LoRA
from ..registry import NAMESPACE, OPS, library
from . import lora_linear, row_norm
from .lora_linear import ALIGN, rows_of
from .row_norm import column_sums


class _Call(NamedTuple):
    """The op's arguments: nine tensors, whose gradients the backward gives in this order, and four options."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    a_q: Tensor | None
    b_q: Tensor | None
    a_v: Tensor | None
    b_v: Tensor | None
    scaling_q: float
    scaling_v: float
    eps: float
    backend: str

    def stacked(self) -> Tensor | None:
        """[A_Q; A_V] (2r, C) in the weight's dtype."""
        if self.a_q is None or self.a_v is None:
            return None
        return torch.cat([self.a_q, self.a_v]).to(self.weight.dtype)


def _call(*arguments: Any) -> _Call:
    call = _Call(*arguments)
    return call if call.x.numel() else call._replace(backend="augmented")  # no kernel is launched on nothing


def _normalised(c: _Call, a: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """a = [A_Q; A_V] (2r, C) -> [z | z aᵀ | 0] (T, C + tail) in the weight's dtype, mean and rstd (T,)."""
    x, channels, thin, dtype = c.x, c.x.shape[-1], 0 if a is None else a.shape[0], c.weight.dtype
    if c.backend == "triton":
        out = x.new_empty((x.numel() // channels, channels + kernels.tail_width(thin)), dtype=dtype)
        within = thin_in_norm(channels, thin, dtype)
        mean, rstd = launch_forward(x, c.norm_weight, c.norm_bias, out, c.eps, a if within else None)
        if a is not None and not within:
            kernels.launch_tail(out[:, :channels], a, out)
        return out, mean, rstd
    wide = torch.promote_types(x.dtype, torch.float32)
    beta = None if c.norm_bias is None else c.norm_bias.to(wide)
    rows, gamma = rows_of(x).to(wide), c.norm_weight.to(wide)
    z, mean, rstd = torch.native_layer_norm(rows, [channels], gamma, beta, c.eps)
    z = z.to(dtype)
    if a is not None:
        z = torch.cat([z, z @ a.t(), z.new_zeros(z.shape[0], -thin % ALIGN)], 1)
    return z, mean, rstd


def _augmented(c: _Call) -> Tensor:
    """[W | s_q B_Q in q's rows | s_v B_V in v's rows | 0], (3C, C + tail)."""
    if c.b_q is None or c.b_v is None:
        return c.weight
    if c.backend == "triton":
        return kernels.launch_weight(c.weight, c.b_q, c.scaling_q, c.b_v, c.scaling_v)
    channels, rank = c.b_q.shape
    out = F.pad(c.weight, (0, 2 * rank + -2 * rank % ALIGN))
    out[:channels, channels : channels + rank] = c.scaling_q * c.b_q
    out[2 * channels :, channels + rank : channels + 2 * rank] = c.scaling_v * c.b_v
    return out


_LIB = library("lora_qkv")
_OP = f"{NAMESPACE}::lora_qkv"
_INPUTS = (
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, Tensor? a_q, Tensor? b_q,"
    " Tensor? a_v, Tensor? b_v, float scaling_q, float scaling_v, float eps, str backend"
)
torch.library.define(_OP, f"({_INPUTS}) -> Tensor", lib=_LIB)
torch.library.define(f"{_OP}_backward", f"(Tensor grad, {_INPUTS}, bool[] needs) -> Tensor[]", lib=_LIB)


@torch.library.impl(_OP, "CompositeExplicitAutograd", lib=_LIB)
def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    a_q: Tensor | None, b_q: Tensor | None, a_v: Tensor | None, b_v: Tensor | None,
    scaling_q: float, scaling_v: float, eps: float, backend: str,
) -> Tensor:  # fmt: skip
    c = _call(x, norm_weight, norm_bias, weight, bias, a_q, b_q, a_v, b_v, scaling_q, scaling_v, eps, backend)
    z, _, _ = _normalised(c, c.stacked())
    return F.linear(z, _augmented(c), bias).view(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake(_OP, lib=_LIB)
def _(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    a_q: Tensor | None, b_q: Tensor | None, a_v: Tensor | None, b_v: Tensor | None,
    scaling_q: float, scaling_v: float, eps: float, backend: str,
) -> Tensor:  # fmt: skip
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd", lib=_LIB)
def _backward_op(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    a_q: Tensor | None, b_q: Tensor | None, a_v: Tensor | None, b_v: Tensor | None,
    scaling_q: float, scaling_v: float, eps: float, backend: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the nine tensors, an empty one for each that is not needed."""
    c = _call(x, norm_weight, norm_bias, weight, bias, a_q, b_q, a_v, b_v, scaling_q, scaling_v, eps, backend)
    channels = x.shape[-1]
    d = rows_of(grad.to(weight.dtype))  # (T, 3C)
    a = c.stacked()
    z, mean, rstd = _normalised(c, a)
    dweight = d.t() @ z[:, :channels] if needs[3] else None
    dbias = column_sums(d) if needs[4] else None
    both = d @ _augmented(c)  # (T, C + tail)
    dz, thin = both[:, :channels], both[:, channels:]
    update: list[Tensor | None] = [None] * 4
    if a is not None:
        update = _lora_gradients(c, d, z, thin, needs)
        dz = torch.addmm(dz, thin[:, : a.shape[0]], a)
    found = (*_norm_gradients(c, dz, mean, rstd, needs), dweight, dbias, *update)
    return [x.new_empty((0,)) if g is None or not need else g for g, need in zip(found, needs, strict=True)]


def _lora_gradients(c: _Call, d: Tensor, z: Tensor, thin: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """Of a_q, b_q, a_v and b_v: d (T, 3C), z with its tail, thin (T, 2r or more) = s d B."""
    assert c.a_q is not None
    assert c.b_q is not None
    assert c.a_v is not None
    assert c.b_v is not None
    channels, (rank, _), third = c.x.shape[-1], c.a_q.shape, c.weight.shape[0] // 3
    found: list[Tensor | None] = [None] * 4
    if needs[5] or needs[7]:
        da = thin[:, : 2 * rank].t() @ z[:, :channels]
        found[0], found[2] = da[:rank].to(c.a_q.dtype), da[rank:].to(c.a_v.dtype)
    if needs[6]:
        seen = z[:, channels : channels + rank]  # z A_Qᵀ
        found[1] = (c.scaling_q * (d[:, :third].t() @ seen)).to(c.b_q.dtype)
    if needs[8]:
        seen = z[:, channels + rank : channels + 2 * rank]
        found[3] = (c.scaling_v * (d[:, 2 * third :].t() @ seen)).to(c.b_v.dtype)
    return found


def _norm_gradients(
    c: _Call, dz: Tensor, mean: Tensor, rstd: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Of x and the norm's weight and bias, in their dtypes and shapes: dz (T, C)."""
    if not any(needs[:3]):
        return None, None, None
    if c.backend == "triton":
        needed = {"need_x": needs[0], "need_weights": needs[1] or needs[2]}
        found = launch_backward(dz, c.x, mean, rstd, c.norm_weight, **needed)
    else:
        wide = torch.promote_types(c.x.dtype, torch.float32)
        beta = None if c.norm_bias is None else c.norm_bias.to(wide)
        mean, rstd = mean.view(-1, 1).to(wide), rstd.view(-1, 1).to(wide)
        found = torch.ops.aten.native_layer_norm_backward(
            dz.to(wide), rows_of(c.x).to(wide), [c.x.shape[-1]], mean, rstd, c.norm_weight.to(wide), beta, needs[:3]
        )  # fmt: skip
    return tuple(
        None if g is None or given is None else g.to(given.dtype).view(given.shape)
        for given, g in zip((c.x, c.norm_weight, c.norm_bias), found, strict=True)
    )


@torch.library.register_fake(f"{_OP}_backward", lib=_LIB)
def _(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    a_q: Tensor | None, b_q: Tensor | None, a_v: Tensor | None, b_v: Tensor | None,
    scaling_q: float, scaling_v: float, eps: float, backend: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    tensors = (x, norm_weight, norm_bias, weight, bias, a_q, b_q, a_v, b_v)
    return [
        t.new_empty(t.shape) if need and t is not None else x.new_empty((0,))
        for t, need in zip(tensors, needs, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:9])
    grads = OPS.lora_qkv_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 4)


torch.library.register_autograd(_OP, _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("lora_qkv"), lib=_LIB)


def lora_qkv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_q: LoRA | None = None,
    lora_v: LoRA | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """x (..., C), norm_weight (C,), weight (3C, C) with rows q, k, v -> (..., 3C), LoRA a (r, C), b (C, r) on q and v.

    Both LoRA pairs or none, of one rank. The result has the weight's dtype, or autocast's; the norm's and LoRA's
    weights may stay fp32. `backend` auto, augmented (library calls alone), triton or torch (three products).
    Raises ValueError on a shape, rank or backend mismatch."""
    _check(x, norm_weight, norm_bias, weight, bias, lora_q, lora_v)
    loras = [t for lora in (lora_q, lora_v) if lora is not None for t in lora[:2]]
    given = (t for t in (x, norm_weight, norm_bias, weight, bias, *loras) if t is not None)
    chosen = select_backend("lora_qkv", *given, backend=backend).backend
    return run(x, (norm_weight, norm_bias), (weight, bias), lora_q, lora_v, eps, chosen)


def run(
    x: Tensor,
    norm: tuple[Tensor, Tensor | None],
    projection: tuple[Tensor, Tensor | None],
    lora_q: LoRA | None,
    lora_v: LoRA | None,
    eps: float,
    backend: str,
) -> Tensor:
    """`lora_qkv` of arguments that are checked, on a backend that is decided; weights and their biases in pairs."""
    weight, bias = projection
    dtype = autocast_dtype(x) or weight.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if backend == "torch":
        return _composed(row_norm.run(x, *norm, eps, dtype, "torch"), weight, bias, lora_q, lora_v)
    a_q, b_q, scaling_q = (None, None, 1.0) if lora_q is None else lora_q
    a_v, b_v, scaling_v = (None, None, 1.0) if lora_v is None else lora_v
    y: Tensor = OPS.lora_qkv(
        x, *norm, weight, bias, a_q, b_q, a_v, b_v,
        number("lora_qkv: scaling", scaling_q), number("lora_qkv: scaling", scaling_v), eps, backend,
    )  # fmt: skip
    return y


def _composed(
    z: Tensor, weight: Tensor, bias: Tensor | None, lora_q: LoRA | None, lora_v: LoRA | None
) -> Tensor:
    """The three products of z = LN(x) by `lora_linear`'s plain engine."""
    biases = (None, None, None) if bias is None else bias.chunk(3)
    parts = zip(weight.chunk(3), biases, (lora_q, None, lora_v), strict=True)
    return torch.cat([lora_linear.run(z, w, b, lora, 0.0, "torch") for w, b, lora in parts], -1)


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_q: LoRA | None,
    lora_v: LoRA | None,
) -> None:
    expected: dict[str, tuple[Tensor, tuple[str, ...]]] = {
        "weight": (weight, ("E", "C")), "norm_weight": (norm_weight, ("C",))
    }  # fmt: skip
    if norm_bias is not None:
        expected["norm_bias"] = (norm_bias, ("C",))
    if bias is not None:
        expected["bias"] = (bias, ("E",))
    sizes = check_shapes("lora_qkv", expected)
    if sizes["E"] != 3 * sizes["C"] or x.dim() < 1 or x.shape[-1] != sizes["C"]:
        raise ValueError(
            f"lora_qkv: x must be (..., C) and weight (3C, C), found shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    loras = [t for lora in (lora_q, lora_v) if lora is not None for t in lora[:2]]
    for tensor in (norm_weight, norm_bias, weight, bias, *loras):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"lora_qkv: x is on {x.device} but one of its weights on {tensor.device}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"lora_qkv: x must be floating point, found {dtype_name(x.dtype)}")
    if (lora_q is None) != (lora_v is None):
        raise ValueError("lora_qkv: lora_q and lora_v come together; one of them is None")
    if lora_q is not None and lora_v is not None:
        c, rank = sizes["C"], lora_q.a.shape[0]
        for name, lora in (("lora_q", lora_q), ("lora_v", lora_v)):
            if lora.a.shape != (rank, c) or lora.b.shape != (c, rank):
                raise ValueError(
                    f"lora_qkv: {name} must be a (r, C) and b (C, r) with r = {rank} and C = {c}, "
                    f"found {tuple(lora.a.shape)} and {tuple(lora.b.shape)}"
                )
