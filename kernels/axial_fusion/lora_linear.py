"""y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ.    Source: LoRA, arXiv 2106.09685, eq. 3.

W and B A are never merged, which in bf16 would round a small B A away. Three engines:

torch       F.linear, then one thin product added to y: y is written, read and written again
augmented   one library product [x | x Aᵀ] [W | s B]ᵀ of K + r: y is written once, x is copied for its tail
triton      one product whose main loop multiplies each tile of x by A as well: y written once, nothing copied

x and the thin x Aᵀ are saved. With d = scaling · dY B, the gradients are

    dX = dY W + dropout'(d A)        dA = dᵀ dropout(X)        dB = scaling · dYᵀ (dropout(X) Aᵀ)

The augmented engine takes dY W and d from one product dY [W | s B], the Triton one from one loop over dY. Its dA and
dB are sums over slabs of rows, slab by slab and then over slabs: the same bits every time, no atomics. Dropout's mask
is a hash of the element's index and the seed, so no engine keeps it in memory for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from axial_fusion._launch import (
    autocast_dtype,
    check_alike,
    check_shapes,
    dtype_name,
    no_second_derivative,
    plain_on,
    select_backend,
)
from axial_fusion._rows import jit, transposed
from axial_fusion._tiles import block
from axial_fusion.axial_attention import _on
from axial_fusion.reference import dropout_mask

try:
    import triton.language as tl
except ImportError:  # the kernels below then stay plain functions that nothing calls
    tl = None

ROWS_OF_A_SLAB = 4096  # of dA's and dB's sums: enough slabs to fill a GPU, few enough that their sum is cheap


@jit
def _dropped(x, row, offs_k, K, seed_ptr, threshold, keep_scale):
    """dropout(x) of elements (row, offs_k) of a (T, K) matrix: SplitMix64 of seed + index, as in reference.py."""
    z = (row[:, None].to(tl.int64) * K + offs_k[None, :] + 1) * -0x61C8864680B583EB + tl.load(seed_ptr)
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    kept = (((z ^ ((z >> 31) & 0x1FFFFFFFF)) >> 40) & 0xFFFFFF) >= threshold
    return tl.where(kept, x.to(tl.float32) * keep_scale, 0.0).to(x.dtype)


@jit
def _lora_linear_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, seed_ptr, y_ptr, xa_ptr,
    scaling, keep_scale, threshold, T, N, stride_xt,
    K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (T, N), and xa = dropout(x) Aᵀ (T, R) from the programs of the first columns."""
    columns = (N + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % columns  # columns fastest: the rows of x are in the cache for them all
    row = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = row < T
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    xa = tl.zeros([BLOCK_T, RANK], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + row[:, None] * stride_xt + offs_k[None, :],
            mask=mask_t[:, None] & mask_k[None, :],
            other=0.0,
        )
        w_ptrs = w_ptr + offs_n[None, :].to(tl.int64) * K + offs_k[:, None]
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc=acc, input_precision="ieee")
        if LORA:
            if DROPOUT:
                x = _dropped(x, row, offs_k, K, seed_ptr, threshold, keep_scale)
            xa = tl.dot(x, transposed(a_ptr, 0, k, R, K, RANK, BLOCK_K), acc=xa, input_precision="ieee")
    if LORA:
        offs_r = tl.arange(0, RANK)
        xa = xa.to(xa_ptr.dtype.element_ty)
        if tile_n == 0:
            tl.store(
                xa_ptr + row[:, None] * R + offs_r[None, :], xa, mask=mask_t[:, None] & (offs_r < R)[None, :]
            )
        b_ptrs = b_ptr + offs_n[None, :] * R + offs_r[:, None]
        b = tl.load(b_ptrs, mask=(offs_r < R)[:, None] & mask_n[None, :], other=0.0)  # [RANK, BLOCK_N]
        acc += scaling * tl.dot(xa, b, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + row[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_n[None, :])


@jit
def _lora_linear_dx_kernel(
    dy_ptr, w_ptr, a_ptr, b_ptr, seed_ptr, dx_ptr, d_ptr,
    scaling, keep_scale, threshold, T, K, stride_yt,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, LORA: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dX (T, K), and d = scaling · dY B (T, R) from the programs of the first columns."""
    columns = (K + BLOCK_K - 1) // BLOCK_K
    tile_k = tl.program_id(0) % columns
    row = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = row < T
    offs_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    offs_r = tl.arange(0, RANK)
    acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    d = tl.zeros([BLOCK_T, RANK], tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        dy_ptrs = dy_ptr + row[:, None] * stride_yt + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask_t[:, None] & mask_n[None, :], other=0.0)
        w_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
        w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(dy, w, acc=acc, input_precision="ieee")
        if LORA:
            b_ptrs = b_ptr + offs_n[:, None] * R + offs_r[None, :]
            b = tl.load(b_ptrs, mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0)  # [BLOCK_N, RANK]
            d = tl.dot(dy, b, acc=d, input_precision="ieee")
    if LORA:
        d = (scaling * d).to(d_ptr.dtype.element_ty)
        if tile_k == 0:
            tl.store(
                d_ptr + row[:, None] * R + offs_r[None, :], d, mask=mask_t[:, None] & (offs_r < R)[None, :]
            )
        a_ptrs = a_ptr + offs_r[:, None] * K + offs_k[None, :]
        a = tl.load(a_ptrs, mask=(offs_r < R)[:, None] & mask_k[None, :], other=0.0)  # [RANK, BLOCK_K]
        through = tl.dot(d, a, input_precision="ieee")
        if DROPOUT:
            through = _dropped(through, row, offs_k, K, seed_ptr, threshold, keep_scale)
        acc += through
    dx_ptrs = dx_ptr + row[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_k[None, :])


@jit
def _thin_product_kernel(
    thin_ptr, wide_ptr, seed_ptr, out_ptr,
    keep_scale, threshold, T, C, stride_wt, slab,
    R: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Slab by slab of `slab` rows: thinᵀ wide, (R, C) of thin (T, R) and wide (T, C), in fp32."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_r = tl.arange(0, RANK)
    mask_r = offs_r < R
    start = tl.program_id(1).to(tl.int64) * slab
    acc = tl.zeros([RANK, BLOCK_C], tl.float32)
    for t in range(0, slab, BLOCK_T):
        row = start + t + tl.arange(0, BLOCK_T)
        mask_t = row < T
        thin = tl.load(
            thin_ptr + row[None, :] * R + offs_r[:, None], mask=mask_r[:, None] & mask_t[None, :], other=0.0
        )
        wide_ptrs = wide_ptr + row[:, None] * stride_wt + offs_c[None, :]
        wide = tl.load(wide_ptrs, mask=mask_t[:, None] & mask_c[None, :], other=0.0)
        if DROPOUT:
            wide = _dropped(wide, row, offs_c, C, seed_ptr, threshold, keep_scale)
        acc = tl.dot(thin, wide, acc=acc, input_precision="ieee")
    out_ptrs = out_ptr + (tl.program_id(1).to(tl.int64) * R + offs_r[:, None]) * C + offs_c[None, :]
    tl.store(out_ptrs, acc, mask=mask_r[:, None] & mask_c[None, :])


def _config(weight: Tensor, rank: int) -> dict[str, int]:
    """Tile of the two large products with W (N, K): what builds without spills for every architecture.

    fp32 is exact on the FMA units and takes a smaller one. Rows that are no multiple of 16 bytes are
    loaded an element at a time, and their pointers fill the registers."""
    if weight.dtype == torch.float32:
        return {"BLOCK_T": 64, "num_warps": 4, "num_stages": 2}
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return {"BLOCK_T": 64, "num_warps": 8, "num_stages": 2}
    if rank > 16:
        return {"BLOCK_T": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_T": 128, "num_warps": 8, "num_stages": 3 if rank else 2}


def _drop(seed: Tensor | None, p: float) -> tuple[float, int]:
    """1 / (1 − p) and the threshold on 24 bits."""
    return (1.0, 0) if seed is None else (1 / (1 - p), round(p * 2**24))


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, seed: Tensor | None,
    scaling: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (T, K) with contiguous rows -> y (T, N) and xa (T, r), all in x's dtype."""
    rows, wide, rank = x.shape[0], x.shape[1], 1 if a is None else a.shape[0]
    y = x.new_empty(rows, weight.shape[0])
    xa = x.new_empty((0,) if a is None else (rows, rank))
    config = _config(weight, 0 if a is None else rank)
    block_n = 64 if x.dtype == torch.float32 else 128
    grid = (-(-rows // config["BLOCK_T"]) * -(-weight.shape[0] // block_n),)
    with _on(x.device):
        _lora_linear_fwd_kernel[grid](
            x, weight, bias, a, b, seed, y, xa,
            scaling, *_drop(seed, p), rows, weight.shape[0], x.stride(0),
            K=wide, R=rank, RANK=block(rank), BIAS=bias is not None, LORA=a is not None, DROPOUT=seed is not None,
            BLOCK_N=block_n, BLOCK_K=32, **config,
        )  # fmt: skip
    return y, xa


def _launch_dx(
    dy: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    """dy (T, N) with contiguous rows -> dX (T, K) and d = scaling · dY B (T, r)."""
    rows, wide, rank = dy.shape[0], weight.shape[1], 1 if a is None else a.shape[0]
    dx, d = dy.new_empty(rows, wide), dy.new_empty((0,) if a is None else (rows, rank))
    config = _config(weight, 0 if a is None else rank)
    block_k = 64 if dy.dtype == torch.float32 else 128
    grid = (-(-rows // config["BLOCK_T"]) * -(-wide // block_k),)
    with _on(dy.device):
        _lora_linear_dx_kernel[grid](
            dy, weight, a, b, seed, dx, d,
            scaling, *_drop(seed, p), rows, wide, dy.stride(0),
            N=weight.shape[0], R=rank, RANK=block(rank), LORA=a is not None, DROPOUT=seed is not None,
            BLOCK_K=block_k, BLOCK_N=32, **config,
        )  # fmt: skip
    return dx, d


def _launch_thin(thin: Tensor, wide: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """thin (T, r)ᵀ · dropout(wide (T, C)) -> (r, C) in fp32."""
    (rows, rank), columns = thin.shape, wide.shape[1]
    slabs = max(1, -(-rows // ROWS_OF_A_SLAB))
    slab = block(-(-rows // slabs))
    slabs = max(1, -(-rows // slab))
    out = wide.new_empty(slabs, rank, columns, dtype=torch.float32)
    with _on(wide.device):
        _thin_product_kernel[(-(-columns // 64), slabs)](
            thin, wide, seed, out,
            *_drop(seed, p), rows, columns, wide.stride(0), slab,
            R=rank, RANK=block(rank), DROPOUT=seed is not None, BLOCK_T=min(slab, 64), BLOCK_C=64,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out.sum(0)


def _plain_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, seed: Tensor | None,
    scaling: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = F.linear(x, weight, bias)
    if a is None or b is None:
        return y, x.new_empty(0)
    xa = F.linear(_masked(x, seed, p), a)  # (T, r)
    return torch.addmm(y, xa, b.t(), alpha=scaling), xa


def _augmented_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, seed: Tensor | None,
    scaling: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if a is None or b is None:
        return F.linear(x, weight, bias), x.new_empty(0)
    xa = F.linear(_masked(x, seed, p), a)
    return F.linear(torch.cat([x, xa], 1), torch.cat([weight, scaling * b], 1), bias), xa


_FORWARD = {"torch": _plain_forward, "augmented": _augmented_forward, "triton": _launch_forward}

_OP = "axial_fusion::lora_linear"
_INPUTS = "Tensor? lora_a, Tensor? lora_b, Tensor? seed, float scaling, float dropout_p, str backend"
torch.library.define(_OP, f"(Tensor x, Tensor weight, Tensor? bias, {_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    f"{_OP}_backward",
    f"(Tensor grad, Tensor x, Tensor xa, Tensor weight, {_INPUTS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl(_OP, "CompositeExplicitAutograd")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (..., K) -> y (..., N) contiguous, and xa (T, r) or nothing."""
    rows = _rows_of(x)
    a, b = _thin_weights(x, lora_a, lora_b)
    shape = (*x.shape[:-1], weight.shape[0])
    if not rows.numel() or not weight.numel():
        y, xa = _plain_forward(rows, weight, bias, a, b, None, scaling, 0.0)
    else:
        y, xa = _FORWARD[backend](rows, weight.contiguous(), bias, a, b, seed, scaling, dropout_p)
    return y.view(shape), xa


@torch.library.register_fake(_OP)
def _(x, weight, bias, lora_a, lora_b, seed, scaling, dropout_p, backend):
    rows = x.numel() // max(1, x.shape[-1]) if lora_a is not None else 0
    xa = x.new_empty(0) if lora_a is None else x.new_empty(rows, lora_a.shape[0])
    return x.new_empty((*x.shape[:-1], weight.shape[0])), xa


@torch.library.impl(f"{_OP}_backward", "CompositeExplicitAutograd")
def _backward_op(
    grad: Tensor, x: Tensor, xa: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float, backend: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, lora_a, lora_b; an empty tensor for each that is not needed."""
    empty = x.new_empty(0)
    dy, rows = _rows_of(grad), _rows_of(x)  # (T, N), (T, K)
    a, b = _thin_weights(x, lora_a, lora_b)
    fused = backend == "triton" and rows.numel() > 0 and weight.numel() > 0
    dx = da = db = d = empty
    if a is None or b is None:
        if needs[0]:
            dx = _launch_dx(dy, weight.contiguous(), None, None, None, 1.0, 0.0)[0] if fused else dy @ weight
    else:
        if needs[0] and fused:
            dx, d = _launch_dx(dy, weight.contiguous(), a, b, seed, scaling, dropout_p)
        elif needs[0] and backend == "augmented":
            both = dy @ torch.cat([weight, scaling * b], 1)  # (T, K + r)
            dx, d = both[:, : x.shape[-1]], both[:, x.shape[-1] :]
        else:
            d = scaling * (dy @ b)
            dx = dy @ weight if needs[0] else empty
        if needs[0] and not fused:
            dx = torch.addmm(dx, d, a) if seed is None else dx + _masked(d @ a, seed, dropout_p)
        if needs[3] and lora_a is not None:
            da = _launch_thin(d, rows, seed, dropout_p) if fused else d.t() @ _masked(rows, seed, dropout_p)
            da = da.to(lora_a.dtype)
        if needs[4] and lora_b is not None:
            db = _launch_thin(xa, dy, None, 0.0).t() if fused else dy.t() @ xa
            db = (scaling * db).to(lora_b.dtype).contiguous()
    dw = dy.t() @ rows if needs[1] else empty
    dbias = dy.sum(0) if needs[2] else empty
    return dx.reshape(x.shape) if needs[0] else empty, dw, dbias, da, db


@torch.library.register_fake(f"{_OP}_backward")
def _(grad, x, xa, weight, lora_a, lora_b, seed, scaling, dropout_p, backend, needs):
    def like(t: Tensor | None, shape: Any, need: bool) -> Tensor:
        return x.new_empty(shape, dtype=x.dtype if t is None else t.dtype) if need else x.new_empty(0)

    return (
        like(x, x.shape, needs[0]),
        like(weight, weight.shape, needs[1]),
        like(weight, (weight.shape[0],), needs[2]),
        like(lora_a, () if lora_a is None else lora_a.shape, needs[3]),
        like(lora_b, () if lora_b is None else lora_b.shape, needs[4]),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, seed, *ctx.options = inputs
    ctx.save_for_backward(x, output[1], weight, lora_a, lora_b, seed)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    grads = torch.ops.axial_fusion.lora_linear_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_save)
torch.library.register_autograd(f"{_OP}_backward", no_second_derivative("lora_linear"))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x (..., K), weight (N, K), bias (N,), lora_a (r, K), lora_b (N, r) -> (..., N), in x's dtype.

    Without lora_a and lora_b it is the plain linear layer. `dropout_p` drops elements of the x that A sees, by
    an int64 `seed` of one element, drawn from torch's generator where it is not given; the same seed draws the
    same mask. lora_a and lora_b may be fp32 beside a half-precision x. Autocast casts x and the weights. `backend`
    is auto, torch, augmented or triton. Raises ValueError on a shape, dtype, device or backend mismatch."""
    _check(x, weight, bias, lora_a, lora_b, dropout_p, seed)
    given = (x, weight) if lora_a is None else (x, weight, lora_a)
    chosen = select_backend("lora_linear", *given, backend=backend).backend
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if lora_a is None or dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), device=x.device)
    if chosen == "torch" and plain_on(x):
        a, b = _thin_weights(x, lora_a, lora_b)
        y, _ = _plain_forward(
            x.reshape(-1, x.shape[-1]), weight, bias, a, b, seed, float(scaling), float(dropout_p)
        )
        return y.view(*x.shape[:-1], weight.shape[0])
    y, _ = torch.ops.axial_fusion.lora_linear(
        x, weight, bias, lora_a, lora_b, seed, float(scaling), float(dropout_p), chosen
    )
    return y


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    sizes = check_shapes("lora_linear", {"weight": (weight, "N K")})
    if x.dim() < 1 or x.shape[-1] != sizes["K"]:
        raise ValueError(
            f"lora_linear: x must be (..., K) with K = {sizes['K']}, found shape {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"lora_linear: bias must be (N,) with N = {sizes['N']}, found shape {tuple(bias.shape)}"
        )
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_linear: lora_a and lora_b come together; one of them is None")
    if lora_a is not None and lora_b is not None:
        if lora_a.dim() != 2 or lora_a.shape[1] != sizes["K"]:
            raise ValueError(
                f"lora_linear: lora_a must be (r, K) with K = {sizes['K']}, found shape {tuple(lora_a.shape)}"
            )
        if lora_b.shape != (sizes["N"], lora_a.shape[0]):
            raise ValueError(
                f"lora_linear: lora_b must be (N, r) = ({sizes['N']}, {lora_a.shape[0]}), found {tuple(lora_b.shape)}"
            )
        check_alike("lora_linear", lora_a=lora_a, lora_b=lora_b)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"lora_linear: dropout_p must lie in [0, 1), found {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(
            f"lora_linear: seed must be one int64, found {tuple(seed.shape)} of {dtype_name(seed.dtype)}"
        )
    if autocast_dtype(x) is None:
        check_alike("lora_linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))


def _rows_of(x: Tensor) -> Tensor:
    """x (..., K) as (T, K) with contiguous rows; copied only where no strides say that."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _thin_weights(x: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A and B in the dtype that products are computed in."""
    if a is None or b is None:
        return None, None
    return a.to(x.dtype).contiguous(), b.to(x.dtype).contiguous()


def _masked(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dropout(x (T, K)), which is also its own derivative applied to x."""
    if seed is None or p == 0:
        return x
    return x * (dropout_mask(x.shape, p, seed).to(x.dtype) / (1 - p))
