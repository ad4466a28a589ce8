"""The axial half as one op: y = x + FC(Attn_N(LN(x))), with LoRA on q and v, saving x and nothing else.

    z = LN(x);  q = z W_Qᵀ + s (z A_Qᵀ) B_Qᵀ,  k = z W_Kᵀ,  v like q;  o = softmax(q kᵀ / √D) v over the N slices
    y = x + o W_Oᵀ,  each product with its bias

Three launches (_axial_half_kernels.py): row statistics with z Aᵀ, then o, then y; q, k and v never reach memory. Rows
are normalised as they are loaded instead of folding the norm into the weights, which would subtract two large
numbers where a row's mean is large. Traffic: x three times, o written and read, y written.

The backward recomputes: one launch turns x and dy into dq, dk, dv, and into o where W_O trains. Library products
give the rest, with d = [dq dk dv],

    dz = d W + s (dq B_Q) A_Q + s (dv B_V) A_V      dW = dᵀ z      dA = s (d B)ᵀ z      dB = s dᵀ (z Aᵀ)
    dW_O = dyᵀ o      dx = LN'(dz) + dy      and each bias the sum of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from axial_fusion import _axial_half_kernels as kernels
from axial_fusion._launch import no_second_derivative
from axial_fusion.reference import AttentionWeights, LoRA

_WEIGHTS = (
    "Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias, Tensor? norm_weight,"
    " Tensor? norm_bias, Tensor? a_q, Tensor? b_q, Tensor? a_v, Tensor? b_v"
)
_OPTIONS = "float scaling_q, float scaling_v, int heads, int[] queries, bool residual, float eps"
_OP = "axial_fusion::axial_half"
torch.library.define(_OP, f"(Tensor x, {_WEIGHTS}, {_OPTIONS}) -> Tensor")
torch.library.define(
    f"{_OP}_backward", f"(Tensor grad, Tensor x, {_WEIGHTS}, {_OPTIONS}, bool[] needs) -> Tensor[]"
)


def _weights(tensors: Sequence[Tensor | None], scaling_q: float, scaling_v: float) -> AttentionWeights:
    qkv_weight, qkv_bias, out_weight, out_bias, norm_weight, norm_bias, a_q, b_q, a_v, b_v = tensors
    assert qkv_weight is not None
    assert out_weight is not None
    lora_q = None if a_q is None or b_q is None else LoRA(a_q, b_q, scaling_q)
    lora_v = None if a_v is None or b_v is None else LoRA(a_v, b_v, scaling_v)
    return AttentionWeights(
        qkv_weight.contiguous(),
        qkv_bias,
        out_weight.contiguous(),
        out_bias,
        norm_weight,
        norm_bias,
        lora_q,
        lora_v,
    )


@torch.library.impl(_OP, "CompositeExplicitAutograd")
def _forward(x: Tensor, *rest: Any) -> Tensor:
    scaling_q, scaling_v, heads, queries, residual, eps = rest[10:]
    return kernels.launch_forward(x, _weights(rest[:10], scaling_q, scaling_v), heads, queries, residual, eps)


@torch.library.register_fake(_OP)
def _(x, *rest):
    queries = rest[13]
    return x.new_empty(x.shape[0], queries[2], x.shape[2], x.shape[3])


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd")
def _backward_op(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    """Gradients of x and the ten weights, an empty tensor for each that is not needed."""
    scaling_q, scaling_v, heads, queries, residual, eps, needs = rest[10:]
    w = _weights(rest[:10], scaling_q, scaling_v)
    need = dict(zip(("x", *_NAMES), needs, strict=True))
    grads = dict.fromkeys(need, x.new_empty(0))
    if grad.numel() == 0:
        given = dict(zip(("x", *_NAMES), (x, *rest[:10]), strict=True))
        return [given[name].new_zeros(given[name].shape) if need[name] else grads[name] for name in need]
    dtype, channels = w.qkv_weight.dtype, x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    first, step, count = queries
    chosen = (
        slice(None)
        if (first, step, count) == (0, 1, x.shape[1])
        else [first + step * i for i in range(count)]
    )
    dy = grad.to(dtype)
    dq, dk, dv, o = kernels.launch_backward(dy, x, w, heads, queries, eps, need["out_weight"])
    rows = dy.flatten(0, 2)
    if need["out_weight"]:
        grads["out_weight"] = rows.t() @ o.flatten(0, 2)
    if need["out_bias"]:
        grads["out_bias"] = rows.sum(0)
    if not any(need[name] for name in need if not name.startswith("out")):
        return list(grads.values())

    norm = None if w.norm_weight is None else w.norm_weight.to(wide)
    beta = None if w.norm_bias is None else w.norm_bias.to(wide)
    z, mean, rstd = x, None, None
    if norm is not None:
        z, mean, rstd = torch.native_layer_norm(x.to(wide), [channels], norm, beta, eps)
    z = z.to(dtype)
    parts = {"q": (dq, z[:, chosen], w.lora_q, 0), "k": (dk, z, None, 1), "v": (dv, z, w.lora_v, 2)}
    weight_grads, bias_grads = [], []
    dz = torch.zeros_like(z)
    for name, (d, seen, lora, index) in parts.items():
        rows, inputs = d.flatten(0, 2), seen.flatten(0, 2)
        back = rows @ w.qkv_weight[index * channels : (index + 1) * channels]
        if need["qkv_weight"]:
            weight_grads.append(rows.t() @ inputs)
        if need["qkv_bias"]:
            bias_grads.append(rows.sum(0))
        if lora is not None:
            a, b = lora.a.to(dtype), lora.b.to(dtype)
            through = lora.scaling * (rows @ b)  # (rows, r)
            back = torch.addmm(back, through, a)
            if need[f"a_{name}"]:
                grads[f"a_{name}"] = (through.t() @ inputs).to(lora.a.dtype)
            if need[f"b_{name}"]:
                grads[f"b_{name}"] = (lora.scaling * (rows.t() @ (inputs @ a.t()))).to(lora.b.dtype)
        dz[:, chosen if name == "q" else slice(None)] += back.view_as(seen)
    if need["qkv_weight"]:
        grads["qkv_weight"] = torch.cat(weight_grads)
    if need["qkv_bias"]:
        grads["qkv_bias"] = torch.cat(bias_grads)
    dx = dz
    if norm is not None:
        mask = [need["x"], need["norm_weight"], need["norm_bias"]]
        dx, dnorm, dbeta = torch.ops.aten.native_layer_norm_backward(
            dz.to(wide), x.to(wide), [channels], mean, rstd, norm, beta, mask
        )
        if need["norm_weight"] and w.norm_weight is not None:
            grads["norm_weight"] = dnorm.to(w.norm_weight.dtype)
        if need["norm_bias"] and w.norm_bias is not None:
            grads["norm_bias"] = dbeta.to(w.norm_bias.dtype)
    if need["x"]:
        dx = dx.to(x.dtype)
        if residual:
            dx[:, chosen] += grad
        grads["x"] = dx
    return list(grads.values())


_NAMES = (
    "qkv_weight", "qkv_bias", "out_weight", "out_bias", "norm_weight", "norm_bias", "a_q", "b_q", "a_v", "b_v",
)  # fmt: skip


@torch.library.register_fake(f"{_OP}_backward")
def _(grad, x, *rest):
    needs = rest[16]
    return [
        t.new_empty(t.shape) if need else x.new_empty(0)
        for t, need in zip((x, *rest[:10]), needs, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[11:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:11])
    grads = torch.ops.axial_fusion.axial_half_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 6)


torch.library.register_autograd(_OP, _backward, setup_context=_save)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("axial_fusion_attention"))


@register_flop_formula(torch.ops.axial_fusion.axial_half)
def _flops(x_shape: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    """q and output of the queries, k and v of all slices, LoRA's two thin products on q and v, the attention."""
    batch, slices, positions, channels = x_shape
    count, a_q, a_v = rest[13][2], rest[6], rest[8]
    rows, queries = batch * slices * positions, batch * count * positions
    lora = sum(4 * n * channels * a[0] for n, a in ((queries, a_q), (rows, a_v)) if a is not None)
    return 4 * channels**2 * (rows + queries) + lora + 4 * queries * slices * channels


def axial_half(
    x: Tensor, w: AttentionWeights, *, num_heads: int, queries: Sequence[int], residual: bool, eps: float
) -> Tensor:
    """x (B, N, P, C) -> (B, Nq, P, C) in x's dtype; `queries` (first, step, Nq) are the slices to compute.

    The projections' weights share the dtype that products are computed in; the norm's and LoRA's may be wider."""
    lora_q, lora_v = w.lora_q, w.lora_v
    return torch.ops.axial_fusion.axial_half(
        x, *w[:6],
        lora_q and lora_q.a, lora_q and lora_q.b, lora_v and lora_v.a, lora_v and lora_v.b,
        lora_q.scaling if lora_q else 1.0, lora_v.scaling if lora_v else 1.0,
        num_heads, list(queries), residual, eps,
    )  # fmt: skip
