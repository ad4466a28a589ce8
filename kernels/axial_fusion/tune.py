"""Measure tile sizes on this GPU.    python -m axial_fusion.tune axial_attention --slices 9 --head-dim 32

Of slice_attention it measures the backends. Every candidate is first held against the reference in fp64, forward and
gradients; a wrong one is named and never timed. Of an axial op the kernel alone is timed, and of tiles that give the
same kernel one. The fastest is kept in this machine's cache folder (tuned.py) and preferred to what ships. In Triton's
interpreter times mean nothing.

    python -m axial_fusion.tune axial_attention --static --arch 90    candidates by counted instructions, without a GPU
    python -m axial_fusion.tune axial_attention --best 4              measure the four that count least"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, tuned
from .checks import dtype_name
from .dispatch import BACKENDS, FASTEST, SliceKey, slice_key
from .gpu.tiles import MEASURED, Key, Tile, arch, packed
from .ops.axial_attention import axial_attention
from .ops.slice_attention import slice_attention
from .trust import triton_version

OPS = ("axial_attention", "axial_attention_backward", "slice_attention")
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}  # relative L2, of what rounds most


class Sizes(NamedTuple):
    """What is measured: slices of a group, a head's channels, and how many heads and positions there are."""

    slices: int
    head_dim: int
    heads: int = 8
    positions: int = 4096
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


class Measured(NamedTuple):
    """What became of a candidate, a tile or a backend: its median time, or why it was refused."""

    tile: Tile | str
    milliseconds: float | None
    refused: str | None


def candidates(op: str) -> Iterable[Tile | str]:
    """Tiles worth trying for N up to 64, or the backends that are fused without torch.compile."""
    if op == "slice_attention":
        return (name for name in BACKENDS[op] if name not in ("flex", "torch"))
    # No loop, so no stages. One head takes fewer than the 4 warps of wgmma (docs/explanation/hardware.md).
    one_head = (Tile(*sizes) for sizes in product((16, 32, 64), (1, 2)))
    return chain(one_head, (Tile(16, warps, 1, heads) for warps, heads in product((2, 4, 8), (2, 4, 8))))


def tune(
    op: str,
    sizes: Sizes,
    *,
    tiles: Iterable[Tile | str] | None = None,
    timer: Callable[[Callable[[], object]], float] | None = None,
    told: Callable[[Key | SliceKey, Measured], None] = lambda key, result: None,
    until: float = math.inf,
) -> tuple[Key | SliceKey, list[Measured]]:
    """The key of `op` at these sizes, and every candidate, the fastest first and the refused ones last.

    `timer` gives a function's time in milliseconds; that of a CUDA graph on a GPU. `told` hears of each candidate once
    it is known, and none is begun after time.monotonic() `until`. Raises ValueError for an unknown op."""
    if op not in OPS:
        raise ValueError(f"op is {op!r}; there are {', '.join(OPS)}")
    small = _Problem(op, sizes._replace(positions=min(sizes.positions, 19)))
    large = _Problem(op, sizes)
    arch_here = arch(small.inputs[0].device)
    key: Key | SliceKey = Key(op, arch_here, sizes.dtype, sizes.slices, sizes.head_dim)
    table: dict[Any, Any] = MEASURED
    if op == "slice_attention":
        key, table = slice_key(small.inputs[0]), FASTEST
    exact = small.exact()
    measure = timer or _timer(sizes.device)
    results: list[Measured] = []
    kept = table.get(key)
    try:
        for tile in _distinct(candidates(op) if tiles is None else tiles, sizes):
            if time.monotonic() > until:
                break
            table[key] = tile
            small.backend = large.backend = tile if isinstance(tile, str) else "triton"
            refused, ms = _wrong(small, exact, TOLERANCE[sizes.dtype]), None
            if refused is None:
                ms = measure(large.run if op == "slice_attention" else large.launch)
            results.append(Measured(tile, ms, refused))
            told(key, results[-1])
    finally:
        table.pop(key, None)
        if kept is not None:
            table[key] = kept
    return key, sorted(results, key=lambda r: (r.milliseconds is None, r.milliseconds or 0.0))


