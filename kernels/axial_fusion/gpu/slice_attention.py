"""Triton kernel of slice attention's forward, y = softmax(scale · q kᵀ) v among the P positions of a slice.

At D 32 the exponentials and the row maximum cost more than the products. The maximum only keeps exp2 from
overflowing: any offset near it gives the same y, since p, its sum and the accumulator are floating point. So each
program takes the row maximum of its first tile of keys as the offset and keeps it: no maximum, no shuffle and no
rescaling in the loop. Where a later score is so much larger that something overflows, or where a NaN or an infinity
came in, the sums at the end are not finite; that program then runs again with a running maximum.
H100, bf16, 9 slices, M 8, two stages of loads, beside cuDNN, in µs: P 4096 D 32 491 and 631, P 1024 D 32 43 and 53,
P 4096 D 64 618 and 647, P 1024 D 64 53 and 55. A third stage takes 10 % off at P 4096 D 32. At P 4096, a running
maximum from the start adds 7 % (D 64), and loads by pointers instead of TMA add 9 % (D 32) and 34 % (D 64)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .common import TensorDescriptor, jit, last_axis_contiguous, on, tl
from .tiles import slice_forward


@jit
def _rows(source, batch, head, n, stride_p, P, TILE: tl.constexpr):
    """Keys or values n .. n + BLOCK_N − 1 of a head, 0 past P. `source`: a TMA descriptor, or a pointer to key 0."""
    if TILE.TMA:
        # leading ones: folded into the load
        return tl.reshape(source.load([batch, head, n, 0]), (TILE.BLOCK_N, TILE.D))
    else:
        offs = (n + tl.arange(0, TILE.BLOCK_N)).to(tl.int64)
        ptrs = source + offs[:, None] * stride_p + tl.arange(0, TILE.D)[None, :]
        if TILE.EVEN:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs < P)[:, None], other=0.0)


@jit
def _scores(q, k, n, P, TILE: tl.constexpr):
    s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
    if not TILE.EVEN:
        s = tl.where((n + tl.arange(0, TILE.BLOCK_N) < P)[None, :], s, -float("inf"))
    return s


@jit
def _attend(
    q, k_source, v_source, batch, head, scale, P, stride_kp, stride_vp, TILE: tl.constexpr, RUNNING: tl.constexpr
):  # fmt: skip
    """Σ p v, the offset o and Σ p of each query's p = exp2(scale · s − o) over all keys.

    o is the running maximum of scale · s, or without RUNNING its maximum over the first tile."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    D: tl.constexpr = TILE.D
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    sums = tl.zeros([BLOCK_M, 8], tl.float32)  # eight a row: no shuffle before the loop has ended
    if RUNNING:
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    else:
        k = _rows(k_source, batch, head, 0, stride_kp, P, TILE)
        top = tl.max(_scores(q, k, 0, P, TILE), 1) * scale
    for n in range(0, P, BLOCK_N):
        k = _rows(k_source, batch, head, n, stride_kp, P, TILE)
        s = _scores(q, k, n, P, TILE)
        if RUNNING:
            new = tl.maximum(top, tl.max(s, 1) * scale)
            offset = tl.where(new == -float("inf"), 0.0, new)  # every score so far is −inf: p is 0, not NaN
            shrink = tl.exp2(top - offset)[:, None]
            p = tl.exp2(s * scale - offset[:, None])
            sums, acc, top = sums * shrink, acc * shrink, new
        else:
            p = tl.exp2(s * scale - top[:, None])
        sums += tl.sum(tl.reshape(p, (BLOCK_M, BLOCK_N // 8, 8)), 1)
        v = _rows(v_source, batch, head, n, stride_vp, P, TILE)
        acc = tl.dot(p.to(v.dtype), v, acc)
    return acc, top, tl.sum(sums, 1)


@jit
def slice_attention_fwd_kernel(
    q_ptr, k_source, v_source, y_ptr, lse_ptr,
    scale, P, M, tiles,
    stride_q, stride_k, stride_v,
    TILE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: y (B', P, M, D), contiguous, and lse (B', M, P), natural logarithms.

    `scale` is in octaves, log2(e) included, and above 0; strides are of (b, p, m, d). Tiles of a head lie side by side:
    they share its keys."""
    D: tl.constexpr = TILE.D
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % M
    batch = pid // (tiles * M)
    head64, batch64 = head.to(tl.int64), batch.to(tl.int64)
    q_ptr += batch64 * stride_q[0] + head64 * stride_q[2]
    if not TILE.TMA:
        k_source += batch64 * stride_k[0] + head64 * stride_k[2]
        v_source += batch64 * stride_v[0] + head64 * stride_v[2]
    offs_m = tile.to(tl.int64) * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)
    offs_d = tl.arange(0, D)
    mask_m = offs_m < P
    q = tl.load(q_ptr + offs_m[:, None] * stride_q[1] + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    acc, top, total = _attend(
        q, k_source, v_source, batch, head, scale, P, stride_k[1], stride_v[1], TILE, False
    )
    finite = (total < 1e30)[:, None] & (tl.abs(acc) < 1e38)  # false for a NaN too
    # Over both axes at once: Triton 3.6 fails to build one minimum of another on sm_100.
    if tl.min(finite.to(tl.int32)) == 0:
        acc, top, total = _attend(
            q, k_source, v_source, batch, head, scale, P, stride_k[1], stride_v[1], TILE, True
        )
    y = (acc / total[:, None]).to(y_ptr.dtype.element_ty)  # [BLOCK_M, D]
    y_ptr += (batch64 * P * M + head64) * D
    tl.store(y_ptr + offs_m[:, None] * (M * D) + offs_d[None, :], y, mask=mask_m[:, None])
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + (batch64 * M + head64) * P + offs_m, lse, mask=mask_m)


def _descriptor(t: Tensor, rows: int) -> Any:
    """A TMA descriptor of keys or values t (B', P, M, D) as (B', M, P, D), in tiles of `rows` positions of one head.

    TMA needs addresses in multiples of 16 bytes and no repeated row; a tensor of other strides is copied first."""
    steps = (t.data_ptr(), *(stride * t.element_size() for stride in t.stride()[:3]))
    if any(step % 16 for step in steps) or 0 in t.stride():
        t = t.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(t.transpose(1, 2), [1, 1, rows, t.shape[-1]])


def launch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v (B', P, M, D) of a half precision, D 16, 32 or 64 -> y (B', P, M, D) contiguous, lse (B', M, P) fp32.

    `scale` is above 0."""
    batch, positions, heads, _ = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, positions), dtype=torch.float32, device=q.device)
    if y.numel() == 0:
        return y, lse
    q, k, v = last_axis_contiguous(q, k, v)
    config = slice_forward(q)
    tile = config["TILE"]
    count = -(-positions // tile.BLOCK_M)
    sources = [_descriptor(t, tile.BLOCK_N) for t in (k, v)] if tile.TMA else [k, v]
    with on(q.device):
        slice_attention_fwd_kernel[(count * heads * batch,)](
            q, *sources, y, lse,
            scale * math.log2(math.e), positions, heads, count,
            q.stride(), k.stride(), v.stride(),
            **config,
        )  # fmt: skip
    return y, lse
