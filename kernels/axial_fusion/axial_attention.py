"""Attention across slices at each position: softmax(scale · q kᵀ) v over the N slices of a group.

N is tiny (9) and D is 32: the products cost little, and the op is bound by memory. A tile holds whole softmax rows, of
one position or of several, so the backward recomputes them and nothing but q, k and v is saved. Each output
is written once, without atomics. A program takes one head, or HEADS neighbouring heads as one batched product, whose
rows of D elements are contiguous in memory. Heads are the fastest axis of the grid: neighbours share cache lines.
Traffic: forward reads q, k, v and writes y; backward reads these and dY and writes dq, dk, dv.

Scores between positions of one tile are masked. Where a tile holds one position, an inf or NaN stays in its position.
A default tile holds one position where N ≥ 9 forward, and where N ≥ 9 and D ≤ 64 backward. In other tiles an inf or
NaN reaches the tile's few positions, since 0 · inf is NaN, and no further.

Tiles keep off wgmma, which Triton takes for 64 rows and 4 warps: on an H100 (Triton 3.6) the sum of D's two parts,
64 + 32, came out wrong there.

Gradients, with p the softmax's rows: dv = pᵀ dY, dp = dY vᵀ, ds = p · (dp − Σ p · dp),
dq = scale · ds k, dk = scale · dsᵀ q."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from axial_fusion._launch import (
    HALF,
    autocast,
    check_alike,
    check_shapes,
    no_derivative,
    no_second_derivative,
    plain_on,
    select_backend,
    softmax_scale,
)
from axial_fusion._rows import jit
from axial_fusion._tiles import Tile, choose, packed, split
from axial_fusion.reference import axial_mask

try:
    import triton.language as tl
except ImportError:  # the kernels below then stay plain functions that nothing calls
    tl = None


@jit
def _rows(tile, batch, head, P, stride_b, stride_n, stride_p, stride_m,
          SLICES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr = 1):  # fmt: skip
    """Rows of a tile, position by position and slice by slice: offset, slice, position in the tile, mask.

    Offsets are [BLOCK] for one head, else [BLOCK, HEADS]."""
    row = tl.arange(0, BLOCK)
    local = row // SLICES
    index = row % SLICES
    position = tile * GROUP + local
    mask = (row < GROUP * SLICES) & (position < P)
    offs = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_m
    offs += index.to(tl.int64) * stride_n + position.to(tl.int64) * stride_p
    if HEADS > 1:
        offs = offs[:, None] + (tl.arange(0, HEADS).to(tl.int64) * stride_m)[None, :]
    return offs, index, local, mask


@jit
def _tile(ptr, offs, mask, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Pointers and mask of columns START .. START + WIDTH − 1 of the rows at `offs`; columns past D are masked."""
    offs_d = START + tl.arange(0, WIDTH)
    mask_d = mask[:, None] & (offs_d < D)[None, :] if START + WIDTH > D else mask[:, None]
    if len(offs.shape) == 1:
        ptrs = ptr + offs[:, None] + offs_d[None, :]
    else:
        ptrs = ptr + offs[:, :, None] + offs_d[None, None, :]
        mask_d = mask_d[:, None, :]
    return ptrs, mask_d