def _distinct(tiles: Iterable[Tile | str], sizes: Sizes) -> Iterator[Tile | str]:
    """The candidates that hold the slices, one of those that give the same kernel."""
    seen = []
    for tile in tiles:
        if isinstance(tile, Tile):
            constants = packed(tile, sizes.slices, sizes.slices, sizes.heads)
            if tile.rows < sizes.slices or constants in seen:
                continue
            seen.append(constants)
        yield tile


class Counted(NamedTuple):
    """A tile and what its kernel cannot be faster than, in microseconds: all counted, and without memory."""

    tile: Tile
    at_least_us: float
    on_chip_us: float
    bound: str
    refused: str | None


def rank(op: str, sizes: Sizes, arch: int, *, tiles: Iterable[Tile] | None = None) -> list[Counted]:
    """Every candidate of an axial `op` by what its machine code for sm_`arch` counts, the least first.

    Candidates that memory binds alike are ranked by the rest. Those that spill, do not fit or hold instructions that
    ptxas miscompiles are refused and come last. Raises ValueError for another op."""
    from .counts import build
    from .counts.bounds import cost, on_chip_us

    if op not in OPS[:2]:
        raise ValueError(f"op is {op!r}; tiles are counted of {' and '.join(OPS[:2])}")
    problem = _Problem(op, sizes._replace(device="cpu"))
    key = Key(op, arch, sizes.dtype, sizes.slices, sizes.head_dim)
    kept, results = MEASURED.get(key), []
    try:
        for tile in _distinct(candidates(op) if tiles is None else tiles, sizes):
            assert isinstance(tile, Tile)
            MEASURED[key] = tile
            with build.target(arch):
                *_, launch = build.recorded(problem.launch)
            counted = cost(launch, arch)
            refused = [name for name, wrong in (
                ("spills", counted["spills"]), ("miscompiled by ptxas", counted["wrong_descriptors"]),
                ("does not fit", not counted["blocks_per_multiprocessor"]),
            ) if wrong]  # fmt: skip
            found = counted["at_least_us"], on_chip_us(counted), counted["bound"]
            results.append(Counted(tile, *found, ", ".join(refused) or None))
    finally:
        MEASURED.pop(key, None)
        if kept is not None:
            MEASURED[key] = kept
    return sorted(results, key=lambda r: (r.refused is not None, r.at_least_us, r.on_chip_us))


class _Problem:
    """Inputs of one size and the function that is timed on them."""

    def __init__(self, op: str, sizes: Sizes) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (
                torch.randn(shape, generator=generator, device="cpu")
                .to(sizes.device, sizes.dtype)
                .requires_grad_()
            )

        self.op, self.backend = op, "triton"
        shape = (1, sizes.slices, sizes.positions, sizes.heads, sizes.head_dim)
        self.inputs = [draw(*shape) for _ in range(3)]
        self.backward = op != "axial_attention"

    def run(self) -> list[Tensor]:
        """The result, and its gradients where the backward is what is tuned or shares the choice."""
        q, k, v = self.inputs
        attend = slice_attention if self.op == "slice_attention" else axial_attention
        return self._with_gradients(attend(q, k, v, backend=self.backend), self.inputs)

    def launch(self) -> None:
        """Launch the Triton kernel of the axial op without autograd: the backward if `backward`, else the forward.

        The inputs may be on the CPU while `build.recorded` records the launch instead of running it."""
        from .gpu import axial_attention as kernels

        (q, k, v), scale = (t.detach() for t in self.inputs), self.inputs[0].shape[-1] ** -0.5
        if self.backward:
            kernels.launch_backward(torch.empty_like(q), q, k, v, None, scale, False)
        else:
            kernels.launch_forward(q, k, v, None, scale, False)

    def exact(self) -> list[Tensor]:
        wide = [t.detach().double().requires_grad_() for t in self.inputs]
        attend = reference.slice_attention if self.op == "slice_attention" else reference.axial_attention
        return self._with_gradients(attend(wide[0], wide[1], wide[2]), wide)

    def _with_gradients(self, y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        if not self.backward:
            return [y]
        weight = torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=y.dtype)
        return [y, *torch.autograd.grad(y, inputs, weight.expand_as(y))]


def _wrong(problem: _Problem, exact: list[Tensor], tolerance: float) -> str | None:
    """Why the current tile is refused, or None."""
    try:
        results = problem.run()
    except Exception as error:  # a tile that does not compile or launch is a result, whatever Triton calls it
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    for value, truth in zip(results, exact, strict=True):
        off = ((value.double() - truth).norm() / truth.norm().clamp_min(1e-12)).item()
        if not off <= tolerance:
            return f"wrong by {off:.1e}"
    return None


