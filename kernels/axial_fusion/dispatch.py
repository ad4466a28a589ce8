"""Which backend runs a call, and why: decided once a call and passed down.

`auto` picks by device, dtype and head size, never by how many tokens there are on a GPU, so that a compiled
model is not compiled again for each image size. A backend that is named and cannot run raises ValueError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .checks import (
    autocast_dtype,
    constant_when_traced,
    dtype_name,
    no_derivative,
    under_transform,
    wrapped,
)
from .obstacles import HALF, Facts, cpu_obstacle, obstacle_to, triton_obstacle
from .reference import AttentionWeights
from .trust import failure
from .tuned import measurements, source

Op = Literal[
    "axial_attention",
    "slice_attention",
    "rel_pos_attention",
    "window_attention",
    "rel_terms",
    "row_norm",
    "lora_linear",
    "lora_qkv",
    "axial_fusion_attention",
]
SDPA_KINDS = ("sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient")
BACKENDS: dict[str, tuple[str, ...]] = {
    "axial_attention": ("triton", "cpu", "torch"),
    "slice_attention": ("triton", "cpu", *SDPA_KINDS, "flash", "xformers", "flex", "torch"),
    "rel_pos_attention": ("triton", "torch"),
    "window_attention": ("triton", "torch"),
    "rel_terms": ("triton", "torch"),
    "row_norm": ("triton", "torch"),
    "lora_linear": ("augmented", "triton", "torch"),
    "lora_qkv": ("augmented", "triton", "torch"),
    "axial_fusion_attention": ("composed", "triton", "torch"),
}
# The others are plain torch there.
CHOSEN_ON_CPU = ("axial_attention", "slice_attention", "lora_linear", "lora_qkv")
# Positions up to which plain products are faster than torch's fused attention on a CPU.
FEW_POSITIONS = {torch.float16: 512, torch.bfloat16: 256, torch.float32: 100}
# Channels · queries · slices from which the compiled axial attention is faster on a CPU; twice as many for one query.
FEWEST_PRODUCTS = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 128}


class SliceKey(NamedTuple):
    """What slice_attention's fastest backend is looked up by; `capability` is (9, 0) for sm_90, (0, 0) off a GPU."""

    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int


def _measured(value: Callable[[dict[str, Any], dict[str, Any]], str]) -> dict[SliceKey, str]:
    """What `value` says of each measured backend of slice_attention, by its key."""
    return {
        SliceKey(divmod(m["arch"], 10), getattr(torch, e["dtype"]), e["head_dim"]): value(m, e)
        for m in measurements() for e in m.get("backends", ())
    }  # fmt: skip


FASTEST = _measured(
    lambda m, e: e["backend"]
)  # of slice_attention; H100, bf16: 1.09 to 1.41 times as fast as cuDNN
SOURCES = _measured(lambda m, e: source(m))


class Choice(NamedTuple):
    """Which backend runs an op, and why."""

    backend: str
    reason: str


class HalfBackends(NamedTuple):
    """The backends of what one half of axial_fusion_attention computes."""

    norm: str
    lora: str  # a projection with LoRA
    dense: str  # a projection without
    attention: str
    qkv: str | None = None  # of norm and projections as one op, lora_qkv, where they can be one


COMPILED = Choice("cpu", "compiled for the CPU: a row is read once, and no score leaves the cache")
ON_CPU = Choice("torch", "a CPU tensor: library matmuls are fastest there")
TRANSFORMED = Choice("torch", "plain products alone have a forward-mode derivative and every transform")
FEW_PRODUCTS = Choice(
    "torch", "so few products take less time in plain torch than a call of the compiled kernel"
)
TRACED = Choice("torch", "a traced graph holds torch's own products alone")
WRAPPED = Choice("torch", "a tensor subclass computes its operators itself, and knows torch's alone")
NOTHING_TO_FUSE = Choice("torch", "library products, nothing to fuse with them here")
SDPA = Choice("sdpa", "torch picks the fastest fused attention for the device")
CANNOT_RUN = "backend {!r} cannot run {} here: {}"
NO_TRANSFORM = "no forward-mode derivative and no torch.func transform"
ALL_TORCH = HalfBackends("torch", "torch", "torch", "torch")


