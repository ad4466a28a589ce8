"""The relative-position terms of SAM's attention: products of each query with the table entries of its row and column.

rel_h[t, h, w, m, k] = Σ_d q[t, h, w, m, d] · table_h[(h mod keys) − k + keys − 1, d], and rel_w likewise with w.
One Triton kernel makes both from q as it lies, in the layouts that attention reads; as library products they take
copies of q and of both results. The torch backend is these products.

Gradients, with R_h[h, k] the table's entry of row h and key k: dq = d rel_h R_h + d rel_w R_w, dR_h = qᵀ d rel_h, and
each table entry sums the dR of its distance.

Source: SAM, arXiv 2304.02643, image_encoder.py; MViTv2, arXiv 2112.01526, eq. 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import autocast_dtype, check_alike, check_shapes, no_autocast
from ..dispatch import select_backend
from ..gpu.rel_terms import by_query, empty_terms, launch
from ..reference import distances
from ..registry import NAMESPACE, OPS, library

_LIB = library("rel_terms")
_OP = f"{NAMESPACE}::rel_terms"
torch.library.define(
    _OP, "(Tensor q, Tensor table_h, Tensor table_w, bool windowed) -> (Tensor, Tensor)", lib=_LIB
)


torch.library.impl(_OP, "CompositeExplicitAutograd", launch, lib=_LIB)
torch.library.register_fake(_OP, empty_terms, lib=_LIB)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.windowed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_h: Tensor, grad_w: Tensor) -> tuple[Tensor | None, ...]:
    q, *tables = ctx.saved_tensors
    need_q, *need_tables, _ = ctx.needs_input_grad
    dq, dtables = None, []
    with no_autocast(q):
        grads = by_query(grad_h, grad_w, q.shape[1:3], ctx.windowed)
        for axis, table, grad, need in zip("hw", tables, grads, need_tables, strict=True):
            entries = distances(table.shape[0], q.shape["thw".index(axis)], q.device)
            if need_q:
                part = torch.einsum(f"thwmk,{axis}kd->thwmd", grad, table[entries].to(q.dtype))
                dq = part if dq is None else dq + part
            dtable = None
            if need:
                drows = torch.einsum(f"thwmd,thwmk->{axis}kd", q, grad).to(table.dtype)
                dtable = torch.zeros_like(table).index_put((entries,), drows, accumulate=True)
            dtables.append(dtable)
    return dq, *dtables, None


torch.library.register_autograd(_OP, _backward, setup_context=_save, lib=_LIB)


def rel_terms(
    q: Tensor, table_h: Tensor, table_w: Tensor, *, windowed: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """rel_h and rel_w of q (T, h, w, M, D) and tables (2·keys − 1, D), in q's dtype, or autocast's.

    They are as `rel_pos_attention` takes them, (T, M, keys, h·w) and (T, M, h·w, keys), or where `windowed` as
    `window_attention` does, both (T, h, w, M, keys). Positions count modulo `keys`, the side of a window or the grid.
    `backend` is auto, triton or torch. Raises ValueError on a shape, dtype, device or backend mismatch."""
    shapes = {
        "q": (q, ("T", "h", "w", "M", "D")),
        "table_h": (table_h, ("E", "D")),
        "table_w": (table_w, ("F", "D")),
    }
    check_shapes("rel_terms", shapes)
    for name, table in (("table_h", table_h), ("table_w", table_w)):
        if table.shape[0] % 2 == 0:
            raise ValueError(
                f"rel_terms: {name} must be (2·keys − 1, D), found an even number of rows, {table.shape[0]}"
            )
    dtype = autocast_dtype(q)
    if dtype is None:
        check_alike("rel_terms", q=q, table_h=table_h, table_w=table_w)
    if select_backend("rel_terms", q, table_h, table_w, backend=backend).backend == "triton":
        q = q if dtype is None else q.to(dtype)
        terms: tuple[Tensor, Tensor] = OPS.rel_terms(q, table_h, table_w, windowed)
        return terms
    rows, columns = (
        table[distances(table.shape[0], length, q.device)]
        for table, length in zip((table_h, table_w), q.shape[1:3], strict=True)
    )  # (h, keys, D), (w, keys, D)
    if windowed:
        return torch.einsum("thwmd,hkd->thwmk", q, rows), torch.einsum("thwmd,wkd->thwmk", q, columns)
    rel_h = torch.einsum("thwmd,hkd->tmkhw", q, rows).flatten(3)
    return rel_h, torch.einsum("thwmd,wkd->tmhwk", q, columns).flatten(2, 3)
