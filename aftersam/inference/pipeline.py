"""Scans on disk to masks on disk: while one scan is computed, the next is read and the last is written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from aftersam.config import Count, Small, checked
from aftersam.errors import SAID, naming, one_line, out_of_memory, plain_console, sentence, tell
from aftersam.files import DICOM, check_place, remove_leftovers
from aftersam.inference.jobs import beside, jobs_of, kept_labels, prompt_file
from aftersam.inference.outputs import Job, write_outputs
from aftersam.inference.processes import sharing_processes
from aftersam.model.run_folder import find_runs

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from aftersam.inference.feature_cache import Embeddings
    from aftersam.inference.inputs import PredictOptions
    from aftersam.inference.segmenter import Segmenter
    from aftersam.inference.sliding import Prediction


@dataclass(frozen=True)
class PredictArgs:
    input: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """A NIfTI file, a folder of them, or a folder that holds one DICOM series."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The mask's file name (.nii.gz, .nii, or .dcm for a DICOM series), or a folder for a folder of scans."""
    model: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["-m"])] = ()
    """Folder of a training run, or the name of a model that comes along. Several, or a folder of folds: the mean of
    their probabilities, at the cost of each."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights with the best validation DSC, or the final ones."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    prompt_labels: Path | None = None
    """For a model with prompts: the label file, or a folder of them by case, that prompts are drawn from."""
    labels: str | None = None
    """Comma-separated organs to keep; the others become background."""
    trust_intensities: bool = False
    """Take scans as they are whose values do not look like Hounsfield units: no warning, no refusal."""
    overwrite: bool = False
    """Replace masks that exist; a folder's finished masks are kept otherwise."""
    preview: bool = True
    """Leave a PNG of the mask over the scan beside each mask."""
    batch_size: Count = 8
    """Slices and groups computed at once; less needs less memory."""
    keep: Small = 1
    """Middle slices kept of each group: K needs about 1/K of the fusion, with less context on one side."""
    overlap: Literal["none", "average"] = "none"
    """average: average the logits of all groups that contain a slice; each of them decodes it."""
    tta: Literal["none", "mirror"] = "none"
    """mirror: the mean with the scan's mirror image, left and right labels swapped; twice the work."""
    parts: Literal["main", "all"] = "main"
    """main: drop small disconnected parts, below a fifth of the largest, of organs that are one piece in every training
    label. all: keep them."""
    roi: Literal["scan", "body"] = "scan"
    """body: slices of air before and after the body are background without being computed."""
    embeddings: Path | None = None
    """Folder for what the encoder makes of each slice: found there, or written for the next prediction."""
    compile: bool = False
    """Compile the model first, which takes a minute and pays back over many scans."""
    graph: bool = True
    """Replay each step as a CUDA graph on a GPU. --no-graph launches kernels one by one, which takes less memory."""
    save_probabilities: bool = False
    """Leave CASE.probabilities.npy beside each mask: float16 (classes, background first, x, y, z)."""
    confidence: bool = False
    """Leave CASE.confidence.nii.gz beside each mask: 1 where all groups that contain a slice agree, 0 where
    none does. Each of them decodes the slice; the mask stays the same."""
    statistics: bool = False
    """Leave each organ's volume in ml and mean HU as CASE.statistics.json beside each mask."""
    review: bool = False
    """List a folder's scans in review.csv of --output by the DSC that their probabilities let expect, lowest first."""
    timings: bool = False
    """Print each stage's seconds, slices a second and peak memory, and leave them as JSON beside each mask."""


@dataclass(frozen=True)
class Predicted:
    """What became of the scans that were asked for."""

    written: tuple[Path, ...]
    """Masks of this prediction."""
    kept: tuple[Path, ...]
    """Masks that existed before; their scans were not predicted again."""
    problems: tuple[str, ...]
    """Why a scan of a folder has no mask, one line a scan."""


