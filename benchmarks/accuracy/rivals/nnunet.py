"""nnU-Net by its own package: its fingerprint, plan, preprocessing, network, augmentation, loss and prediction.

Differences from the package: it trains on the training cases of the split alone; scans with left and right organs are
not mirrored; small parts are dropped as in all rows. With a limit, the planner is asked for a network of the table's
size, training stops at the limit, and the learning rate follows the fraction of the limit that is spent.

Source: github.com/MIC-DKFZ/nnUNet, nnunetv2/training/nnUNetTrainer/nnUNetTrainer.py, which is subclassed here."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aftersam.config import DataConfig
from aftersam.data.dataset import mirror_pairs
from aftersam.data.volume import read_image, read_labels, write_labels
from aftersam.files import read_json, write_json
from aftersam.inference.postprocess import drop_small_parts, one_piece
from aftersam.training.schedule import Progress

if TYPE_CHECKING:
    from benchmarks.accuracy.rivals.patch_training import Spent
    from benchmarks.accuracy.systems import Job

NUMBER, NAME = 1, "Dataset001_accuracy"  # nnU-Net's names for a data set
CONFIGURATIONS = {"nnU-Net 2D": "2d", "nnU-Net 3D": "3d_fullres"}


def train(job: Job) -> Spent:
    """Plan, preprocess and train nnU-Net on the row's training cases; only the training itself is timed."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, preprocess
    from safetensors.torch import save_model

    from benchmarks.accuracy.rivals.patch_training import Spent, peak_mib

    root = _paths(job)
    _export(job, root / "raw" / NAME)
    extract_fingerprints([NUMBER], num_processes=1)
    _plan(limited=job.limited)
    preprocess([NUMBER], configurations=(CONFIGURATIONS[job.system.title],), num_processes=(1,))
    write_json(
        root / "preprocessed" / NAME / "splits_final.json", [{"train": job.training, "val": job.training[:1]}]
    )
    cached = job.cached(DataConfig(spacing_mm=job.limits.spacing_mm))
    write_json(
        job.home / "facts.json", {"one_piece": one_piece((c.labels for c in cached), job.dataset.labels)}
    )
    trainer = _trainer(job)
    trainer.run_training()
    cpu_minutes = (time.process_time() - trainer.cpu_began) / 60
    save_model(trainer.network, str(job.home / "weights.safetensors"))
    progress = trainer.progress
    return Spent(progress.seconds / 60, cpu_minutes, progress.step, peak_mib(job.device))


def predict(job: Job) -> dict[str, Any]:
    """Segment the held-out scans by nnU-Net's sliding window and export. Returns the row's facts and title."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from safetensors.torch import load_model

    made = _paths(job) / "masks"
    made.mkdir(exist_ok=True)
    trainer = _trainer(job)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(False)
    load_model(trainer.network, str(job.home / "weights.safetensors"))
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    axes = trainer.inference_allowed_mirroring_axes
    predictor = nnUNetPredictor(device=job.device, use_mirroring=axes is not None, allow_tqdm=False)
    weights = trainer.network.state_dict()
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, [weights], trainer.dataset_json,
        type(trainer).__name__, axes,
    )  # fmt: skip
    cases = list(job.held_out_cases())
    scans = [[str(case.image)] for case in cases]
    predictor.predict_from_files_sequential(scans, [str(made / case.id) for case in cases])
    pieces = read_json(job.home / "facts.json")["one_piece"]
    for case in cases:
        volume = read_image(case.image)
        labels = read_labels(made / f"{case.id}{trainer.dataset_json['file_ending']}", like=volume).array
        drop_small_parts(labels, pieces)
        write_labels(job.home / "masks" / f"{case.id}.nii.gz", labels, volume, job.dataset.labels)
    return {
        "title": job.system.title + (", planned for the budget" if job.limited else ""),
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "spacing_mm": spacing_mm(read_json(_plans(job)), CONFIGURATIONS[job.system.title]),
        "precision": "float32" if job.device.type == "cpu" else "float16",
    }


def spacing_mm(plans: dict[str, Any], configuration: str) -> list[float]:
    """Voxel size (d, h, w) at which the network of `configuration` works.

    A 2D network keeps the slice spacing of the data. In plans, axes are in the order of the network's input."""
    spacing = plans["configurations"][configuration]["spacing"]
    if len(spacing) == 2:
        spacing = [plans["original_median_spacing_after_transp"][0], *spacing]
    return [float(spacing[axis]) for axis in plans["transpose_backward"]]


