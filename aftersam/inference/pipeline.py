"""Predicts the masks of many scans: while one scan is computed, the next is read and the previous one is written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aftersam.config import checked
from aftersam.errors import (
    SAID,
    Terminated,
    counted,
    one_line,
    plain_console,
    sentence,
    signals_noted,
    tell,
)
from aftersam.files import check_place, remove_leftovers
from aftersam.inference.arguments import PredictArgs
from aftersam.inference.background import Background, leave_behind
from aftersam.inference.claims import TakenOver, remove_old_leases
from aftersam.inference.cohort import Cohort, Entry, cohort_of
from aftersam.inference.manifest import FOLDER, ManifestArgs, code_of, manifest
from aftersam.inference.outputs import Job, write_outputs
from aftersam.inference.processes import POLL_SECONDS, part_of_this_process, sharing_processes
from aftersam.inference.storage import names_in, pack
from aftersam.inference.work import Work, row_of, rows_of, working
from aftersam.model.run_folder import find_runs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from aftersam.inference.sliding import Prediction

GRACE_SECONDS = 5.0  # to finish writing a mask after a signal


@dataclass(frozen=True)
class Predicted:
    """Outcome of a prediction, by scan."""

    written: tuple[Path | str, ...]
    """Masks that this process has written."""
    kept: tuple[Path | str, ...]
    """Masks that existed before, or that another process wrote."""
    problems: tuple[str, ...]
    """One line for each scan without a mask, with the reason."""
    elsewhere: int = 0
    """Number of scans that other processes are still computing."""

    @property
    def code(self) -> int:
        """Exit code: 0 where no scan failed, 1 where some scans have a mask, 3 where no scan has one."""
        return code_of(len(self.written) + len(self.kept) + self.elsewhere, len(self.problems))


def predict_files(args: PredictArgs) -> Predicted:
    """Segment every scan that `args` name. Where there are several, a failed scan is tried once more, then reported.

    While one scan is computed, the next is read and the previous one is written: at most three are in memory. Several
    processes share the scans, by parts or by claims. Under torchrun with device "auto", each process has one GPU.
    Raises ValueError where nothing can be predicted: no scans, a bad run, an output that exists."""
    from aftersam.device import find_device, keep_freed_memory

    keep_freed_memory(find_device(checked(args).device))  # before anything is read
    args = dataclasses.replace(args, model=tuple(find_runs(args.model)))
    cohort = cohort_of(args)
    if args.review and not cohort.many:
        raise ValueError(f"--review lists the scans of a folder, but {args.input} is one scan")
    if args.review and (cohort.archive or not cohort.store.local):
        raise ValueError(f"--review lists the masks of a folder on disk, but --output is {args.output}")
    report = Report(plain_console(stderr=True), cohort.many)
    processes = sharing_processes()
    entries = own_entries(args, cohort, report)
    if entries:
        if cohort.store.local is not None:
            where = cohort.store.local
            check_place(where if cohort.many else where / entries[0].mask, folder=cohort.many)
        with working(args, cohort) as work:
            if len(args.model) > 1:  # so that the user sees which folds are missing
                tell(report.console, f"mean of {len(args.model)} runs: {', '.join(map(str, args.model))}")
            predict_entries(work, entries, report)
    finish_output(args, cohort)
    if args.review and (folder := cohort.store.local) and folder.is_dir():  # the last process has all masks
        from aftersam.evaluation.review import write_review

        tell(report.console, write_review(folder, {(folder / e.mask).parent for e in cohort.entries}))
    processes.wait_for_the_others(len(report.problems), functools.partial(tell, report.console))
    return report.result()


def own_entries(args: PredictArgs, cohort: Cohort, report: Report) -> list[Entry]:
    """The scans of this process's part that have no mask yet."""
    if not cohort.many:
        mask = cohort.entries[0].mask
        if not args.overwrite and cohort.store.exists(mask):
            raise ValueError(f"{cohort.store.path(mask)} exists; --overwrite replaces it")
        if cohort.store.local is not None:
            remove_leftovers((cohort.store.local / mask).parent)
        return cohort.entries
    part = part_of_this_process(args.num_parts, args.part_id, os.environ)
    entries = cohort.entries
    if part.count > 1:
        if cohort.archive is not None:
            raise ValueError(
                f"--output {args.output} can be written by one process only, but there are {part.count} parts; "
                "give a folder or a URL"
            )
        entries = [entry for entry in entries if part.has(entry.case)]
        cohort.skipped[:] = [pair for pair in cohort.skipped if part.has(pair[0].case)]
        scans = counted(len(cohort.entries), "scan")
        said = f"part {part.index} of {part.count} ({part.source}): {len(entries)} of {scans}"
        tell(report.console, said)
    for entry, why in cohort.skipped:
        report.tell(f"{entry.image}: series {entry.series} is left out: {why}")
    names = remove_leftovers_beside(args, entries, cohort)
    if args.overwrite:
        return entries
    if cohort.archive is not None:
        names |= names_in(cohort.archive)
    return report.keep_finished(entries, names, cohort)


