"""The first minutes on new hardware, every second of them kept.    python -m benchmarks.first_contact --out DIR

Stages in the order of their worth: the machine, tests of the kernels, our kernels' times, their rivals', tiles,
slice attention, encoder, blocks, prediction, training, compiled rivals, counters, the sanitizer. Each number, test and
compilation is a line of DIR/lines.jsonl once it is known. A stage has a share of the seconds that are left; a unit of
work that hangs or crashes is named, and the stage goes on without it.

    --resume DIR     go on where a run was stopped
    --collect DIR    measure nothing: write the result, tiles and backends, figures and tables from the lines"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import contact_summary, harness, journal
from benchmarks.machine import ROOT

LINES, LOG, SUMMARY, CACHE = "lines.jsonl", "log.txt", "summary.txt", "cache.tar.gz"
LAST_S = 4.0  # of the budget, for the summary and the archive
STATUS = {"missing": "skipped", "failed": "failed", "out of memory": "failed"}  # of a stage by its subject's
LOST_CODE = 3  # of a process whose GPU context is lost: it goes on in a new one
LEAST_S = 12.0  # of a stage
SLACK_S = 1.5  # a process is asked to end so long before it is made to
MOST_BYTES = 15 * 2**20  # of a file that is brought back
TESTS = [f"tests/test_{name}.py" for name in (
    "axial_attention", "rel_pos_attention", "slice_attention", "lora_linear", "row_norm", "rel_terms", "lora_qkv",
    "graphs")]  # fmt: skip
KERNEL_SUBJECTS = ["axial", "axial_half", "lora", "rel_pos", "window"]
KERNELS = "axial_attention|row_norm|lora|rel_pos"  # in the names of their kernels
WHEEL_FOLDER = "CONTACT_WHEELS"  # names a folder of pure Python wheels, for packages that the machine lacks


class Stage(NamedTuple):
    name: str
    commands: list[list[str]] | Callable[[], list[list[str]]]
    """Run side by side, or what gives them when the stage begins; `{seconds}` becomes what each has."""
    weight: float
    """Of the seconds that are left, among the stages that are left."""
    unit_s: float = 25.0
    """A unit of work that takes longer is given up."""
    least_s: float = LEAST_S
    """With fewer seconds, nothing would be known at its end."""
    good: tuple[int, ...] = (0,)
    """Exit codes of a process that did what it should."""
    missing: str = ""
    """Why the stage cannot run here; empty where it can."""


def stages(lines: Path) -> list[Stage]:
    """What to run on this machine, most worth first."""
    gpu = torch.cuda.is_available()
    no_gpu = "" if gpu else "torch sees no GPU"
    python = sys.executable
    processes = max(2, min(12, (os.cpu_count() or 2) - 2))

    def bench(subjects: Sequence[str], *groups: str) -> list[list[str]]:
        what = ["quick", "--subjects", *subjects, "--groups", *groups] if subjects else ["machine"]
        return [[python, "-m", "benchmarks", *what, "--budget", "{seconds}", "--case", "0.4" if gpu else "0.2",
                 "--lines", str(lines)]]  # fmt: skip

    kernels = KERNEL_SUBJECTS
    tune = [
        [python, "-m", "axial_fusion.tune", op, "--head-dim", d, "--best", "5", "--lines", str(lines),
         "--seconds", "{seconds}"]
        for d in ("32", "96") for op in ("axial_attention", "axial_attention_backward")
    ]  # fmt: skip
    check = [python, "-m", "axial_fusion.self_check"]
    sanitizer, ncu = shutil.which("compute-sanitizer"), shutil.which("ncu")
    return [
        Stage("machine", bench([]), 20, least_s=30),
        Stage("tests", shared(TESTS, lines, processes), 75, good=(0, 1, 5)),
        Stage("ours", bench(kernels, "ours"), 55),
        Stage("rivals", bench(kernels, "eager"), 75),
        *[Stage(f"tiles {i}", [command], 14, missing=no_gpu) for i, command in enumerate(tune, 1)],
        Stage("slice attention", bench(["slice"], "ours", "eager"), 25),
        *[
            Stage(name, bench([name], "ours", "eager"), weight, 40)
            for name, weight in (("encoder", 30), ("transformer", 30), ("predict", 30), ("train_step", 25))
        ],
        Stage("compiled", bench([*kernels, "slice", "encoder", "transformer"], "compiled"), 60, 60, missing=no_gpu),
        Stage("counters", lambda: [
            [str(ncu), "--launch-count", "4", "-k", f"regex:{KERNELS}", python, "-m", "benchmarks", "quick",
             "--subjects", subject, "--groups", "ours", "--case", "0", "--lines", os.devnull]
            for subject in furthest(lines)
        ], 25, missing=no_gpu or ("" if ncu else "ncu is not installed")),
        Stage("sanitizer", [["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", str(sanitizer), *check]], 25,
              missing=no_gpu or ("" if sanitizer else "compute-sanitizer is not installed")),
    ]  # fmt: skip


def shared(tests: Sequence[str], lines: Path, processes: int) -> list[list[str]]:
    """Commands that share `tests` among processes."""
    return [
        [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.contact_tests", "-p", "no:cacheprovider", "-o",
         "filterwarnings=", "-o", "timeout=0", "--lines", str(lines), "--share", f"{i}/{processes}",
         "--seconds", "{seconds}", *tests]
        for i in range(processes)
    ]  # fmt: skip


def furthest(lines: Path) -> list[str]:
    """The three subjects whose kernels reach the least part of this machine's copy or matmul."""
    head, records = harness.read(lines)
    shares: dict[str, float] = {}
    for record in records:
        if (
            record["role"] == "ours"
            and "ms" in record
            and (name := record["subject"].replace(" ", "_")) in KERNEL_SUBJECTS
        ):
            share = harness.share(record, head["ceilings"]) or 1.0
            shares[name] = min(share, shares.get(name, share))
    return sorted(shares, key=lambda name: shares[name])[:3]


