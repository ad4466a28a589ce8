"""What a launch cannot be faster than: instruction slots, units and memory, each alone, from counted instructions.

A program's cycles on a multiprocessor, as if nothing else held it up:
issue    instructions of all its warps, four a cycle
tensor   FLOPs of its matrix instructions, masked parts included, by the peak of the dense product
exp      MUFU instructions; fp32: additions, products and multiply-adds; each by lanes a cycle
shared   bytes between registers and shared memory, without bank conflicts
memory   its part of the bytes that the launch reads or writes, each once, by the memory's peak

The largest binds. Latency, waits, a last wave that is not full, copies into shared memory and traffic of the L2 cache
are not counted, so the true time is longer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..counts import sass
from ..counts.build import Build, Launch, build
from ..counts.machines import (
    EXP_PER_CYCLE,
    MACHINES,
    QUARTERS,
    SHARED_BYTES_PER_CYCLE,
    Machine,
    resident_blocks,
)

Arguments = Mapping[str, Any]


def _windows(a: Arguments) -> list[int]:
    """Queries of each window of a grid."""
    height, width, down, across = a["sizes"][1:5]
    rows = [min(down, height - top) for top in range(0, height, down)]
    columns = [min(across, width - left) for left in range(0, width, across)]
    return [r * c for r in rows for c in columns]


def _up(number: int, by: int) -> int:
    return -(-number // by)


def _turns_of_queries(a: Arguments, programs: int) -> list[float]:
    """Of the forward and dq of relative positions: steps of key rows, by programs that have queries."""
    tile, windows = a["TILE"], _windows(a)
    step = 2 if tile.PAIR else tile.BLOCK_N // tile.COLUMNS
    busy = sum(_up(queries, tile.BLOCK_M) for queries in windows)
    return [_up(a["sizes"][3], step) * busy / (a["sizes"][5] * len(windows))]


def _turns_of_keys(a: Arguments, programs: int) -> list[float]:
    """Of dk and dv of relative positions: tiles of a window's queries."""
    windows = _windows(a)
    return [sum(_up(queries, a["TILE"].BLOCK_M) for queries in windows) / len(windows)]


def _turns_of_terms(a: Arguments, programs: int) -> list[float]:
    """Of relative-position terms: tiles of keys, by the share of the programs that take rows, then columns."""
    rows, columns = a["height"] * a["tiles_h"], a["width"] * a["tiles_w"]
    keys = (_up(a[name], a["BLOCK_K"]) for name in ("keys_h", "keys_w"))
    return [part * turns / (rows + columns) for part, turns in zip((rows, columns), keys, strict=True)]


# A kernel -> turns of each loop of one program on average, in the order of the code. Absent: a kernel without loops.
TURNS: dict[str, Callable[[Arguments, int], list[float]]] = {
    "rel_pos_fwd_kernel": _turns_of_queries,
    "rel_pos_bwd_dq_kernel": _turns_of_queries,
    "rel_pos_bwd_dkv_kernel": _turns_of_keys,
    "rel_terms_kernel": _turns_of_terms,
    # Loops of axial attention run where a tile holds an inf or NaN.
    "axial_attention_fwd_kernel": lambda a, programs: [0] * 2,
    "axial_attention_bwd_kernel": lambda a, programs: [0] * 6,
    # The second loop runs where the first one overflowed.
    "slice_attention_fwd_kernel": lambda a, programs: [_up(a["P"], a["TILE"].BLOCK_N), 0],
    "row_norm_bwd_kernel": lambda a, programs: [_up(a["rows"], a["BLOCK_T"]) / programs],
    "column_sums_kernel": lambda a, programs: [_up(a["slab"], a["BLOCK_T"])],
    "lora_tail_kernel": lambda a, programs: [_up(a["K"], a["BLOCK_K"])],
    "lora_weight_kernel": lambda a, programs: [_up(a["K"], a["BLOCK_K"])],
    "lora_reduce_kernel": lambda a, programs: [
        _up(a["N"], a["BLOCK_C"]),
        *([] if a["da_ptr"] is None else [_up(a["K"], a["BLOCK_C"])]),
    ],
}


