"""The systems of the accuracy table, and what all rows share.

Networks have two to six million parameters, about as many as our `small` preset, so that every row makes several
hundred steps in forty minutes on one processor core. The sizes were chosen for that and not by scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from aftersam.config import Config, DataConfig, preset
from aftersam.data.cache import CachedCase, cache_cases
from aftersam.data.dataset import Case, Dataset
from aftersam.device import precision_for
from benchmarks.accuracy.rivals.cotr import build_cotr
from benchmarks.accuracy.rivals.slice_groups import build_after_unet, build_msa
from benchmarks.accuracy.rivals.swin_unet import build_swin_unet
from benchmarks.accuracy.rivals.transunet import build_transunet
from benchmarks.machine import absent

Preset = Literal["paper", "best", "small", "tiny"]


class Limits(NamedTuple):
    """What every row of a table shares."""

    max_minutes: float | None
    max_steps: int | None
    threads: int
    preset: Preset  # of our own systems and of the rivals made of our parts
    spacing_mm: tuple[float, float, float] | Literal["median"]  # of the patch-based networks
    patch: tuple[int, int, int]
    sam_checkpoint: str | None
    imagenet: Mapping[str, str]
    """Files of ImageNet weights by system."""
    fold: int
    device: str


@dataclass(frozen=True)
class Job:
    """One row: a system and a seed, the data, and the folder that its weights and masks go to."""

    system: System
    seed: int
    home: Path
    limits: Limits
    dataset: Dataset
    training: list[str]
    held_out: list[str]
    cache: Path
    scans: Path
    """Folder with images/ and labels/ of the held-out cases."""

    @property
    def device(self) -> torch.device:
        wanted = self.limits.device
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)

    @property
    def precision(self) -> torch.dtype:
        return torch.bfloat16 if precision_for("auto", self.device.type) == "bf16" else torch.float32

    @property
    def imagenet(self) -> str | None:
        """The file of ImageNet weights that the network starts from."""
        return next((f for name, f in self.limits.imagenet.items() if SYSTEMS[name] is self.system), None)

    @property
    def num_classes(self) -> int:
        return len(self.dataset.labels) + 1

    @property
    def limited(self) -> bool:
        return self.limits.max_minutes is not None or self.limits.max_steps is not None

    def held_out_cases(self) -> Iterator[Case]:
        return (case for case in self.dataset.cases if case.id in self.held_out)

    def config(self) -> Config:
        """The preset within the row's limit, without validation, since nothing is chosen by it."""
        pretrained = self.system.kind == "group" and self.system.prompted and self.limits.sam_checkpoint
        base = preset("best" if pretrained else self.system.preset or self.limits.preset)
        changes: dict[str, Any] = {"seed": self.seed, "validations": 0}
        if self.limited:
            changes |= {"max_minutes": self.limits.max_minutes, "max_steps": self.limits.max_steps}
        if self.system.learning_rate is not None:
            changes["learning_rate"] = self.system.learning_rate
        return Config(
            dataclasses.replace(base.model, **self.system.model),
            base.data,
            dataclasses.replace(base.train, **changes),
        )

    def patch_size(self) -> list[int]:
        """The table's patch, its sides rounded down to what the network divides."""
        multiple = self.system.multiple
        return [max(side // multiple, 1) * multiple for side in self.limits.patch]

    def cached(self, data: DataConfig) -> list[CachedCase]:
        """The training scans at the spacing of `data`."""
        found = cache_cases(self.dataset, self.training, data, self.cache, training=self.training)
        return list(found.values())


@dataclass(frozen=True)
class System:
    """A row's name in the paper, how it is trained, and what a reader must know of it."""

    title: str
    kind: Literal["patch", "group", "ours", "nnunet"]
    note: str = ""
    build: Callable[..., nn.Module] | None = None
    multiple: int = 1
    """Sides of a patch are rounded down to it."""
    learning_rate: float | None = None
    """In place of the preset's."""
    channels_last: bool = False
    """Train and predict with weights in channels last, on a CPU, where that makes the network faster."""
    preset: Preset | None = None
    """In place of the table's."""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of the preset's model that differ."""
    prompted: bool = False
    imagenet: bool = False
    """Whether it can start from ImageNet's weights, then at its published size."""
    needs: str = ""
    """A package that the installation may lack."""

    def missing(self) -> str:
        """Why this system cannot be trained here; empty where it can."""
        return absent(self.needs) if self.needs else ""


def _unet(num_classes: int) -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(3, 1, num_classes, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="instance")


def _attention_unet(num_classes: int) -> nn.Module:
    from monai.networks.nets import AttentionUnet

    return AttentionUnet(3, 1, num_classes, (16, 32, 64, 128, 256), (2, 2, 2, 2))


def _swin_unetr(num_classes: int) -> nn.Module:
    from monai.networks.nets import SwinUNETR

    # windows of 4 instead of 7 tokens fit 64-voxel patches without padding, at a quarter of the time
    return SwinUNETR(1, num_classes, feature_size=12, window_size=4)


def _dynunet(num_classes: int) -> nn.Module:
    from monai.networks.nets import DynUNet

    return DynUNet(
        3, 1, num_classes, kernel_size=[3] * 5, strides=[1, 2, 2, 2, 2], upsample_kernel_size=[2] * 4,
        filters=(16, 32, 64, 128, 192),
    )  # fmt: skip


_OURS = "a reimplementation from our parts and MONAI's blocks; the authors' code was not used"
_NNUNET = (
    "the package nnunetv2; within a limit its planner is asked for half the features and 0.5 GB of GPU memory"
)
_2D: dict[str, Any] = {"attention": "none", "stem_slices": 1}  # every slice by itself
SYSTEMS: dict[str, System] = {  # in the order of the paper's tables
    "unet": System("U-Net", "patch", "MONAI UNet", _unet, 16, channels_last=True),
    "attention_unet": System("Att U-Net", "patch", "MONAI AttentionUnet", _attention_unet, 16),
    "nnunet_2d": System("nnU-Net 2D", "nnunet", _NNUNET, needs="nnunetv2"),
    "nnunet_3d": System("nnU-Net 3D", "nnunet", _NNUNET, needs="nnunetv2"),
    "dynunet": System("DynUNet", "patch", "MONAI DynUNet: nnU-Net's network without its pipeline", _dynunet, 16),
    "transunet": System(
        "TransUNet", "group",
        "from MONAI's parts, without ImageNet weights; 6 of R50's 16 blocks at a quarter of the width, 4 of ViT-B's 12 "
        "layers with 192 of 768 channels", build_transunet, model=_2D, imagenet=True,
    ),
    "swin_unet": System(
        "Swin-Unet", "group", "from MONAI's parts, without ImageNet weights; 40 of 96 channels, windows of 4 tokens",
        build_swin_unet, model=_2D, imagenet=True, needs="einops",
    ),
    "cotr": System(
        "CoTr", "patch", "from MONAI's parts, without deep supervision; a quarter of the width, 3 of 6 layers",
        build_cotr, 16,
    ),
    "after_unet": System("AFTer-UNet", "group", _OURS, build_after_unet, model={"stem_slices": 1}),
    "swin_unetr": System(
        "Swin UNETR", "patch", "MONAI SwinUNETR, windows of 4 tokens", _swin_unetr, 32, learning_rate=5e-4,
        channels_last=True, needs="einops",
    ),
    "msa": System(
        "MSA", "group",
        f"{_OURS}; prompted from the label: one click in every slice that holds the organ, and which slices lack it",
        build_msa,
        model={**_2D, "prompts": "point"}, prompted=True,
    ),
    "aftersam_2d": System(
        "AFTer-SAM 2D", "ours", "ours without fusion blocks, every slice by itself", model=_2D,
    ),
    "aftersam": System("AFTer-SAM", "ours", "ours"),
    "aftersam_best": System("AFTer-SAM best", "ours", "ours", preset="best"),
    "aftersam_paper": System("AFTer-SAM paper", "ours", "ours, the paper read literally", preset="paper"),
}  # fmt: skip
