"""A training run: set-up, optimiser steps, validations and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aftersam.config import to_dict
from aftersam.training.arguments import TrainArgs, configuration
from aftersam.training.schedule import Progress, group_loader, learning_rate, steps_in_epoch

if TYPE_CHECKING:
    from aftersam.data.cache import CachedCase
    from aftersam.data.dataset import Dataset
    from aftersam.data.stored_features import StoredScan
    from aftersam.model.aftersam import AfterSAM
    from aftersam.model.sam_checkpoint import SamCheckpoint
    from aftersam.training.losses import Loss


def train(args: TrainArgs) -> Path:
    """Run or resume the training that `args` describe and return the folder of the run.

    Raises ValueError on bad input, FloatingPointError when the loss is no longer finite (last.safetensors then
    holds the last good state)."""
    run = _Run(args)
    run.loop()
    return args.output


class _Run:
    """A training run: its parts, its progress, and the files it leaves."""

    def __init__(self, args: TrainArgs) -> None:
        self.output, self.progress = args.output, Progress()
        self.config, sam, stored = configuration(args)
        self._start(args.device)
        dataset = self._read(args, stored)
        model = self._build(args, sam)
        count, total = self._prepare(model, resume=args.resume)
        if self.accelerator.is_main_process:
            self._write(args, dataset, sam)
        config = self.config
        self.accelerator.init_trackers("aftersam" if config.train.tracker != "tensorboard" else "tensorboard")
        self._say(
            f"{len(self.training)} training and {len(self.validation)} validation scans, {len(self.labels)} organs; "
            f"{config.model.image_encoder}, {total / 1e6:.1f} M parameters of which {count / 1e6:.1f} M train; "
            f"{self.device}, {self.precision}"
        )

    def _start(self, device: str) -> None:
        """Devices, precision, trackers and seeds."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.tracking import filter_trackers
        from accelerate.utils import set_seed

        from aftersam.device import DTYPES, precision_for

        config = self.config.train
        self.precision = precision_for(config.precision, device)
        if not filter_trackers(config.tracker, self.output):
            raise ValueError(
                f"tracker is {config.tracker!r}, whose package is not installed; install it, or use tensorboard"
            )
        AcceleratorState._reset_state()  # a run before this one in the same process may have had another precision
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(self.precision, self.precision),
            cpu=device == "cpu",
            log_with=config.tracker,
            project_dir=str(self.output),
        )
        self.device = self.accelerator.device
        if self.precision == "fp16" and self.device.type == "cpu":  # where nothing scales the gradients
            raise ValueError("precision fp16 needs a GPU to train on; use bf16 or fp32")
        self.dtype = DTYPES[self.precision]
        set_seed(config.seed)

    def _read(self, args: TrainArgs, stored: dict[str, Any]) -> Dataset:
        """The scans of the fold, preprocessed, and their groups; `stored` is run.json of a run that is resumed."""
        from aftersam.data.cache import cache_cases
        from aftersam.data.dataset import find_dataset, mirror_pairs, split
        from aftersam.data.slice_group import SliceGroups

        config, dataset = self.config, find_dataset(args.data)
        self.fold, self.labels = stored.get("fold", args.fold), dataset.labels
        self.output.mkdir(parents=True, exist_ok=True)
        train_ids, validation_ids = split(  # the same folds for every seed, so that seeds can be compared
            dataset, self.fold, 0, write_to=self.output / "splits_final.json"
        )
        names = {int(k): v for k, v in stored["labels"].items()} if stored else self.labels
        if names != self.labels:
            raise ValueError(
                f"{args.data} has the labels {self.labels}, but the run to resume was trained on {names}"
            )
        cached = cache_cases(
            dataset,
            [*train_ids, *validation_ids],
            config.data,
            args.cache or self.output / "cache",
            training=train_ids,
        )
        self.training: list[CachedCase] = [cached[case] for case in train_ids]
        self.validation: list[CachedCase] = [cached[case] for case in validation_ids]
        self.groups = SliceGroups(
            self.training,
            model=config.model,
            data=config.data,
            seed=config.train.seed,
            label_swap=mirror_pairs(self.labels) if "mirror" in config.data.augmentation else {},
        )
        return dataset

    def _build(self, args: TrainArgs, sam: SamCheckpoint | None) -> AfterSAM:
        """The model with its weights, new, SAM's or the resumed run's, and what its frozen encoder stores."""
        from aftersam.inference.feature_cache import Embeddings
        from aftersam.model.build import build_aftersam
        from aftersam.training.checkpoint import load_training

        config = self.config
        model = build_aftersam(config.model, num_classes=len(self.labels) + 1, sam=sam)
        model.set_activation_checkpointing(config.train.activation_checkpointing)
        if args.resume:
            facts = load_training(self.output / "last.safetensors", model)
            self.progress = Progress(**facts["progress"])
        self.stored: dict[str, StoredScan] = {}
        if args.embeddings is not None:
            store = Embeddings(
                args.embeddings, model.to(self.device), image_size=config.model.image_size, precision=self.dtype
            )  # fmt: skip
            cases = [*self.training, *self.validation]
            for case in cases[self.accelerator.process_index :: self.accelerator.num_processes]:
                store.of(case.hu, case.box)
            self.accelerator.wait_for_everyone()
            self.groups.stored = self.stored = {case.id: store.of(case.hu, case.box) for case in cases}
        return model

    def _prepare(self, model: AfterSAM, *, resume: bool) -> tuple[int, int]:
        """The model and its optimiser on the devices; the numbers of parameters that train, and of all."""
        import torch

        from aftersam.training.checkpoint import load_moments
        from aftersam.training.sharding import shard

        config = self.config.train
        total = sum(p.numel() for p in model.parameters())
        if config.shard:
            shard(model, self.device)
        trainable = [p for p in model.parameters() if p.requires_grad]
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        optimizer = kind(
            trainable,
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=config.weight_decay,
            fused=not config.shard,  # one pass over all weights: a quarter of the time on a CPU
        )
        # a sharded model exchanges its own gradients, so that accelerate must not
        self.model = model if config.shard else self.accelerator.prepare(model)
        self.optimizer = self.accelerator.prepare(optimizer)
        if resume:
            load_moments(self.output / "last.safetensors", self.optimizer.optimizer)
        share = config.batch_size * config.accumulate * self.accelerator.num_processes
        self.steps_per_epoch = steps_in_epoch(len(self.training), share)
        return sum(p.numel() for p in trainable), total

    def _write(self, args: TrainArgs, dataset: Dataset, sam: SamCheckpoint | None) -> None:
        """What repeats the run, config.json, and what its weights need beside it, run.json."""
        from aftersam.files import write_json
        from aftersam.inference.postprocess import one_piece
        from aftersam.training.checkpoint import provenance, trim_history

        trim_history(self.output / "history.jsonl", self.progress.step)
        if args.resume:
            return
        write_json(self.output / "config.json", to_dict(self.config))
        native = self.config.data.spacing_mm == "native"
        facts = {
            "labels": {str(value): name for value, name in self.labels.items()},
            "spacing_mm": None if native else list(self.training[0].spacing_mm),
            "one_piece": one_piece((case.labels for case in self.training), self.labels),
            "dataset": dataset.name, "fold": self.fold, "sam_sha256": sam.sha256 if sam else None,
        }  # fmt: skip
        write_json(self.output / "run.json", facts | provenance())

    def loop(self) -> None:
        """Optimiser steps until the run's limit, with validations and checkpoints on the way."""
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        config, progress = self.config.train, self.progress
        loader = group_loader(
            self.groups,
            config,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            start=progress.step,
        )
        source = iter(loader)
        began = time.monotonic() - progress.seconds
        columns = (
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with (
            (self.output / "history.jsonl").open("a", buffering=1) as history,
            Bar(*columns, disable=not self.accelerator.is_main_process) as bar,
        ):
            task = bar.add_task("training", total=1.0)
            while (fraction := progress.fraction(config, self.steps_per_epoch)) < 1:
                rate = learning_rate(config, fraction)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                record = self._step([next(source) for _ in range(config.accumulate)])
                progress.step += 1
                progress.seconds = time.monotonic() - began
                record |= {"step": progress.step, "minutes": round(progress.seconds / 60, 4), "lr": rate}
                done = progress.fraction(config, self.steps_per_epoch)
                if self.accelerator.is_main_process:
                    history.write(json.dumps(record) + "\n")
                bar.update(
                    task, completed=done, description=f"step {progress.step}, loss {record['loss']:.3f}"
                )
                if progress.step % 10 == 0:
                    self.accelerator.log(
                        {k: record[k] for k in ("loss", "dice", "ce", "lr")}, step=progress.step
                    )
                if self.validation and done * config.validations >= progress.validated + 1:
                    progress.validated = int(done * config.validations)
                    model = self._whole_model()
                    if self.accelerator.is_main_process:
                        history.write(json.dumps(self._validate(model)) + "\n")
                    self.accelerator.wait_for_everyone()
                    progress.seconds = time.monotonic() - began
                if progress.step % config.checkpoint_steps == 0:
                    self._checkpoint()
            bar.update(task, completed=1.0)
        self._checkpoint()
        if not (self.validation and config.validations):  # nothing was chosen: the last are the best
            model = self._whole_model()
            if self.accelerator.is_main_process:
                self._save_best(model)
        self.accelerator.end_training()

    def _step(self, parts: Sequence[dict[str, Any]]) -> dict[str, float]:
        """One optimiser step on batches of groups: {"loss", "dice", "ce"}, their means over batches and processes."""
        import torch

        config = self.config.train
        self.model.train()
        self.optimizer.zero_grad()
        losses = []
        try:
            for i, batch in enumerate(parts):
                waits = i + 1 < len(parts)  # processes exchange gradients once a step
                with self.accelerator.no_sync(self.model) if waits else contextlib.nullcontext():
                    loss = self._loss(batch)
                    self.accelerator.backward(loss.total / len(parts))
                losses.append(torch.stack([loss.total, loss.dice, loss.ce]).detach())
            if config.clip_norm:
                self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
            mean = self.accelerator.reduce(torch.stack(losses).mean(0), "mean").tolist()
            if not math.isfinite(mean[0]):
                cases = [case for batch in parts for case in batch["case"]]
                raise FloatingPointError(
                    f"the loss is {mean[0]} at step {self.progress.step + 1} on {', '.join(cases)}; "
                    f"last.safetensors keeps the last good state; a lower --learning-rate or --precision fp32 may help"
                )
            self.optimizer.step()
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                "the device ran out of memory; use --activation-checkpointing, or a smaller --batch-size, "
                f"--image-size or --num-slices ({str(error).splitlines()[0]})"
            ) from None
        return dict(zip(("loss", "dice", "ce"), mean, strict=True))

    def _loss(self, batch: dict[str, Any]) -> Loss:
        """The loss of one batch of groups; deep supervision adds to its total alone."""
        from aftersam.training.losses import segmentation_loss

        config = self.config.train
        hu, labels = batch["hu"].to(self.device), batch["labels"].to(self.device)
        centre = (self.config.model.num_slices // 2,)
        query_index = centre if config.supervision == "centre" else None
        embedding = batch["embedding"].to(self.device) if self.stored else None
        deep = config.deep_supervision
        with self.accelerator.autocast():
            logits = self.model(
                hu, query_index=query_index, labels=labels, embedding=embedding, coarse=deep > 0
            )
        truth = labels if query_index is None else labels[:, list(centre)]
        loss, *coarse = (
            segmentation_loss(
                some,
                truth,
                dice=config.dice,
                ce_foreground_weight=config.ce_foreground_weight,
                ce_hardest=config.ce_hardest,
            )
            for some in (logits if deep else [logits])
        )
        return loss._replace(total=loss.total + sum(deep * extra.total for extra in coarse))

    def _validate(self, model: AfterSAM) -> dict[str, Any]:
        """Score the validation scans and keep the best weights."""
        from aftersam.evaluation.figures import loss_figure
        from aftersam.training.validation import mean, validate_scans

        step = self.progress.step
        per_organ = validate_scans(
            model, self.validation, self.labels, self.config.model,
            precision=self.dtype, stored=self.stored, overlay=self.output / "overlay.png", title=f"step {step}",
        )  # fmt: skip
        score = mean([value for value in per_organ.values() if value is not None])
        if score is not None and score > self.progress.best:
            self.progress.best = score
            self._save_best(model)
        self.accelerator.log({"val_mean_dsc": score or 0.0}, step=step)
        self._say(f"step {step}: validation DSC {score if score is None else round(score, 4)}")
        loss_figure(self.output / "history.jsonl", self.output / "loss.png")
        minutes = round(self.progress.seconds / 60, 4)
        return {"step": step, "minutes": minutes, "val_dsc": per_organ, "val_mean_dsc": score}

    def _checkpoint(self) -> None:
        from aftersam.training.checkpoint import save_training

        main = self.accelerator.is_main_process
        if main or self.config.train.shard:
            model = self.accelerator.unwrap_model(self.model)
            facts = {"step": self.progress.step, "progress": dataclasses.asdict(self.progress)}
            save_training(
                self.output / "last.safetensors", model, self.optimizer.optimizer, facts, write=main
            )

    def _whole_model(self) -> AfterSAM:
        """The model with all its weights; where they are sharded a copy, for which every process must ask."""
        from aftersam.training.sharding import whole_copy

        model: AfterSAM = self.accelerator.unwrap_model(self.model)
        if self.config.train.shard:
            model = whole_copy(model, self.config.model, len(self.labels) + 1).to(self.device)
        return model

    def _save_best(self, model: AfterSAM) -> None:
        from aftersam.training.checkpoint import save_weights

        facts = {"step": self.progress.step, "val_mean_dsc": self.progress.best}
        save_weights(self.output / "best.safetensors", model, facts)

    def _say(self, text: str) -> None:
        self.accelerator.print(text)
