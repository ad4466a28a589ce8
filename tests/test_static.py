"""Counts without a GPU: machine code is read right, bounds follow from it, and no measurement beats one."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from axial_fusion.counts import sass
from axial_fusion.counts.machines import MACHINES, resident_blocks
from benchmarks import static
from benchmarks.machine import RESULTS

ROOT = Path(__file__).parents[1]
# A guarded loop of four turns at most: it waits at a barrier out of line, takes a slow path sometimes, and jumps back.
SASS = """
kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
        /*0030*/                   MUFU.RCP R9, R8 ;
.L_x_1:
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R7 ;
        /*0050*/              @!P1 BRA `(.L_x_4) ;
.L_x_2:
        /*0060*/                   LDSM.16.M88.4 R12, [R20] ;
        /*0070*/                   LDS.64 R16, [R21] ;
        /*0080*/                   HMMA.16816.F32.BF16 R24, R12, R16, R24 ;
        /*0090*/                   HGMMA.64x32x16.F32.BF16 R32, gdesc[UR4], R32 ;
        /*00a0*/                   MUFU.EX2 R9, R8 ;
        /*00b0*/                   FFMA R9, R9, R8, R7 ;
        /*00c0*/                   FFMA2 R10, R10.F32x2.HI_LO, R8.F32x2.HI_LO, R6.F32x2.HI_LO ;
        /*00d0*/                   HFMA2.MMA R5, -RZ, RZ, 0, 0 ;
        /*00e0*/               @P2 BRA `(.L_x_5) ;
        /*00f0*/                   FADD R9, R9, R8 ;
.L_x_5:
        /*0100*/                   STG.E.U16 desc[UR4][R2.64], R9 ;
        /*0110*/               @P3 BRA `(.L_x_1) ;
.L_x_3:
        /*0120*/               @P6 STG.E.64 desc[UR4][R2.64], R4 ;
        /*0130*/                   EXIT ;
.L_x_4:
        /*0140*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R7 ;
        /*0150*/              @!P1 BRA `(.L_x_4) ;
        /*0160*/                   BRA `(.L_x_2) ;
.L_x_6:
        /*0170*/                   BRA `(.L_x_6);
