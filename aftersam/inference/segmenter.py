"""Loads a trained run for prediction:    aftersam.load("run").predict(nib.load("scan.nii.gz"))"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import nibabel as nib
    import numpy as np
    import torch

    from aftersam.config import Config
    from aftersam.data.volume import Volume
    from aftersam.inference.inputs import PredictOptions, Scan
    from aftersam.inference.sliding import Prediction
    from aftersam.inference.timings import Timings
    from aftersam.model.aftersam import AfterSAM


FAR = 10  # warn of a scan that is this many times coarser, finer or shorter than the training scans


class Prepared(NamedTuple):
    """A scan as it was read, and at the model's spacing."""

    volume: Volume
    scan: Scan
    more: tuple[Scan, ...] = ()
    """The scan at the spacing of each model in `Segmenter.folds`."""


@dataclass(frozen=True)
class Segmenter:
    """A trained model with the preprocessing and the label names of its run."""

    model: AfterSAM
    config: Config
    labels: dict[int, str]
    spacing_mm: tuple[float, float, float] | None  # None: the model works at each scan's own spacing
    precision: torch.dtype
    one_piece: tuple[int, ...] = ()
    """Organs that are one connected piece in every training label. `segment` drops small parts of these organs."""
    longest_mm: tuple[float, float] | None = None
    """Length along the longest axis of the shortest and of the longest training scan."""
    temperature: float = 1.0
    """Divisor of the logits before the softmax (temperature scaling)."""
    folds: tuple[Segmenter, ...] = ()
    """Further models on the same organs. Masks come from the mean of all models' probabilities."""

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    def predict(
        self,
        image: nib.spatialimages.SpatialImage | np.ndarray,
        affine: np.ndarray | None = None,
        *,
        prompt_labels: nib.spatialimages.SpatialImage | None = None,
    ) -> nib.Nifti1Image:
        """Segment a nibabel image, or an array in NIfTI's (x, y, z) order with its affine (voxel to RAS mm).

        Returns integer labels on the same grid, with the label names in a header extension. A model with prompts needs
        `prompt_labels`, labels on the image's grid. Raises ValueError on a bad grid, and as `prepare` does."""
        from aftersam.data.intensities import check_intensities
        from aftersam.data.volume import from_nifti, image_of, labels_from_nifti, to_nifti

        if not hasattr(image, "affine"):
            if affine is None:
                raise ValueError("an array needs its affine: predict(array, affine)")
            image = image_of(image, affine)
        volume = from_nifti(image)  # type: ignore[arg-type]  # an image by now
        check_intensities(volume, refuse=False)
        prompts = None if prompt_labels is None else labels_from_nifti(prompt_labels, like=volume)
        found = self.segment(self.prepare(volume, prompt_labels=prompts))
        return to_nifti(found.labels, volume, self.labels)

    def prepare(
        self, volume: Volume, *, prompt_labels: Volume | None = None, timings: Timings | None = None
    ) -> Prepared:
        """Resample a scan, and the labels for prompts, to the model's spacing. Runs on the CPU.

        Warns where the scan's voxels or length are far from those of the training scans. Raises ValueError where a
        model with prompts gets no labels, or one without prompts gets some."""
        from aftersam.data.transforms import preprocess, resample
        from aftersam.inference.inputs import Scan
        from aftersam.inference.timings import Timings

        timings = timings or Timings()
        timings.slices = volume.array.shape[0]
        if (odd := _far_from_training(volume, self.spacing_mm, self.longest_mm)) is not None:
            warnings.warn(f"{volume.name} {odd}; is its spacing right?", stacklevel=2)
        needs, prompts = self.config.model.prompts, None
        if needs == "none" and prompt_labels is not None:
            raise ValueError("the model was trained without prompts, so it takes no prompt_labels")
        if needs != "none" and prompt_labels is None:
            raise ValueError(
                f"the model was trained with prompts={needs}, so {volume.name} needs labels to draw them from "
                "(--prompt-labels)"
            )
        scans: dict[tuple[float, float, float] | None, Scan] = {}
        with timings.stage("resample"):
            for spacing_mm in (self.spacing_mm, *(fold.spacing_mm for fold in self.folds)):
                if spacing_mm in scans:
                    continue
                ready = preprocess(volume, spacing_mm)
                if prompt_labels is not None:
                    prompts = resample(prompt_labels.array, volume.spacing_mm, ready.spacing_mm, labels=True)
                scans[spacing_mm] = Scan(ready.array, ready.box, prompts, timings=timings)
        return Prepared(volume, scans[self.spacing_mm], tuple(scans[fold.spacing_mm] for fold in self.folds))

    def segment(
        self,
        prepared: Prepared,
        options: PredictOptions | None = None,
        *,
        main_parts: bool = True,
        probabilities: np.ndarray | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Prediction:
        """Labels (D, H, W) in the canonical axes of the scan's volume, and the confidence where `options` ask for it.

        With `main_parts` False small parts of the organs in `one_piece` are kept. `probabilities` (K+1, D, H, W) and
        `progress` are as in `aftersam.predict_volume`."""
        from aftersam.inference.inputs import PredictOptions
        from aftersam.inference.postprocess import drop_small_parts
        from aftersam.inference.sliding import Sink, fill, mean_planes, output_planes

        options, shape = options or PredictOptions(), prepared.volume.array.shape
        runs = list(zip((self, *self.folds), (prepared.scan, *prepared.more), strict=True))
        streams = [
            output_planes(
                run.model, scan, run.config.model, options, output_shape=shape, precision=run.precision
            )
            for run, scan in runs
        ]
        planes, temperature = streams[0], self.temperature
        if self.folds:
            planes, temperature = mean_planes(streams, [run.temperature for run, _ in runs]), 1.0
        sink = Sink(shape, prepared.scan.timings, probabilities, progress, temperature)
        found = fill(planes, len(self.labels) + 1, options, sink)
        if main_parts:
            with prepared.scan.timings.stage("write"):
                drop_small_parts(found.labels, self.one_piece)
        return found


def _far_from_training(
    volume: Volume,
    spacing_mm: tuple[float, float, float] | None,
    longest_mm: tuple[float, float] | None,
) -> str | None:
    """How a scan's voxels or length differ from the training scans by a factor that makes masks unreliable, or None."""
    found = volume.spacing_mm
    ratios = [a / b for a, b in zip(found, spacing_mm or found, strict=True)]
    if max(ratios) > FAR or min(ratios) < 1 / FAR:
        sizes = (" × ".join(f"{mm:.3g}" for mm in each) for each in (found, spacing_mm or found))
        return "has voxels of {} mm, but the model works at {} mm".format(*sizes)
    longest = max(n * mm for n, mm in zip(volume.array.shape, found, strict=True))
    if longest_mm is not None and not longest_mm[0] / FAR <= longest <= longest_mm[1] * 3:
        return (
            f"is {longest:.3g} mm long, but the training scans {longest_mm[0]:.3g} to {longest_mm[1]:.3g} mm"
        )
    return None


def load(
    run: Path | str | Sequence[Path | str],
    *,
    checkpoint: Literal["best", "last"] = "best",
    device: str = "auto",
    compiled: bool = False,
    graphs: bool = True,
) -> Segmenter:
    """Load the model that `aftersam.train` wrote to the folder `run`, with LoRA merged, for prediction.

    `run` may also be the name of a model that comes along, or several runs, such as a folder of folds; the
    probabilities of several runs are averaged. `compiled` compiles each step at its first use, which takes a minute and
    pays off over many scans. `graphs` replays each step as a CUDA graph if the model is on a GPU; masks do not change.
    Raises ValueError on a missing, truncated or foreign file, on runs of different organs, and on a device that does
    not exist."""
    from aftersam.model.run_folder import find_runs, read_run

    runs = find_runs([run] if isinstance(run, (str, Path)) else run)
    facts = [read_run(path) for path in runs]
    for path, (config, own) in zip(runs, facts, strict=True):
        asked, names = facts[0][0].model.prompts, facts[0][1].names
        if config.model.prompts != asked:
            raise ValueError(
                f"{path} was trained with prompts={config.model.prompts}, but {runs[0]} with prompts={asked}; runs "
                "that are averaged need the same"
            )
        if differ := sorted(own.names.items() ^ names.items()):
            theirs, ours = (known.get(differ[0][0], "nothing") for known in (own.names, names))
            raise ValueError(
                f"{path} has {theirs} as label {differ[0][0]}, but {runs[0]} has {ours}; runs that are averaged need "
                "the same labels in the same order"
            )
    first, *others = (
        load_run(path, checkpoint=checkpoint, device=device, compiled=compiled, graphs=graphs)
        for path in runs
    )
    one_piece = tuple(v for v in first.one_piece if all(v in other.one_piece for other in others))
    return replace(first, one_piece=one_piece, folds=tuple(others))


def load_run(
    run: Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    device: str = "auto",
    compiled: bool = False,
    graphs: bool = True,
) -> Segmenter:
    """Load a single run; see `load`."""
    from aftersam.device import dtype_for, find_device
    from aftersam.inference.graphs import capture_steps
    from aftersam.model.build import build_aftersam, check_weights, load_weights
    from aftersam.model.layers import put_channels_last
    from aftersam.model.lora import merge_lora
    from aftersam.model.run_folder import find_run, read_run

    where, run = find_device(device), find_run(run)
    config, facts = read_run(run)
    weights = run / f"{checkpoint}.safetensors"
    check_weights(weights, config.model, num_classes=len(facts.labels) + 1)
    model = build_aftersam(config.model, num_classes=len(facts.labels) + 1)
    load_weights(weights, model)
    merge_lora(model)
    if compiled:
        compile_steps(model)
    if graphs:
        capture_steps(model)
    if where.type == "cpu":
        put_channels_last(model)
    return Segmenter(
        model.to(where).eval(),
        config,
        facts.names,
        facts.spacing_mm,
        dtype_for(config.train.precision, where.type),
        facts.one_piece,
        facts.longest_mm,
        facts.temperature if checkpoint == "best" else 1.0,  # fitted to the best weights
    )


def compile_steps(model: AfterSAM, *, backend: str = "inductor") -> None:
    """Compile the encoder, the fusion and the decoder of `model` in place, each without graph breaks.

    The first batch size is compiled as a constant. The second one triggers a compilation for all sizes."""
    for part in (model.encoder, model.fusion, model.decoder):
        if part is not None:
            part.compile(fullgraph=True, backend=backend)
