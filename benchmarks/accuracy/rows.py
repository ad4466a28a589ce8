"""One row of the accuracy table: a system trained on the split within the limits, the held-out scans segmented, scored.

Every system but nnU-Net trains on the same preprocessed cache. Ours goes through aftersam.train and aftersam.predict,
nnU-Net through its own loop, the others through one loop. All systems drop small disconnected parts of organs that are
one piece in every training label."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aftersam.config import DataConfig, to_dict
from aftersam.data.cache import CachedCase, cache_cases
from aftersam.data.dataset import find_dataset, split
from aftersam.data.transforms import preprocess, resample
from aftersam.data.volume import read_image, read_labels, write_labels
from aftersam.device import keep_freed_memory
from aftersam.evaluation.scoring import Metrics, score_folder
from aftersam.files import fcntl, read_json, write_json
from aftersam.inference.inputs import Scan
from aftersam.inference.pipeline import PredictArgs, predict_files
from aftersam.inference.postprocess import drop_small_parts, one_piece
from aftersam.inference.segmenter import load
from aftersam.inference.sliding import predict_volume
from aftersam.model.layers import put_channels_last
from aftersam.model.sam_checkpoint import read_sam_checkpoint, sha256
from aftersam.training.arguments import TrainArgs
from aftersam.training.run import train
from benchmarks.accuracy.places import place_scores, write_sparse
from benchmarks.accuracy.rivals import nnunet
from benchmarks.accuracy.rivals.patch_training import (
    Spent,
    fit,
    lead_background,
    patch_loss,
    patches,
    peak_mib,
    segment_by_patches,
    with_sound_gradients,
)
from benchmarks.accuracy.rivals.slice_groups import group_loss, groups
from benchmarks.accuracy.summary import first_difference
from benchmarks.accuracy.systems import SYSTEMS, Job, Limits
from benchmarks.machine import environment, slug


def row_home(output: Path, name: str, seed: int) -> Path:
    return output / "rows" / f"{name}-seed-{seed}"


def run_row(name: str, seed: int, limits: Limits, data: Path, output: Path) -> None:
    """Train, predict and score the row of the system `name`, whichever of it is not done, in its folder of `output`.

    A row that another process works on is left alone. Raises ValueError where the row is there with other settings."""
    torch.set_num_threads(limits.threads)
    system, home = SYSTEMS[name], row_home(output, name, seed)
    with _claimed(home) as claimed:
        if not claimed:
            print(f"{system.title}, seed {seed}: left out, since another process works on it", flush=True)
            return
        dataset = find_dataset(data)
        training, held_out = split(dataset, limits.fold, 0)
        job = Job(
            system, seed, home, limits, dataset, training, held_out, output / "cache", output / "held-out"
        )
        settings = _settings(job)
        if (home / "spent.json").exists():
            _check_settings(home, settings)
        if not (home / "row.json").exists():
            print(f"{system.title}, seed {seed}", flush=True)
            _finish(job, name, settings)


@contextlib.contextmanager
def _claimed(home: Path) -> Iterator[bool]:
    """Whether no other process works on the row `home`. None will until the end of the block or of this process.

    The lock lies beside the folder, which an interrupted training loses."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_name(f"{home.name}.lock").open("w") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _settings(job: Job) -> dict[str, Any]:
    """What identifies the row beside its system and seed, as JSON values."""
    config = to_dict(job.config())
    del config["train"]["seed"]
    settings = {"data": job.dataset.root.resolve(), "training": job.training, "config": config}
    return _plain({**settings, **_own_limits(job)})


def _own_limits(job: Job) -> dict[str, Any]:
    """The limits, with the checksum of the row's own ImageNet weights alone."""
    file = job.imagenet
    return {**job.limits._asdict(), "imagenet": None if file is None else sha256(Path(file))}


def _check_settings(home: Path, settings: dict[str, Any]) -> None:
    if differs := first_difference(read_json(home / "settings.json"), settings):
        key, stored, asked = differs
        raise ValueError(
            f"{home} was made with other settings ({key} {stored}, not {asked}); delete it or choose another --output"
        )


def _finish(job: Job, name: str, settings: dict[str, Any]) -> None:
    system, home, limits = job.system, job.home, job.limits
    (home / "failed.json").unlink(missing_ok=True)
    if not (home / "spent.json").exists():
        shutil.rmtree(home, ignore_errors=True)  # of an interrupted training
        home.mkdir(parents=True)
        write_json(home / "settings.json", settings)
        before = environment()  # the commit may be another one after hours of training
        write_json(home / "spent.json", {**train_row(job)._asdict(), "environment": before})
    facts = predict_row(job)
    row = {
        "system": name,
        "title": system.title + (f" {limits.preset}" if name in ("aftersam", "aftersam_2d") else ""),
        "seed": job.seed,
        "protocol": "equal budget" if job.limited else "own recipe",
        "note": _note(limits, name),
        **facts,
        **read_json(home / "spent.json"),
        "training": settings["training"],
        "config": settings["config"],
        "limits": _own_limits(job),
    }
    if system.kind == "ours":
        row["places"] = {"sparse": _sparse_scores(job)}
    _score(home / "masks", job.scans / "labels", home, row)


