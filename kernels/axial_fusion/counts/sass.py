"""Reads machine code (nvdisasm's text) and PTX: blocks, loops, and how often each kind of instruction runs.

Only what runs for sure is counted. Of a loop, that is what every way from its head to its end passes; of the rest, what
every way from the first instruction to the last one passes. Code that a warp may skip, such as a slow path, counts as
zero, so that a bound made of these counts is a lower one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

GUARD = r"(?:@!?%?U?[pP]\w+\s+)?"
SASS_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
SASS_LABEL = re.compile(r"(\.L_\w+):")
SASS_JUMP = re.compile(rf"({GUARD})BRA[.\w]*\s+(!?U?P\w+,\s*)?`\((\.L_\w+)\)")
PTX_LABEL = re.compile(r"(\$L\w+):")
PTX_JUMP = re.compile(rf"({GUARD})()bra[.\w]*\s+(\$L\w+)")
END = re.compile(rf"({GUARD})(?:EXIT|RET|ret|KILL)\b")

KINDS = {
    "tensor": "HMMA HGMMA UTCHMMA DMMA IMMA QMMA QGMMA UTCQMMA",
    "fp32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FHADD FHFMA HFMA2 HADD2 HMUL2",
    "convert": "F2F F2FP I2F I2FP F2I FRND",
    "shuffle": "SHFL REDUX CREDUX",
    "tensor memory": "LDTM STTM",
    "spill": "LDL STL",
    "barrier": "BAR SYNCS DEPBAR LDGDEPBAR WARPGROUP WARPSYNC MEMBAR FENCE NANOSLEEP UTCBAR BSSY BSYNC",
}  # fmt: skip
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
MEMORY = {"LDG": "load", "STG": "store", "LDGSTS": "copy", "LDS": "shared load", "STS": "shared store"}
MATRIX = {"LDSM": "shared load", "STSM": "shared store"}  # matrices of 8 by 8 half-precision elements


class Loop(NamedTuple):
    """Instructions that every turn of a loop runs, and all that it holds."""

    turn: list[str]
    whole: list[str]


class Code(NamedTuple):
    """Instructions that run once, and those of each loop, in the order of the code."""

    once: list[str]
    loops: list[Loop]


def read(text: str) -> Code:
    """The code of one kernel as nvdisasm prints it. Loops that only wait for a barrier are left out."""
    return _code(*instructions(text), SASS_JUMP)


def instructions(text: str) -> tuple[list[str], dict[str, int]]:
    """All instructions that nvdisasm printed, and which of them each label stands before."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := SASS_LABEL.match(line):
            labels[found[1]] = len(lines)
        elif found := SASS_LINE.match(line):
            lines.append(found[1])
    return lines, labels


