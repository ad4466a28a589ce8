"""Triton kernels of the axial half, and what launches them: three launches forward, two backward.

Row statistics with z Aᵀ come first, from rows_kernel. Then, for each head and tile of 64 // N positions, the product
that makes q, k and v of its rows, with the attention as its epilogue: q, k and v never reach memory. Then the output
projection. The backward makes q, k and v again and turns dy into dq, dk and dv. A tile's heads are neighbours on the
grid: x comes from memory once and M − 1 times from the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from axial_fusion._launch import softmax_scale
from axial_fusion._rows import jit, normalised, rows_kernel, transposed
from axial_fusion._tiles import block, tiles
from axial_fusion.axial_attention import _on, _probabilities, _rows, _store, _visible
from axial_fusion.reference import AttentionWeights, LoRA

try:
    import triton.language as tl
except ImportError:  # the kernels below then stay plain functions that nothing calls
    tl = None


@jit
def _completed(acc, bias_ptr, row, xa_ptr, t, mask, b_ptr, b_row, scaling, PART: tl.constexpr, D: tl.constexpr,
               R: tl.constexpr, RANK: tl.constexpr, BLOCK_D: tl.constexpr, BIAS: tl.constexpr,
               LORA: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """A projection: its product plus LoRA's scaling · xa Bᵀ and the bias, rounded.  # [rows, BLOCK_D]"""
    offs_d = tl.arange(0, BLOCK_D)
    if LORA:
        offs_r = tl.arange(0, RANK)
        at = t[:, None] * (2 * R) + PART * R + offs_r[None, :]
        xa = tl.load(xa_ptr + at, mask=mask[:, None] & (offs_r < R)[None, :], other=0.0)
        inside = (offs_r < R)[:, None] & (offs_d < D)[None, :]
        b = tl.load(b_ptr + (b_row + offs_d)[None, :] * R + offs_r[:, None], mask=inside, other=0.0)
        acc += scaling * tl.dot(xa, b, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + row + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]
    return acc.to(dtype)


