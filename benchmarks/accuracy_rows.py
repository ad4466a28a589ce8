"""One row of the accuracy table: a system trained on the split within the limits, and the held-out scans segmented.

Every system reads the same preprocessed cache; ours goes through aftersam.train and aftersam.predict, the others
through one loop. Of organs that are one piece in every training label all lose small parts."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from aftersam.config import DataConfig
from aftersam.data.cache import CachedCase, cache_cases
from aftersam.data.transforms import preprocess, resample
from aftersam.data.volume import read_image, read_labels, write_labels
from aftersam.files import read_json, write_json
from aftersam.inference.inputs import Scan
from aftersam.inference.pipeline import PredictArgs, predict_files
from aftersam.inference.postprocess import drop_small_parts, one_piece
from aftersam.inference.segmenter import load
from aftersam.inference.sliding import predict_volume
from aftersam.model.sam_checkpoint import read_sam_checkpoint
from aftersam.training.arguments import TrainArgs
from aftersam.training.run import train
from benchmarks import nnunet_rival
from benchmarks.accuracy_systems import Job
from benchmarks.patch_training import (
    Spent,
    fit,
    lead_background,
    patch_loss,
    patches,
    peak_mib,
    segment_by_patches,
    with_sound_gradients,
)
from benchmarks.slice_rivals import group_loss, groups


def train_row(job: Job) -> Spent:
    """Train the row's system from its start. Weights and facts are left in the row's folder."""
    return TRAIN[job.system.kind](job)


def predict_row(job: Job) -> dict[str, Any]:
    """Segment the held-out scans into the row's masks/: its facts, seconds a scan, peak memory."""
    (job.home / "masks").mkdir(exist_ok=True)
    began = time.monotonic()
    facts = PREDICT[job.system.kind](job)
    seconds = (time.monotonic() - began) / len(job.held_out)
    return {**facts, "prediction_s": round(seconds, 3), "prediction_peak_mib": round(peak_mib(job.device))}


def _train_patch(job: Job) -> Spent:
    config = job.config().train
    cached = job.cached(DataConfig(spacing_mm=job.limits.spacing_mm))
    size = job.patch_size()
    model = _build(job)
    source = patches(cached, size, config)
    spent = fit(model, source, patch_loss, config, device=job.device, precision=job.precision)
    _save(job, model, cached, patch=size)
    return spent


def _predict_patch(job: Job) -> dict[str, Any]:
    model, facts = _restored(job)
    for case in job.held_out_cases():
        volume = read_image(case.image)
        ready = preprocess(volume, tuple(facts["spacing_mm"]))
        labels = segment_by_patches(
            model, ready.array, facts["patch"], volume.array.shape, device=job.device, precision=job.precision
        )
        drop_small_parts(labels, facts["one_piece"])
        write_labels(job.home / "masks" / f"{case.id}.nii.gz", labels, volume, job.dataset.labels)
    return facts


def _train_group(job: Job) -> Spent:
    config = job.config()
    cached = job.cached(config.data)
    model = _build(job)
    source = groups(cached, config)
    loss = functools.partial(group_loss, config=config.train)
    spent = fit(model, source, loss, config.train, device=job.device, precision=job.precision)
    _save(job, model, cached)
    return spent


def _predict_group(job: Job) -> dict[str, Any]:
    model, facts = _restored(job)
    for case in job.held_out_cases():
        volume = read_image(case.image)
        ready = preprocess(volume, tuple(facts["spacing_mm"]))
        prompts = None
        if job.system.prompted:
            assert case.label is not None, "training refuses cases without a label"
            truth = read_labels(case.label, like=volume)
            prompts = resample(truth.array, truth.spacing_mm, ready.spacing_mm, labels=True)
        labels = predict_volume(
            model,  # type: ignore[arg-type]  # an AfterSAM of other parts
            Scan(ready.array, ready.box, prompts),
            job.config().model,
            output_shape=volume.array.shape,
            precision=job.precision,
        ).labels
        drop_small_parts(labels, facts["one_piece"])
        told = {"prompted": "point"} if job.system.prompted else {}
        write_labels(job.home / "masks" / f"{case.id}.nii.gz", labels, volume, job.dataset.labels, told)
    return facts


def _train_ours(job: Job) -> Spent:
    """By aftersam.train, the scans cached before, so that training alone is timed."""
    config, run = job.config(), job.home / "run"
    everyone = [*job.training, *job.held_out]
    cache_cases(job.dataset, everyone, config.data, job.cache, training=job.training)
    cpu = time.process_time()
    train(
        TrainArgs(
            data=job.dataset.root, output=run, config=config, fold=job.limits.fold, cache=job.cache,
            device=job.limits.device, sam_checkpoint=job.limits.sam_checkpoint,
        )
    )  # fmt: skip
    cpu_minutes = (time.process_time() - cpu) / 60
    *_, line = (run / "history.jsonl").read_text().splitlines()
    last = json.loads(line)
    return Spent(last["minutes"], cpu_minutes, last["step"], peak_mib(job.device))


def _predict_ours(job: Job) -> dict[str, Any]:
    run, device = job.home / "run", job.limits.device
    segmenter = load(run, checkpoint="last", device=device)
    predict_files(
        PredictArgs(
            input=job.scans / "images", output=job.home / "masks", model=run, checkpoint="last", device=device,
            preview=False, overwrite=True,
        )
    )  # fmt: skip
    return _facts(segmenter.model, segmenter.spacing_mm, segmenter.precision)


def _build(job: Job) -> nn.Module:
    """The system's network with the random weights of the row's seed, or SAM's where they are given."""
    torch.manual_seed(job.seed)
    build = job.system.build
    assert build is not None, f"{job.system.title} is not trained by this loop"
    if job.system.kind == "patch":
        return with_sound_gradients(lead_background(build(job.num_classes), job.num_classes))
    if job.system.prompted and job.limits.sam_checkpoint:
        sam = read_sam_checkpoint(job.limits.sam_checkpoint)
        model = dataclasses.replace(job.config().model, image_encoder=sam.name)  # type: ignore[arg-type]
        return build(model, job.num_classes, sam)
    return build(job.config().model, job.num_classes)


def _save(job: Job, model: nn.Module, cached: Sequence[CachedCase], **facts: Any) -> None:
    from safetensors.torch import save_model  # which allows modules with two names, as DynUNet has them

    save_model(model, str(job.home / "weights.safetensors"))
    facts["one_piece"] = one_piece((case.labels for case in cached), job.dataset.labels)
    write_json(job.home / "facts.json", {**_facts(model, cached[0].spacing_mm, job.precision), **facts})


def _restored(job: Job) -> tuple[nn.Module, dict[str, Any]]:
    from safetensors.torch import load_model

    model = _build(job)
    load_model(model, str(job.home / "weights.safetensors"))
    return model.to(job.device).eval(), read_json(job.home / "facts.json")


def _facts(model: nn.Module, spacing_mm: Any, precision: torch.dtype) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "spacing_mm": None if spacing_mm is None else list(spacing_mm),
        "precision": str(precision).removeprefix("torch."),
    }


TRAIN: dict[str, Callable[[Job], Spent]] = {
    "patch": _train_patch, "group": _train_group, "ours": _train_ours, "nnunet": nnunet_rival.train,
}  # fmt: skip
PREDICT: dict[str, Callable[[Job], dict[str, Any]]] = {
    "patch": _predict_patch, "group": _predict_group, "ours": _predict_ours, "nnunet": nnunet_rival.predict,
}  # fmt: skip