def read_ptx(text: str) -> Code:
    """The same of PTX; instructions inside braces of inline assembly count as they stand."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text[text.find(".entry") :].splitlines():
        if found := PTX_LABEL.match(line):
            labels[found[1]] = len(lines)
        elif ";" in line:
            lines.append(line.strip())
    return _code(lines, labels, PTX_JUMP)


def _code(lines: Sequence[str], labels: dict[str, int], jump: re.Pattern[str]) -> Code:
    starts, after = _blocks(lines, labels, jump)
    bounds = [*starts, len(lines)]
    of_block = [list(lines[a:b]) for a, b in pairwise(bounds)]
    sink = len(starts)
    heads: dict[int, set[int]] = {}  # head of a loop -> the blocks that jump back to it
    for block in _reach(after, 0):
        for target in after[block]:
            if block not in _reach(after, 0, without=target):  # every way to `block` passes `target`
                heads.setdefault(target, set()).add(block)
    loops: list[Loop] = []
    inside = {sink}
    for head, ends in sorted(heads.items()):
        body = _body(after, head, ends)
        turn = [line for b in sorted(_turn(after, head, ends, body)) for line in of_block[b]]
        whole = [line for b in sorted(body) for line in of_block[b]]
        if any(_works(line) for line in whole):
            loops.append(Loop(turn, whole))
            inside |= body
    once = [line for b in sorted(_certain(after, 0, sink) - inside) for line in of_block[b]]
    return Code(once, loops)


def _blocks(
    lines: Sequence[str], labels: dict[str, int], jump: re.Pattern[str]
) -> tuple[list[int], list[set[int]]]:
    """First line of each block, and the blocks that may follow it; the block past the last one is the end."""
    cuts = {0, *labels.values()}
    for i, line in enumerate(lines):
        if jump.match(line) or END.match(line):
            cuts.add(i + 1)
    starts = sorted(c for c in cuts if c < len(lines))
    number = {start: i for i, start in enumerate(starts)} | {len(lines): len(starts)}
    after: list[set[int]] = []
    for i, start in enumerate(starts):
        last = lines[
            (starts[i + 1] if i + 1 < len(starts) else len(lines)) - 1 if start < len(lines) else start
        ]
        if found := jump.match(last):
            ways = {number[labels[found[3]]]}
            ways |= {i + 1} if found[1] or found[2] else set()
        elif found := END.match(last):
            ways = {len(starts)} | ({i + 1} if found[1] else set())
        else:
            ways = {i + 1}
        after.append(ways)
    return starts, [*after, set()]


def _reach(after: Sequence[set[int]], start: int, without: int = -1) -> set[int]:
    """Blocks that a way from `start` comes to, `start` included, none of which leads through `without`."""
    seen, todo = set(), [start]
    while todo:
        block = todo.pop()
        if block != without and block not in seen:
            seen.add(block)
            todo += after[block]
    return seen


def _certain(after: Sequence[set[int]], start: int, end: int) -> set[int]:
    """Blocks that every way from `start` to `end` passes, both included."""
    return {b for b in _reach(after, start) if b == end or end not in _reach(after, start, without=b)}


def _body(after: Sequence[set[int]], head: int, ends: set[int]) -> set[int]:
    """Blocks of a loop: those from which its end can be reached without its head, and the head."""
    body, todo = {head}, list(ends)
    while todo:
        block = todo.pop()
        if block not in body:
            body.add(block)
            todo += [b for b, ways in enumerate(after) if block in ways]
    return body


def _turn(after: Sequence[set[int]], head: int, ends: set[int], body: set[int]) -> set[int]:
    """Blocks that every turn of a loop passes."""
    back = len(after)
    within = [ways & body - {head} | ({back} if b in ends else set()) for b, ways in enumerate(after)]
    within = [ways if b in body else set() for b, ways in enumerate(within)]
    return _certain([*within, set()], head, back) - {back}


def _works(line: str) -> bool:
    """Whether an instruction computes or moves data: a loop without any waits."""
    if re.match(rf"{GUARD}(?:tcgen05|wgmma|mma|ld|st|cp|fma|add|mul)[.\w]*\.", line):
        return True  # PTX
    kind = kind_of(line)
    return kind not in ("integer, other", "barrier")


def opcode(line: str) -> str:
    """An instruction's name with its modifiers."""
    return re.sub(rf"^{GUARD}", "", line).split(" ")[0].rstrip(";")


def width(name: str) -> int:
    """Bytes that a thread moves by a load or store of this name."""
    if found := re.search(r"\.(128|64|32|[US]16|[US]8)(?=\.|$)", name):
        return {"128": 16, "64": 8, "32": 4, "16": 2, "8": 1}[found[1].lstrip("US")]
    return 4


def kind_of(line: str) -> str:
    """The class that an instruction is counted in: that of a load or store says how many bytes a thread moves."""
    name = opcode(line)
    base = name.split(".")[0]
    if base == "MUFU":
        return "exp" if ".EX2" in name else "other MUFU"
    if base in MEMORY:
        return f"{MEMORY[base]} {width(name)}"
    if base in MATRIX:
        return f"{MATRIX[base]} matrix"
    if base in ("UTMALDG", "UBLKCP", "UTMASTG"):
        return "bulk copy"
    return KIND_OF.get(base, "integer, other")


