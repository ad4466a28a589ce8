"""The forward of slice attention, y = softmax(scale · q kᵀ) v among the P positions of a slice, and its launch.

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

from axial_fusion import _tiles
from axial_fusion._rows import jit
from axial_fusion.axial_attention import _last_axis_contiguous, _on

try:
    import triton.language as tl
except ImportError:  # the kernels below then stay plain functions that nothing calls
    tl = None
try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an older Triton: tiles are loaded by pointers
    TensorDescriptor = None


@jit
def _rows(
    source, batch, head, n, stride_p, P, D: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Keys or values n .. n + BLOCK − 1 of a head, 0 past P. `source`: a TMA descriptor, or a pointer to key 0."""
    if TMA:
        return tl.reshape(source.load([batch, head, n, 0]), (BLOCK, D))  # leading ones: folded into the load
    else:
        offs = (n + tl.arange(0, BLOCK)).to(tl.int64)
        ptrs = source + offs[:, None] * stride_p + tl.arange(0, D)[None, :]
        if EVEN:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs < P)[:, None], other=0.0)


@jit
def _scores(q, k, n, P, BLOCK_N: tl.constexpr, EVEN: tl.constexpr):
    s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
    if not EVEN:
        s = tl.where((n + tl.arange(0, BLOCK_N) < P)[None, :], s, -float("inf"))
    return s


@jit
def _attend(
    q, k_source, v_source,
    batch, head, scale, P, stride_kp, stride_vp,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, TMA: tl.constexpr, RUNNING: tl.constexpr,
):  # fmt: skip
    """Σ p v, the offset o and Σ p of each query's p = exp2(scale · s − o) over all keys.

    o is the running maximum of scale · s, or without RUNNING its maximum over the first tile."""
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    sums = tl.zeros([BLOCK_M, 8], tl.float32)  # eight a row: no shuffle before the loop has ended
    if RUNNING:
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    else:
        k = _rows(k_source, batch, head, 0, stride_kp, P, D, BLOCK_N, EVEN, TMA)
        top = tl.max(_scores(q, k, 0, P, BLOCK_N, EVEN), 1) * scale
    for n in range(0, P, BLOCK_N):
        k = _rows(k_source, batch, head, n, stride_kp, P, D, BLOCK_N, EVEN, TMA)
        s = _scores(q, k, n, P, BLOCK_N, EVEN)
        if RUNNING:
            new = tl.maximum(top, tl.max(s, 1) * scale)
            offset = tl.where(new == -float("inf"), 0.0, new)  # every score so far is −inf: p is 0, not NaN
            shrink = tl.exp2(top - offset)[:, None]
            p = tl.exp2(s * scale - offset[:, None])
            sums, acc, top = sums * shrink, acc * shrink, new
        else:
            p = tl.exp2(s * scale - top[:, None])
        sums += tl.sum(tl.reshape(p, (BLOCK_M, BLOCK_N // 8, 8)), 1)
        v = _rows(v_source, batch, head, n, stride_vp, P, D, BLOCK_N, EVEN, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc)
    return acc, top, tl.sum(sums, 1)


@jit
def slice_attention_fwd_kernel(
    q_ptr, k_source, v_source, y_ptr, lse_ptr,
    scale, P, M, tiles,
    stride_qb, stride_qp, stride_qm,
    stride_kb, stride_kp, stride_km,
    stride_vb, stride_vp, stride_vm,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: y (B', P, M, D), contiguous, and lse (B', M, P), natural logarithms.

    `scale` is in octaves, log2(e) included, and above 0. Tiles of a head lie side by side: they share its keys."""
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % M
    batch = pid // (tiles * M)
    head64, batch64 = head.to(tl.int64), batch.to(tl.int64)
    q_ptr += batch64 * stride_qb + head64 * stride_qm
    if not TMA:
        k_source += batch64 * stride_kb + head64 * stride_km
        v_source += batch64 * stride_vb + head64 * stride_vm
    offs_m = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    mask_m = offs_m < P
    q = tl.load(q_ptr + offs_m[:, None] * stride_qp + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    acc, top, total = _attend(
        q, k_source, v_source, batch, head, scale, P, stride_kp, stride_vp,
        D, BLOCK_M, BLOCK_N, EVEN, TMA, False,
    )  # fmt: skip
    finite = (total < 1e30)[:, None] & (tl.abs(acc) < 1e38)  # false for a NaN too
    # Over both axes at once: Triton 3.6 fails to build one minimum of another on sm_100.
    if tl.min(finite.to(tl.int32)) == 0:
        acc, top, total = _attend(
            q, k_source, v_source, batch, head, scale, P, stride_kp, stride_vp,
            D, BLOCK_M, BLOCK_N, EVEN, TMA, True,
        )  # fmt: skip
    y = (acc / total[:, None]).to(y_ptr.dtype.element_ty)  # [BLOCK_M, D]
    y_ptr += (batch64 * P * M + head64) * D
    tl.store(y_ptr + offs_m[:, None] * (M * D) + offs_d[None, :], y, mask=mask_m[:, None])
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + (batch64 * M + head64) * P + offs_m, lse, mask=mask_m)


def _config(q: Tensor) -> dict[str, Any]:
    """The tile of q's device and head size: on sm_90 the measured one, elsewhere one that builds without spills.

    TMA loads the keys and values on sm_90, wherever Triton has descriptors."""
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "TMA": False}
    if _tiles.arch(q.device) == 90:
        stages = 3 if q.shape[-1] <= 32 else 2
        config |= {"BLOCK_N": 128, "num_stages": stages, "TMA": TensorDescriptor is not None}
    return config


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
    batch, positions, heads, dim = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, positions), dtype=torch.float32, device=q.device)
    if y.numel() == 0:
        return y, lse
    q, k, v = _last_axis_contiguous(q, k, v)
    config = _config(q)
    rows = config["BLOCK_N"]
    count = -(-positions // config["BLOCK_M"])
    sources = [_descriptor(t, rows) for t in (k, v)] if config["TMA"] else [k, v]
    with _on(q.device):
        slice_attention_fwd_kernel[(count * heads * batch,)](
            q, *sources, y, lse,
            scale * math.log2(math.e), positions, heads, count,
            q.stride(0), q.stride(1), q.stride(2),
            k.stride(0), k.stride(1), k.stride(2),
            v.stride(0), v.stride(1), v.stride(2),
            D=dim, EVEN=positions % rows == 0, **config,
        )  # fmt: skip
    return y, lse