def predict_files(args: PredictArgs) -> Predicted:
    """Segment every scan that `args` name; a scan of a folder that fails is reported and the others are done.

    While one scan is computed the next is read and the last is written, so three are in memory at most. Under
    torchrun each process takes its share of a folder, on a GPU of its own with the device "auto".
    Raises ValueError where nothing can be done: no scans, a bad run, an output that exists."""
    from aftersam.device import find_device

    find_device(checked(args).device)  # before anything is read
    args = dataclasses.replace(args, model=tuple(find_runs(args.model)))
    prompts = [] if args.prompt_labels is None else [args.prompt_labels]
    jobs, folder = jobs_of(
        args.input, args.output, also_read=[*args.model, *prompts], overwrite=args.overwrite
    )
    if args.review and not folder:
        raise ValueError(f"--review lists the scans of a folder, but {args.input} is one scan")
    report = _Report(plain_console(stderr=True), folder)
    processes = sharing_processes()
    jobs = processes.share(jobs)
    for home in {mask.parent for _, mask in jobs}:
        remove_leftovers(home)
    if not args.overwrite:
        jobs = report.keep_finished(jobs, args.output)
    if jobs:
        check_place(args.output if folder else jobs[0][1], folder=folder)
        _predict(args, jobs, report)
    if args.review and args.output.is_dir():  # the last process to come here has all masks
        from aftersam.evaluation.review import write_review

        tell(report.console, write_review(args.output))
    processes.wait_for_the_others(len(report.problems), functools.partial(tell, report.console))
    return Predicted(tuple(report.written), tuple(report.kept), tuple(report.problems))


def _predict(args: PredictArgs, jobs: Sequence[tuple[Path, Path]], report: _Report) -> None:
    """Segment the scans of `jobs`, (scan, mask) pairs."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    work = _work(args)
    if len(args.model) > 1:  # shows which folds are not there yet
        tell(report.console, f"mean of {len(args.model)} runs: {', '.join(map(str, args.model))}")
    name = TextColumn("{task.description}", markup=False)
    with (
        Progress(
            name,
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=report.console,
            transient=True,
            disable=not report.console.is_terminal,
        ) as bar,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
    ):
        upcoming = [reader.submit(work.read, *pair) for pair in jobs[:1]]
        writing: list[tuple[Path, Future[str]]] = []
        for index, (scan, mask) in enumerate(jobs):
            reading = upcoming.pop()
            upcoming = [reader.submit(work.read, *later) for later in jobs[index + 1 : index + 2]]
            if os.path.exists(mask) and not args.overwrite:  # by now, from another process
                report.kept.append(mask)
                continue
            with report.problems_of_one_scan():
                job = reading.result()
                task = bar.add_task(one_line(scan.name), total=job.prepared.volume.array.shape[0])
                try:
                    found = work.compute(job, functools.partial(bar.advance, task))
                finally:
                    bar.remove_task(task)
                report.collect(writing)
                writing = [(mask, writer.submit(write_outputs, args, work.names, job, found))]
        report.collect(writing)


@dataclass(frozen=True)
class _Report:
    """What the user is told, and what the caller gets."""

    console: Console
    folder: bool
    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def keep_finished(self, jobs: Sequence[tuple[Path, Path]], output: Path) -> list[tuple[Path, Path]]:
        """The jobs without a mask; the number of the others is told."""
        self.kept.extend(mask for _, mask in jobs if os.path.exists(mask))  # False for a name too long
        if self.kept:
            text = f"{output}: {len(self.kept)} of {len(jobs)} masks exist and are kept; --overwrite replaces them"
            tell(self.console, text)
        finished = set(self.kept)
        return [job for job in jobs if job[1] not in finished]

    @contextlib.contextmanager
    def problems_of_one_scan(self) -> Iterator[None]:
        """One bad scan of a folder costs a line, not the others."""
        try:
            yield
        except SAID as error:
            if not self.folder:
                raise
            self.problems.append(sentence(error))
            tell(self.console, f"aftersam.predict: {sentence(error)}")

    def collect(self, writing: list[tuple[Path, Future[str]]]) -> None:
        """Wait for masks to be written and tell of each."""
        with self.problems_of_one_scan():
            while writing:
                mask, future = writing.pop()
                for line in future.result().splitlines():
                    tell(self.console, line)
                self.written.append(mask)


@dataclass(frozen=True)
class _Work:
    """What is done to each scan before it is written: read and compute, each in a thread of its own."""

    args: PredictArgs
    segmenter: Segmenter
    options: PredictOptions
    embeddings: tuple[Embeddings, ...]  # of each model, or none
    names: dict[int, str]  # labels that masks keep

    def read(self, scan: Path, mask: Path) -> Job:
        """Read one scan, and its prompts, and bring them to the model's spacing."""
        from aftersam.data.intensities import check_intensities
        from aftersam.data.volume import read_image, read_labels
        from aftersam.inference.timings import Timings

        began = time.monotonic()
        timings = Timings(self.segmenter.device if self.args.timings else None)
        needs = self.segmenter.config.model.prompts
        prompts, facts = None, dict[str, str]()
        with naming(scan):
            check_place(mask)
            with timings.stage("read"):
                volume = read_image(scan)
                check_intensities(volume, trusted=self.args.trust_intensities)
                if mask.suffix == DICOM:  # what cannot be written is known before it is computed
                    from aftersam.data.dicom_segmentation import check_segmentation

                    check_segmentation(scan, self.names)
                if self.args.prompt_labels is not None and needs != "none":
                    prompts = read_labels(prompt_file(self.args.prompt_labels, scan), like=volume)
                    facts = {"prompted": needs}  # who scores this mask must know
            prepared = self.segmenter.prepare(volume, prompt_labels=prompts, timings=timings)
        return Job(scan, mask, prepared, facts, began)

    def compute(self, job: Job, progress: Callable[[int], None]) -> Prediction:
        """Segment one scan. Raises MemoryError where the memory does not suffice."""
        prepared, batch = job.prepared, self.args.batch_size
        try:
            if self.embeddings:
                scans = zip((prepared.scan, *prepared.more), self.embeddings, strict=True)
                with prepared.scan.timings.stage("encode"):
                    scan, *more = (
                        dataclasses.replace(scan, stored=store.of(scan.hu, scan.box, batch_size=batch))
                        for scan, store in scans
                    )
                prepared = prepared._replace(scan=scan, more=tuple(more))
            with self._probabilities(job) as probabilities:
                return self.segmenter.segment(
                    prepared,
                    options=self.options,
                    main_parts=self.args.parts == "main",
                    probabilities=probabilities,
                    progress=progress,
                )
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            detail = (str(error) or "no more is known").splitlines()[0]
            raise MemoryError(
                f"{job.scan}: memory ran out; a --batch-size below {batch} needs less ({detail})"
            ) from None

    @contextlib.contextmanager
    def _probabilities(self, job: Job) -> Iterator[np.ndarray | None]:
        """The file that the scan's probabilities go to as they come, if they are wanted."""
        if not self.args.save_probabilities:
            yield None
            return
        from aftersam.data.volume import open_probabilities

        job.mask.parent.mkdir(parents=True, exist_ok=True)
        path = beside(job.mask, ".probabilities.npy")
        with open_probabilities(path, job.prepared.volume, len(self.segmenter.labels) + 1) as array:
            yield array