class Watched:
    """A process of a stage, and the unit of work that it is at since a time."""

    def __init__(self, command: list[str], until: float, folder: Path) -> None:
        self.command, self.until, self.folder = command, until, folder
        self.unit: dict[str, Any] | None = None
        self.since = 0.0
        self.start()

    def start(self) -> None:
        seconds = max(1.0, self.until - SLACK_S - time.time())
        command = [part.replace("{seconds}", f"{seconds:.1f}") for part in self.command]
        with (self.folder / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def told(self, entry: journal.Entry) -> None:
        self.unit, self.since = entry["begin"], time.time()

    def kill(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """Ask the system to kill this process when its parent ends, however that ends."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Of every process that a stage starts: where modules and Triton's cache are, what tests on a GPU need."""
    known = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), str(ROOT / "kernels"), *([known] if known else []), str(_site())]
    fixed = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TRITON_CACHE_DIR": str(_cache()),
        "AXIAL_FUSION_SELF_CHECK": "0",  # kernels are tested here, and are to run whatever is found
    }
    return {"OMP_NUM_THREADS": "8"} | os.environ | fixed


def _site() -> Path:
    """Where wheels that came along lie unpacked."""
    return Path(tempfile.gettempdir()) / "first-contact-site"


def _cache() -> Path:
    """Where kernels are compiled to. Triton keeps absolute paths in it, so an archive fits where this is the same."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(tempfile.gettempdir()) / "first-contact-triton")


def run(stage: Stage, folder: Path, until: float) -> tuple[str, str]:
    """Run a stage until the time `until` at most: its status (ok, failed, out of time) and why.

    A unit that hangs or crashes gets a line that says so, and its process is started again without it."""
    lines = folder / LINES
    tail = _tail(lines, lines.stat().st_size)
    commands = stage.commands() if callable(stage.commands) else stage.commands
    running = [Watched(command, until, folder) for command in commands]
    status, why = "ok", ""
    while running:
        time.sleep(0.05)
        ended = [w for w in running if w.process.poll() is not None]  # before its last lines are read
        at = {w.process.pid: w for w in running}
        for entry in next(tail):
            if entry.get("pid") in at:
                at[entry["pid"]].told(entry)
            elif "skipped" in entry:
                status = STATUS.get(entry["skipped"].get("status"), "out of time")
                why = entry["skipped"]["reason"]
        for watched in list(running):
            lost = _lost(watched, stage.unit_s, watched in ended)
            if time.time() >= until and watched not in ended:
                status, why = "out of time", f"stopped at {_named(watched.unit)}"
            elif lost:
                watched.kill()
                journal.append(lines, _given_up(watched.unit or {}, lost))
                watched.unit = None
                watched.start()
                continue
            elif watched not in ended:
                continue
            elif watched.process.returncode == LOST_CODE:
                watched.start()
                continue
            elif watched.process.returncode not in stage.good:
                status, why = "failed", f"code {watched.process.returncode}: {_last_said(folder)}"
            watched.kill()
            running.remove(watched)
    return status, why


def _lost(watched: Watched, unit_s: float, ended: bool) -> str:
    """Why the unit that a process is at is given up, or nothing."""
    if watched.unit is None:
        return ""
    if ended:
        return f"the process ended with code {watched.process.returncode}"
    return f"gave no result in {unit_s:.0f} s" if time.time() - watched.since > unit_s else ""


def _given_up(unit: dict[str, Any], why: str) -> dict[str, Any]:
    """The line of a unit that gave none itself."""
    if "test" in unit:
        return {**unit, "outcome": "failed", "error": why, "lost": True}
    return {**unit, "status": "failed", "reason": why, "lost": True}


def _last_said(folder: Path) -> str:
    said = (folder / LOG).read_text(errors="replace").strip().splitlines() or ["nothing was said"]
    return said[-1][:200]


def _named(unit: dict[str, Any] | None) -> str:
    if unit is None:
        return "the start of a process"
    return str(unit.get("test") or f"{unit.get('subject')}, {unit.get('name')}, {unit.get('provider')}")


def _tail(path: Path, position: int) -> Iterator[list[journal.Entry]]:
    """The whole lines from `position` on, those that were added since the last time."""
    while True:
        with path.open("rb") as file:
            file.seek(position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        position += len(whole)
        yield journal.parsed(whole)


def all_stages(chosen: Sequence[Stage], folder: Path, end: float) -> None:
    """Run the stages that `folder` does not know as done, each once and then, while seconds are left, what is left."""
    ended, again = ["ok", "failed"], False
    while True:
        done = {e["stage"] for e in journal.read(folder / LINES) if "stage" in e and e["status"] in ended}
        left = [stage for stage in chosen if stage.name not in done]
        if not left or (again and end - time.time() < 2 * LEAST_S):
            return
        for i, stage in enumerate(left):
            _one(stage, left[i:], folder, end)
        ended, again = [*ended, "skipped"], True


def _one(stage: Stage, left: Sequence[Stage], folder: Path, end: float) -> None:
    """Run a stage for its share of the seconds among the stages that are `left`; it leaves a line."""
    began = time.time()
    if stage.missing:
        status, why = "skipped", stage.missing
    elif end - began < 3 * SLACK_S:
        status, why = "out of time", "no seconds were left for it"
    else:
        share = stage.weight / sum(other.weight for other in left if not other.missing)
        until = min(end, began + max(stage.least_s, (end - began) * share))
        print(f"{stage.name}: at most {until - began:.0f} s", flush=True)
        status, why = run(stage, folder, until)
    seconds = round(time.time() - began, 1)
    journal.append(folder / LINES, {"stage": stage.name, "status": status, "why": why, "seconds": seconds})
    print(f"{stage.name}: {status} after {seconds:.0f} s{why and f': {why}'}", flush=True)


def pack(folder: Path) -> None:
    """The newest compiled kernels into one archive, as many as may come back; the log without its beginning if long."""
    log = folder / LOG
    if log.exists() and log.stat().st_size > MOST_BYTES:
        log.write_bytes(log.read_bytes()[-MOST_BYTES:])
    archive(folder / CACHE, MOST_BYTES)


def archive(file: Path, most_bytes: float = math.inf) -> int:
    """Write the kernels of Triton's cache, the newest first, and return how many; no file where there are none."""
    cache, size, count = _cache(), 0, 0
    kept = [p for p in cache.rglob("*") if p.suffix in (".cubin", ".json", ".so")] if cache.is_dir() else []
    if not kept:
        return 0
    with tarfile.open(file, "w:gz", compresslevel=1) as packed:
        for path in sorted(kept, key=lambda p: -p.stat().st_mtime):
            size += path.stat().st_size
            if size > most_bytes:
                break
            packed.add(path, path.relative_to(cache))
            count += path.suffix == ".cubin"
    return count