def select_backend(op: Op, *tensors: Tensor, backend: str = "auto") -> Choice:
    """The backend that `op` takes for these tensors (its inputs in order; the first one decides), and why.

    Under autocast it is that of a call under autocast. Raises ValueError for an op or a backend that does not exist,
    and where the backend that is named cannot run, or none can."""
    if op not in BACKENDS:
        raise ValueError(f"op is {op!r}; there are {', '.join(BACKENDS)}")
    if not tensors:
        raise ValueError(f"select_backend({op!r}) needs the op's tensors")
    if backend != "auto":
        return _named(op, backend, tensors)
    if tensors[0].device.type == "cpu":
        if op not in CHOSEN_ON_CPU:
            return ON_CPU
        if op == "axial_attention" and _traced():
            return TRACED
    return _fastest(op, tensors)


def select_halves(
    x: Tensor,
    inter: AttentionWeights | None,
    intra: AttentionWeights | None,
    *,
    num_heads: int,
    queries: int,
    backend: str,
) -> tuple[HalfBackends, HalfBackends]:
    """The one decision of a call of axial_fusion_attention on x (B, N, P, C): the backends of its two halves.

    `queries`: how many slices the first half computes. Raises ValueError for a backend that does not exist or run."""
    given = (x, *_tensors(inter), *_tensors(intra))
    if backend != "auto":
        _named("axial_fusion_attention", backend, given)
    if backend == "torch" or wrapped(given) or under_transform(given):
        return ALL_TORCH, ALL_TORCH
    slices = max(x.shape[1], queries)
    facts = Facts(x.device, autocast_dtype(x) or x.dtype, x.shape[-1] // num_heads, slices, queries)
    within = "torch"
    across = "torch" if inter is None else _fastest_kernel("axial_attention", facts).backend
    if intra is not None:
        within = _fastest_slices(facts, x.shape[2]).backend
    kernels = backend == "triton"
    if kernels:
        obstacle = None if inter is None else triton_obstacle("axial_attention", facts)
        if obstacle:
            raise ValueError(CANNOT_RUN.format("triton", "axial_fusion_attention", obstacle))
        across, within = "triton", within if triton_obstacle("slice_attention", facts) else "triton"
    return _half(x, inter, facts.dtype, across, kernels), _half(x, intra, facts.dtype, within, kernels)


def _half(
    x: Tensor, w: AttentionWeights | None, dtype: torch.dtype, attention: str, kernels: bool
) -> HalfBackends:
    """The backends of a half whose products compute in `dtype`; `kernels`: our own wherever there is one.

    Raises ValueError where one that is wanted cannot run."""
    if w is None:
        return ALL_TORCH
    ranks = [0 if lora is None else lora.a.shape[0] for lora in (w.lora_q, w.lora_v)]
    lora, dense = (_fastest_linear(x.device, dtype, rank).backend for rank in (max(ranks), 0))
    rows = Facts(x.device, x.dtype, channels=x.shape[-1], rank=max(ranks), weights=_dtypes(*_tensors(w)))
    as_one = w.norm_weight is not None and ranks[0] == ranks[1] > 0
    if kernels:
        obstacle = triton_obstacle("lora_qkv", rows)
        if obstacle:
            raise ValueError(CANNOT_RUN.format("triton", "axial_fusion_attention", obstacle))
        return HalfBackends("triton", "triton", dense, attention, "triton" if as_one else None)
    if x.device.type != "cuda":
        return HalfBackends("torch", lora, dense, attention)
    norm_rows = rows._replace(rank=0, weights=_dtypes(w.norm_weight, w.norm_bias))
    norm = _fastest_kernel("row_norm", norm_rows).backend
    return HalfBackends(norm, lora, dense, attention, _fastest_qkv(rows).backend if as_one else None)


def _tensors(w: AttentionWeights | None) -> tuple[Tensor, ...]:
    """Every tensor of w, those of LoRA last."""
    if w is None:
        return ()
    lora = (t for update in (w.lora_q, w.lora_v) if update is not None for t in update[:2])
    return (*(t for t in w[:6] if t is not None), *lora)


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype, ...]:
    return tuple(t.dtype for t in tensors if t is not None)


