"""A training run: steps until its limit, with validations and checkpoints on the way, and the files that it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import rich.progress
import torch
from torch import nn

from aftersam.data.stored_features import StoredScan
from aftersam.errors import counted, naming, signals_noted, stopped
from aftersam.evaluation.figures import loss_figure
from aftersam.files import read_json, write_json
from aftersam.model.aftersam import AfterSAM
from aftersam.model.build import build_aftersam, load_weights
from aftersam.model.layers import put_channels_last
from aftersam.training.arguments import Plan, TrainArgs, make_plan
from aftersam.training.checkpoint import load_moments, save_training, save_weights, trim_history
from aftersam.training.schedule import Progress, average_share, group_batches, learning_rate, steps_in_epoch
from aftersam.training.setup import (
    Processes,
    Scans,
    build_model,
    own_folder,
    read_scans,
    start_processes,
    store_features,
    with_tokens,
    write_facts,
)
from aftersam.training.sharding import shard
from aftersam.training.step import Batch, Learner, build_optimizer
from aftersam.training.validation import calibrate, mean, validate_scans
from aftersam.training.warm_start import table


@dataclass(frozen=True)
class TrainResult:
    """What a training left."""

    run: Path
    steps: int
    mean_dsc: float | None
    """Of the best validation, which best.safetensors is of; None where nothing was validated."""
    minutes: float
    """Of the steps and validations, those before a resume included."""
    cpu_minutes: float
    """Processor minutes of the same, of this process and since the resume."""


def train(args: TrainArgs) -> TrainResult:
    """Run or resume the training that `args` describe.

    Raises ValueError on bad input, FloatingPointError when the loss is no longer finite (last.safetensors then
    holds the last good state), MemoryError where the device's memory does not suffice."""
    plan = make_plan(args)
    processes = start_processes(plan.config.train, args.output, args.device)
    own_folder(args.output)
    scans = read_scans(args, plan)
    if scans.absent:
        processes.accelerator.print(f"no training scan has {', '.join(scans.absent)}: it will not be learned")
    plan = with_tokens(plan, scans)
    model, progress = build_model(args, plan, scans, processes.accelerator.print)
    if plan.start is not None:
        processes.accelerator.print(table(plan.start, plan.config.model, scans.labels, scans.spacing_mm))
    stored = {} if args.embeddings is None else store_features(args.embeddings, model, scans, processes)
    sizes = _sizes(model)
    learner = _learner(model, plan, processes)
    if args.resume:
        load_moments(args.output / "last.safetensors", learner.optimizer.optimizer)  # type: ignore[attr-defined]  # accelerate's wrapper of it
    if processes.main:
        trim_history(args.output / "history.jsonl", progress.step)
        write_facts(args.output, plan, scans)
    tracker = plan.config.train.tracker
    processes.accelerator.init_trackers("aftersam" if tracker != "tensorboard" else "tensorboard")
    processes.accelerator.print(
        f"{counted(len(scans.training), 'training scan')} and {counted(len(scans.validation), 'validation scan')} of "
        f"{len(scans.dataset.cases)}, {counted(len(scans.labels), 'organ')}; "
        f"{plan.config.model.image_encoder}, {sizes}; {processes.device}, {processes.precision}"
    )
    return Run(args.output, processes, scans, learner, progress, stored).loop()


def _sizes(model: nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total / 1e6:.1f} M parameters of which {trainable / 1e6:.1f} M train"


def _learner(model: AfterSAM, plan: Plan, processes: Processes) -> Learner:
    """The model and its optimiser on the devices of the run."""
    config, accelerator = plan.config.train, processes.accelerator
    if config.shard:
        shard(model, processes.device)
    elif processes.device.type == "cpu":
        put_channels_last(model, trained=True)
    optimizer = build_optimizer(model, config)
    # a sharded model exchanges its own gradients, so that accelerate must not
    prepared = model if config.shard else accelerator.prepare(model)
    return Learner(prepared, accelerator.prepare(optimizer), accelerator, plan.config)