def unpack(archive: Path) -> None:
    """Kernels that an earlier run compiled. Triton takes those whose source, versions and target are the same."""
    with tarfile.open(archive) as packed:
        packed.extractall(_cache(), filter="data")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, or collect their lines. The exit code is 1 where something of ours is wrong."""
    began = time.time() - (journal.process_seconds() if argv is None else 0.0)
    parser = argparse.ArgumentParser(prog="benchmarks.first_contact", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="new folder for the lines and all else")
    where.add_argument("--resume", type=Path, metavar="DIR", help="folder of a run to go on with")
    where.add_argument("--collect", type=Path, metavar="DIR", help="folder of a run to write the result of")
    parser.add_argument(
        "--budget", type=float, default=420.0, help="seconds in all, from this command's start"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="of benchmarks.compile_ahead or an earlier run: kernels that need no compiling",
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages to run, by name")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="where --collect writes, with the repository's folders"
    )
    args = parser.parse_args(argv)
    if args.collect:
        return contact_summary.collect(args.collect / LINES, args.root)
    folder = args.out or args.resume
    lines = folder / LINES
    if args.out and lines.exists():
        parser.error(f"{folder} holds a run; go on with --resume {folder}, or name a new folder")
    if args.resume and not lines.exists():
        parser.error(f"{folder} holds no {LINES}; begin with --out {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    lines.touch()
    journal.mend(lines)
    chosen = stages(lines)
    unknown = set(args.only or ()) - {stage.name for stage in chosen}
    if unknown:
        parser.error(f"there is no stage {unknown.pop()!r}; there are {', '.join(s.name for s in chosen)}")
    if args.only:
        chosen = [stage for stage in chosen if stage.name in args.only]
    for wheel in Path(os.environ[WHEEL_FOLDER]).glob("*.whl") if WHEEL_FOLDER in os.environ else ():
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(_site())
    if args.cache:
        unpack(args.cache)
    all_stages(chosen, folder, began + args.budget - LAST_S)
    pack(folder)
    text = contact_summary.summary(journal.read(lines))
    (folder / SUMMARY).write_text(text)
    print(text)
    return contact_summary.wrong(journal.read(lines))


if __name__ == "__main__":
    sys.exit(main())
