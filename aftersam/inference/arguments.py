"""The flags of `aftersam predict`."""

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
    """A NIfTI file, a folder of NIfTI files, a folder with one DICOM series, a .zip, or a URL such as s3://bucket/scans.
    Or a list of scans: a .txt with one scan a line; a .csv, .tsv or .parquet with the column image and, if you like,
    the columns case_id and mask."""
    output: Annotated[str | Path, tyro.conf.arg(aliases=["-o"], metavar="PATH|URL")]
    """File name of the mask (.nii.gz, .nii, or .dcm for a DICOM series). For several scans: a folder, a URL or a
    .zip."""
    model: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["-m"])] = ()
    """Folder of a training run, or the name of a model that comes along. Several runs, or a folder of folds, are an
    ensemble: their probabilities are averaged, and their times add up."""
    recursive: bool = False
    """Search --input and all folders below it for NIfTI files and CT series in DICOM. Masks get the same folders below
    --output."""
    num_parts: Parts | None = None
    """Split the scans into this many parts, by a hash of the case id. By default the number comes from SLURM's array,
    AWS Batch's array or torchrun; a Kubernetes indexed job needs the flag."""
    part_id: PartId | None = None
    """Number of the part to predict, from 0. By default it is the scheduler's index."""
    manifest: Literal["auto", "on", "off"] = "auto"
    """Write one row for each scan to --output/manifest, which `aftersam manifest` merges. auto: on, unless --input is
    one scan or a flat folder."""
    engine: Literal["local", "ray"] = "local"
    """local: predict in this process. ray: share the scans among the actors of a Ray cluster (needs the extra ray)."""
    address: str | None = None
    """Address of the Ray cluster to join, such as auto. By default Ray starts on this machine alone."""
    workers: Count = 1
    """Number of actors of --engine ray. Each loads the model."""
    gpus_per_worker: GPUs = 0.0
    """Number of GPUs of each actor of --engine ray. 0.25 puts four actors on one GPU."""
    checkpoint: Literal["best", "last"] = "best"
    """best: the weights with the best validation DSC. last: the weights at the end of the training; their probabilities
    are not calibrated."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    prompt_labels: Path | None = None
    """Label file, or folder of label files named by case, from which a model with prompts draws its prompts."""
    labels: str | None = None
    """Organs to keep, separated by commas. All others become background."""
    trust_intensities: bool = False
    """Predict scans whose values do not look like Hounsfield units, without a warning and without an error."""
    overwrite: bool = False
    """Replace masks that exist. By default the finished masks of a folder are kept."""
    preview: bool = True
    """Write a PNG of the mask over the scan beside each mask."""
    batch_size: Count = 8
    """Slices and groups computed at once. A smaller number needs less memory."""
    keep: Small = 1
    """Middle slices kept of each group. With K of them the fusion takes about 1/K of the time, but the outer ones have
    less context on one side."""
    overlap: Literal["none", "average"] = "none"
    """average: average the logits of all groups that contain a slice. Every group then decodes all its slices."""
    tta: Literal["none", "mirror"] = "none"
    """mirror: average with the logits of the mirrored scan, left and right labels swapped. Takes twice as long."""
    parts: Literal["main", "all"] = "main"
    """main: drop small disconnected parts. A part is small below a fifth of the largest; only organs that are one piece
    in every training label are affected. all: keep all parts."""
    roi: Literal["scan", "body"] = "scan"
    """body: skip the slices of air before and after the body, which become background."""
    embeddings: Path | None = None
    """Folder of the embedding cache. The encoder's features of each scan are read from it, or computed and stored for
    the next prediction."""
    compile: bool = False
    """Compile the model first. This takes a minute and pays off over many scans."""
    graph: bool = True
    """Replay each step as a CUDA graph on a GPU. --no-graph launches kernels one by one, which needs less memory."""
    save_probabilities: bool = False
    """Write CASE.probabilities.npy beside each mask: float16 (classes, x, y, z), background first."""
    confidence: bool = False
    """Write CASE.confidence.nii.gz beside each mask: 1 where all groups that contain a slice agree, 0 where each is
    sure of another class. Every group then decodes all its slices; the mask does not change."""
    statistics: bool = False
    """Write each organ's volume in ml and mean HU to CASE.statistics.json beside each mask."""
    review: bool = False
    """Write review.csv to --output: the scans by the DSC expected from their probabilities, lowest first. An organ that
    is not found counts as 0."""
    timings: bool = False
    """Print each stage's seconds, slices a second and peak memory, and write them as JSON beside each mask."""
