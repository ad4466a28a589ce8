"""SAM's windowed attention with decomposed relative position, without padding.

SAM pads its grid to whole windows after the norm, so that a padded token is a key and value that holds the qkv
bias alone. Here those keys are made from the bias, and padded queries do not exist: equal to SAM in exact
arithmetic, without projecting the padding. Bias, backends and gradients are those of `rel_pos_attention` in each
window; d qkv_bias is the sum over the padded keys.

Source: SAM, arXiv 2304.02643, image_encoder.py; MViTv2, arXiv 2112.01526, eq. 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import autocast, check_alike, check_shapes, check_whole, no_second_derivative, softmax_scale
from ..cpu import window_attention as plain
from ..cpu.biased_attention import attend_blocks, attend_plain, backward_with_graph, choose
from ..dispatch import select_backend
from ..gpu.rel_pos_attention import launch_window_backward, launch_window_forward
from ..registry import NAMESPACE, OPS, library

_LIB = library("window_attention")
_OP = f"{NAMESPACE}::window_attention"
torch.library.define(
    _OP,
    "(Tensor qkv, Tensor qkv_bias, Tensor rel_h, Tensor rel_w, int window, float scale, str backend)"
    " -> (Tensor, Tensor)",
    lib=_LIB,
)
torch.library.define(
    f"{_OP}_backward",
    "(Tensor grad, Tensor qkv, Tensor qkv_bias, Tensor rel_h, Tensor rel_w, Tensor y, Tensor? lse, int window,"
    " float scale, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lib=_LIB,
)


@torch.library.impl(_OP, "CompositeExplicitAutograd", lib=_LIB)
def _forward(
    qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, window: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """y, and what the Triton backward needs of the softmax; empty on the torch backend."""
    if backend == "triton":
        return launch_window_forward(qkv, qkv_bias, rel_h, rel_w, window, scale)
    lse = torch.empty(0, dtype=torch.float32, device=qkv.device)
    if qkv.numel() == 0:
        return torch.empty((*qkv.shape[:3], *qkv.shape[4:]), dtype=qkv.dtype, device=qkv.device), lse
    return plain.forward(qkv, qkv_bias, rel_h, rel_w, window, scale, attend_blocks), lse


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd", lib=_LIB)
def _backward_op(
    grad: Tensor, qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor,
    y: Tensor, lse: Tensor | None, window: int, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the four inputs."""
    if backend == "triton":
        assert lse is not None
        return launch_window_backward(grad, (qkv, qkv_bias, rel_h, rel_w), y, lse, window, scale)
    return plain.backward(grad, qkv, qkv_bias, rel_h, rel_w, y, window, scale)


@torch.library.register_fake(_OP, lib=_LIB)
def _(
    qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, window: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    batch, height, width, _, heads, dim = qkv.shape
    y = qkv.new_empty((batch, height, width, heads, dim))
    lse = (batch, heads, height * width) if backend == "triton" else (0,)
    return y, y.new_empty(lse, dtype=torch.float32)


@torch.library.register_fake(f"{_OP}_backward", lib=_LIB)
def _(
    grad: Tensor, qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor,
    y: Tensor, lse: Tensor | None, window: int, scale: float, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in (qkv, qkv_bias, rel_h, rel_w))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, qkv_bias, rel_h, rel_w, *ctx.options = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, qkv_bias, rel_h, rel_w, y, lse if inputs[-1] == "triton" else None)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    window, scale, backend = ctx.options
    if torch.is_grad_enabled() and backend == "torch":
        grads = backward_with_graph(
            lambda qkv, bias, rel_h, rel_w: plain.forward(qkv, bias, rel_h, rel_w, window, scale, attend_plain),
            ctx.saved_tensors[:4], ctx.needs_input_grad[:4], grad,
        )  # fmt: skip
    else:
        grads = OPS.window_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("window_attention"), lib=_LIB)


def window_attention(
    qkv: Tensor,
    qkv_bias: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    window: int,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """SAM's windowed attention on an unpadded grid: qkv (B, H', W', 3, M, D) -> (B, H', W', M, D).

    qkv_bias (3·M·D,) is what a padded token's key and value hold; its use in the projection is not this op's.
    rel_h and rel_w (B, H', W', M, window): the bias of each query against the rows and the columns of its own
    window, padded ones included. A query whose bias is -inf throughout gives 0. Autocast casts all four.
    Raises ValueError on a shape, dtype or device mismatch."""
    check_whole("window_attention", window=window)
    rel = ("B", "H", "W", "M", window)
    expected = {
        "qkv": (qkv, ("B", "H", "W", 3, "M", "D")),
        "rel_h": (rel_h, rel),
        "rel_w": (rel_w, rel),
        "qkv_bias": (qkv_bias, ("E",)),
    }
    sizes = check_shapes("window_attention", expected)
    channels = 3 * sizes["M"] * sizes["D"]
    if qkv_bias.shape != (channels,):
        raise ValueError(
            f"window_attention: qkv_bias must be (3·M·D,) = ({channels},), found {tuple(qkv_bias.shape)}"
        )
    qkv, qkv_bias, rel_h, rel_w = autocast(qkv, qkv_bias, rel_h, rel_w)
    check_alike("window_attention", qkv=qkv, qkv_bias=qkv_bias, rel_h=rel_h, rel_w=rel_w)
    scale = softmax_scale("window_attention", scale, qkv.shape[-1])
    chosen = select_backend("window_attention", qkv, qkv_bias, rel_h, rel_w, backend=backend).backend
    attend = None
    if chosen == "torch" and qkv.numel():
        attend = choose(qkv[..., 0, :, :].flatten(1, 2), window * window, qkv, qkv_bias, rel_h, rel_w)
    if attend is None:
        y: Tensor = OPS.window_attention(qkv, qkv_bias, rel_h, rel_w, window, scale, chosen)[0]
        return y
    return plain.forward(qkv, qkv_bias, rel_h, rel_w, window, scale, attend)
