"""What kernels cost, counted without a GPU.    python -m benchmarks.static --arch 90 --kernel rel_pos

Every Triton kernel is compiled for sm_80, sm_90, sm_100 and sm_120, at the shapes that the benchmarks measure on a GPU
and with the tile that ships. Its machine code is counted, and bounds follow (axial_fusion.counts). The table goes to
results/static/, apart from what was measured. docs/explanation/static.md says how to read it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftersam.evaluation.tables import markdown_table
from aftersam.files import write_text
from benchmarks.figure import newest
from benchmarks.machine import RESULTS, ROOT, environment
from benchmarks.page import write_sections
from benchmarks.speed import axial_attention as axial_cases
from benchmarks.speed import axial_half as half_cases
from benchmarks.speed import lora_linear as lora_cases
from benchmarks.speed import rel_pos as rel_pos_cases
from benchmarks.speed import slice_attention as slice_cases

STATIC = RESULTS / "static"
PAGE = ROOT / "docs" / "explanation" / "static.md"
ARCHS = (80, 90, 100, 120)
WINDOW = 14
MEASURED = "H100"  # the GPU whose measurements the page shows beside counts for sm_90

Steps = Iterator[list[Tensor]]
"""A case: runs a forward and yields the tensors that it must read or write, then the same of a backward, if any."""


class Case(NamedTuple):
    """A shape of a benchmark; subject and name are those of its measured records."""

    subject: str
    name: str
    steps: Callable[[torch.dtype], Steps]


def axial_attention(shape: axial_cases.Shape, dtype: torch.dtype) -> Steps:
    from axial_fusion.gpu import axial_attention as kernels

    b, n, p, m, d = shape
    q, k, v = torch.zeros(b, n, p, 3, m, d, dtype=dtype).unbind(3)
    y = kernels.launch_forward(q, k, v, None, d**-0.5, False)
    yield [q, k, v, y]
    yield [y, q, k, v, *kernels.launch_backward(y.clone(), q, k, v, None, d**-0.5, False)]


def axial_half(shape: half_cases.Shape, dtype: torch.dtype) -> Steps:
    """The norm and the attention; the products around them are the library's."""
    from axial_fusion.gpu import axial_attention as attention
    from axial_fusion.gpu import row_norm

    b, n, side, c, m = shape
    x, gamma = torch.zeros(b, n, side**2, c, dtype=dtype), torch.zeros(2, c, dtype=dtype)
    z = torch.zeros(x.shape, dtype=dtype).view(-1, c)
    q, k, v = torch.zeros(*x.shape[:3], 3, m, c // m, dtype=dtype).unbind(3)
    mean, rstd = row_norm.launch_forward(x, gamma[0], gamma[1], z, 1e-6)
    y = attention.launch_forward(q, k, v, None, 1.0, False)
    yield [x, y]
    attention.launch_backward(y.clone(), q, k, v, None, 1.0, False)
    row_norm.launch_backward(z, x, mean, rstd, gamma[0], need_x=True, need_weights=True)
    row_norm.launch_column_sums(torch.zeros(z.shape[0], 3 * c, dtype=dtype))
    yield [x, y, z]


def rel_pos(shape: rel_pos_cases.Shape, dtype: torch.dtype) -> Steps:
    from axial_fusion.gpu import rel_pos_attention as kernels

    b, side, m, d, _ = shape
    p = side**2
    q, k, v = torch.zeros(3, b, p, m, d, dtype=dtype).unbind()
    rel_h, rel_w = torch.zeros(b, m, side, p, dtype=dtype), torch.zeros(b, m, p, side, dtype=dtype)
    y, lse = kernels.launch_forward(q, k, v, rel_h, rel_w, d**-0.5)
    yield [q, k, v, rel_h, rel_w, y]
    yield [*kernels.launch_backward(y, (q, k, v, rel_h, rel_w), y, lse, d**-0.5), q, k, v, rel_h, rel_w]


def window(shape: rel_pos_cases.Shape, dtype: torch.dtype) -> Steps:
    from axial_fusion.gpu import rel_pos_attention as kernels

    b, side, m, d, _ = shape
    qkv, bias = torch.zeros(b, side, side, 3, m, d, dtype=dtype), torch.zeros(3 * m * d, dtype=dtype)
    rel_h, rel_w = torch.zeros(2, b, side, side, m, WINDOW, dtype=dtype).unbind()
    y, lse = kernels.launch_window_forward(qkv, bias, rel_h, rel_w, WINDOW, d**-0.5)
    yield [qkv, rel_h, rel_w, y]
    inputs = (qkv, bias, rel_h, rel_w)
    dqkv, _, *tables = kernels.launch_window_backward(y, inputs, y, lse, WINDOW, d**-0.5)
    yield [dqkv, *tables, qkv, rel_h, rel_w]


def terms(shape: rel_pos_cases.Shape, dtype: torch.dtype, *, windowed: bool = False) -> Steps:
    """The relative-position terms; their backward is the library's."""
    from axial_fusion.gpu import rel_terms as kernels

    b, side, m, d, _ = shape
    q = torch.zeros(b, side, side, 3, m, d, dtype=dtype)[..., 0, :, :]
    rows, columns = torch.zeros(2, 2 * (WINDOW if windowed else side) - 1, d, dtype=dtype).unbind()
    yield [q, rows, columns, *kernels.launch(q, rows, columns, windowed)]


def slice_attention(shape: slice_cases.Shape, dtype: torch.dtype) -> Steps:
    """The forward in half precision; all else is a library's."""
    from axial_fusion.gpu import slice_attention as kernels

    b, n, p, m, d = shape
    if dtype != torch.float32:
        q, k, v = torch.zeros(b * n, p, 3, m, d, dtype=dtype).unbind(2)
        y, _ = kernels.launch_forward(q, k, v, d**-0.5)
        yield [q, k, v, y]


def lora_linear(shape: lora_cases.Shape, dtype: torch.dtype) -> Steps:
    """What stands around the library's large products."""
    from axial_fusion.gpu import lora

    rows, k, n, rank = shape
    x, dy, xa = (torch.zeros(rows, columns, dtype=dtype) for columns in (k, n, rank))
    a, b, weight = (torch.zeros(s, dtype=dtype) for s in ((rank, k), (n, rank), (n, k)))
    lora.launch_tail(x, a, torch.zeros(rows, k + lora.tail_width(rank), dtype=dtype), xa=xa)
    lora.launch_weight(weight, b, lora_cases.SCALING)
    yield [x, weight]
    lora.launch_reduce(dy, x, xa, b, lora_cases.SCALING, lora.NO_DROPOUT, need_a=True, need_b=True)
    yield [dy, x, weight]


def _of(subject: str, steps: Callable[..., Steps], shapes: Sequence[tuple[str, Any]]) -> list[Case]:
    return [Case(subject, name, partial(steps, shape)) for name, shape in shapes]


CASES = [
    *_of("axial", axial_attention, axial_cases.GPU_QUICK),
    *_of("axial half", axial_half, half_cases.GPU_SHAPES[:2]),
    *_of("rel_pos", rel_pos, rel_pos_cases.GPU_SHAPES_FULL),
    *_of("window", window, rel_pos_cases.GPU_SHAPES_FULL),
    *_of("terms", terms, rel_pos_cases.GPU_SHAPES_FULL),
    *_of("terms of windows", partial(terms, windowed=True), rel_pos_cases.GPU_SHAPES_FULL),
    *_of("slice", slice_attention, slice_cases.GPU_SHAPES),
    *_of("lora", lora_linear, [(shape.name, shape) for shape in lora_cases.GPU_QUICK]),
]


def rows_of(case: Case, arch: int, dtype: torch.dtype, kernel: str = "") -> list[dict[str, Any]]:
    """A row for each kernel of a case whose name contains `kernel`."""
    from axial_fusion.counts.bounds import cost
    from axial_fusion.counts.build import recorded, target

    rows = []
    with target(arch):
        steps = case.steps(dtype)
        for phase in ("forward", "backward"):
            needed: list[Tensor] = []
            launches = recorded(partial(_step, steps, needed))
            moved = sum(t.numel() * t.element_size() for t in needed)
            rows += [
                {"subject": case.subject, "name": case.name, "phase": phase, "case_bytes": moved,
                 **cost(launch, arch)}
                for launch in launches
                if kernel in launch.kernel.__name__
            ]  # fmt: skip
    return rows


def _step(steps: Steps, needed: list[Tensor]) -> None:
    needed += next(steps, [])


def table(
    archs: Sequence[int], dtype: torch.dtype, *, kernel: str = "", processes: int = 2
) -> list[dict[str, Any]]:
    """Rows of all cases on all `archs`, in their order."""
    jobs = [(case, arch) for case in CASES for arch in archs]
    names = [(CASES.index(case), arch, str(dtype).removeprefix("torch."), kernel) for case, arch in jobs]
    os.environ.pop("TRITON_INTERPRET", None)  # of the processes below, which compile
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(_job, names) for row in rows]