def remove_leftovers_beside(args: PredictArgs, entries: Sequence[Entry], cohort: Cohort) -> set[str]:
    """Delete what killed processes left beside the masks of `entries`, and return the names in the output.

    With `args.overwrite` claims stay and no name is returned: a living process may be replacing the mask."""
    if cohort.store.local is not None:
        for home in {os.path.dirname(os.path.join(cohort.store.base, entry.mask)) for entry in entries}:
            remove_leftovers(Path(home))
    if args.overwrite:
        return set()
    names = cohort.store.names()
    remove_old_leases(cohort.store, names)
    return names


def finish_output(args: PredictArgs, cohort: Cohort) -> None:
    """Add the skipped series to the manifest, and pack the masks where the output is an archive."""
    rows = rows_of(args, cohort) if cohort.skipped else None
    if rows is not None:
        for entry, why in cohort.skipped:
            rows.add(row_of(cohort, entry, "skipped", reason=why))
    archive, folder = cohort.archive, cohort.store.local
    if archive is None or folder is None or not folder.is_dir():
        return
    if (folder / FOLDER).is_dir():
        manifest(ManifestArgs(folder))
    pack(folder, archive)
    shutil.rmtree(folder)


def predict_entries(work: Work, entries: Sequence[Entry], report: Report, *, patient: bool = False) -> None:
    """Segment the scans `entries`. With `patient` also wait for scans that living processes have claimed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=report.console,
        transient=True,
        disable=report.quiet or not report.console.is_terminal,
    )
    with bar:
        _Line(work, report, bar, patient, deque((entry, 1) for entry in entries)).run()


Attempt = tuple[Entry, int]  # a scan, and the number of this attempt from 1


@dataclass
class _Line:
    """Pipeline of the three stages reading, computing and writing, with at most one scan in each."""

    work: Work
    report: Report
    bar: Progress
    patient: bool
    queue: deque[Attempt]
    reader: Background = field(default_factory=Background)
    writer: Background = field(default_factory=Background)
    others: list[Entry] = field(default_factory=list)  # claimed by other processes
    reading: tuple[Attempt, Future[Job | None]] | None = None
    writing: tuple[Attempt, Job, Future[str]] | None = None

    def run(self) -> None:
        """Segment all scans. A signal stops the loop after the mask that is being written."""
        try:
            while self._more():
                self._next()
        except (KeyboardInterrupt, Terminated) as stop:
            with signals_noted():
                if self.writing is not None:
                    wait([self.writing[2]], GRACE_SECONDS)
                    leave_behind(self.writing[2], _code(stop))
                    if self.writing[2].done():
                        self._collect()
                leave_behind(self.reading and self.reading[1], _code(stop))
            raise
        finally:
            self.report.elsewhere += len(self.others)
            self.reader.close()
            self.writer.close()

    def _more(self) -> bool:
        """Whether a scan is left for this process.

        Waits until the holder of every other claim is seen to be alive or dead; with `patient`, until each of those
        scans is finished or its holder is dead."""
        if self.reading is None and not self.queue:
            self._collect()  # a mask that could not be written puts its scan back into the queue
        while self.reading is None and not self.queue and self.others:
            waiting = [e for e in self.others if self.patient or not self._holder_lives(e)]
            if not waiting:
                break
            self.others = [e for e in self.others if e not in waiting]
            self.queue.extend((entry, 1) for entry in waiting)
            time.sleep(POLL_SECONDS)
        return self.reading is not None or bool(self.queue)

    def _holder_lives(self, entry: Entry) -> bool:
        return self.work.claims is not None and self.work.claims.alive(entry.mask)

    def _read_ahead(self) -> None:
        if self.queue:
            attempt = self.queue.popleft()
            self.reading = attempt, self.reader.submit(self.work.read, attempt[0])

    def _next(self) -> None:
        """Compute the scan that was read, while the next one is read, and start to write its mask."""
        if self.reading is None:
            self._read_ahead()
        assert self.reading is not None
        attempt, future = self.reading
        wait([future])
        self.reading = None
        self._read_ahead()
        with self._problems(attempt):
            job = future.result()
            if job is None:
                if self.work.finished(attempt[0]):
                    self.report.kept.append(self.work.cohort.store.path(attempt[0].mask))
                else:
                    self.others.append(attempt[0])
                return
            try:
                found = self._compute(job)
                self._collect()
            except BaseException:
                self.work.close(job)
                raise
            self.writing = attempt, job, self.writer.submit(self._write, job, found)

    def _compute(self, job: Job) -> Prediction:
        task = self.bar.add_task(one_line(job.scan.name), total=job.prepared.volume.array.shape[0])
        try:
            return self.work.compute(job, functools.partial(self.bar.advance, task))
        finally:
            self.bar.remove_task(task)

    def _write(self, job: Job, found: Prediction) -> str:
        finishing = functools.partial(self.work.finish, job, found)
        try:
            return write_outputs(
                self.work.args, self.work.names, dataclasses.replace(job, finishing=finishing), found
            )
        finally:
            self.work.close(job)

    def _collect(self) -> None:
        """Wait for the mask that is being written, and print its line."""
        if self.writing is None:
            return
        (attempt, job, future), self.writing = self.writing, None
        with self._problems(attempt):
            for line in future.result().splitlines():
                self.report.tell(line)
            self.report.written.append(self.work.cohort.store.path(job.entry.mask))

    @contextlib.contextmanager
    def _problems(self, attempt: Attempt) -> Iterator[None]:
        """Handle the errors of one attempt. Where there are several scans, one that fails does not stop the others.

        The scan is tried once more at the end; if it fails again, one line reports it. After a MemoryError there is no
        second attempt."""
        entry, number = attempt
        try:
            yield
        except TakenOver:
            self.others.append(entry)
        except SAID as error:
            said = self.work.said(error, entry)
            if not self.report.many:
                if said == sentence(error):
                    raise
                raise ValueError(said) from error
            if number == 1 and not isinstance(error, MemoryError):
                self.queue.append((entry, 2))
                return
            self.report.problem(said, entry)
            if self.work.rows is not None:
                self.work.rows.add(row_of(self.work.cohort, entry, "failed", reason=said, **self.work.made))


def _code(stop: KeyboardInterrupt | Terminated) -> int:
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@dataclass
class Report:
    """Prints the outcome of each scan and collects it for the caller."""

    console: Console
    many: bool
    written: list[Path | str] = field(default_factory=list)
    kept: list[Path | str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)  # mask -> reason why it is missing
    elsewhere: int = 0
    quiet: bool = False

    def keep_finished(self, entries: Sequence[Entry], names: set[str], cohort: Cohort) -> list[Entry]:
        """The scans without a mask. Prints how many masks exist."""
        self.kept.extend(cohort.store.path(entry.mask) for entry in entries if entry.mask in names)
        if self.kept:
            masks = counted(len(entries), "mask exists and is", "masks exist and are")
            where = cohort.archive or cohort.store.root
            tell(
                self.console,
                f"{where}: {len(self.kept)} of {masks} kept; --overwrite replaces existing masks",
            )
        return [entry for entry in entries if entry.mask not in names]

    def tell(self, text: str) -> None:
        """Print a line, unless the report is quiet."""
        if not self.quiet:
            tell(self.console, text)

    def problem(self, said: str, entry: Entry) -> None:
        """Record and print that a scan has no mask, for the reason `said`."""
        self.problems[entry.mask] = said
        self.tell(f"aftersam.predict: {said}")

    def outcome(self, mask: Path | str, entry: Entry) -> tuple[str, str]:
        """(status, reason) of a scan: done, kept or failed."""
        if entry.mask in self.problems:
            return "failed", self.problems[entry.mask]
        return ("done" if mask in self.written else "kept"), ""

    def result(self) -> Predicted:
        """The outcome of all scans. Prints how many scans other processes are computing."""
        if self.elsewhere:
            scans = counted(self.elsewhere, "scan is", "scans are")
            tell(self.console, f"{scans} being computed by other processes")
        return Predicted(tuple(self.written), tuple(self.kept), tuple(self.problems.values()), self.elsewhere)
