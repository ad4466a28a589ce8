"""SAM's attention with decomposed relative position over a whole grid.

The bias of a query against the key in row h and column w is rel_h[h] + rel_w[w], two small tables a query. It is
never held for all queries at once. The Triton kernels (gpu/rel_pos_kernels.py) never hold a score outside the chip, and
save the inputs, y and one number a query. The torch backend (cpu/biased_attention.py) computes block by block, forward
and backward, and saves the inputs and y.

Gradients, with p the softmax's rows: dv = pᵀ dY, ds = p · (dY vᵀ − Σ p · dY vᵀ), dq = scale · ds k,
dk = scale · dsᵀ q, d rel_h and d rel_w the sums of ds over the columns and over the rows of keys.

Source: SAM, arXiv 2304.02643, image_encoder.py; MViTv2, arXiv 2112.01526, eq. 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import autocast, check_alike, check_shapes, check_whole, no_second_derivative, softmax_scale
from ..cpu.biased_attention import attend_backward, attend_blocks, attend_plain, backward_with_graph, choose
from ..dispatch import select_backend
from ..gpu.rel_pos_attention import launch_backward, launch_forward
from ..registry import NAMESPACE, OPS, library

_LIB = library("rel_pos_attention")
_OP = f"{NAMESPACE}::rel_pos_attention"
torch.library.define(
    _OP,
    "(Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, float scale, str backend) -> (Tensor, Tensor)",
    lib=_LIB,
)
torch.library.define(
    f"{_OP}_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, Tensor y, Tensor? lse, float scale,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lib=_LIB,
)


@torch.library.impl(_OP, "CompositeExplicitAutograd", lib=_LIB)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """y, and what the Triton backward needs of the softmax; empty on the torch backend."""
    if backend == "triton":
        return launch_forward(q, k, v, rel_h, rel_w, scale)
    y = attend_blocks(q, k, v, rel_h.transpose(-1, -2), rel_w, scale)
    return y, torch.empty(0, dtype=torch.float32, device=q.device)


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd", lib=_LIB)
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor,
    y: Tensor, lse: Tensor | None, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if backend == "triton":
        assert lse is not None
        return launch_backward(grad, (q, k, v, rel_h, rel_w), y, lse, scale)
    grads = attend_backward(grad, q, k, v, rel_h.transpose(-1, -2), rel_w, y, scale)
    dq, dk, dv, dbias_h, dbias_w = (t.contiguous() for t in grads)
    return dq, dk, dv, dbias_h.transpose(-1, -2).contiguous(), dbias_w


@torch.library.register_fake(_OP, lib=_LIB)
def _(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    batch, positions, heads, _ = q.shape
    lse = (batch, heads, positions) if backend == "triton" else (0,)
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


@torch.library.register_fake(f"{_OP}_backward", lib=_LIB)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor,
    y: Tensor, lse: Tensor | None, scale: float, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in (q, k, v, rel_h, rel_w))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rel_h, rel_w, *ctx.options = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, rel_h, rel_w, y, lse if inputs[-1] == "triton" else None)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    scale, backend = ctx.options
    if torch.is_grad_enabled() and backend == "torch":
        grads = backward_with_graph(
            lambda q, k, v, rel_h, rel_w: attend_plain(q, k, v, rel_h.transpose(-1, -2), rel_w, scale),
            ctx.saved_tensors[:5], ctx.needs_input_grad[:5], grad,
        )  # fmt: skip
    else:
        grads = OPS.rel_pos_attention_backward(grad, *ctx.saved_tensors, scale, backend)
    return (*grads, None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("rel_pos_attention"), lib=_LIB)


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    grid: tuple[int, int],
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """SAM's attention over one grid (H', W') of P = H'·W' tokens: q, k, v (B, P, M, D) -> (B, P, M, D).

    rel_h (B, M, H', P) and rel_w (B, M, P, W') are the bias of each query against each row and column of keys,
    added to scale · q·k; `scale` is D^-½ where None. A query whose bias is -inf throughout sees no key and gives 0.
    Autocast casts all five.
    Raises ValueError on a shape, dtype, device or backend mismatch."""
    height, width = grid
    check_whole("rel_pos_attention", **{"grid[0]": height, "grid[1]": width})
    qkv, tokens = ("B", "P", "M", "D"), height * width
    if q.dim() != 4 or q.shape[1] != tokens:
        raise ValueError(
            f"rel_pos_attention: q must be (B, P, M, D) with P = {height}·{width} of grid, found {tuple(q.shape)}"
        )
    check_shapes(
        "rel_pos_attention",
        {
            "q": (q, qkv),
            "k": (k, qkv),
            "v": (v, qkv),
            "rel_h": (rel_h, ("B", "M", height, "P")),
            "rel_w": (rel_w, ("B", "M", "P", width)),
        },
    )
    q, k, v, rel_h, rel_w = autocast(q, k, v, rel_h, rel_w)
    check_alike("rel_pos_attention", q=q, k=k, v=v, rel_h=rel_h, rel_w=rel_w)
    scale = softmax_scale("rel_pos_attention", scale, q.shape[-1])
    chosen = select_backend("rel_pos_attention", q, k, v, rel_h, rel_w, backend=backend).backend
    attend = None if chosen == "triton" else choose(q, tokens, k, v, rel_h, rel_w)
    if attend is None:
        y: Tensor = OPS.rel_pos_attention(q, k, v, rel_h, rel_w, scale, chosen)[0]
        return y
    return attend(q, k, v, rel_h.transpose(-1, -2), rel_w, scale)
