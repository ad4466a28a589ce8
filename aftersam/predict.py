"""Segment CT volumes.    python -m aftersam.predict -i scan.nii.gz -o mask.nii.gz -m RUN

Any NIfTI grid in, the mask on the very same grid and affine out; a folder in, a folder of masks out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from aftersam.config import Config, from_dict, validate

if TYPE_CHECKING:
    import nibabel as nib
    import numpy as np
    import torch

    from aftersam.data.volume import Volume
    from aftersam.model.aftersam import AfterSAM

NIFTI = (".nii.gz", ".nii")


@dataclass(frozen=True)
class PredictArgs:
    input: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """A NIfTI file, a folder of them, or a folder that holds one DICOM series."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The mask's file name, or a folder for a folder of scans."""
    model: Annotated[Path, tyro.conf.arg(aliases=["-m"])]
    """Folder of a training run."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights with the best validation DSC, or the final ones."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    prompt_labels: Path | None = None
    """For a model with prompts: the label file, or a folder of them by case, that prompts are drawn from."""
    labels: str | None = None
    """Comma-separated organs to keep; the others become background."""
    overwrite: bool = False
    """Replace masks that exist; a folder's finished masks are kept otherwise."""
    preview: bool = True
    """Leave a PNG of the mask over the scan beside each mask."""
    batch_size: int = 8
    """Slices and groups computed at once; less needs less memory."""


@dataclass(frozen=True)
class Segmenter:
    """A trained model with the preprocessing and the label names of its run."""

    model: AfterSAM
    config: Config
    labels: dict[int, str]
    spacing_mm: tuple[float, float, float] | None  # None: the model works at each scan's own spacing
    precision: torch.dtype

    def predict(
        self,
        image: nib.spatialimages.SpatialImage | np.ndarray,
        affine: np.ndarray | None = None,
        *,
        prompt_labels: nib.spatialimages.SpatialImage | None = None,
    ) -> nib.Nifti1Image:
        """Segment a nibabel image, or an array in NIfTI's (x, y, z) order with its affine (voxel to RAS mm).

        Returns integer labels on the same grid, names in a header extension. `prompt_labels`, labels on the image's
        grid, are for a model with prompts. Raises ValueError on a bad grid, or where such a model gets none."""
        from aftersam.data.volume import from_nifti, labels_from_nifti, to_nifti

        if not hasattr(image, "affine"):
            import nibabel as nib

            if affine is None:
                raise ValueError("an array needs its affine: predict(array, affine)")
            image = nib.Nifti1Image(image, affine)
        volume = from_nifti(image)  # type: ignore[arg-type]  # an image by now
        prompts = None if prompt_labels is None else labels_from_nifti(prompt_labels, like=volume)
        return to_nifti(self.predict_volume(volume, prompt_labels=prompts), volume, self.labels)

    def predict_volume(
        self,
        volume: Volume,
        *,
        prompt_labels: Volume | None = None,
        batch_size: int = 8,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Segment a Volume: labels (D, H, W) uint8 in the volume's canonical axes."""
        from aftersam.data.transforms import preprocess, resample
        from aftersam.streaming import predict_labels

        ready = preprocess(volume, self.spacing_mm)
        prompts = None
        if self.config.model.prompts != "none":
            if prompt_labels is None:
                raise ValueError(
                    f"the model was trained with prompts={self.config.model.prompts}, so {volume.name} needs labels "
                    "to draw them from (--prompt-labels)"
                )
            prompts = resample(prompt_labels.array, volume.spacing_mm, ready.spacing_mm, labels=True)
        return predict_labels(
            self.model,
            ready.array,
            self.config.model,
            box=ready.box,
            output_shape=volume.array.shape,
            batch_size=batch_size,
            precision=self.precision,
            prompt_labels=prompts,
            progress=progress,
        )


def load(run: Path | str, *, checkpoint: Literal["best", "last"] = "best", device: str = "auto") -> Segmenter:
    """Load the model that `aftersam.train` left in the folder `run`, LoRA merged, ready to predict.

    Raises ValueError on a missing, truncated or foreign file."""
    import torch

    from aftersam.checkpoint import load_weights, read_json
    from aftersam.model.build import build_aftersam, merge_lora
    from aftersam.train import precision_for

    run = Path(run)
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is not a training run: it has no config.json")
    config = validate(from_dict(Config, read_json(run / "config.json"), where=str(run / "config.json")))
    facts = read_json(run / "run.json")
    labels = {int(value): name for value, name in facts["labels"].items()}
    model = build_aftersam(config.model, num_classes=len(labels) + 1)
    load_weights(run / f"{checkpoint}.safetensors", model)
    merge_lora(model)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    spacing = facts["spacing_mm"]
    return Segmenter(
        model.to(where).eval(),
        config,
        labels,
        None if spacing is None else tuple(spacing),
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            precision_for(config.train.precision, where.type), torch.float32
        ),
    )