def _plan(*, limited: bool) -> None:
    """Write nnU-Net's plans: the default ones, or with `limited` plans for networks of the table's size."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    if not limited:
        ExperimentPlanner(NUMBER).plan_experiment()
        return
    planner = ExperimentPlanner(NUMBER, gpu_memory_target_in_gb=0.5, suppress_transpose=True)
    planner.UNet_base_num_features = 16  # default 32
    planner.UNet_max_features_2d, planner.UNet_max_features_3d = 256, 192
    plans = planner.plan_experiment()
    plans["configurations"]["2d"]["batch_size"] = 12  # the planner's reference batch size
    planner.save_plans(plans)


def _paths(job: Job) -> Path:
    """Make nnU-Net's three folders in the row's. nnU-Net reads their names from the environment when it is imported."""
    root = (job.home / "nnunet").resolve()
    for kind in ("raw", "preprocessed", "results"):
        (root / kind).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{kind}"] = str(root / kind)
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "false"}
    return root


def _plans(job: Job) -> Path:
    return job.home.resolve() / "nnunet" / "preprocessed" / NAME / "nnUNetPlans.json"


def _export(job: Job, raw: Path) -> None:
    """The training cases as a raw data set of nnU-Net's: links to the scans and labels, and a dataset.json."""
    from aftersam.data.dataset import link_cases

    link_cases(job.dataset, job.training, raw)
    (raw / "labels").rename(raw / "labelsTr")
    (raw / "images").rename(raw / "imagesTr")
    endings = set()
    for link in sorted((raw / "imagesTr").iterdir()):
        case = link.name.partition(".")[0]
        endings.add(ending := link.name.removeprefix(case))
        link.rename(link.with_name(f"{case}_0000{ending}"))
    if len(endings) != 1:
        raise ValueError(
            f"nnU-Net needs one kind of file, but the scans end in {' and '.join(sorted(endings))}"
        )
    labels = {"background": 0, **{name: value for value, name in job.dataset.labels.items()}}
    write_json(
        raw / "dataset.json",
        {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": len(job.training),
         "file_ending": endings.pop()},
    )  # fmt: skip


def _tells_sides(labels: dict[int, str]) -> bool:
    try:
        return bool(mirror_pairs(labels))
    except ValueError:  # one side alone
        return True


def _trainer(job: Job) -> Any:
    """A trainer of the row's configuration that stops at its limit."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    limits, sided = job.config().train, _tells_sides(job.dataset.labels)

    class Budgeted(nnUNetTrainer):
        def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:
            rotation, dummy_2d, size, axes = (
                super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            )
            if sided:
                axes = self.inference_allowed_mirroring_axes = None
            return rotation, dummy_2d, size, axes

        def run_training(self) -> None:
            self.progress, began, self.cpu_began = Progress(), time.monotonic(), time.process_time()
            if not job.limited:
                super().run_training()
                steps = self.num_epochs * self.num_iterations_per_epoch
                self.progress = Progress(steps, time.monotonic() - began)
                return
            self.on_train_start()
            self.network.train()
            began, self.cpu_began = time.monotonic(), time.process_time()
            while (done := self.progress.fraction(limits, 1)) < 1:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.initial_lr * (1 - done) ** 0.9
                self.train_step(next(self.dataloader_train))
                self.progress.step += 1
                self.progress.seconds = time.monotonic() - began

    os.environ |= {"nnUNet_n_proc_DA": "0"}  # no processes for augmentation beside the row's threads
    torch.set_num_threads(job.limits.threads)  # planning changed it
    preprocessed = _plans(job).parent
    plans = {**read_json(_plans(job)), "continue_training": False}
    random.seed(job.seed)
    np.random.seed(job.seed)
    torch.manual_seed(job.seed)
    return Budgeted(
        plans, CONFIGURATIONS[job.system.title], 0, read_json(preprocessed / "dataset.json"), job.device
    )
