"""The steps of one scan of a cohort: claim, fetch, read, compute, and finish with a row in the manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aftersam.errors import naming, out_of_memory, sentence
from aftersam.files import DICOM, check_place, workplace
from aftersam.inference.arguments import PredictArgs
from aftersam.inference.background import Background
from aftersam.inference.claims import Claims, TakenOver
from aftersam.inference.cohort import Cohort, Entry
from aftersam.inference.jobs import beside, kept_labels, prompt_file
from aftersam.inference.manifest import Rows
from aftersam.inference.outputs import Job
from aftersam.inference.storage import fetched, is_url
from aftersam.model.run_folder import model_id, read_run

if TYPE_CHECKING:
    import numpy as np

    from aftersam.inference.feature_cache import Embeddings
    from aftersam.inference.inputs import PredictOptions
    from aftersam.inference.segmenter import Segmenter
    from aftersam.inference.sliding import Prediction

CHUNK = 2**20


@dataclass(frozen=True)
class Work:
    """Model and options of a prediction, with the steps of each scan. `read` and `compute` run in different threads."""

    args: PredictArgs
    cohort: Cohort
    segmenter: Segmenter
    options: PredictOptions
    embeddings: tuple[Embeddings, ...]  # one for each model; empty without an embedding cache
    names: dict[int, str]  # labels that masks contain
    claims: Claims | None  # None for a single scan
    rows: Rows | None
    model: Future[str]
    """Id of the model, computed in the background."""
    temporary: Path  # for files that are downloaded or uploaded

    def read(self, entry: Entry) -> Job | None:
        """Claim one scan, read it and the labels for its prompts, and resample them to the model's spacing.

        Returns None where another process has claimed the scan or finished it."""
        if self.cohort.store.local is not None:
            with naming(entry.image):
                check_place(self.cohort.store.local / entry.mask)
        if self.claims is None:
            return self._read(entry)
        if self.finished(entry) or not self.claims.take(entry.mask):
            return None
        try:
            job = None if self.finished(entry) else self._read(entry)
        except BaseException:
            self.claims.release(entry.mask)
            raise
        if job is None:
            self.claims.release(entry.mask)
        return job

    def finished(self, entry: Entry) -> bool:
        """Whether the scan has a mask that is to be kept."""
        return not self.args.overwrite and self.cohort.store.exists(entry.mask)

    def _read(self, entry: Entry) -> Job:
        from aftersam.data.intensities import check_intensities
        from aftersam.data.volume import read_image, read_labels
        from aftersam.inference.timings import Timings

        began = time.monotonic()
        timings = Timings(self.segmenter.device if self.args.timings else None)
        prompts, facts = None, dict(self.made)
        with self._home(entry) as home:
            with timings.stage("read"):
                scan = fetched(entry.image, home / "in") if is_url(entry.image) else Path(entry.image)
            with naming(scan):
                with timings.stage("read"):
                    volume = read_image(scan, series=entry.series)
                    check_intensities(volume, trusted=self.args.trust_intensities)
                    if entry.mask.endswith(DICOM):  # before computing a mask that could not be written
                        from aftersam.data.dicom_segmentation import check_segmentation

                        check_segmentation(scan, self.names)
                    if self.args.prompt_labels is not None:
                        prompts = read_labels(
                            prompt_file(self.args.prompt_labels, scan, entry.case), like=volume
                        )
                        # scores of a prompted mask must say so
                        facts |= {"prompted": self.segmenter.config.model.prompts}
                    checksum = _sha256(scan) if self.rows is not None else None
                prepared = self.segmenter.prepare(volume, prompt_labels=prompts, timings=timings)
        store = self.cohort.store
        mask = home / "out" / Path(entry.mask).name if store.local is None else store.local / entry.mask
        return Job(scan, mask, prepared, facts, began, entry, checksum, str(store.path(entry.mask)))

    @contextlib.contextmanager
    def _home(self, entry: Entry) -> Iterator[Path]:
        """A folder for the downloads and uploads of a scan. It is kept until `close`, or removed on an error."""
        if not is_url(entry.image) and self.cohort.store.local is not None:
            yield self.temporary
            return
        home = self._home_of(entry)
        for name in ("in", "out"):
            (home / name).mkdir(parents=True)
        try:
            yield home
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise

    def _home_of(self, entry: Entry) -> Path:
        return self.temporary / hashlib.sha256(entry.mask.encode()).hexdigest()[:16]

    def close(self, job: Job) -> None:
        """Remove a scan's downloaded files and give back its claim."""
        shutil.rmtree(self._home_of(job.entry), ignore_errors=True)
        if self.claims is not None:
            self.claims.release(job.entry.mask)

    def said(self, error: BaseException, entry: Entry) -> str:
        """The sentence of an error, with the scan's URL in place of the path of the downloaded copy."""
        name = entry.image.partition("::")[0].rpartition("/")[2]
        copy = re.escape(str(self.temporary)) + r"/\w+/in/" + re.escape(name)
        return re.sub(copy, lambda _: entry.image, sentence(error))

    def finish(self, job: Job, found: Prediction, voxels: dict[int, int], temporary: Path) -> None:
        """Upload the scan's files where the output is a URL, and add the scan's row to the manifest.

        Called before the mask gets its name. The mask comes last, so that no mask is without a row. Raises TakenOver
        where another process has taken over the scan."""
        entry, store = job.entry, self.cohort.store
        if self.claims is not None and not self.claims.keeps(entry.mask):
            raise TakenOver
        if store.local is None:
            folder = entry.mask.rpartition("/")[0]
            for file in sorted(path for path in job.mask.parent.iterdir() if path.is_file()):
                store.put(file, f"{folder}/{file.name}".lstrip("/"))
        if self.rows is not None:
            self.rows.add(self._row(job, found, voxels))
        if store.local is None:
            store.put(temporary, entry.mask)

    @property
    def made(self) -> dict[str, str]:
        """The model's id and the package's version, for the manifest and the JSON beside each mask."""
        from aftersam import __version__

        return {"model": self.model.result(), "version": __version__}

    def _row(self, job: Job, found: Prediction, voxels: Mapping[int, int]) -> dict[str, Any]:
        import numpy as np

        from aftersam.evaluation.review import mean_expected
        from aftersam.evaluation.statistics import number

        ml = abs(float(np.linalg.det(job.prepared.volume.affine[:3, :3]))) / 1000
        organs = {name: voxels.get(value, 0) for value, name in self.names.items()}
        confidence = expected = None
        if found.confidence is not None and any(organs.values()):
            confidence = round(float(found.confidence[found.labels > 0].mean() / 255), 4)
        if found.expected_dsc is not None:
            expected = round(mean_expected(number(found.expected_dsc[v - 1]) for v in self.names), 4)
        stages = {name: round(value, 4) for name, value in job.prepared.scan.timings.seconds.items()}
        total = round(time.monotonic() - job.began, 4)
        return row_of(
            self.cohort,
            job.entry,
            "done",
            seconds={"total": total, **stages},
            voxels=organs,
            ml={name: round(count * ml, 4) for name, count in organs.items()},
            confidence=confidence,
            expected_dsc=expected,
            sha256=job.checksum,
            **self.made,
        )

    def compute(self, job: Job, progress: Callable[[int], None]) -> Prediction:
        """Segment one scan. Raises MemoryError where memory runs out."""
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
        """Memory map of the file for the scan's probabilities, or None if they are not to be saved."""
        if not self.args.save_probabilities:
            yield None
            return
        from aftersam.data.volume import open_probabilities

        job.mask.parent.mkdir(parents=True, exist_ok=True)
        path = beside(job.mask, ".probabilities.npy")
        with open_probabilities(path, job.prepared.volume, len(self.segmenter.labels) + 1) as array:
            yield array