class Run:
    """A training under way: its parts, its progress, and the files it leaves in `output`."""

    def __init__(
        self,
        output: Path,
        processes: Processes,
        scans: Scans,
        learner: Learner,
        progress: Progress,
        stored: dict[str, StoredScan],
    ) -> None:
        self.output = output
        self.log = output / "history.jsonl"
        self.processes = processes
        self.accelerator = processes.accelerator
        self.scans = scans
        self.learner = learner
        self.config = learner.config
        self.progress = progress
        self.stored = stored
        share = self.config.train.batch_size * self.config.train.accumulate * processes.world
        self.steps_per_epoch = steps_in_epoch(len(scans.training), share)
        self.began = 0.0  # on the clock that counts the run's seconds, those before a resume included
        self.signals: list[int] = []  # that this process was sent
        self.stop = 0  # the signal at which all processes stop
        # the limits of a resumed run may be others now
        reached = int(self._fraction() * self.config.train.validations)
        progress.validated = min(progress.validated, reached)

    def loop(self) -> TrainResult:
        """Optimiser steps until the run's limit, with validations and checkpoints on the way.

        SIGINT and SIGTERM end it after the step under way, with a checkpoint of that step: raises KeyboardInterrupt or
        Terminated, whose text says how to go on."""
        with (
            signals_noted() as self.signals,
            self.log.open("ab", buffering=0) as history,
            self._bar() as bar,
        ):
            began = time.process_time()
            self._steps(history, bar)
            minutes, cpu_minutes = self.progress.seconds / 60, (time.process_time() - began) / 60
            self._checkpoint()
            if not self.stop and self.scans.validation and self.config.train.validations:
                self._calibrate()
        if self.stop:
            self._end()
            said = f"stopped at step {self.progress.step}, which {self.output} keeps; go on with --resume"
            raise stopped(self.stop, said if self.processes.main else "")
        if not (self.scans.validation and self.config.train.validations):
            # nothing was chosen: what the training ends with is the best
            with self.learner.kept_model() as model:
                if self.processes.main:
                    self._save_best(model)
        self._end()
        best = self.progress.best
        return TrainResult(self.output, self.progress.step, best if best >= 0 else None, minutes, cpu_minutes)

    def _end(self) -> None:
        """Close trackers and leave the group of processes.

        A thread of gloo lets go of a reduced tensor after the reduction has returned, and aborts the process where the
        interpreter is ending by then. Waiting for the others gives it that time."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _steps(self, history: FileIO, bar: rich.progress.Progress) -> None:
        """Steps, validations and checkpoints until the run's limit, or until `self.stop`."""
        every = self.config.train.checkpoint_steps
        task = bar.add_task("training", total=1.0)
        self.began = time.monotonic() - self.progress.seconds
        if self._validation_is_due():  # a signal had ended it
            self._validate(history)
        with contextlib.closing(self._batches()) as source:
            while not self.stop and (fraction := self._fraction()) < 1:
                record = self._advance(source, fraction)
                self._note(history, record)
                text = f"step {self.progress.step}, loss {record['loss']:.3f}"
                bar.update(task, completed=self._fraction(), description=text)
                if self._validation_is_due():
                    self._validate(history)
                if self.progress.step % every == 0 and not self.stop:
                    self._checkpoint()

    def _agree(self) -> None:
        """Set the run's clock, and the signal to stop at: the latest and the highest among the processes."""
        self.progress.seconds = time.monotonic() - self.began
        self.stop = max(self.signals, default=0)
        if self.processes.world > 1:
            said = torch.tensor([self.progress.seconds, self.stop], device=self.processes.device)
            torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
            self.progress.seconds, self.stop = float(said[0]), int(said[1])

    def _batches(self) -> Generator[Batch, None, None]:
        """Endless batches for this process from the step that the run stands at."""
        return group_batches(
            self.scans.groups,
            self.config.train,
            rank=self.processes.rank,
            world=self.processes.world,
            start=self.progress.step,
            device=self.processes.device.type,
        )

    def _bar(self) -> rich.progress.Progress:
        return rich.progress.Progress(
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeRemainingColumn(),
            disable=not self.processes.main,
        )

    def _fraction(self) -> float:
        """Share of the run that is done."""
        return self.progress.fraction(self.config.train, self.steps_per_epoch)

    def _advance(self, source: Iterator[Batch], fraction: float) -> dict[str, Any]:
        """One optimiser step at `fraction` of the run, and what history.jsonl says of it."""
        config, progress, number = self.config.train, self.progress, self.progress.step + 1
        batches = [next(source) for _ in range(config.accumulate)]
        rate, average = learning_rate(config, fraction), average_share(config, fraction, number)
        losses = self.learner.step(batches, rate=rate, number=number, average=average)
        progress.step += 1
        self._agree()
        record = losses | {"step": progress.step, "minutes": round(progress.seconds / 60, 4), "lr": rate}
        if progress.step % 10 == 0:
            self.accelerator.log({k: record[k] for k in ("loss", "dice", "ce", "lr")}, step=progress.step)
        return record

    def _note(self, history: FileIO, record: dict[str, Any]) -> None:
        if self.processes.main:
            line = json.dumps(record).encode() + b"\n"
            with naming(self.log):
                if history.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _validation_is_due(self) -> bool:
        reached = self._fraction() * self.config.train.validations
        return bool(self.scans.validation) and reached >= self.progress.validated + 1

    def _validate(self, history: FileIO) -> None:
        """Score the validation scans, on one process, and keep the best weights. A signal ends it without a score."""
        with self.learner.kept_model() as model, contextlib.suppress(InterruptedError):
            if self.processes.main:
                self._note(history, self._score(model))
            self.progress.validated = int(self._fraction() * self.config.train.validations)
        self.accelerator.wait_for_everyone()
        self._agree()

    def _score(self, model: AfterSAM) -> dict[str, Any]:
        """What history.jsonl says of a validation of `model`."""
        step = self.progress.step
        per_organ = validate_scans(
            model,
            self.scans,
            self.config.model,
            precision=self.processes.dtype,
            stored=self.stored,
            overlay=self.output / "overlay.png",
            title=f"step {step}",
            progress=self._go_on,
        )
        score = mean([value for value in per_organ.values() if value is not None])
        if score is not None and score > self.progress.best:
            self.progress.best = score
            self._save_best(model)
        self.accelerator.log({"val_mean_dsc": score or 0.0}, step=step)
        self.accelerator.print(f"step {step}: validation DSC {score if score is None else round(score, 4)}")
        loss_figure(self.log, self.output / "loss.png")
        minutes = round(self.progress.seconds / 60, 4)
        return {"step": step, "minutes": minutes, "val_dsc": per_organ, "val_mean_dsc": score}

    def _calibrate(self) -> None:
        """Add the temperature of the best weights to run.json, fitted on one process. A signal ends it without one."""
        path, best = self.output / "run.json", self.output / "best.safetensors"
        with contextlib.suppress(InterruptedError):
            if self.processes.main and best.exists():
                model = build_aftersam(self.config.model, self.scans.num_classes)
                load_weights(best, model)
                found = calibrate(
                    model.to(self.processes.device),
                    self.scans.validation,
                    self.config.model,
                    precision=self.processes.dtype,
                    stored=self.stored,
                    progress=self._go_on,
                )
                write_json(path, read_json(path) | found._asdict())
                if found.ece is not None:
                    before, after = found.ece
                    text = f"temperature {found.temperature:.3g}: calibration error {before:.4f}, then {after:.4f}"
                    self.accelerator.print(text)
        self.accelerator.wait_for_everyone()
        self._agree()

    def _go_on(self, _: int) -> None:
        if self.signals:
            raise InterruptedError

    def _checkpoint(self) -> None:
        if not (self.processes.main or self.config.train.shard):
            return
        save_training(
            self.output / "last.safetensors",
            self.accelerator.unwrap_model(self.learner.model),
            self.learner.optimizer.optimizer,  # type: ignore[attr-defined]  # accelerate's wraps it
            {"step": self.progress.step, "progress": dataclasses.asdict(self.progress)},
            write=self.processes.main,
        )

    def _save_best(self, model: AfterSAM) -> None:
        facts = {"step": self.progress.step, "val_mean_dsc": self.progress.best}
        save_weights(self.output / "best.safetensors", model, facts)