def _sparse_scores(job: Job) -> dict[str, Any]:
    """DSC of every held-out case and organ on every third slice alone."""
    with tempfile.TemporaryDirectory() as folder:
        scans, masks = Path(folder) / "scans", Path(folder) / "masks"
        write_sparse(job.scans, scans)
        _segment(job, scans / "images", masks)
        cases = _scored(masks, scans / "labels")["cases"]
    return {case: {organ: {"dsc": score["dsc"]} for organ, score in of.items()} for case, of in cases.items()}


def score_elsewhere(output: Path, name: str, masks: Path) -> None:
    """Score the masks of another tool as the row `name` of the table in `output`."""
    home = output / "rows" / f"elsewhere-{slug(name)}"
    home.mkdir(parents=True, exist_ok=True)
    row = {
        "system": slug(name),
        "title": name,
        "seed": 0,
        "protocol": "own recipe",
        "note": "masks made elsewhere",
    }
    _score(masks, output / "held-out" / "labels", home, row)


def _score(masks: Path, labels: Path, home: Path, row: dict[str, Any]) -> None:
    """Leave metrics.json, then row.json, which says that the row is done. Raises ValueError on a missing mask."""
    metrics = _scored(masks, labels)
    write_json(home / "metrics.json", metrics)
    places = {**row.get("places", {}), **place_scores(masks, labels)}
    write_json(home / "row.json", _plain({**row, "prompted": metrics["prompted"], "places": places}))


def _scored(masks: Path, labels: Path) -> Metrics:
    metrics = score_folder(masks, labels, quiet=True)
    if metrics["problems"]:
        raise ValueError(f"every row needs all cases: {next(iter(metrics['problems'].values()))}")
    return metrics


def _plain(value: Any) -> Any:
    """`value` as it is after a round trip through JSON: paths are strings, tuples lists."""
    return json.loads(json.dumps(value, default=str))


def _note(limits: Limits, name: str) -> str:
    """What the system is, and what it starts from."""
    if name in limits.imagenet:
        return "from MONAI's parts at the published size; from ImageNet's weights"
    pretrained = limits.sam_checkpoint and (name == "msa" or name.startswith("aftersam"))
    start = "SAM's weights" if pretrained else "scratch"
    return f"{SYSTEMS[name].note}; from {start}"


def train_row(job: Job) -> Spent:
    """Train the row's system from the start; weights and facts are written to the row's folder."""
    keep_freed_memory(job.device)
    return TRAIN[job.system.kind](job)


def predict_row(job: Job) -> dict[str, Any]:
    """Segment the held-out scans into the row's folder masks/. Returns facts, seconds a scan and peak memory."""
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
    if job.device.type == "cpu":
        put_channels_last(model, trained=True)
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
    """Train by aftersam.train. Scans are cached before, so that training alone is timed."""
    config, run = job.config(), job.home / "run"
    everyone = [*job.training, *job.held_out]
    cache_cases(job.dataset, everyone, config.data, job.cache, training=job.training)
    result = train(
        TrainArgs(
            data=job.dataset.root,
            output=run,
            config=config,
            fold=job.limits.fold,
            cache=job.cache,
            device=job.limits.device,
            sam_checkpoint=job.limits.sam_checkpoint,
        )
    )
    return Spent(result.minutes, result.cpu_minutes, result.steps, peak_mib(job.device))


def _predict_ours(job: Job) -> dict[str, Any]:
    segmenter = load(job.home / "run", device=job.limits.device)
    _segment(job, job.scans / "images", job.home / "masks")
    return _facts(segmenter.model, segmenter.spacing_mm, segmenter.precision)


def _segment(job: Job, images: Path, masks: Path) -> None:
    """Segment the scans of a folder by the row's run."""
    run = (job.home / "run",)
    predict_files(
        PredictArgs(
            input=images, output=masks, model=run, device=job.limits.device, preview=False, overwrite=True
        )
    )


def _build(job: Job) -> nn.Module:
    """The system's network with the random weights of the row's seed, or SAM's where they are given."""
    torch.manual_seed(job.seed)
    build = job.system.build
    assert build is not None, f"{job.system.title} is not trained by this loop"
    if job.system.kind == "patch":
        network = with_sound_gradients(lead_background(build(job.num_classes), job.num_classes))
        if job.system.channels_last and job.device.type == "cpu":
            network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # not in its stubs
        return network
    if job.system.prompted and job.limits.sam_checkpoint:
        sam = read_sam_checkpoint(job.limits.sam_checkpoint)
        model = dataclasses.replace(job.config().model, image_encoder=sam.name)  # type: ignore[arg-type]  # a name in ENCODERS
        return build(model, job.num_classes, sam)
    more = [Path(job.imagenet)] if job.imagenet else []
    return build(job.config().model, job.num_classes, *more)


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
    "patch": _train_patch, "group": _train_group, "ours": _train_ours, "nnunet": nnunet.train,
}  # fmt: skip
PREDICT: dict[str, Callable[[Job], dict[str, Any]]] = {
    "patch": _predict_patch, "group": _predict_group, "ours": _predict_ours, "nnunet": nnunet.predict,
}  # fmt: skip
