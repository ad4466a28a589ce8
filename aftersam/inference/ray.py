"""Predicts a cohort on Ray: Ray Data distributes the scans to actors that hold the model. Needs the extra `ray`.

Ray handles retries, dead actors and back-pressure. Claims and existing masks prevent a second computation of a scan."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aftersam.config import checked
from aftersam.errors import plain_console, tell
from aftersam.inference.arguments import PredictArgs
from aftersam.inference.cohort import Cohort, Entry, case_of, cohort_of, mask_name
from aftersam.inference.pipeline import (
    Predicted,
    Report,
    finish_output,
    own_entries,
    predict_entries,
    remove_leftovers_beside,
)
from aftersam.inference.storage import Store, is_url, plain
from aftersam.inference.work import check_prompts, working
from aftersam.model.run_folder import find_runs

if TYPE_CHECKING:
    import numpy as np

OURS = ("case_id", "image", "mask", "series")
LARGEST_BLOCK = 50  # scans that an actor gets at once; reading and computing overlap within a block
RETRIES = 3  # of a block whose actor dies; Ray's default never ends where a scan kills its actor each time
INSTALL = "pip install 'aftersam[ray]'"


class SegmentScans:
    """Callable for `ray.data.Dataset.map_batches` that segments batches of scans. Each actor loads the model once.

        scans = ray.data.read_csv("scans.csv")      # the column image; case_id, mask, series if you like
        rows = scans.map_batches(
            SegmentScans, fn_constructor_kwargs={"output": "s3://bucket/masks", "model": "headneck"},
            batch_size=16, compute=ray.data.ActorPoolStrategy(size=4), num_gpus=1,
        )

    `options` are the fields of `aftersam.inference.arguments.PredictArgs`."""

    def __init__(
        self, output: str | Path, model: str | Path | tuple[str | Path, ...], **options: Any
    ) -> None:
        models = (model,) if isinstance(model, (str, Path)) else tuple(model)
        runs = tuple(find_runs(models))
        args = checked(PredictArgs(input="", output=output, model=runs, **options))
        cohort = Cohort([], Store(plain(output)), many=True, listed=True)
        self._open = contextlib.ExitStack()  # for as long as the actor lives
        self._work = self._open.enter_context(working(args, cohort))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Segment a batch. Returns its columns and case_id, image, mask, status (done, kept or failed) and reason."""
        columns = tuple(name for name in batch if name not in OURS)
        texts = {name: ["" if v is None else str(v) for v in values] for name, values in batch.items()}
        entries = [
            _entry({name: values[i] for name, values in texts.items()}, columns)
            for i in range(len(texts["image"]))
        ]
        work = dataclasses.replace(
            self._work, cohort=dataclasses.replace(self._work.cohort, entries=entries, columns=columns)
        )
        report = Report(plain_console(stderr=True), many=True, quiet=True)
        predict_entries(work, entries, report, patient=True)
        outcome = [report.outcome(work.cohort.store.path(entry.mask), entry) for entry in entries]
        own = {
            "case_id": [entry.case for entry in entries],
            "image": [entry.image for entry in entries],
            "mask": [entry.mask for entry in entries],
            "status": [status for status, _ in outcome],
            "reason": [reason for _, reason in outcome],
        }
        return {**{name: list(batch[name]) for name in columns}, **own}


def _entry(row: dict[str, str], columns: tuple[str, ...]) -> Entry:
    case = row.get("case_id") or case_of(row["image"])
    extra = tuple(row[name] for name in columns)
    return Entry(case, row["image"], row.get("mask") or mask_name(case), row.get("series") or None, extra)


def predict_on_ray(args: PredictArgs) -> Predicted:
    """`predict_files` on a Ray cluster. The actors read the scans and write the masks.

    Raises ValueError where Ray is not installed, and as `predict_files` does."""
    args = dataclasses.replace(checked(args), model=tuple(Path(_everywhere(run)) for run in args.model))
    found = dataclasses.replace(args, model=tuple(find_runs(args.model)))
    check_prompts(found)  # here, not in each actor
    cohort = cohort_of(found)
    if not cohort.many:
        raise ValueError(f"--engine ray is for several scans, but {args.input} is one scan")
    if args.review:
        raise ValueError("--review needs --engine local")
    report = Report(plain_console(stderr=True), many=True)
    entries = own_entries(args, cohort, report)
    if entries:
        with _cluster(args.address) as ray:
            _predict(ray, args, cohort, entries, report)
        remove_leftovers_beside(args, entries, cohort)  # of actors that died after they had written a mask
    finish_output(args, cohort)
    return report.result()


def _predict(ray: Any, args: PredictArgs, cohort: Cohort, entries: list[Entry], report: Report) -> None:
    """Segment the scans in actors, and report the outcome of each as its row returns."""
    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    for name in ("input", "output", "model", "engine", "manifest", "num_parts", "part_id"):
        options.pop(name)
    manifest = "off" if args.manifest == "off" or (args.manifest == "auto" and not cohort.listed) else "on"
    root = cohort.store.root
    output = str(root.absolute()) if isinstance(root, Path) else root
    arguments = {**options, "output": output, "model": args.model, "manifest": manifest}
    blocks = max(-(-len(entries) // LARGEST_BLOCK), min(len(entries), 4 * args.workers))
    carried = [dict(zip(cohort.columns, entry.extra, strict=True)) for entry in entries]
    items = [
        {
            **more,
            "case_id": e.case,
            "image": str(_everywhere(e.image)),
            "mask": e.mask,
            "series": e.series or "",
        }
        for e, more in zip(entries, carried, strict=True)
    ]
    scans = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        SegmentScans,
        fn_constructor_kwargs=arguments,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_gpus=args.gpus_per_worker,
        max_restarts=-1,
        max_task_retries=RETRIES,
    )
    missing = {entry.mask: entry for entry in entries}
    for row in scans.iter_rows():
        del missing[row["mask"]]
        path = cohort.store.path(row["mask"])
        if row["status"] == "failed":
            report.problem(row["reason"], Entry(row["case_id"], row["image"], row["mask"]))
            continue
        (report.written if row["status"] == "done" else report.kept).append(path)
        tell(report.console, f"{path}: {row['status']}")
    for entry in missing.values():
        report.problem(
            f"{entry.image}: Ray returned no result; the actor that computed it died or failed", entry
        )


def _everywhere(path: Path | str) -> Path | str:
    """An existing path as absolute path, valid in every process. A URL or a model's name is returned unchanged."""
    return path if is_url(path) or not Path(path).exists() else Path(path).absolute()


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster: the current one if there is one, else the one at `address`, else a local one."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"--engine ray needs Ray, which cannot be imported ({error}): {INSTALL}") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a scan that kills its actor each time fails its block alone
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # ray.init replaces the handler
        yield ray
    finally:
        ray.shutdown()