def row_of(cohort: Cohort, entry: Entry, status: str, **facts: Any) -> dict[str, Any]:
    """A row of the manifest: the list's other columns, the scan, its `status` and further `facts`."""
    carried = dict(zip(cohort.columns, entry.extra, strict=True))
    series = {"series": entry.series} if entry.series else {}
    known = {"case_id": entry.case, "image": entry.image, **series, "mask": entry.mask}
    return {**carried, **known, "status": status, **facts}


def rows_of(args: PredictArgs, cohort: Cohort) -> Rows | None:
    """The manifest rows of this process, or None if `args` ask for no manifest."""
    wanted = args.manifest == "on" or (args.manifest == "auto" and cohort.listed)
    return Rows(cohort.store) if wanted else None


@contextlib.contextmanager
def working(args: PredictArgs, cohort: Cohort) -> Iterator[Work]:
    """Load the model and the options that `args` ask for. At the end the claims are given back."""
    from aftersam.inference.segmenter import load

    check_prompts(args)
    thread = Background()
    model = thread.submit(model_id, args.model, args.checkpoint)
    thread.close()
    segmenter = load(
        args.model, checkpoint=args.checkpoint, device=args.device, compiled=args.compile, graphs=args.graph
    )
    names = kept_labels(args.labels, segmenter.labels)
    options, embeddings = _options(args, segmenter), _embeddings(args, segmenter)
    claims = Claims(cohort.store) if cohort.many else None
    rows = rows_of(args, cohort)
    with workplace(Path(tempfile.gettempdir())) as temporary:
        try:
            yield Work(
                args,
                cohort,
                segmenter,
                options,
                embeddings,
                names,
                claims,
                rows,
                model,
                temporary,
            )
        finally:
            if claims is not None:
                claims.release_all()


def check_prompts(args: PredictArgs) -> None:
    """Raises ValueError where the model needs labels for its prompts and none are given, or takes no prompts."""
    run = args.model[0]
    needs = read_run(run)[0].model.prompts
    if needs == "none" and args.prompt_labels is not None:
        raise ValueError(
            f"{run} was trained without prompts, so leave out --prompt-labels {args.prompt_labels}"
        )
    if needs != "none" and args.prompt_labels is None:
        raise ValueError(
            f"{run} was trained with prompts={needs}; give the labels that they are drawn from (--prompt-labels)"
        )


def _sha256(scan: Path) -> str:
    """SHA-256 of a file's content, or of the names, sizes and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in scan.iterdir() if p.is_file()) if scan.is_dir() else [scan]:
        if scan.is_dir():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _options(args: PredictArgs, segmenter: Segmenter) -> PredictOptions:
    """The options in `args`. Raises ValueError where keep is above a group's size, or an organ has no mirror pair."""
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