def _timer(device: str) -> Callable[[Callable[[], object]], float]:
    if device.startswith("cuda"):
        from triton.testing import do_bench

        def in_a_graph(run: Callable[[], object]) -> float:
            """Without Python's share, which would hide differences between short kernels."""
            run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            return float(do_bench(graph.replay, warmup=10, rep=40, return_mode="median"))

        return in_a_graph

    def once(run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)

    return once


def entry(key: Key | SliceKey, result: Measured) -> dict[str, Any]:
    """A candidate as JSON values: `tile` or `backend`, what it is for, its `ms`, or why it was refused."""
    choice = {"backend": result.tile} if isinstance(result.tile, str) else {"tile": list(result.tile)}
    found = key._asdict() | {"op": getattr(key, "op", "slice_attention"), "dtype": dtype_name(key.dtype)}
    where = {name: found[name] for name in ("op", "dtype", "slices", "head_dim") if name in found}
    return where | choice | {"ms": result.milliseconds, "refused": result.refused}


def keep(entries: Iterable[dict[str, Any]]) -> Path:
    """Write the fastest candidates to this machine's cache folder; the file."""
    major, minor = torch.cuda.get_device_capability()
    version = (Path(__file__).parent / "VERSION").read_text().strip()
    facts = {
        "device": torch.cuda.get_device_name(), "arch": 10 * major + minor, "by": "axial_fusion.tune on this machine",
        "date": datetime.now(UTC).date().isoformat(), "triton": triton_version(),
        "commit": os.environ.get("BENCH_COMMIT") or f"of version {version}",
    }  # fmt: skip
    plain = [{k: v for k, v in e.items() if k not in ("ms", "refused")} for e in entries]
    kinds = {
        kind: [e for e in plain if one in e] for kind, one in (("tiles", "tile"), ("backends", "backend"))
    }
    return tuned.write(facts, kinds, tuned.folder() / "measured")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="axial_fusion.tune", description=__doc__)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--slices", type=int, default=9)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--static", action="store_true", help="rank tiles by counts and stop; needs no GPU")
    parser.add_argument("--arch", type=int, help="count for sm_ARCH; this GPU's, or 90 without one")
    parser.add_argument("--best", type=int, help="measure only so many tiles, those that count least")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no candidate after so many")
    parser.add_argument(
        "--lines", type=Path, help="append each candidate to this file as JSON, and keep nothing"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    began, parser = time.monotonic(), _parser()
    args = vars(parser.parse_args(argv))
    static, asked, best = args.pop("static"), args.pop("arch"), args.pop("best")
    seconds, lines = args.pop("seconds"), args.pop("lines")
    op, sizes = args.pop("op"), Sizes(**args | {"dtype": getattr(torch, args["dtype"])})
    gpu = torch.cuda.is_available()
    if (static or best) and op not in OPS[:2]:
        parser.error(f"tiles are counted of {' and '.join(OPS[:2])}, not of {op}")
    if not gpu and not static:
        print("axial_fusion.tune: tiles are measured on a GPU, and torch sees none", file=sys.stderr)
        return 2
    tiles: Iterable[Tile | str] | None = None
    if static or best:
        found = rank(op, sizes, asked or (arch(torch.device("cuda")) if gpu else 90))
        for counted in found if static else ():
            print("{refused:>30}  ≥ {at_least_us:.1f} us by {bound}, {on_chip_us:.1f} on chip  {tile}".format(
                **counted._asdict() | {"refused": counted.refused or ""}))  # fmt: skip
        tiles = [counted.tile for counted in found if not counted.refused][:best]
    if static:
        return 0

    def told(key: Key | SliceKey, result: Measured) -> None:
        print(f"{result.refused or f'{result.milliseconds:.4f} ms':>30}  {result.tile}", flush=True)
        if lines:
            with lines.open("a") as file:
                file.write(json.dumps(entry(key, result)) + "\n")

    key, results = tune(op, sizes, tiles=tiles, told=told, until=began + seconds)
    if results and results[0].milliseconds is not None and not lines:
        print(f"{results[0].tile!r} is kept in {keep([entry(key, results[0])])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
