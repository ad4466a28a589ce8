"""Merge the rows of a prediction into one table.    aftersam manifest MASKS

Each process of `predict` writes rows to a file in MASKS/manifest. This command merges the files into
MASKS/manifest.csv, and into MASKS/manifest.parquet where pyarrow is installed. The table has one row for each scan: the
last one whose mask exists."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import socket
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from aftersam.errors import counted, one_line, plain_console, run_command, tell
from aftersam.inference.storage import Store, plain

FOLDER = "manifest"
ROWS_A_FILE = 100  # at a URL, where each new row rewrites the whole file
FIRST = ("case_id", "image", "mask", "status", "reason", "confidence", "expected_dsc")
LAST = ("model", "version", "sha256", "finished", "worker")
ENTIRE_DONE, WITH_FAILURES, NOTHING_DONE = 0, 1, 3  # exit codes; 2 means that the command was refused


class Rows:
    """The manifest rows of this process, in files that no other process writes. Safe to use from any thread."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._lines: list[bytes] = []
        self._number = 0
        self._lock = threading.Lock()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and return when it is in the file. Raises OSError or ValueError where it cannot be written."""
        finished = datetime.now(UTC).isoformat(timespec="microseconds")
        line = json.dumps({**row, "finished": finished, "worker": self.worker}).encode() + b"\n"
        with self._lock:
            name = f"{FOLDER}/{self.worker}-{self._number}.jsonl"
            if self.store.local is not None:
                path = self.store.local / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                return
            self._lines.append(line)
            self.store.write(name, b"".join(self._lines))
            if len(self._lines) == ROWS_A_FILE:
                self._lines, self._number = [], self._number + 1


@dataclass(frozen=True)
class ManifestArgs:
    output: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="MASKS")]
    """The folder or the URL that was the --output of predict."""


@dataclass(frozen=True)
class Merged:
    """The merged rows of a cohort, one for each scan."""

    rows: tuple[dict[str, Any], ...]
    unfinished: int
    """Number of scans whose row says done but whose mask is missing: the process died or the mask was deleted."""
    files: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of scans by status."""
        return dict(Counter(row["status"] for row in self.rows))

    @property
    def code(self) -> int:
        """Exit code of the command, as `code_of` says."""
        return code_of(self.counts.get("done", 0), self.counts.get("failed", 0))


def code_of(done: int, failed: int) -> int:
    """Exit code: 0 where no scan failed, 1 where some scans have a mask, 3 where no scan has one."""
    if not failed:
        return ENTIRE_DONE
    return WITH_FAILURES if done else NOTHING_DONE


def manifest(args: ManifestArgs) -> Merged:
    """Merge the rows of all processes. Raises ValueError where there are none."""
    store = Store(plain(args.output))
    names = store.names()
    rows, unfinished = _rows(store, names)
    if not rows and not unfinished:
        raise ValueError(
            f"{args.output} has no rows of a prediction in {FOLDER}/; predict --manifest on leaves them"
        )
    table = _table(rows)
    files = {"manifest.csv": _csv(table)}
    if (parquet := _parquet(table)) is not None:
        files["manifest.parquet"] = parquet
    for name, data in files.items():
        store.write(name, data)
    return Merged(tuple(rows), unfinished, tuple(str(store.path(name)) for name in files))


def _rows(store: Store, names: set[str]) -> tuple[list[dict[str, Any]], int]:
    """(last row of each case, sorted by case; number of cases whose only rows are of a missing mask)."""
    found: dict[str, dict[str, Any]] = {}
    lost = set()
    for name in sorted(n for n in names if n.startswith(f"{FOLDER}/") and n.endswith(".jsonl")):
        for line in store.read(name).splitlines():
            try:
                row = json.loads(line)
                case, order = row["case_id"], (row["status"] == "done", row["finished"])
            except (ValueError, KeyError, TypeError):  # half a line: the process was killed while writing
                continue
            if row["status"] == "done" and row["mask"] not in names:
                lost.add(case)
            elif case not in found or order > (found[case]["status"] == "done", found[case]["finished"]):
                found[case] = row
    return [found[case] for case in sorted(found)], len(lost - found.keys())


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """{column name: values}: our columns first, then the columns copied from the list of scans."""
    flat = []
    for row in rows:
        cells = {}
        for key, value in row.items():
            if isinstance(value, dict):
                cells.update({f"{key}_{name}": inner for name, inner in value.items()})
            else:
                cells[key] = value
        flat.append(cells)
    keys = dict.fromkeys(key for cells in flat for key in cells)
    ours = [key for prefix in ("seconds_", "voxels_", "ml_") for key in keys if key.startswith(prefix)]
    order = dict.fromkeys([*FIRST, *ours, *LAST, *keys])
    return {key: [cells.get(key) for cells in flat] for key in order}


def _csv(table: Mapping[str, list[Any]]) -> bytes:
    """The table as CSV. A quote before =, +, - and @ keeps spreadsheets from reading a cell as a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in [list(table), *zip(*table.values(), strict=True)]:
        cells = [one_line(cell) if isinstance(cell, str) else cell for cell in row]
        writer.writerow(
            [f"'{c}" if isinstance(c, str) and c.startswith(("=", "+", "-", "@")) else c for c in cells]
        )
    return text.getvalue().encode()


def _parquet(table: Mapping[str, list[Any]]) -> bytes | None:
    """The table as Parquet. None where pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return None
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(dict(table)), sink)
    return sink.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("manifest", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = tyro.cli(ManifestArgs, args=argv, description=__doc__)
    merged = manifest(args)
    counts = ", ".join(f"{number} {status}" for status, number in sorted(merged.counts.items()))
    lost = f"; {merged.unfinished} were not finished" if merged.unfinished else ""
    scans = counted(len(merged.rows), "scan")
    tell(plain_console(), f"{' and '.join(merged.files)}: {scans}: {counts or 'none'}{lost}")
    for row in merged.rows:
        if row["status"] == "failed":
            tell(plain_console(stderr=True), one_line(f"{row['case_id']}: {row['reason']}"))
    return merged.code


if __name__ == "__main__":
    sys.exit(main())
