"""What prediction is asked for: every flag of `aftersam predict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from aftersam.config import Count, Range, Small

Parts = Annotated[int, Range(1, 1e6)]
PartId = Annotated[int, Range(0, 1e6)]
GPUs = Annotated[float, Range(0, 64)]


@dataclass(frozen=True)
class PredictArgs:
    input: Annotated[str | Path, tyro.conf.arg(aliases=["-i"], metavar="PATH|URL")]
    """A NIfTI file, a folder of them, or a folder that holds one DICOM series; a list of scans (.txt, one a line; .csv,
    .tsv or .parquet with the column image, and case_id, mask if you like); a .zip; or a URL, such as s3://bucket/scans."""
    output: Annotated[str | Path, tyro.conf.arg(aliases=["-o"], metavar="PATH|URL")]
    """The mask's file name (.nii.gz, .nii, or .dcm for a DICOM series); for many scans a folder, a URL or a .zip."""
    model: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["-m"])] = ()
    """Folder of a training run, or the name of a model that comes along. Several, or a folder of folds: the mean of
    their probabilities, at the cost of each."""
    recursive: bool = False
    """Search the folder --input with all folders in it, for NIfTI files and for every CT series in DICOM; masks get the
    same folders in --output."""
    num_parts: Parts | None = None
    """Number of parts that the scans are split into, by a hash of the case id. Without it SLURM's array, AWS Batch's
    array and torchrun are asked; a Kubernetes indexed job needs it."""
    part_id: PartId | None = None
    """The part to do, from 0. Without it the scheduler's index is taken."""
    manifest: Literal["auto", "on", "off"] = "auto"
    """Leave a row a scan in --output/manifest, which `aftersam manifest` merges. auto: for every input but one scan and
    a flat folder."""
    engine: Literal["local", "ray"] = "local"
    """ray: share the scans among the actors of a Ray cluster (extra ray)."""
    address: str | None = None
    """The Ray cluster to join, such as auto; without it Ray starts on this machine alone."""
    workers: Count = 1
    """Actors of --engine ray, each with the model."""
    gpus_per_worker: GPUs = 0.0
    """GPUs of each actor of --engine ray; 0.25 puts four actors on one GPU."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights with the best validation DSC, or the final ones."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    prompt_labels: Path | None = None
    """For a model with prompts: the label file, or a folder of them by case, that prompts are drawn from."""
    labels: str | None = None
    """Comma-separated organs to keep; the others become background."""
    trust_intensities: bool = False
    """Take scans as they are whose values do not look like Hounsfield units: no warning, no refusal."""
    overwrite: bool = False
    """Replace masks that exist; a folder's finished masks are kept otherwise."""
    preview: bool = True
    """Leave a PNG of the mask over the scan beside each mask."""
    batch_size: Count = 8
    """Slices and groups computed at once; less needs less memory."""
    keep: Small = 1
    """Middle slices kept of each group: K needs about 1/K of the fusion, with less context on one side."""
    overlap: Literal["none", "average"] = "none"
    """average: average the logits of all groups that contain a slice; each of them decodes it."""
    tta: Literal["none", "mirror"] = "none"
    """mirror: the mean with the scan's mirror image, left and right labels swapped; twice the work."""
    parts: Literal["main", "all"] = "main"
    """main: drop small disconnected parts, below a fifth of the largest, of organs that are one piece in every training
    label. all: keep them."""
    roi: Literal["scan", "body"] = "scan"
    """body: slices of air before and after the body are background without being computed."""
    embeddings: Path | None = None
    """Folder for what the encoder makes of each slice: found there, or written for the next prediction."""
    compile: bool = False
    """Compile the model first, which takes a minute and pays back over many scans."""
    graph: bool = True
    """Replay each step as a CUDA graph on a GPU. --no-graph launches kernels one by one, which takes less memory."""
    save_probabilities: bool = False
    """Leave CASE.probabilities.npy beside each mask: float16 (classes, background first, x, y, z)."""
    confidence: bool = False
    """Leave CASE.confidence.nii.gz beside each mask: 1 where all groups that contain a slice agree, 0 where
    none does. Each of them decodes the slice; the mask stays the same."""
    statistics: bool = False
    """Leave each organ's volume in ml and mean HU as CASE.statistics.json beside each mask."""
    review: bool = False
    """List a folder's scans in review.csv of --output by the DSC that their probabilities let expect, lowest first."""
    timings: bool = False
    """Print each stage's seconds, slices a second and peak memory, and leave them as JSON beside each mask."""