def _facts(op: str, tensors: tuple[Tensor, ...]) -> Facts:
    """What the rules for `op` look at."""
    x = tensors[0]
    if op in ("row_norm", "lora_qkv"):  # read x as it is, in autocast too
        rank = _rank(tensors) if op == "lora_qkv" else 0
        return Facts(x.device, x.dtype, channels=x.shape[-1], rank=rank, weights=_dtypes(*tensors[1:]))
    dtype = autocast_dtype(x) or x.dtype
    if op == "lora_linear":
        return Facts(x.device, dtype, rank=_rank(tensors))
    if op == "axial_fusion_attention":
        return Facts(x.device, dtype, channels=x.shape[-1], slices=x.shape[1])
    facts = Facts(x.device, dtype, head_dim=x.shape[-1])
    if op == "axial_attention":
        return facts._replace(slices=max(t.shape[1] for t in tensors[:3]), queries=x.shape[1])
    if op in ("rel_pos_attention", "window_attention") and len(tensors) > 3:
        return facts._replace(columns=tensors[-1].shape[-1])  # of rel_w
    return facts._replace(weights=_dtypes(*tensors[1:])) if op == "rel_terms" else facts


def _rank(tensors: tuple[Tensor, ...]) -> int:
    """The rank of LoRA's A, the second matrix behind x among the inputs of lora_linear or lora_qkv; 0 without."""
    matrices = 0
    for tensor in tensors[1:]:
        matrices += tensor.dim() == 2
        if matrices == 2:
            return tensor.shape[0]
    return 0


def _fastest(op: str, tensors: tuple[Tensor, ...]) -> Choice:
    """The choice of `auto`. Raises ValueError where no backend runs."""
    x = tensors[0]
    rank = _rank(tensors) if op == "lora_linear" else 0
    if op == "lora_linear" and not rank and x.device.type != "cuda":
        return NOTHING_TO_FUSE
    if wrapped(tensors):
        return WRAPPED
    if under_transform(tensors):
        return TRANSFORMED
    if op == "axial_fusion_attention":
        return Choice(
            "composed", "library products between our kernels, each on the backend that is fastest for it"
        )
    if op == "lora_linear":
        return _fastest_linear(x.device, autocast_dtype(x) or x.dtype, rank)
    facts = _facts(op, tensors)
    if op == "slice_attention":
        return _fastest_slices(facts, x.shape[2])
    if op == "lora_qkv":
        return _fastest_qkv(facts)
    return _fastest_kernel(op, facts)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _few_products(facts: Facts) -> bool:
    """Whether plain torch is faster than the compiled axial attention on a CPU; measured on an EPYC, Zen 5."""
    fewest = FEWEST_PRODUCTS.get(facts.dtype, 0) * (2 if facts.queries == 1 else 1)
    return facts.head_dim * facts.queries * facts.slices < fewest


def _fastest_kernel(op: str, facts: Facts) -> Choice:
    """Of an op that has a Triton kernel and plain torch, and a compiled form on a CPU if it is axial_attention."""
    if facts.device.type == "cpu":
        if op != "axial_attention":
            return ON_CPU
        if _traced():
            return TRACED
        if _few_products(facts):
            return FEW_PRODUCTS
        obstacle = cpu_obstacle(facts)
        return Choice("torch", obstacle) if obstacle else COMPILED
    obstacle = _unfit(op, facts)
    if obstacle:
        return Choice("torch", obstacle)
    if op == "row_norm":
        return Choice("triton", "a row is read once: 15.7 us against 48.9 us on an H100")
    if op == "rel_terms":
        return Choice("triton", "q is read as it lies: products of the library copy q and their results")
    return Choice("triton", "no score leaves the chip")


def _unfit(op: str, facts: Facts) -> str | None:
    """Why `auto` does not take the Triton kernels of `op`: they cannot run, or failed their check on this GPU."""
    obstacle = triton_obstacle(op, facts)
    if obstacle is None and (wrong := failure(op, facts.device, facts.dtype)):
        return f"its kernels failed their check on this GPU: {wrong}"
    return obstacle