def _work(args: PredictArgs) -> _Work:
    """The model of the run and the options that `args` ask for."""
    from aftersam.inference.segmenter import load

    segmenter = load(
        args.model, checkpoint=args.checkpoint, device=args.device, compiled=args.compile, graphs=args.graph
    )
    names = kept_labels(args.labels, segmenter.labels)
    return _Work(args, segmenter, _options(args, segmenter), _embeddings(args, segmenter), names)


def _options(args: PredictArgs, segmenter: Segmenter) -> PredictOptions:
    """The options in `args`. Raises ValueError on a keep that no group has, or an organ of one side alone."""
    from aftersam.data.dataset import mirror_pairs
    from aftersam.inference.inputs import PredictOptions

    options = PredictOptions(
        keep=args.keep,
        average=args.overlap == "average",
        body=args.roi == "body",
        confidence=args.confidence,
        expected_dsc=args.review,
        batch_size=args.batch_size,
    )
    for run in (segmenter, *segmenter.folds):
        options.check(run.config.model.num_slices)
    if args.tta == "mirror":
        options = dataclasses.replace(options, label_swap=mirror_pairs(segmenter.labels))
    return options


def _embeddings(args: PredictArgs, segmenter: Segmenter) -> tuple[Embeddings, ...]:
    if args.embeddings is None:
        return ()
    from aftersam.inference.feature_cache import Embeddings

    return tuple(
        Embeddings(
            args.embeddings, run.model, image_size=run.config.model.image_size, precision=run.precision
        )
        for run in (segmenter, *segmenter.folds)
    )