def predict_files(args: PredictArgs) -> int:
    """Segment every scan that `args` name. Returns 0, or 1 when a scan of a folder failed and was reported.

    Raises ValueError where nothing can be done: no scans, a bad run, an output that exists."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    jobs, folder = _jobs(args)
    segmenter = load(args.model, checkpoint=args.checkpoint, device=args.device)
    keep = _kept_labels(args.labels, segmenter.labels)
    failed = 0
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        for scan, mask in jobs:
            if mask.exists() and not args.overwrite:
                console.print(f"{mask} exists and is kept; --overwrite replaces it", soft_wrap=True)
                continue
            try:
                _predict_file(segmenter, scan, mask, keep, args, bar)
            except (ValueError, OSError) as error:
                if not folder:
                    raise
                failed += 1
                console.print(f"aftersam.predict: {error}", soft_wrap=True, markup=False, highlight=False)
    return 1 if failed else 0


def _predict_file(
    segmenter: Segmenter, scan: Path, mask: Path, keep: set[int] | None, args: PredictArgs, bar: Any
) -> None:
    """Read, segment and write one scan, with its preview."""
    import numpy as np

    from aftersam.data.volume import read_image, read_labels, write_labels

    began = time.monotonic()
    volume = read_image(scan)
    prompts, facts = None, dict[str, str]()
    if args.prompt_labels is not None and segmenter.config.model.prompts != "none":
        prompts = read_labels(_prompt_file(args.prompt_labels, scan), like=volume)
        facts = {"prompted": segmenter.config.model.prompts}  # who scores this mask must know
    task = bar.add_task(scan.name, total=volume.array.shape[0])
    labels = segmenter.predict_volume(
        volume, prompt_labels=prompts, batch_size=args.batch_size, progress=lambda n: bar.advance(task, n)
    )
    if keep is not None:
        labels[~np.isin(labels, list(keep))] = 0
    names = {v: n for v, n in segmenter.labels.items() if keep is None or v in keep}
    mask.parent.mkdir(parents=True, exist_ok=True)
    write_labels(mask, labels, volume, names, facts)
    if args.preview:
        from aftersam.figures import overlay_png

        overlay_png(_stem(mask, ".png"), volume.array, labels, volume.spacing_mm, names, title=scan.name)
    bar.remove_task(task)
    found = ", ".join(names[v] for v in sorted(set(np.unique(labels)) & set(names))) or "nothing"
    bar.console.print(
        f"{mask}: {found}; {volume.array.shape[0]} slices in {time.monotonic() - began:.1f} s", soft_wrap=True
    )


def _jobs(args: PredictArgs) -> tuple[list[tuple[Path, Path]], bool]:
    """(scan, mask) pairs, and whether the input is a folder of scans."""
    if not args.input.exists():
        raise ValueError(f"{args.input} does not exist")
    scans = []
    if args.input.is_dir():
        scans = sorted(p for p in args.input.iterdir() if p.name.endswith(NIFTI))
    if scans:
        if args.output.name.endswith(NIFTI) or args.output.is_file():
            raise ValueError(f"{args.input} is a folder of {len(scans)} scans, so --output must be a folder")
        return [(scan, args.output / f"{_case(scan)}.nii.gz") for scan in scans], True
    mask = args.output
    if not mask.name.endswith(NIFTI):
        mask = mask / f"{_case(args.input)}.nii.gz"
    if mask.exists() and not args.overwrite:
        raise ValueError(f"{mask} exists; --overwrite replaces it")
    return [(args.input, mask)], False


def _prompt_file(labels: Path, scan: Path) -> Path:
    """The label of `scan`: `labels` itself, or the file with the scan's name in that folder."""
    if not labels.is_dir():
        return labels
    found = [p for ending in NIFTI if (p := labels / (_case(scan) + ending)).exists()]
    if not found:
        raise ValueError(f"{labels} has no label {_case(scan)}.nii.gz to draw the prompts of {scan} from")
    return found[0]


def _case(scan: Path) -> str:
    """The case's name: without the file ending and nnU-Net's channel number."""
    name = scan.name
    for ending in NIFTI:
        name = name.removesuffix(ending)
    return name.removesuffix("_0000")


def _stem(mask: Path, ending: str) -> Path:
    return mask.with_name(_case(mask) + ending)


def _kept_labels(wanted: str | None, labels: dict[int, str]) -> set[int] | None:
    if wanted is None:
        return None
    import difflib

    values = {name: value for value, name in labels.items()}
    kept = set()
    for name in (part.strip() for part in wanted.split(",")):
        if name not in values:
            close = difflib.get_close_matches(name, values, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"the model has no label {name!r}{hint} It has {', '.join(values)}")
        kept.add(values[name])
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    args = tyro.cli(PredictArgs, args=argv, description=__doc__)
    try:
        return predict_files(args)
    except (ValueError, OSError) as error:
        print(f"aftersam.predict: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