def counts(lines: Iterable[str]) -> dict[str, int]:
    """Instructions of each class."""
    return dict(sorted(Counter(map(kind_of, lines)).items()))


def fp32_lanes(lines: Iterable[str]) -> int:
    """fp32 operations of a thread: an instruction of Blackwell may do two."""
    return sum(1 + (opcode(t)[:5] in ("FFMA2", "FADD2", "FMUL2")) for t in lines if kind_of(t) == "fp32")


def shared_bytes(lines: Iterable[str]) -> int:
    """Bytes that a warp moves between registers and shared memory, if no two threads read the same."""
    total = 0
    for line in lines:
        name = opcode(line)
        base = name.split(".")[0]
        if base in ("LDS", "STS"):
            total += 32 * width(name)
        elif base in MATRIX:
            total += 128 * int((re.search(r"M(?:T)?88\.(\d)", name) or [0, 1])[1])
    return total


def tensor_flops(lines: Iterable[str]) -> dict[str, float]:
    """FLOPs of a warp's matrix instructions, by the type that they multiply: half, tf32 or fp64.

    A warp's part of a wgmma is a quarter. Shapes of tcgen05 are not in the machine code: `tcgen05_flops`."""
    total: Counter[str] = Counter()
    for line in lines:
        name = opcode(line)
        kind = "fp64" if name.startswith("DMMA") else "tf32" if ".TF32" in name else "half"
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
            total[kind] += 2 * int(found[1]) * int(found[2]) * int(found[3]) // 4
        elif found := re.match(r"[HD]MMA\.(16|8)(8)(16|8|4)\b", name):
            total[kind] += 2 * int(found[1]) * int(found[2]) * int(found[3])
    return dict(total)


def tcgen05_flops(lines: Iterable[str], whole: str) -> float:
    """FLOPs of a block's half-precision tcgen05.mma instructions among PTX `lines`; `whole` is all of the PTX.

    The instruction's descriptor holds N / 8 from bit 17 and M / 16 from bit 24 on; K is 16."""
    held = {m[1]: int(m[2]) for m in re.finditer(r"mov\.b32\s+(%r\d+), (\d+);", whole)}
    total = 0.0
    for line in lines:
        if found := re.search(r"tcgen05\.mma\.\S*kind::f16.*, (%r\d+), %p\d+", line):
            descriptor = held[found[1]]
            total += 2.0 * (descriptor >> 24 & 31) * 16 * (descriptor >> 17 & 63) * 8 * 16
    return total


def wrong_descriptors(sass: str) -> list[str]:
    """Instructions that take the upper word of a wgmma descriptor from a register that does not hold zero.

    ptxas 12.8, which Triton 3.6 and 3.7 bring along, makes such code where one shared buffer is read as tiles of two
    swizzles, as heads of 64 + 32 channels were. On an H100 every kernel with such an instruction was wrong (relative
    errors of 0.3 to 0.8) or read memory that is not there, and every other one was right; ptxas 13.0 compiles the
    same PTX to code that is right."""
    last: dict[str, str] = {}  # uniform register -> the instruction that wrote it last
    found = []
    for text in sass.splitlines():
        line = re.sub(r"/\*.*?\*/", "", text).strip().rstrip(" ;")
        upper = re.match(r"UIADD3\.X UR\d+, (UR\w+), (-?0x[0-9a-f]+), URZ, UP\d", line)
        if upper and (int(upper[2], 16) & 0xFFFFFFFF) >> 30:  # the two bits that say how a tile is swizzled
            zero = upper[1] == "URZ" or re.fullmatch(r"UMOV UR\d+, URZ", last.get(upper[1], ""))
            found += [] if zero else [line]
        written = re.match(r"(?:@!?U?P\w+ )?([A-Z0-9.]+) (?:UP\d, )?UR(\d+)\b", line)
        if written:
            last[f"UR{written[2]}"] = line
            if ".64" in written[1] or ".WIDE" in written[1]:
                last[f"UR{int(written[2]) + 1}"] = line
    return found