def cost(launch: Launch, arch: int) -> dict[str, Any]:
    """Everything that is counted of a launch on sm_`arch`, as JSON values."""
    made, machine = build(launch, arch), MACHINES[arch]
    code, warps = sass.read(made.sass), launch.keywords["num_warps"]
    turns = turns_of(launch, len(code.loops))
    cycles = _cycles(launch, made, code, turns, machine)
    largest = max(cycles, key=lambda name: cycles[name])
    main = max(range(len(turns)), key=lambda i: turns[i] * len(code.loops[i].turn), default=None)
    share = launch.programs / machine.multiprocessors / machine.clock_hz * 1e6
    return {
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "tile": tile_of(launch),
        "programs": launch.programs,
        "registers": made.registers,
        "spills": made.spills,
        "wrong_descriptors": len(sass.wrong_descriptors(made.sass)),
        "shared_bytes": made.shared,
        "blocks_per_multiprocessor": resident_blocks(
            machine, warps, made.registers, made.shared, made.columns
        ),
        "turns": None if main is None else round(turns[main], 2),
        "instructions": sass.counts(code.once if main is None else code.loops[main].turn),
        "bytes": round(moved_bytes(launch) / launch.programs),
        "cycles": {name: round(count, 1) for name, count in cycles.items()},
        "bound": largest,
        "at_least_us": round(cycles[largest] * share, 2),
        "roofline_at_most_percent": round(100 * max(cycles["tensor"], cycles["memory"]) / cycles[largest], 1),
    }


def on_chip_us(counted: Mapping[str, Any]) -> float:
    """What binds a row of `cost` beside memory, in microseconds."""
    machine, cycles = MACHINES[counted["arch"]], counted["cycles"]
    largest = max(count for name, count in cycles.items() if name != "memory")
    return 1e6 * largest * counted["programs"] / machine.multiprocessors / machine.clock_hz


def turns_of(launch: Launch, loops: int) -> list[float]:
    """Turns of each of the `loops` that the code has.

    The compiler may unroll loops of few turns altogether: those with the most turns are the ones that are left."""
    name = launch.kernel.__name__
    turns = TURNS[name](launch.arguments, launch.programs) if name in TURNS else []
    if loops > len(turns):
        raise ValueError(
            f"loops of {name}: {loops} in the compiled code, {len(turns)} in counts.bounds.TURNS"
        )
    kept = sorted(sorted(range(len(turns)), key=lambda i: -turns[i])[:loops])
    return [turns[i] for i in kept]


def _cycles(
    launch: Launch, made: Build, code: sass.Code, turns: list[float], machine: Machine
) -> dict[str, float]:
    """Cycles of a multiprocessor for one program, by what they are spent on."""
    warps = launch.keywords["num_warps"]
    parts = [(1.0, code.once), *((n, loop.turn) for n, loop in zip(turns, code.loops, strict=True))]

    def total(of: Callable[[Iterable[str]], float]) -> float:
        return warps * sum(times * of(lines) for times, lines in parts)

    flops: Counter[str] = Counter()
    for times, lines in parts:
        for kind, number in sass.tensor_flops(lines).items():
            flops[kind] += warps * times * number
    if "tcgen05.mma" in made.ptx:
        flops["half"] += _tcgen05(made.ptx, turns)  # type: ignore[assignment]  # a float by now
    peak = {"half": machine.half_flops, "tf32": machine.tf32_flops, "fp64": machine.fp64_flops}
    exp = total(lambda lines: sum(sass.kind_of(t) in ("exp", "other MUFU") for t in lines))
    bytes_per_cycle = machine.bytes_per_s / machine.multiprocessors / machine.clock_hz
    return {
        "issue": total(lambda lines: len(list(lines))) / QUARTERS,
        "tensor": sum(number / peak[kind] for kind, number in flops.items()),
        "exp": exp * 32 / EXP_PER_CYCLE,
        "fp32": total(sass.fp32_lanes) * 32 / machine.fp32_per_cycle,
        "shared": total(sass.shared_bytes) / SHARED_BYTES_PER_CYCLE,
        "memory": moved_bytes(launch) / launch.programs / bytes_per_cycle,
    }


def _tcgen05(ptx: str, turns: list[float]) -> float:
    """FLOPs of a program's tcgen05 instructions; of a kernel with loops those of the loops.

    What stands before a loop is a turn that the compiler took out of it."""
    code = sass.read_ptx(ptx)
    if not turns:
        return sass.tcgen05_flops(ptx.splitlines(), ptx)
    return sum(n * sass.tcgen05_flops(loop.whole, ptx) for n, loop in zip(turns, code.loops, strict=True))


def tile_of(launch: Launch) -> dict[str, Any]:
    """The tile that the launcher chose: constants, warps and stages."""
    named: dict[str, Any] = {}
    for name, value in launch.keywords.items():
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            named |= value._asdict()
        elif name.startswith("BLOCK") or name in ("num_warps", "num_stages"):
            named[name] = value
    return named


def moved_bytes(launch: Launch) -> int:
    """Bytes of all tensors of a launch, each counted once: what any kernel with these arguments must move."""
    seen: dict[int, int] = {}

    def look(value: Any) -> None:
        value = getattr(value, "base", value)  # a TMA descriptor's tensor
        if isinstance(value, torch.Tensor):
            size = value.numel() * value.element_size()
            seen[value.data_ptr()] = max(size, seen.get(value.data_ptr(), 0))
        elif isinstance(value, tuple):
            for part in value:
                look(part)

    look(launch.args)
    return sum(seen.values())