"""


def test_loops_are_found_and_what_may_be_skipped_is_not_counted():
    code = sass.read(SASS)
    assert [sass.opcode(line) for line in code.once] == ["LDC", "LDG.E.128", "BRA", "STG.E.64", "EXIT"]
    (loop,) = code.loops  # the one that waits for the barrier is none
    skipped = Counter(loop.whole) - Counter(loop.turn)
    assert sorted(sass.opcode(line).split(".")[0] for line in skipped) == ["BRA", "BRA", "FADD", "SYNCS"]
    assert sass.counts(loop.turn) == {
        "barrier": 1, "exp": 1, "fp32": 3, "integer, other": 3, "shared load 8": 1, "shared load matrix": 1,
        "store 2": 1, "tensor": 2,
    }  # fmt: skip
    assert sass.fp32_lanes(loop.turn) == 4
    assert sass.shared_bytes(loop.turn) == 4 * 8 * 16 + 32 * 8
    assert sass.tensor_flops(loop.turn) == {"half": 2 * 16 * 8 * 16 + 2 * 64 * 32 * 16 / 4}


def test_blocks_that_a_multiprocessor_holds():
    h100 = MACHINES[90]
    assert (
        resident_blocks(h100, warps=4, registers=232, shared=34_816) == 2
    )  # 232 · 32 registers, twice a quarter
    assert resident_blocks(h100, warps=4, registers=128, shared=0) == 4
    assert resident_blocks(h100, warps=1, registers=16, shared=0) == 32  # the most blocks there may be
    assert resident_blocks(h100, warps=8, registers=32, shared=0) == 8  # 2048 threads
    assert resident_blocks(h100, warps=4, registers=32, shared=100 * 1024) == 2
    assert resident_blocks(h100, warps=4, registers=32, shared=228 * 1024) == 0
    assert resident_blocks(h100, warps=32, registers=72, shared=0) == 0
    assert resident_blocks(MACHINES[100], warps=4, registers=64, shared=0, columns=256) == 2
    assert resident_blocks(MACHINES[120], warps=4, registers=64, shared=60 * 1024) == 1


def test_loops_that_were_unrolled_are_those_of_few_turns():
    from types import SimpleNamespace

    from axial_fusion.counts.bounds import turns_of

    kernel = SimpleNamespace(__name__="lora_reduce_kernel")
    launch = SimpleNamespace(
        kernel=kernel, programs=1, arguments={"N": 768, "K": 256, "BLOCK_C": 64, "da_ptr": 1}
    )
    assert [turns_of(launch, loops) for loops in range(3)] == [[], [12], [12, 4]]
    with pytest.raises(ValueError, match=r"loops of .*: 3 in the compiled code"):
        turns_of(launch, 3)


def compiled(code: str):
    """The JSON that `code` prints in a process whose Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    command = [sys.executable, "-c", "import json, torch\n" + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def case(subject: str, name: str) -> static.Case:
    return next(c for c in static.CASES if (c.subject, c.name) == (subject, name))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_counts_agree_with_what_the_kernel_must_do(arch):
    """Products and exponentials of the forward at 256 px, whose tiles have nothing to mask, by hand."""
    index = static.CASES.index(case("rel_pos", "ViT-B, 256 px"))
    (row,) = compiled(
        "from benchmarks.static import CASES, rows_of\n"
        f"print(json.dumps(rows_of(CASES[{index}], {arch}, torch.bfloat16, 'rel_pos_fwd')))"
    )
    machine, tile = MACHINES[arch], row["tile"]
    queries, keys = tile["BLOCK_M"], 256
    assert row["programs"] == 32 * 12 * 256 // queries
    assert row["turns"] == keys / tile["BLOCK_N"]
    assert row["cycles"]["tensor"] == pytest.approx(
        2 * 2 * queries * keys * 64 / machine.half_flops, rel=1e-3
    )
    assert row["cycles"]["exp"] == pytest.approx(
        queries * keys / 16, rel=0.35
    )  # rescaling and 1 / sum on top
    assert row["cycles"]["exp"] >= queries * keys / 16
    assert row["bytes"] * row["programs"] == 32 * 12 * 256 * (
        4 * 64 * 2 + 2 * 16 * 2 + 4
    )  # q, k, v, y, tables, lse
    assert 0 < row["blocks_per_multiprocessor"] <= 32
    assert row["cycles"]["issue"] * 4 > row["turns"] * sum(row["instructions"].values()) * tile["num_warps"]
    assert set(row) == ROW
    largest = max(row["cycles"].values())
    assert row["at_least_us"] == pytest.approx(
        largest * row["programs"] / machine.multiprocessors / machine.clock_hz * 1e6, rel=1e-2
    )
    assert row["roofline_at_most_percent"] <= 100


ROW = {
    "subject", "name", "phase", "case_bytes", "kernel", "arch", "tile", "programs", "registers", "spills",
    "wrong_descriptors", "shared_bytes", "blocks_per_multiprocessor", "turns", "instructions", "bytes", "cycles",
    "bound", "at_least_us", "roofline_at_most_percent",
}  # fmt: skip


@cache
def committed() -> dict:
    (path,) = static.STATIC.glob("*bfloat16.json")
    return json.loads(path.read_text())


def test_the_committed_table_is_marked_and_whole():
    found = committed()
    assert found["evidence"] == "counted"
    assert {"triton", "commit", "date"} <= found["environment"].keys()
    assert not found["environment"]["dirty"]
    assert {int(arch): machine for arch, machine in found["machines"].items()} == {
        arch: MACHINES[arch]._asdict() for arch in static.ARCHS
    }
    for arch in static.ARCHS:
        cases = {(row["subject"], row["name"]) for row in found["rows"] if row["arch"] == arch}
        assert cases == {(c.subject, c.name) for c in static.CASES}
    for row in found["rows"]:
        assert set(row) == ROW
        assert row["bound"] == max(row["cycles"], key=row["cycles"].get)
        assert row["spills"] == row["wrong_descriptors"] == 0, row
        assert row["shared_bytes"] <= MACHINES[row["arch"]].shared_block_bytes


@pytest.mark.slow
def test_the_committed_table_is_of_the_tiles_that_ship():
    """Launches alone, nothing compiled: `python -m benchmarks.static` makes the table anew after a change of tiles."""
    shipped = compiled(
        "from benchmarks import static\n"
        "from axial_fusion.counts import bounds\n"
        "bounds.cost = lambda launch, arch: {'row': [launch.kernel.__name__, arch, bounds.tile_of(launch), "
        "launch.programs]}\n"
        "jobs = [(case, arch, torch.bfloat16) for case in static.CASES for arch in static.ARCHS]\n"
        "rows = [row for job in jobs for row in static.rows_of(*job)]\n"
        "print(json.dumps([[r['subject'], r['name'], r['phase'], *r['row']] for r in rows]))"
    )
    keys = ("subject", "name", "phase", "kernel", "arch", "tile", "programs")
    assert [[row[key] for key in keys] for row in committed()["rows"]] == shipped


def test_no_measurement_beats_a_bound():
    known = {machine.name.split()[0]: arch for arch, machine in MACHINES.items()}
    compared = 0
    for path in RESULTS.glob("*.json"):
        measured = json.loads(path.read_text())
        for name, arch in known.items():
            if name in measured["environment"]["device"]:
                bounds = static.bounds_of(committed(), arch)
                for record in measured["records"]:
                    for kind in record.get("ms", {}) if record["role"] == "ours" else ():
                        bound = bounds.get((record["subject"], record["name"], kind))
                        if bound is not None:
                            compared += 1
                            assert record["ms"][kind]["q20"] >= bound, (
                                record["subject"],
                                record["name"],
                                kind,
                            )
    assert compared >= 25


def test_tiles_are_ranked_by_counts_and_those_that_spill_come_last():
    found = compiled(
        "from axial_fusion import tune\n"
        "tiles = [tune.Tile(64, 1), tune.Tile(16, 4, 1, 2), tune.Tile(32, 1), tune.Tile(16, 4, 1, 8)]\n"
        "print(json.dumps(tune.rank('axial_attention_backward', tune.Sizes(9, 32, positions=512), 90, tiles=tiles)))"
    )
    assert [tile[0] for tile, *_ in found] == [32, 16, 16, 64]
    *right, (_, _, _, _, refused) = found
    assert refused == "spills"
    assert [r for *_, r in right] == [None] * 3
    keys = [(at_least, on_chip) for _, at_least, on_chip, _, _ in right]
    assert keys == sorted(keys)
    assert keys[0][0] == keys[1][0]  # memory binds both, so the rest decides


def test_static_ranking_is_of_the_axial_ops_alone(capsys):
    from axial_fusion import tune

    with pytest.raises(SystemExit):
        tune.main(["slice_attention", "--static"])
    assert "tiles are counted of axial_attention and axial_attention_backward" in capsys.readouterr().err
    with pytest.raises(ValueError, match="slice_attention"):
        tune.rank("slice_attention", tune.Sizes(9, 32), 90)