def _job(job: tuple[int, int, str, str]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    index, arch, dtype, kernel = job
    return rows_of(CASES[index], arch, getattr(torch, dtype), kernel)


def result(
    archs: Sequence[int], dtype: torch.dtype, *, kernel: str = "", processes: int = 2
) -> dict[str, Any]:
    """The whole table as JSON values, marked as counted, with versions and machines."""
    from axial_fusion.counts.machines import MACHINES

    where = environment()
    kept = {key: where[key] for key in ("torch", "triton", "commit", "dirty", "date")}
    return {
        "evidence": "counted",
        "environment": kept,
        "dtype": str(dtype).removeprefix("torch."),
        "machines": {str(arch): MACHINES[arch]._asdict() for arch in archs},
        "rows": table(archs, dtype, kernel=kernel, processes=processes),
    }


def bounds_of(counted: Mapping[str, Any], arch: int) -> dict[tuple[str, str, str], float]:
    """{(subject, name, forward or forward_backward): ms}, which no run of these kernels can beat.

    On-chip bounds of several kernels add up. Bytes are those of the case, each read or written once in a forward and
    once in a backward: a later kernel may find them in the L2 cache."""
    machine = counted["machines"][str(arch)]
    found: dict[tuple[str, str, str], float] = {}
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in counted["rows"]:
        if row["arch"] == arch:
            grouped.setdefault((row["subject"], row["name"]), []).append(row)
    for key, rows in grouped.items():
        for kind, phases in (("forward", ["forward"]), ("forward_backward", ["forward", "backward"])):
            taken = [row for row in rows if row["phase"] in phases]
            if {row["phase"] for row in taken} != set(phases):
                continue
            on_chip = sum(
                max(v for name, v in row["cycles"].items() if name != "memory") * row["programs"]
                for row in taken
            )
            moved = sum({row["phase"]: row["case_bytes"] for row in taken}.values())
            seconds = max(
                on_chip / machine["multiprocessors"] / machine["clock_hz"], moved / machine["bytes_per_s"]
            )
            found[(*key, kind)] = 1e3 * seconds
    return found


def comparison(counted: Mapping[str, Any], measured: Mapping[str, Any], arch: int) -> list[list[str]]:
    """Rows of cases that both know: bound, measured time, and the part of it that the bound explains."""
    rows = []
    for (subject, name, kind), bound in bounds_of(counted, arch).items():
        for record in measured["records"]:
            if (record["subject"], record["name"], record["role"]) == (
                subject,
                name,
                "ours",
            ) and "ms" in record:
                time = record["ms"][kind]["median"]
                title = f"{subject}, {name}" + (", with backward" if kind != "forward" else "")
                rows.append([title, f"{bound:.3g} ms", f"{time:.3g} ms", f"{bound / time:.0%}"])
    return rows


def write(found: Mapping[str, Any], folder: Path = STATIC) -> Path:
    """Write a table to <folder>/triton-<version>-<dtype>.json, a line a row."""
    path = folder / f"triton-{found['environment']['triton']}-{found['dtype']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in found["rows"])
    write_text(path, f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def write_page(counted: Mapping[str, Any], measured: Mapping[str, Any], page: Path = PAGE) -> None:
    """Put two tables into the page: counts beside measurements, and every kernel on sm_90."""
    heads = ["kernel and case", "registers", "blocks", "issue", "tensor", "exp", "fp32", "shared", "memory", "binds",
             "roofline at most"]  # fmt: skip
    kernels = [
        [f"{row['kernel'].removesuffix('_kernel')}, {row['name']}", str(row["registers"]),
         str(row["blocks_per_multiprocessor"]), *(f"{v:,.0f}" for v in row["cycles"].values()), row["bound"],
         f"{row['roofline_at_most_percent']:.0f} %"]
        for row in counted["rows"] if row["arch"] == 90
    ]  # fmt: skip
    beside = comparison(counted, measured, 90)
    first = markdown_table([["case", "counted: at least", "measured", "bound / measured"], *beside])
    write_sections(page, [first, markdown_table([heads, *kernels])], "static")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.static", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument(
        "--kernel", default="", help="only kernels with this in their name; nothing is written"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    found = result(args.arch, getattr(torch, args.dtype), kernel=args.kernel, processes=args.processes)
    for row in found["rows"]:
        print(line(row))
    if not args.kernel and set(args.arch) == set(ARCHS):
        print(write(found))
        if args.dtype == "bfloat16":  # as what was measured
            write_page(found, next(r for r in newest() if MEASURED in r["environment"]["device"]))
    return int(any(row["spills"] and args.dtype != "float32" for row in found["rows"]))


def line(row: Mapping[str, Any]) -> str:
    """One kernel of a case, for the terminal."""
    cycles = ", ".join(f"{name} {count:,.0f}" for name, count in row["cycles"].items())
    return (
        f"sm_{row['arch']} {row['kernel'].removesuffix('_kernel'):<22} {row['subject']}, {row['name']:<26} "
        f"registers {row['registers']:>3}, blocks {row['blocks_per_multiprocessor']:>2}, spills {row['spills']}; "
        f"cycles: {cycles}; ≥ {row['at_least_us']} us by {row['bound']}, "
        f"≤ {row['roofline_at_most_percent']} % of the roofline"
    )


if __name__ == "__main__":
    sys.exit(main())
