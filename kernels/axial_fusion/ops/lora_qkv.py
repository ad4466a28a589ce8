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

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from axial_fusion.checks import autocast_dtype, check_shapes, no_second_derivative
from axial_fusion.dispatch import HALF, select_backend
from axial_fusion.gpu import lora as kernels
from axial_fusion.gpu.row_norm import launch_backward, launch_forward
from axial_fusion.ops.lora_linear import ALIGN, _rows_of
from axial_fusion.ops.row_norm import column_sums
from axial_fusion.reference import LoRA


def _normalised(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., C), a = [A_Q; A_V] (2r, C) -> [z | z aᵀ | 0] (T, C + tail) in `dtype`, mean and rstd (T,)."""
    channels, thin = x.shape[-1], 0 if a is None else a.shape[0]
    if backend == "triton":
        out = x.new_empty(x.numel() // channels, channels + kernels.tail_width(thin), dtype=dtype)
        within = 0 < thin <= 32 and channels <= 1024 and dtype in HALF
        mean, rstd = launch_forward(x, gamma, beta, out, eps, a if within else None)
        if a is not None and not within:
            kernels.launch_tail(out[:, :channels], a, out)
        return out, mean, rstd
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if beta is None else beta.to(wide)
    z, mean, rstd = torch.native_layer_norm(_rows_of(x).to(wide), [channels], gamma.to(wide), bias, eps)
    z = z.to(dtype)
    if a is not None:
        z = torch.cat([z, z @ a.t(), z.new_zeros(z.shape[0], -thin % ALIGN)], 1)
    return z, mean, rstd


def _augmented(
    weight: Tensor, b_q: Tensor | None, b_v: Tensor | None, scaling: tuple[float, float], backend: str
) -> Tensor:
    """[W | s_q B_Q in q's rows | s_v B_V in v's rows | 0], (3C, C + tail)."""
    if b_q is None or b_v is None:
        return weight
    if backend == "triton":
        return kernels.launch_weight(weight, b_q, scaling[0], b_v, scaling[1])
    channels, rank = b_q.shape
    out = F.pad(weight, (0, 2 * rank + -2 * rank % ALIGN))
    out[:channels, channels : channels + rank] = scaling[0] * b_q
    out[2 * channels :, channels + rank : channels + 2 * rank] = scaling[1] * b_v
    return out


_OP = "axial_fusion::lora_qkv"
_INPUTS = (
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, Tensor? a_q, Tensor? b_q,"
    " Tensor? a_v, Tensor? b_v, float scaling_q, float scaling_v, float eps, str backend"
)
torch.library.define(_OP, f"({_INPUTS}) -> Tensor")
torch.library.define(f"{_OP}_backward", f"(Tensor grad, {_INPUTS}, bool[] needs) -> Tensor[]")


def _stacked(a_q: Tensor | None, a_v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if a_q is None or a_v is None else torch.cat([a_q, a_v]).to(dtype)


@torch.library.impl(_OP, "CompositeExplicitAutograd")
def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    a_q: Tensor | None, b_q: Tensor | None, a_v: Tensor | None, b_v: Tensor | None,
    scaling_q: float, scaling_v: float, eps: float, backend: str,
) -> Tensor:  # fmt: skip
    a = _stacked(a_q, a_v, weight.dtype)
    backend = backend if x.numel() else "augmented"  # no kernel is launched on nothing
    z, _, _ = _normalised(x, norm_weight, norm_bias, a, eps, weight.dtype, backend)
    y = F.linear(z, _augmented(weight, b_q, b_v, (scaling_q, scaling_v), backend), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake(_OP)
def _(x, norm_weight, norm_bias, weight, bias, *_):
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd")
def _backward_op(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    a_q: Tensor | None, b_q: Tensor | None, a_v: Tensor | None, b_v: Tensor | None,
    scaling_q: float, scaling_v: float, eps: float, backend: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the nine tensors, an empty one for each that is not needed."""
    inputs = (x, norm_weight, norm_bias, weight, bias, a_q, b_q, a_v, b_v)
    grads = [x.new_empty(0) for _ in inputs]
    dtype, channels = weight.dtype, x.shape[-1]
    backend = backend if x.numel() else "augmented"
    d = _rows_of(grad.to(dtype))  # (T, 3C)
    a = _stacked(a_q, a_v, dtype)
    z, mean, rstd = _normalised(x, norm_weight, norm_bias, a, eps, dtype, backend)
    if needs[3]:
        grads[3] = d.t() @ z[:, :channels]
    if needs[4]:
        grads[4] = column_sums(d)
    both = d @ _augmented(weight, b_q, b_v, (scaling_q, scaling_v), backend)  # (T, C + tail)
    dz = both[:, :channels]
    if a is not None and a_q is not None and b_q is not None and a_v is not None and b_v is not None:
        rank, third = a_q.shape[0], weight.shape[0] // 3
        thin = both[:, channels : channels + 2 * rank]
        if needs[5] or needs[7]:
            da = thin.t() @ z[:, :channels]
            grads[5], grads[7] = da[:rank].to(a_q.dtype), da[rank:].to(a_v.dtype)
        for i, b, part, scaling in ((6, b_q, 0, scaling_q), (8, b_v, 1, scaling_v)):
            if needs[i]:
                seen = z[:, channels + part * rank : channels + (part + 1) * rank]
                grads[i] = (scaling * (d[:, 2 * part * third : (2 * part + 1) * third].t() @ seen)).to(
                    b.dtype
                )
        dz = torch.addmm(dz, thin, a)
    if any(needs[:3]):
        if backend == "triton":
            needed = {"need_x": needs[0], "need_weights": needs[1] or needs[2]}
            found = launch_backward(dz, x, mean, rstd, norm_weight, **needed)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            beta = None if norm_bias is None else norm_bias.to(wide)
            statistics = (mean.view(-1, 1).to(wide), rstd.view(-1, 1).to(wide))
            found = torch.ops.aten.native_layer_norm_backward(
                dz.to(wide),
                _rows_of(x).to(wide),
                [channels],
                *statistics,
                norm_weight.to(wide),
                beta,
                needs[:3],
            )
        for i, (given, g) in enumerate(zip(inputs[:3], found, strict=True)):
            if needs[i] and given is not None and g is not None:
                grads[i] = g.to(given.dtype).view(given.shape)
    return [g if need else x.new_empty(0) for g, need in zip(grads, needs, strict=True)]