@jit
def _qkv(x_ptr, mean_ptr, rstd_ptr, xa_ptr, gamma_ptr, beta_ptr, w_ptr, bias_ptr, b_q_ptr, b_v_ptr,
         scaling_q, scaling_v, tile, batch, head, P, first, step, stride_xb, stride_xn, stride_xp,
         NQ: tl.constexpr, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
         SAME: tl.constexpr, NORM: tl.constexpr, BETA: tl.constexpr, BIAS: tl.constexpr, LORA_Q: tl.constexpr,
         LORA_V: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
         BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """q [BLOCK_Q, BLOCK_D], k and v [BLOCK_K, BLOCK_D] of one head and tile, in the weights' dtype.

    SAME: the queries are all N slices in order; else they are the slices first, first + step, ..."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    offs, _, _, mask_k = _rows(tile, batch, head, P, stride_xb, stride_xn, stride_xp, 0, N, GROUP, BLOCK_K)
    t, _, _, _ = _rows(tile, batch, head, P, N * P, P, 1, 0, N, GROUP, BLOCK_K)
    mean = tl.zeros([BLOCK_K], tl.float32)
    rstd = tl.zeros([BLOCK_K], tl.float32)
    if NORM:
        mean = tl.load(mean_ptr + t, mask=mask_k, other=0.0)
        rstd = tl.load(rstd_ptr + t, mask=mask_k, other=0.0)
    q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    row = head * D
    for c in range(0, C, BLOCK_C):
        z = normalised(x_ptr, offs, mask_k, mean, rstd, gamma_ptr, beta_ptr, c, C, NORM, BETA, BLOCK_C, dtype)
        if SAME:
            q = tl.dot(z, transposed(w_ptr, row, c, D, C, BLOCK_D, BLOCK_C), acc=q, input_precision="ieee")
        k = tl.dot(z, transposed(w_ptr, C + row, c, D, C, BLOCK_D, BLOCK_C), acc=k, input_precision="ieee")
        v = tl.dot(
            z, transposed(w_ptr, 2 * C + row, c, D, C, BLOCK_D, BLOCK_C), acc=v, input_precision="ieee"
        )
    t_q = t
    mask_q = mask_k
    if not SAME:
        offs, _, _, mask_q = _rows(
            tile, batch, head, P, stride_xb, step * stride_xn, stride_xp, 0, NQ, GROUP, BLOCK_Q
        )
        offs += first.to(tl.int64) * stride_xn
        t_q, _, _, _ = _rows(tile, batch, head, P, N * P, step * P, 1, 0, NQ, GROUP, BLOCK_Q)
        t_q += first.to(tl.int64) * P
        mean = tl.zeros([BLOCK_Q], tl.float32)
        rstd = tl.zeros([BLOCK_Q], tl.float32)
        if NORM:
            mean = tl.load(mean_ptr + t_q, mask=mask_q, other=0.0)
            rstd = tl.load(rstd_ptr + t_q, mask=mask_q, other=0.0)
        for c in range(0, C, BLOCK_C):
            z = normalised(
                x_ptr, offs, mask_q, mean, rstd, gamma_ptr, beta_ptr, c, C, NORM, BETA, BLOCK_C, dtype
            )
            q = tl.dot(z, transposed(w_ptr, row, c, D, C, BLOCK_D, BLOCK_C), acc=q, input_precision="ieee")
    q = _completed(q, bias_ptr, row, xa_ptr, t_q, mask_q, b_q_ptr, row, scaling_q,
                   0, D, R, RANK, BLOCK_D, BIAS, LORA_Q, dtype)  # fmt: skip
    k = _completed(k, bias_ptr, C + row, xa_ptr, t, mask_k, b_q_ptr, row, scaling_q,
                   0, D, R, RANK, BLOCK_D, BIAS, False, dtype)  # fmt: skip
    v = _completed(v, bias_ptr, 2 * C + row, xa_ptr, t, mask_k, b_v_ptr, row, scaling_v,
                   1, D, R, RANK, BLOCK_D, BIAS, LORA_V, dtype)  # fmt: skip
    return q, k, v


@jit
def axial_half_fwd_kernel(
    x_ptr, mean_ptr, rstd_ptr, xa_ptr, gamma_ptr, beta_ptr, w_ptr, bias_ptr, b_q_ptr, b_v_ptr, o_ptr,
    scaling_q, scaling_v, scale, P, M, tiles, first, step, stride_xb, stride_xn, stride_xp,
    NQ: tl.constexpr, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
    SAME: tl.constexpr, NORM: tl.constexpr, BETA: tl.constexpr, BIAS: tl.constexpr, LORA_Q: tl.constexpr,
    LORA_V: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """o (B, Nq, P, C), contiguous."""
    pid = tl.program_id(0)
    head = pid % M
    tile = (pid // M) % tiles
    batch = pid // (M * tiles)
    q, k, v = _qkv(x_ptr, mean_ptr, rstd_ptr, xa_ptr, gamma_ptr, beta_ptr, w_ptr, bias_ptr, b_q_ptr, b_v_ptr,
                   scaling_q, scaling_v, tile, batch, head, P, first, step, stride_xb, stride_xn, stride_xp,
                   NQ, N, C, D, R, RANK, SAME, NORM, BETA, BIAS, LORA_Q, LORA_V,
                   GROUP, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_C)  # fmt: skip
    offs_o, index_q, local_q, mask_q = _rows(
        tile, batch, head, P, NQ * P * C, P * C, C, D, NQ, GROUP, BLOCK_Q
    )
    _, index_k, local_k, mask_k = _rows(tile, batch, head, P, 0, 0, 0, 0, N, GROUP, BLOCK_K)
    visible = _visible(local_q, index_q, mask_q, local_k, index_k, mask_k, o_ptr, batch, NQ, N, False, False)
    p, share = _probabilities(tl.dot(q, tl.trans(k), input_precision="ieee"), visible, scale)
    o = tl.dot(p.to(v.dtype), v, input_precision="ieee") * share[:, None]
    _store(o_ptr, offs_o, mask_q, o, 0, BLOCK_D, D)


@jit
def output_kernel(
    o_ptr, w_ptr, bias_ptr, x_ptr, y_ptr,
    P, rows, first, step, stride_xb, stride_xn, stride_xp,
    NQ: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = o Wᵀ + bias + x[:, queries], rounded once; o and y (B, Nq, P, C) contiguous."""
    columns = (C + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0)
    row = (pid // columns).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = (pid % columns) * BLOCK_E
    offs_e = start + tl.arange(0, BLOCK_E)
    mask = row < rows
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        o = tl.load(
            o_ptr + row[:, None] * C + offs_c[None, :], mask=mask[:, None] & (offs_c < C)[None, :], other=0.0
        )
        inside = (offs_c < C)[:, None] & (offs_e < C)[None, :]
        w = tl.load(
            w_ptr + offs_e[None, :] * C + offs_c[:, None], mask=inside, other=0.0
        )  # [BLOCK_C, BLOCK_E]
        acc = tl.dot(o, w, acc=acc, input_precision="ieee")
    mask_y = mask[:, None] & (offs_e < C)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + offs_e, mask=offs_e < C, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        offs = (
            (row // P // NQ) * stride_xb + (first + row // P % NQ * step) * stride_xn + (row % P) * stride_xp
        )
        acc += tl.load(x_ptr + offs[:, None] + offs_e[None, :], mask=mask_y, other=0.0).to(tl.float32)
    tl.store(y_ptr + row[:, None] * C + offs_e[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask_y)


@jit
def axial_half_bwd_kernel(
    g_ptr, w_o_ptr, x_ptr, mean_ptr, rstd_ptr, xa_ptr, gamma_ptr, beta_ptr, w_ptr, bias_ptr, b_q_ptr, b_v_ptr,
    dq_ptr, dk_ptr, dv_ptr, o_ptr,
    scaling_q, scaling_v, scale, P, M, tiles, first, step, stride_xb, stride_xn, stride_xp,
    stride_qb, stride_qn, stride_qp, stride_kb, stride_kn, stride_kp,
    NQ: tl.constexpr, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
    SAME: tl.constexpr, NORM: tl.constexpr, BETA: tl.constexpr, BIAS: tl.constexpr, LORA_Q: tl.constexpr,
    LORA_V: tl.constexpr, KEEP_O: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of one head and tile from x and dy (g, contiguous); o as well where KEEP_O."""
    pid = tl.program_id(0)
    head = pid % M
    tile = (pid // M) % tiles
    batch = pid // (M * tiles)
    q, k, v = _qkv(x_ptr, mean_ptr, rstd_ptr, xa_ptr, gamma_ptr, beta_ptr, w_ptr, bias_ptr, b_q_ptr, b_v_ptr,
                   scaling_q, scaling_v, tile, batch, head, P, first, step, stride_xb, stride_xn, stride_xp,
                   NQ, N, C, D, R, RANK, SAME, NORM, BETA, BIAS, LORA_Q, LORA_V,
                   GROUP, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_C)  # fmt: skip
    offs_g, index_q, local_q, mask_q = _rows(
        tile, batch, head, P, NQ * P * C, P * C, C, 0, NQ, GROUP, BLOCK_Q
    )
    offs_q, _, _, _ = _rows(tile, batch, head, P, stride_qb, stride_qn, stride_qp, D, NQ, GROUP, BLOCK_Q)
    offs_k, index_k, local_k, mask_k = _rows(
        tile, batch, head, P, stride_kb, stride_kn, stride_kp, D, N, GROUP, BLOCK_K
    )
    offs_d = tl.arange(0, BLOCK_D)
    g = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)  # dO = dy W_O of this head
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        inside = (offs_c < C)[:, None] & (offs_d < D)[None, :]
        w = tl.load(w_o_ptr + offs_c[:, None] * C + head * D + offs_d[None, :], mask=inside, other=0.0)
        dy = tl.load(
            g_ptr + offs_g[:, None] + offs_c[None, :], mask=mask_q[:, None] & (offs_c < C)[None, :], other=0.0
        )
        g = tl.dot(dy, w, acc=g, input_precision="ieee")
    g = g.to(v.dtype)
    visible = _visible(local_q, index_q, mask_q, local_k, index_k, mask_k, o_ptr, batch, NQ, N, False, False)
    p, share = _probabilities(tl.dot(q, tl.trans(k), input_precision="ieee"), visible, scale)
    if KEEP_O:
        o = tl.dot(p.to(v.dtype), v, input_precision="ieee") * share[:, None]
        _store(o_ptr, offs_g + head * D, mask_q, o, 0, BLOCK_D, D)
    p = p * share[:, None]
    dp = tl.dot(g, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(v.dtype)
    _store(dv_ptr, offs_k, mask_k, tl.dot(tl.trans(p.to(v.dtype)), g, input_precision="ieee"), 0, BLOCK_D, D)
    _store(dq_ptr, offs_q, mask_q, tl.dot(ds, k, input_precision="ieee"), 0, BLOCK_D, D)
    _store(dk_ptr, offs_k, mask_k, tl.dot(tl.trans(ds), q, input_precision="ieee"), 0, BLOCK_D, D)


class _Call:
    """What every launch of one call shares: sizes, flags, row statistics and pointers."""

    def __init__(
        self, op: str, x: Tensor, w: AttentionWeights, heads: int, queries: Sequence[int], eps: float
    ) -> None:
        if x.stride(-1) != 1:
            x = x.contiguous()
        self.x, self.w, self.eps = x, w, eps
        self.first, self.step, self.num_queries = queries
        batch, slices, positions, channels = x.shape
        dim = channels // heads
        dtype = w.qkv_weight.dtype
        self.a_q, self.b_q = _thin(w.lora_q, dtype)
        self.a_v, self.b_v = _thin(w.lora_v, dtype)
        rank = next((a.shape[0] for a in (self.a_q, self.a_v) if a is not None), 1)
        self.config = tiles(op, w.qkv_weight, self.num_queries, slices, dim, channels)
        self.tiles = -(-positions // self.config["GROUP"])
        self.grid = (batch * self.tiles * heads,)
        block_c = 64 if dtype != torch.float32 and dim in (16, 32) else 32  # what builds without spills
        flags = {
            "C": channels, "R": rank, "RANK": block(rank), "NORM": w.norm_weight is not None,
            "BETA": w.norm_bias is not None, "LORA_Q": w.lora_q is not None, "LORA_V": w.lora_v is not None,
        }  # fmt: skip
        self.flags = {
            **flags, "NQ": self.num_queries, "N": slices, "D": dim, "BIAS": w.qkv_bias is not None,
            "SAME": list(queries) == [0, 1, slices], "BLOCK_D": block(dim), "BLOCK_C": block_c,
            **self.config,
        }  # fmt: skip
        rows = batch * slices * positions
        self.mean = self.rstd = self.xa = None
        if w.norm_weight is not None:
            self.mean, self.rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
        if w.lora_q is not None or w.lora_v is not None:
            self.xa = x.new_empty(rows, 2, rank, dtype=dtype)
        if self.mean is not None or self.xa is not None:
            rows_kernel[(-(-rows // 32),)](
                x, w.norm_weight, w.norm_bias, self.a_q, self.a_v, self.mean, self.rstd, None, self.xa,
                eps, slices, positions, rows, x.stride(0), x.stride(1), x.stride(2), 0, 2 * rank, rank,
                **flags, WRITE_Z=False, BLOCK_T=32, BLOCK_C=block_c, num_warps=8 if channels % 64 else 4, num_stages=2,
            )  # fmt: skip
        self.scalars = (
            w.lora_q.scaling if w.lora_q else 0.0, w.lora_v.scaling if w.lora_v else 0.0, softmax_scale(None, dim),
            positions, heads, self.tiles, self.first, self.step, x.stride(0), x.stride(1), x.stride(2),
        )  # fmt: skip

    def sources(self) -> tuple[Tensor | None, ...]:
        w = self.w
        return (self.x, self.mean, self.rstd, self.xa, w.norm_weight, w.norm_bias, w.qkv_weight, w.qkv_bias,
                self.b_q, self.b_v)  # fmt: skip


def _thin(lora: LoRA | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A and B in the dtype that products are computed in."""
    return (None, None) if lora is None else (lora.a.to(dtype).contiguous(), lora.b.to(dtype).contiguous())


def launch_forward(
    x: Tensor, w: AttentionWeights, heads: int, queries: Sequence[int], residual: bool, eps: float
) -> Tensor:
    """x (B, N, P, C) -> y (B, Nq, P, C) in x's dtype; the weights but the norm's share one dtype."""
    batch, _, positions, channels = x.shape
    count = queries[2]
    y = x.new_empty(batch, count, positions, channels)
    if y.numel() == 0:
        return y
    with _on(x.device):
        call = _Call("axial_half", x, w, heads, queries, eps)
        o = x.new_empty(y.shape, dtype=w.qkv_weight.dtype)
        axial_half_fwd_kernel[call.grid](*call.sources(), o, *call.scalars, **call.flags)
        rows = batch * count * positions
        x = call.x
        output_kernel[(-(-rows // 64) * -(-channels // 64),)](
            o, w.out_weight, w.out_bias, x, y,
            positions, rows, call.first, call.step, x.stride(0), x.stride(1), x.stride(2),
            NQ=count, C=channels, BIAS=w.out_bias is not None, RESIDUAL=residual,
            BLOCK_T=64, BLOCK_E=64, BLOCK_C=call.flags["BLOCK_C"], num_warps=4, num_stages=3,
        )  # fmt: skip
    return y


def launch_backward(
    dy: Tensor, x: Tensor, w: AttentionWeights, heads: int, queries: Sequence[int], eps: float, keep_o: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq (B, Nq, P, C), dk and dv (B, N, P, C), views of one tensor where Nq = N, and o (B, Nq, P, C) or empty."""
    batch, slices, positions, channels = x.shape
    dtype = w.qkv_weight.dtype
    dy = dy.contiguous()
    with _on(x.device):
        call = _Call("axial_half_backward", x, w, heads, queries, eps)
        if call.flags["SAME"]:
            dq, dk, dv = x.new_empty(batch, slices, positions, 3 * channels, dtype=dtype).chunk(3, -1)
        else:
            dq = x.new_empty(dy.shape, dtype=dtype)
            dk, dv = x.new_empty(batch, slices, positions, 2 * channels, dtype=dtype).chunk(2, -1)
        o = x.new_empty(dy.shape if keep_o else (0,), dtype=dtype)
        axial_half_bwd_kernel[call.grid](
            dy, w.out_weight, *call.sources(), dq, dk, dv, o,
            *call.scalars, dq.stride(0), dq.stride(1), dq.stride(2), dk.stride(0), dk.stride(1), dk.stride(2),
            **call.flags, KEEP_O=keep_o,
        )  # fmt: skip
    return dq, dk, dv, o