def _fastest_slices(facts: Facts, positions: int) -> Choice:
    """The choice for slice_attention with so many positions a slice."""
    key = SliceKey(_capability(facts.device), facts.dtype, facts.head_dim)
    measured = FASTEST.get(key)
    if measured:
        unfit = _unfit("slice_attention", facts) if measured == "triton" else None
        if not (unfit or obstacle_to("slice_attention", measured, facts)):
            by = f" ({SOURCES[key]})" if key in SOURCES else ""
            device = "sm_{}{}".format(*key.capability)
            what = f"measured fastest on {device} for {dtype_name(key.dtype)}, D {key.head_dim}"
            return Choice(measured, what + by)
        if unfit and "failed their check" in unfit:
            return Choice("sdpa", unfit)
    if facts.device.type != "cpu":
        return SDPA
    if not _traced() and cpu_obstacle(facts._replace(slices=1)) is None:
        return COMPILED
    most = FEW_POSITIONS.get(facts.dtype, 0)
    if not torch.compiler.is_exporting() and positions <= most:
        return Choice("torch", f"at most {most} positions on a CPU: plain products are faster")
    return SDPA


def _fastest_linear(device: torch.device, dtype: torch.dtype, rank: int) -> Choice:
    """Of lora_linear, with LoRA where the rank is above 0."""
    if device.type == "cuda":
        if not rank:
            return Choice("augmented", "the library's product; a bias gradient is one pass over the rows")
        unfit = _unfit("lora_linear", Facts(device, dtype, rank=rank))
        if unfit is None:
            return Choice(
                "triton", "x is read and joined with its update in one pass: 265 us on an H100, not 316"
            )
        return Choice("augmented", f"one product of K + r writes y once; not Triton: {unfit}")
    if rank and dtype in HALF:
        return Choice("augmented", "one product rounds y once; a small update added to it after is lost")
    return NOTHING_TO_FUSE


def _fastest_qkv(facts: Facts) -> Choice:
    if facts.device.type != "cuda":
        return Choice("augmented", "the library's one product of K + 2r")
    unfit = _unfit("lora_qkv", facts)
    if unfit is None:
        return Choice(
            "triton", "a row is normalised in one pass: 62 us on an H100, without LoRA 87 us by torch"
        )
    return Choice("augmented", f"the library's one product of K + 2r; not Triton: {unfit}")


def slice_key(q: Tensor) -> SliceKey:
    """The key of q (..., D)."""
    return SliceKey(_capability(q.device), q.dtype, q.shape[-1])


@constant_when_traced
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _named(op: str, backend: str, tensors: tuple[Tensor, ...]) -> Choice:
    """The backend that the caller names. Raises ValueError where it does not exist or cannot run."""
    if backend not in BACKENDS[op]:
        raise ValueError(f"backend is {backend!r}; {op} has auto, {', '.join(BACKENDS[op])}")
    obstacle = None
    if backend not in ("torch", "sdpa", "composed"):  # torch differentiates these, or says what it cannot
        if wrapped(tensors):
            obstacle = "it takes torch's own tensors alone; the torch backend takes subclasses that compute themselves"
        elif under_transform(tensors):
            obstacle = f"it has {NO_TRANSFORM}; the torch backend has both"
        obstacle = obstacle or obstacle_to(op, backend, _facts(op, tensors))
    if backend == "flex" and tensors[0].device.type == "cpu" and not no_derivative(*tensors):
        obstacle = obstacle or "FlexAttention has no gradient on a CPU"
    if obstacle:
        raise ValueError(CANNOT_RUN.format(backend, op, obstacle))
    return Choice(backend, "named by the caller")


def sums_by_triton(x: Tensor) -> bool:
    """Whether a kernel sums the rows of x (T, C) up."""
    facts = Facts(x.device, x.dtype, channels=x.shape[-1])
    return x.device.type == "cuda" and x.numel() > 0 and _unfit("row_norm", facts) is None


def plain_on(*tensors: Tensor) -> bool:
    """Whether the torch backend runs as a composition that autograd sees through, not as a registered op.

    On a CPU a composition costs less a call and autograd's saved activations save a recomputation; elsewhere the
    registered op saves its inputs alone. Transforms of torch.func and forward-mode AD need the composition."""
    return tensors[0].device.type in ("cpu", "meta") or under_transform(tensors)