@torch.library.register_fake(f"{_OP}_backward")
def _(grad, x, *rest):
    needs = rest[12]
    return [
        t.new_empty(t.shape) if need else x.new_empty(0)
        for t, need in zip((x, *rest[:8]), needs, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:9])
    grads = torch.ops.axial_fusion.lora_qkv_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 4)


torch.library.register_autograd(_OP, _backward, setup_context=_save)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("lora_qkv"))


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
    weights may stay fp32. `backend` auto, augmented (library calls alone) or triton.
    Raises ValueError on a shape, rank or backend mismatch."""
    expected = {"weight": (weight, "E C"), "norm_weight": (norm_weight, "C")}
    if norm_bias is not None:
        expected["norm_bias"] = (norm_bias, "C")
    if bias is not None:
        expected["bias"] = (bias, "E")
    sizes = check_shapes("lora_qkv", expected)
    if sizes["E"] != 3 * sizes["C"] or x.dim() < 1 or x.shape[-1] != sizes["C"]:
        raise ValueError(
            f"lora_qkv: x must be (..., C) and weight (3C, C), found shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if (lora_q is None) != (lora_v is None):
        raise ValueError("lora_qkv: lora_q and lora_v come together; one of them is None")
    flat: list[Tensor | None] = [None] * 4
    scaling = (1.0, 1.0)
    if lora_q is not None and lora_v is not None:
        c = sizes["C"]
        for name, lora in (("lora_q", lora_q), ("lora_v", lora_v)):
            if lora.a.shape != (lora_q.a.shape[0], c) or lora.b.shape != (c, lora_q.a.shape[0]):
                raise ValueError(
                    f"lora_qkv: {name} must be a (r, C) and b (C, r) with r = {lora_q.a.shape[0]} and C = {c}, "
                    f"found {tuple(lora.a.shape)} and {tuple(lora.b.shape)}"
                )
        flat, scaling = (
            [lora_q.a, lora_q.b, lora_v.a, lora_v.b],
            (float(lora_q.scaling), float(lora_v.scaling)),
        )
    chosen = select_backend(
        "lora_qkv", x, weight, *(() if lora_q is None else (lora_q.a,)), backend=backend
    ).backend
    dtype = autocast_dtype(x) or x.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.ops.axial_fusion.lora_qkv(
        x, norm_weight, norm_bias, weight, bias, *flat, *scaling, eps, chosen
    )