@jit
def _load(ptr, offs, mask, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """[rows, WIDTH] of one head, or [HEADS, rows, WIDTH]."""
    ptrs, mask_d = _tile(ptr, offs, mask, START, WIDTH, D)
    x = tl.load(ptrs, mask=mask_d, other=0.0)
    return x if len(offs.shape) == 1 else x.permute(1, 0, 2)


@jit
def _store(ptr, offs, mask, x, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    ptrs, mask_d = _tile(ptr, offs, mask, START, WIDTH, D)
    x = x.to(ptr.dtype.element_ty)
    tl.store(ptrs, x if len(offs.shape) == 1 else x.permute(1, 0, 2), mask=mask_d)


@jit
def _visible(local_q, index_q, mask_q, local_k, index_k, mask_k, lengths_ptr, batch,
             NQ: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr):  # fmt: skip
    """Scores that count: same position, real rows, and the causal and length rules.  # [BLOCK_Q, BLOCK_K]"""
    visible = (local_q[:, None] == local_k[None, :]) & mask_q[:, None] & mask_k[None, :]
    if CAUSAL:
        visible = visible & (index_k[None, :] <= index_q[:, None] + (N - NQ))
    if HAS_LENGTHS:
        visible = visible & (index_k[None, :] < tl.load(lengths_ptr + batch))
    return visible


@jit
def _probabilities(s, visible, scale):
    """Softmax rows of scores s before their division: exp(scale · s − maximum), and 1 / its row sums.

    s [..., BLOCK_Q, BLOCK_K]; `scale` may have any sign."""
    AXIS: tl.constexpr = len(s.shape) - 1
    s = tl.where(visible, s * (scale * 1.4426950408889634), -float("inf"))  # log2(e): hardware has exp2
    top = tl.max(s, AXIS)
    p = tl.exp2(s - tl.expand_dims(tl.where(top == -float("inf"), 0.0, top), AXIS))
    total = tl.sum(p, AXIS)
    return p, 1.0 / tl.where(total == 0.0, 1.0, total)  # a query without keys gives 0


@jit
def _place(tiles, M, HEADS: tl.constexpr):
    """A program's tile, batch element and first head."""
    groups = M // HEADS
    pid = tl.program_id(0)
    return (pid // groups) % tiles, pid // (groups * tiles), pid % groups * HEADS


@jit
def _axial_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, y_ptr,
    scale, P, M, tiles,
    stride_qb, stride_qn, stride_qp, stride_qm,
    stride_kb, stride_kn, stride_kp, stride_km,
    stride_vb, stride_vn, stride_vp, stride_vm,
    NQ: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """y (B, Nq, P, M, D), contiguous. Tiles of q, k and v are [HEADS, rows, columns], without HEADS where it is 1."""
    tile, batch, head = _place(tiles, M, HEADS)
    stride_yn = tl.cast(P, tl.int64) * M * D
    offs_q, index_q, local_q, mask_q = _rows(
        tile, batch, head, P, stride_qb, stride_qn, stride_qp, stride_qm, NQ, GROUP, BLOCK_Q, HEADS
    )
    offs_k, index_k, local_k, mask_k = _rows(
        tile, batch, head, P, stride_kb, stride_kn, stride_kp, stride_km, N, GROUP, BLOCK_K, HEADS
    )
    offs_v, _, _, _ = _rows(
        tile, batch, head, P, stride_vb, stride_vn, stride_vp, stride_vm, N, GROUP, BLOCK_K, HEADS
    )
    offs_y, _, _, _ = _rows(
        tile, batch, head, P, NQ * stride_yn, stride_yn, M * D, D, NQ, GROUP, BLOCK_Q, HEADS
    )

    q0 = _load(q_ptr, offs_q, mask_q, 0, D0, D)  # [HEADS, BLOCK_Q, D0]
    k0 = _load(k_ptr, offs_k, mask_k, 0, D0, D)  # [HEADS, BLOCK_K, D0]
    v0 = _load(v_ptr, offs_v, mask_k, 0, D0, D)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [HEADS, BLOCK_Q, BLOCK_K]
    if D1 > 0:
        q1 = _load(q_ptr, offs_q, mask_q, D0, D1, D)
        k1 = _load(k_ptr, offs_k, mask_k, D0, D1, D)
        s = tl.dot(q1, tl.trans(k1), acc=s, input_precision="ieee")

    visible = _visible(
        local_q, index_q, mask_q, local_k, index_k, mask_k, lengths_ptr, batch, NQ, N, CAUSAL, HAS_LENGTHS
    )
    p, share = _probabilities(s, visible, scale)
    share = tl.expand_dims(share, len(s.shape) - 1)
    p = p.to(v0.dtype)
    _store(y_ptr, offs_y, mask_q, tl.dot(p, v0, input_precision="ieee") * share, 0, D0, D)
    if D1 > 0:
        v1 = _load(v_ptr, offs_v, mask_k, D0, D1, D)
        _store(y_ptr, offs_y, mask_q, tl.dot(p, v1, input_precision="ieee") * share, D0, D1, D)


@jit
def _axial_attention_bwd_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, lengths_ptr, dq_ptr, dk_ptr, dv_ptr,
    scale, P, M, tiles,
    stride_gb, stride_gn, stride_gp, stride_gm,
    stride_qb, stride_qn, stride_qp, stride_qm,
    stride_kb, stride_kn, stride_kp, stride_km,
    stride_vb, stride_vn, stride_vp, stride_vm,
    NQ: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """dq (B, Nq, P, M, D), dk and dv (B, N, P, M, D), contiguous; g is dY. Tiles as in the forward."""
    tile, batch, head = _place(tiles, M, HEADS)
    stride_n = tl.cast(P, tl.int64) * M * D  # of what is written
    offs_g, index_q, local_q, mask_q = _rows(
        tile, batch, head, P, stride_gb, stride_gn, stride_gp, stride_gm, NQ, GROUP, BLOCK_Q, HEADS
    )
    offs_q, _, _, _ = _rows(
        tile, batch, head, P, stride_qb, stride_qn, stride_qp, stride_qm, NQ, GROUP, BLOCK_Q, HEADS
    )
    offs_k, index_k, local_k, mask_k = _rows(
        tile, batch, head, P, stride_kb, stride_kn, stride_kp, stride_km, N, GROUP, BLOCK_K, HEADS
    )
    offs_v, _, _, _ = _rows(
        tile, batch, head, P, stride_vb, stride_vn, stride_vp, stride_vm, N, GROUP, BLOCK_K, HEADS
    )
    offs_dq, _, _, _ = _rows(
        tile, batch, head, P, NQ * stride_n, stride_n, M * D, D, NQ, GROUP, BLOCK_Q, HEADS
    )
    offs_dk, _, _, _ = _rows(tile, batch, head, P, N * stride_n, stride_n, M * D, D, N, GROUP, BLOCK_K, HEADS)

    q0 = _load(q_ptr, offs_q, mask_q, 0, D0, D)  # [HEADS, BLOCK_Q, D0]
    k0 = _load(k_ptr, offs_k, mask_k, 0, D0, D)  # [HEADS, BLOCK_K, D0]
    g0 = _load(g_ptr, offs_g, mask_q, 0, D0, D)
    v0 = _load(v_ptr, offs_v, mask_k, 0, D0, D)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [HEADS, BLOCK_Q, BLOCK_K]
    dp = tl.dot(g0, tl.trans(v0), input_precision="ieee")
    if D1 > 0:
        q1 = _load(q_ptr, offs_q, mask_q, D0, D1, D)
        k1 = _load(k_ptr, offs_k, mask_k, D0, D1, D)
        g1 = _load(g_ptr, offs_g, mask_q, D0, D1, D)
        v1 = _load(v_ptr, offs_v, mask_k, D0, D1, D)
        s = tl.dot(q1, tl.trans(k1), acc=s, input_precision="ieee")
        dp = tl.dot(g1, tl.trans(v1), acc=dp, input_precision="ieee")

    visible = _visible(
        local_q, index_q, mask_q, local_k, index_k, mask_k, lengths_ptr, batch, NQ, N, CAUSAL, HAS_LENGTHS
    )
    p, share = _probabilities(s, visible, scale)
    AXIS: tl.constexpr = len(s.shape) - 1
    p = p * tl.expand_dims(share, AXIS)
    ds = p * (dp - tl.expand_dims(tl.sum(p * dp, AXIS), AXIS)) * scale
    p = tl.trans(p.to(q0.dtype))  # [HEADS, BLOCK_K, BLOCK_Q]
    ds = ds.to(q0.dtype)
    ds_t = tl.trans(ds)
    _store(dv_ptr, offs_dk, mask_k, tl.dot(p, g0, input_precision="ieee"), 0, D0, D)
    _store(dq_ptr, offs_dq, mask_q, tl.dot(ds, k0, input_precision="ieee"), 0, D0, D)
    _store(dk_ptr, offs_dk, mask_k, tl.dot(ds_t, q0, input_precision="ieee"), 0, D0, D)
    if D1 > 0:
        _store(dv_ptr, offs_dk, mask_k, tl.dot(p, g1, input_precision="ieee"), D0, D1, D)
        _store(dq_ptr, offs_dq, mask_q, tl.dot(ds, k1, input_precision="ieee"), D0, D1, D)
        _store(dk_ptr, offs_dk, mask_k, tl.dot(ds_t, q1, input_precision="ieee"), D0, D1, D)


@lru_cache(maxsize=256)
def _config(tile: Tile, sizes: torch.Size, slices: int) -> tuple[int, int, dict[str, int]]:
    """Programs, tiles of a batch element and the kernels' constants, for q of `sizes` and N slices."""
    batch, num_queries, positions, heads, dim = sizes
    together = gcd(tile.heads, heads)  # heads of one program
    constants = {"NQ": num_queries, "N": slices, "D": dim, "HEADS": together} | split(dim)
    constants |= packed(tile, num_queries, slices)
    constants["num_warps"] = max(1, tile.num_warps * together // tile.heads)
    count = -(-positions // constants["GROUP"])
    return batch * count * (heads // together), count, constants


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> Tensor:
    q, k, v = _last_axis_contiguous(q, k, v)
    sizes, slices = q.shape, k.shape[1]
    y = torch.empty(sizes, dtype=q.dtype, device=q.device)
    if y.numel() == 0:
        return y
    if slices == 0:
        return y.zero_()
    tile = choose("axial_attention", q, max(sizes[1], slices), sizes[4])
    programs, count, constants = _config(tile, sizes, slices)
    qb, qn, qp, qm, _ = q.stride()
    kb, kn, kp, km, _ = k.stride()
    vb, vn, vp, vm, _ = v.stride()
    with _on(q.device):
        _axial_attention_fwd_kernel[(programs,)](
            q, k, v, lengths, y,
            scale, sizes[2], sizes[3], count,
            qb, qn, qp, qm,
            kb, kn, kp, km,
            vb, vn, vp, vm,
            CAUSAL=causal, HAS_LENGTHS=lengths is not None, **constants,
        )  # fmt: skip
    return y


def _launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = _last_axis_contiguous(grad, q, k, v)
    sizes, slices = q.shape, k.shape[1]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    tile = choose("axial_attention_backward", q, max(sizes[1], slices), sizes[4])
    programs, count, constants = _config(tile, sizes, slices)
    gb, gn, gp, gm, _ = grad.stride()
    qb, qn, qp, qm, _ = q.stride()
    kb, kn, kp, km, _ = k.stride()
    vb, vn, vp, vm, _ = v.stride()
    with _on(q.device):
        _axial_attention_bwd_kernel[(programs,)](
            grad, q, k, v, lengths, dq, dk, dv,
            scale, sizes[2], sizes[3], count,
            gb, gn, gp, gm,
            qb, qn, qp, qm,
            kb, kn, kp, km,
            vb, vn, vp, vm,
            CAUSAL=causal, HAS_LENGTHS=lengths is not None, **constants,
        )  # fmt: skip
    return dq, dk, dv


def _last_axis_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


_HERE = nullcontext()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """The torch backend: q (B, Nq, P, M, D) -> contiguous (B, Nq, P, M, D), differentiable."""
    visible = axial_mask(q.shape[1], k.shape[1], causal=causal, lengths=lengths, device=q.device)
    if q.dtype not in HALF and q.shape[1] * k.shape[1] <= 16:
        # So few slices that N² products of rows cost less than the copies a batched matmul makes.
        scores = scale * (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1)  # (B, Nq, N, P, M)
        weights = _softmax(scores, None if visible is None else visible[:, 0, 0, :, :, None, None], 2)
        return (weights.unsqueeze(-1) * v.unsqueeze(1)).sum(2)
    rows = [t.permute(0, 2, 3, 1, 4) for t in (q, k, v)]  # (B, P, M, N, D)
    if visible is None and q.dtype not in HALF and q.device.type == "cpu" and no_derivative(q, k, v):
        # Nothing is kept for a backward: half the time of two products with a softmax between them.
        q, k, v = (t.flatten(0, 1) for t in rows)
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)  # (B·P, M, N, D)
        return y.unflatten(0, rows[0].shape[:2]).permute(0, 3, 1, 2, 4).contiguous()
    weights = _softmax(rows[0] @ rows[1].transpose(-1, -2) * scale, visible, -1)
    return (weights @ rows[2]).permute(0, 3, 1, 2, 4).contiguous()


def _softmax(scores: Tensor, visible: Tensor | None, dim: int) -> Tensor:
    if visible is None:
        return scores.softmax(dim)
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = ~visible.any(dim, keepdim=True)  # a query without keys: no NaN, forward or backward
    return scores.masked_fill(empty, 0.0).softmax(dim).masked_fill(empty, 0.0)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    visible = axial_mask(q.shape[1], k.shape[1], causal=causal, lengths=lengths, device=q.device)
    dy, q, k, v = (t.permute(0, 2, 3, 1, 4) for t in (grad, q, k, v))  # (B, P, M, N, D)
    p = _softmax(q @ k.transpose(-1, -2) * scale, visible, -1)
    dp = dy @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    grads = (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dy)
    dq, dk, dv = (t.permute(0, 3, 1, 2, 4).contiguous() for t in grads)
    return dq, dk, dv


_OP = "axial_fusion::axial_attention"
torch.library.define(
    _OP, "(Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale, bool causal, str backend) -> Tensor"
)
torch.library.define(
    f"{_OP}_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale, bool causal, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl(_OP, "CompositeExplicitAutograd")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool, backend: str
) -> Tensor:
    run = _launch_forward if backend == "triton" else _plain_forward
    return run(q, k, v, lengths, scale, causal)


@torch.library.register_fake(_OP)
def _(q, k, v, lengths, scale, causal, backend):
    return q.new_empty(q.shape)


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd")
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _launch_backward if backend == "triton" else _plain_backward
    return run(grad, q, k, v, lengths, scale, causal)


@torch.library.register_fake(f"{_OP}_backward")
def _(grad, q, k, v, lengths, scale, causal, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, lengths, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, lengths)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.axial_fusion.axial_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_save)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("axial_attention"))


@register_flop_formula(torch.ops.axial_fusion.axial_attention)
def _flops(q_shape: Any, k_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products of (Nq, D) and (D, N) a head and position, a multiply-add counted as two."""
    batch, num_queries, positions, heads, dim = q_shape
    return 4 * batch * positions * heads * num_queries * k_shape[1] * dim


@register_flop_formula(torch.ops.axial_fusion.axial_attention_backward)
def _backward_flops(
    grad_shape: Any, q_shape: Any, k_shape: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Five products: the scores again, dp, dq, dk and dv."""
    return 5 * _flops(q_shape, k_shape) // 2


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention across slices at each position: q (B, Nq, P, M, D), k and v (B, N, P, M, D) -> (B, Nq, P, M, D).

    Not the "axial attention" of rows and columns of one image. `scale` is D^-½ where None. `causal`: query i sees
    keys 0 .. i + N − Nq. `lengths` (B,) integers: group b has keys 0 .. lengths[b] − 1. A query that sees no key
    gives 0. Any strides are read as they are where D is contiguous; the result is contiguous, in q's dtype or
    autocast's. Softmax in fp32. Raises ValueError on a shape, dtype, device or backend mismatch."""
    check_shapes("axial_attention", {"q": (q, "B Nq P M D"), "k": (k, "B N P M D"), "v": (v, "B N P M D")})
    q, k, v = autocast(q, k, v)
    check_alike("axial_attention", q=q, k=k, v=v)
    if lengths is not None:
        if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"axial_attention: lengths must be (B,) = ({q.shape[0]},) of int32 or int64, "
                f"found {tuple(lengths.shape)} of {str(lengths.dtype).removeprefix('torch.')}"
            )
        if lengths.device != q.device:
            raise ValueError(f"axial_attention: lengths is on {lengths.device} but q is on {q.device}")
        lengths = lengths.contiguous()
    chosen = select_backend("axial_attention", q, k, v, backend=backend).backend
    scale = softmax_scale(scale, q.shape[-1])
    if chosen == "torch" and plain_on(q):
        return _plain_forward(q, k, v, lengths, scale, causal)
    return torch.ops.axial_fusion.axial_attention(q, k, v, lengths, scale, causal, chosen)
