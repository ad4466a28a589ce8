"""SAM's attention with decomposed relative position: over a whole grid, and in windows without padding.

The bias of a query against the key in row h and column w is rel_h[h] + rel_w[w], two small tables a query. It is
never held for all queries at once. The Triton kernels (_rel_pos_kernels.py) never hold a score outside the chip, and
save the inputs, y and one number a query. The torch backend computes block by block, forward and backward, and saves
the inputs and y. Only where scores are few (`_choose`), on a CPU, does autograd keep the softmax, which saves computing
it again.

SAM pads its grid to whole windows after the norm, so that a padded token is a key and value that holds the qkv
bias alone. Here those keys are made from the bias, and padded queries do not exist: equal to SAM in exact
arithmetic, without projecting the padding. Gradients, with p the softmax's rows: dv = pᵀ dY,
ds = p · (dY vᵀ − Σ p · dY vᵀ), dq = scale · ds k, dk = scale · dsᵀ q, d rel_h and d rel_w the sums of ds over
the columns and over the rows of keys, d qkv_bias the sum over the padded keys.

Source: SAM, arXiv 2304.02643, image_encoder.py; MViTv2, arXiv 2112.01526, eq. 4."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from axial_fusion._launch import (
    autocast,
    check_alike,
    check_shapes,
    no_second_derivative,
    plain_on,
    select_backend,
    softmax_scale,
    under_transform,
)
from axial_fusion._rel_pos_launch import (
    launch_backward,
    launch_forward,
    launch_window_backward,
    launch_window_forward,
)

_SAVED = 1 << 24  # scores that autograd may keep for a backward: 64 MiB in fp32
_KEYS = 512  # of a query, above which fp32 scores that leave the cache cost more than computing them again
_BLOCK = (
    1 << 22
)  # scores that a block holds; half of it in a backward, which has three such tensors at a time

# An attention over biased keys: q (B, Q, M, D), k and v (B, K, M, D), bias_h (B, M, Q, H), bias_w (B, M, Q, W) with
# H · W = K, scale -> (B, Q, M, D).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor, scale: float) -> Tensor:
    """All scores at once, by products that autograd and every transform see through."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.add(_bias(bias_h, bias_w), q @ k.transpose(-1, -2), alpha=scale)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor, scale: float) -> Tensor:
    """Fused attention, block by block; no gradient."""
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    for b, m, rows in _blocks(q, k.shape[2], _BLOCK):
        bias = _bias(bias_h[b, m, rows], bias_w[b, m, rows])
        query = q[b, rows, m].transpose(1, 2)
        part = F.scaled_dot_product_attention(query, k[b, m], v[b, m], attn_mask=bias, scale=scale)
        y[b, rows, m] = part.transpose(1, 2)
    return y


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor, y: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs, block by block; dk and dv are summed in fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dbias_h, dbias_w = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, bias_h, bias_w))
    k, v = (t.transpose(1, 2).contiguous() for t in (k, v))  # (B, M, K, D)
    dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k, v))
    for b, m, rows in _blocks(q, k.shape[2], _BLOCK // 2):
        here = (b, m, rows)
        query, dy, part = (
            t[b, rows, m].transpose(1, 2).flatten(0, 1) for t in (q, grad, y)
        )  # (b·m, rows, D)
        key, value = k[b, m].flatten(0, 1), v[b, m].flatten(0, 1)
        scores = _bias(bias_h[here], bias_w[here]).flatten(0, 1)  # (b·m, rows, K)
        p = scores.baddbmm_(query, key.transpose(1, 2), alpha=scale).softmax(-1)
        ds = (dy @ value.transpose(1, 2)).sub_((dy * part).sum(-1, keepdim=True)).mul_(p)
        dv[b, m] += (p.transpose(1, 2) @ dy).view_as(dv[b, m])
        dk[b, m] += (ds.transpose(1, 2) @ query).mul_(scale).view_as(dk[b, m])
        dq[b, rows, m] = (ds @ key).mul_(scale).view_as(dq[b, rows, m].transpose(1, 2)).transpose(1, 2)
        cells = ds.unflatten(-1, (bias_h.shape[-1], bias_w.shape[-1]))
        dbias_h[here] = cells.sum(-1).view_as(dbias_h[here])
        dbias_w[here] = cells.sum(-2).view_as(dbias_w[here])
    return dq, dk.transpose(1, 2).to(q.dtype), dv.transpose(1, 2).to(q.dtype), dbias_h, dbias_w


def _bias(bias_h: Tensor, bias_w: Tensor) -> Tensor:
    """(B, M, Q, H) and (B, M, Q, W) -> (B, M, Q, H·W)."""
    return (bias_h.unsqueeze(-1) + bias_w.unsqueeze(-2)).flatten(-2)


def _blocks(q: Tensor, keys: int, most: int) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of q (B, Q, M, D) along B, M and Q, of at most `most` scores (or one query) each.

    Queries are divided last: fused attention is slower on few of them."""
    batch, queries, heads, _ = q.shape
    rows = max(1, min(queries, most // max(1, keys)))
    m = max(1, min(heads, most // max(1, rows * keys)))
    b = max(1, min(batch, most // max(1, m * rows * keys)))
    for i, j, r in product(range(0, batch, b), range(0, heads, m), range(0, queries, rows)):
        yield slice(i, i + b), slice(j, j + m), slice(r, r + rows)


def _choose(q: Tensor, keys: int, *others: Tensor) -> Attend | None:
    """How a CPU computes: all at once where autograd may keep that, blocks where it need not, else None: the op."""
    tensors = (q, *others)
    if (
        under_transform(tensors) or torch.compiler.is_exporting()
    ):  # an exported graph runs without this package
        return _attend_plain
    if not plain_on(q):
        return None
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return None if torch.compiler.is_compiling() else _attend_blocks
    few = keys <= _KEYS or q.dtype != torch.float32
    return _attend_plain if few and q.shape[0] * q.shape[1] * q.shape[2] * keys <= _SAVED else None


# One grid.

_OP = "axial_fusion::rel_pos_attention"
torch.library.define(
    _OP,
    "(Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, float scale, str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    f"{_OP}_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, Tensor y, Tensor? lse, float scale,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl(_OP, "CompositeExplicitAutograd")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """y, and what the Triton backward needs of the softmax; empty on the torch backend."""
    if backend == "triton":
        return launch_forward(q, k, v, rel_h, rel_w, scale)
    y = _attend_blocks(q, k, v, rel_h.transpose(-1, -2), rel_w, scale)
    return y, _lse(q, (0,))


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd")
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor,
    y: Tensor, lse: Tensor | None, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if backend == "triton":
        assert lse is not None
        return launch_backward(grad, q, k, v, rel_h, rel_w, y, lse, scale)
    grads = _attend_backward(grad, q, k, v, rel_h.transpose(-1, -2), rel_w, y, scale)
    dq, dk, dv, dbias_h, dbias_w = (t.contiguous() for t in grads)
    return dq, dk, dv, dbias_h.transpose(-1, -2).contiguous(), dbias_w


@torch.library.register_fake(_OP)
def _(q, k, v, rel_h, rel_w, scale, backend):
    batch, positions, heads, _ = q.shape
    return q.new_empty(q.shape), _lse(q, (batch, heads, positions) if backend == "triton" else (0,))


@torch.library.register_fake(f"{_OP}_backward")
def _(grad, *inputs):
    return tuple(t.new_empty(t.shape) for t in inputs[:5])


def _lse(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For both ops: the inputs, y, and on the Triton backend what else the softmax left."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    ctx.options = inputs[len(tensors) :]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[0], output[1] if inputs[-1] == "triton" else None)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = torch.ops.axial_fusion.rel_pos_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_save)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("rel_pos_attention"))


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
    added to scale · q·k; `scale` is D^-½ where None. Autocast casts all five.
    Raises ValueError on a shape, dtype, device or backend mismatch."""
    height, width = grid
    qkv, tokens = "B P M D", height * width
    if q.dim() != 4 or q.shape[1] != tokens:
        raise ValueError(
            f"rel_pos_attention: q must be (B, P, M, D) with P = {height}·{width} of grid, found {tuple(q.shape)}"
        )
    expected = {"q": (q, qkv), "k": (k, qkv), "v": (v, qkv)}
    tables = {"rel_h": (rel_h, f"B M {height} P"), "rel_w": (rel_w, f"B M P {width}")}
    check_shapes("rel_pos_attention", expected | tables)
    q, k, v, rel_h, rel_w = autocast(q, k, v, rel_h, rel_w)
    check_alike("rel_pos_attention", q=q, k=k, v=v, rel_h=rel_h, rel_w=rel_w)
    chosen = select_backend("rel_pos_attention", q, k, v, rel_h, rel_w, backend=backend).backend
    scale = softmax_scale(scale, q.shape[-1])
    attend = None if chosen == "triton" else _choose(q, tokens, k, v, rel_h, rel_w)
    if attend is None:
        return torch.ops.axial_fusion.rel_pos_attention(q, k, v, rel_h, rel_w, scale, chosen)[0]
    return attend(q, k, v, rel_h.transpose(-1, -2), rel_w, scale)


# Windows.

_WINDOW_OP = "axial_fusion::window_attention"
torch.library.define(
    _WINDOW_OP,
    "(Tensor qkv, Tensor qkv_bias, Tensor rel_h, Tensor rel_w, int window, float scale, str backend)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    f"{_WINDOW_OP}_backward",
    "(Tensor grad, Tensor qkv, Tensor qkv_bias, Tensor rel_h, Tensor rel_w, Tensor y, Tensor? lse, int window,"
    " float scale, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _bands(size: int, window: int) -> list[tuple[slice, int]]:
    """An axis cut into the whole windows and the last, partial one: where each part lies and its windows' extent."""
    whole = size - size % window
    bands = [(slice(0, whole), window)] if whole else []
    return [*bands, (slice(whole, size), size - whole)] if whole < size else bands


def _cut(t: Tensor, rows: slice, height: int, columns: slice, width: int) -> Tensor:
    """The windows of one part of the grid: (B, H', W', ...) -> (B', height, width, ...)."""
    t = t[:, rows, columns].unflatten(2, (-1, width)).unflatten(1, (-1, height))
    return t.transpose(2, 3).flatten(0, 2)


def _join(t: Tensor, batch: int, rows: slice, height: int, columns: slice, width: int) -> Tensor:
    """The inverse of `_cut`: (B', height·width or height, width, ...) -> (B, rows, columns, ...)."""
    t = t.unflatten(0, (batch, (rows.stop - rows.start) // height, -1))
    return t.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _keys(windows: Tensor, qkv_bias: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """k and v (B', window², M, D) of the windows (B', h, w, 3, M, D), the bias alone where the grid ends."""
    kv = windows[:, :, :, 1:]
    count, height, width, _, heads, dim = kv.shape
    pad = qkv_bias.view(3, heads, dim)[1:]
    if width < window:
        kv = torch.cat([kv, pad.expand(count, height, window - width, 2, heads, dim)], 2)
    if height < window:
        kv = torch.cat([kv, pad.expand(count, window - height, window, 2, heads, dim)], 1)
    k, v = kv.flatten(1, 2).unbind(2)
    return k, v


def _window(
    qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, window: int, scale: float, attend: Attend
) -> Tensor:
    batch = qkv.shape[0]
    bands = []
    for rows, height in _bands(qkv.shape[1], window):
        parts = []
        for columns, width in _bands(qkv.shape[2], window):
            place = (rows, height, columns, width)
            windows = _cut(qkv, *place)
            k, v = _keys(windows, qkv_bias, window)
            bias_h, bias_w = (_cut(rel, *place).flatten(1, 2).transpose(1, 2) for rel in (rel_h, rel_w))
            y = attend(windows[:, :, :, 0].flatten(1, 2), k, v, bias_h, bias_w, scale)
            parts.append(_join(y.unflatten(1, (height, width)), batch, *place))
        bands.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
    return (bands[0] if len(bands) == 1 else torch.cat(bands, 1)).contiguous()


@torch.library.impl(_WINDOW_OP, "CompositeExplicitAutograd")
def _window_forward(
    qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor, window: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return launch_window_forward(qkv, qkv_bias, rel_h, rel_w, window, scale)
    if qkv.numel() == 0:
        return qkv.new_empty((*qkv.shape[:3], *qkv.shape[4:])), _lse(qkv, (0,))
    return _window(qkv, qkv_bias, rel_h, rel_w, window, scale, _attend_blocks), _lse(qkv, (0,))


@torch.library.impl(f"{_WINDOW_OP}_backward", "CompositeExplicitAutograd")
def _window_backward_op(
    grad: Tensor, qkv: Tensor, qkv_bias: Tensor, rel_h: Tensor, rel_w: Tensor,
    y: Tensor, lse: Tensor | None, window: int, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if backend == "triton":
        assert lse is not None
        return launch_window_backward(grad, qkv, qkv_bias, rel_h, rel_w, y, lse, window, scale)
    return _window_backward_blocks(grad, qkv, qkv_bias, rel_h, rel_w, y, window, scale)


def _window_backward_blocks(
    grad: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    y: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = qkv.shape[0]
    dqkv, drel_h, drel_w = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qkv, rel_h, rel_w))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    dpad = torch.zeros((2, *qkv.shape[4:]), dtype=wide, device=qkv.device)
    for rows, height in _bands(qkv.shape[1], window):
        for columns, width in _bands(qkv.shape[2], window):
            place = (rows, height, columns, width)
            windows = _cut(qkv, *place)
            k, v = _keys(windows, qkv_bias, window)
            bias_h, bias_w = (_cut(rel, *place).flatten(1, 2).transpose(1, 2) for rel in (rel_h, rel_w))
            q = windows[:, :, :, 0].flatten(1, 2)
            dy, part = (_cut(t, *place).flatten(1, 2) for t in (grad, y))
            dq, dk, dv, dh, dw = _attend_backward(dy, q, k, v, bias_h, bias_w, part, scale)
            dkv = torch.stack([dk, dv], 2).unflatten(1, (window, window))  # (B', window, window, 2, M, D)
            real = dkv[:, :height, :width]
            dpad += dkv[:, height:].sum((0, 1, 2), dtype=wide) + dkv[:, :height, width:].sum(
                (0, 1, 2), dtype=wide
            )
            dq = dq.unflatten(1, (height, width)).unsqueeze(3)
            dqkv[:, rows, columns] = _join(torch.cat([dq, real], 3), batch, *place)
            for whole, table in ((drel_h, dh), (drel_w, dw)):
                whole[:, rows, columns] = _join(
                    table.transpose(1, 2).unflatten(1, (height, width)), batch, *place
                )
    dbias = torch.cat([torch.zeros_like(dpad[:1]), dpad]).flatten().to(qkv_bias.dtype)
    return dqkv, dbias, drel_h, drel_w


@torch.library.register_fake(_WINDOW_OP)
def _(qkv, qkv_bias, rel_h, rel_w, window, scale, backend):
    batch, height, width, _, heads, dim = qkv.shape
    y = qkv.new_empty((batch, height, width, heads, dim))
    return y, _lse(qkv, (batch, heads, height * width) if backend == "triton" else (0,))


@torch.library.register_fake(f"{_WINDOW_OP}_backward")
def _(grad, *inputs):
    return tuple(t.new_empty(t.shape) for t in inputs[:4])


def _window_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = torch.ops.axial_fusion.window_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None)


torch.library.register_autograd(_WINDOW_OP, _window_backward, setup_context=_save)
torch.library.register_autograd(f"{_WINDOW_OP}_backward", no_second_derivative("window_attention"))


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
    window, padded ones included. Autocast casts all four. Raises ValueError on a shape, dtype or device mismatch."""
    if window < 1:
        raise ValueError(f"window_attention: window must be at least 1, found {window}")
    rel = f"B H W M {window}"
    sizes = check_shapes(
        "window_attention", {"qkv": (qkv, "B H W 3 M D"), "rel_h": (rel_h, rel), "rel_w": (rel_w, rel)}
    )
    channels = 3 * sizes["M"] * sizes["D"]
    if qkv_bias.shape != (channels,):
        raise ValueError(
            f"window_attention: qkv_bias must be (3·M·D,) = ({channels},), found {tuple(qkv_bias.shape)}"
        )
    qkv, qkv_bias, rel_h, rel_w = autocast(qkv, qkv_bias, rel_h, rel_w)
    check_alike("window_attention", qkv=qkv, qkv_bias=qkv_bias, rel_h=rel_h, rel_w=rel_w)
    chosen = select_backend("window_attention", qkv, qkv_bias, rel_h, rel_w, backend=backend).backend
    scale = softmax_scale(scale, qkv.shape[-1])
    attend = None
    if chosen == "torch" and qkv.numel():
        attend = _choose(qkv[..., 0, :, :].flatten(1, 2), window * window, qkv, qkv_bias, rel_h, rel_w)
    if attend is None:
        return torch.ops.axial_fusion.window_attention(qkv, qkv_bias, rel_h, rel_w, window, scale, chosen)[0]
    return _window(qkv, qkv_bias, rel_h, rel_w, window, scale, attend)
