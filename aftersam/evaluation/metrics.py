"""Scores of a mask against a reference: DSC, HD95, NSD, inter-slice consistency. Units in names, empty masks by rule.

Masks are boolean arrays (D, H, W), spacing_mm is (d, h, w). Surface distances are MONAI's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

Convention = Literal["nnunet", "monai", "transunet"]
Spacing = Sequence[float]


@dataclass(frozen=True)
class OrganScore:
    """One organ of one case. NaN: not defined, because reference and prediction are both empty."""

    dsc: float
    hd95_mm: float  # infinite where one of the masks is empty
    nsd: float  # at the tolerance of the evaluation
    ice: float  # inter-slice consistency error, 0 is best
    gaps: int  # slices without the organ between two with it, in the prediction
    diagonal_mm: float  # of the image: what a missed organ costs in a penalised mean of HD95
    predicted_voxels: int
    reference_voxels: int


def score_organ(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing_mm: Spacing,
    *,
    tolerance_mm: float = 3.0,
    convention: Convention = "nnunet",
) -> OrganScore:
    """All scores of one organ, DSC and HD95 by `convention`. Raises ValueError where the two masks differ in shape."""
    prediction, reference = _masks(prediction, reference)
    extent = np.array(prediction.shape) * np.asarray(spacing_mm)
    return OrganScore(
        dsc=dice(prediction, reference, convention=convention),
        hd95_mm=hd95_mm(prediction, reference, spacing_mm, convention=convention),
        nsd=nsd(prediction, reference, spacing_mm, tolerance_mm=tolerance_mm),
        ice=inter_slice_consistency_error(prediction, reference),
        gaps=gaps(prediction),
        diagonal_mm=float(np.linalg.norm(extent)),
        predicted_voxels=int(prediction.sum()),
        reference_voxels=int(reference.sum()),
    )


def dice(prediction: np.ndarray, reference: np.ndarray, *, convention: Convention = "nnunet") -> float:
    """DSC = 2|P ∩ R| / (|P| + |R|), in 0 ... 1.

    Empty masks. nnunet: 0 where one is empty, NaN where both are (left out of means). monai: NaN wherever the
    reference is empty, so that an organ found where there is none costs nothing. transunet: 1 where the prediction
    finds something in an empty reference, 0 where both are empty, as that code has it.

    Source: nnunetv2/evaluation/evaluate_predictions.py, compute_metrics; monai/metrics/meandice.py, ignore_empty;
    github.com/Beckschen/TransUNet, utils.py, calculate_metric_percase."""
    prediction, reference = _masks(prediction, reference)
    total = int(prediction.sum()) + int(reference.sum())
    if convention == "transunet" and not reference.any():
        return 1.0 if prediction.any() else 0.0
    if total == 0 or (convention == "monai" and not reference.any()):
        return math.nan
    return 2 * int((prediction & reference).sum()) / total


def hd95_mm(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: Spacing, *, convention: Convention = "nnunet"
) -> float:
    """The larger of the two directed 95th percentiles of surface distance, in mm.

    Empty masks. nnunet, which has no HD95 of its own: infinite where one is empty, NaN where both are. monai: NaN
    where any is, so that a missed organ is left out. transunet: 0 where any is, so that a missed organ counts as
    perfect. transunet pools both directions as MedPy does. TransUNet's own code leaves the spacing out and reports
    voxels; ours stays in mm.

    Source: monai/metrics/hausdorff_distance.py; medpy/metric/binary.py, hd95; TransUNet as for `dice`."""
    prediction, reference = _masks(prediction, reference)
    if not (prediction.any() and reference.any()):
        if convention == "transunet":
            return 0.0
        return math.nan if convention == "monai" or prediction.any() == reference.any() else math.inf
    if convention == "transunet":
        return _surface(_pooled_percentile, prediction, reference, spacing_mm, percentile=95)
    from monai.metrics import compute_hausdorff_distance

    return _surface(compute_hausdorff_distance, prediction, reference, spacing_mm, percentile=95)


def _pooled_percentile(
    prediction: torch.Tensor,
    reference: torch.Tensor,
    *,
    spacing: Spacing,
    percentile: float,
    **_options: object,
) -> float:
    """MedPy's percentile of surface distance: both directions pooled into one set."""
    from monai.metrics.utils import get_edge_surface_distance

    _edges, distances, _areas = get_edge_surface_distance(
        prediction[0, 0], reference[0, 0], spacing=list(spacing), symmetric=True
    )
    return float(np.percentile(np.concatenate([d.numpy() for d in distances]), percentile))


def nsd(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Spacing, *, tolerance_mm: float) -> float:
    """Normalised surface Dice: the share of both surfaces' area within `tolerance_mm` of the other, in 0 ... 1.

    Area-weighted with sub-voxel surfaces. 0 where one mask is empty, NaN where both are.
    Source: Nikolov et al., arXiv 1809.04430."""
    prediction, reference = _masks(prediction, reference)
    if not (prediction.any() and reference.any()):
        return math.nan if prediction.any() == reference.any() else 0.0
    from monai.metrics import compute_surface_dice

    return _surface(
        compute_surface_dice,
        prediction,
        reference,
        spacing_mm,
        class_thresholds=[tolerance_mm],
        use_subvoxels=True,
    )


def inter_slice_consistency_error(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Mean of |s_P(z) − s_R(z)| over the slice pairs where either mask has something; 0 is best, NaN without any.

    s_M(z) = 2|M_z ∩ M_z+1| / (|M_z| + |M_z+1|), 1 where both slices are empty."""
    prediction, reference = _masks(prediction, reference)
    there = np.zeros(len(prediction) - 1, dtype=bool)
    overlaps = []
    for mask in (prediction, reference):
        size = mask.sum((1, 2))
        pairs = size[:-1] + size[1:]
        shared = (mask[:-1] & mask[1:]).sum((1, 2))
        overlaps.append(np.where(pairs > 0, 2 * shared / np.maximum(pairs, 1), 1.0))
        there |= pairs > 0
    return float(np.abs(overlaps[0] - overlaps[1])[there].mean()) if there.any() else math.nan


def gaps(mask: np.ndarray) -> int:
    """Slices z without the organ while z − 1 and z + 1 have it."""
    there: np.ndarray = np.any(mask, axis=(1, 2))
    return int((there[:-2] & ~there[1:-1] & there[2:]).sum())


def _masks(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, reference = np.asarray(prediction, dtype=bool), np.asarray(reference, dtype=bool)
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(
            f"prediction has shape {prediction.shape} and reference {reference.shape}; both must be the same (D, H, W)"
        )
    return prediction, reference


def _surface(
    compute: object, prediction: np.ndarray, reference: np.ndarray, spacing_mm: Spacing, **options: object
) -> float:
    """One of MONAI's surface metrics on the masks' common bounding box, padded by background."""
    import torch

    union: Any = prediction | reference
    box = []
    for axis in range(3):
        found = np.flatnonzero(np.any(union, axis=tuple(i for i in range(3) if i != axis)))
        box.append(slice(found[0], found[-1] + 1))
    pair = [torch.from_numpy(np.pad(m[tuple(box)], 2))[None, None] for m in (prediction, reference)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI announces changes of its defaults; we pass every choice
        value = compute(*pair, include_background=True, spacing=[float(s) for s in spacing_mm], **options)  # type: ignore[operator]  # `compute` is one of two functions of MONAI
    return float(value)


def organ_statistics(
    labels: np.ndarray, hu: np.ndarray, names: Mapping[int, str], *, voxel_mm3: float
) -> dict[str, dict[str, float | None]]:
    """{organ: its volume_ml and mean_hu} of labels (D, H, W) over the scan hu (D, H, W); mean_hu None where empty."""
    size = max(*names, int(labels.max(initial=0)), 0) + 1
    count, total = np.zeros(size), np.zeros(size)
    for plane, values in zip(labels, hu, strict=True):  # no float64 copy of the scan
        count += np.bincount(plane.ravel(), minlength=size)
        total += np.bincount(plane.ravel(), weights=values.ravel(), minlength=size)
    return {
        name: {
            "volume_ml": round(count[value] * voxel_mm3 / 1000, 4),
            "mean_hu": round(total[value] / count[value], 2) if count[value] else None,
        }
        for value, name in names.items()
    }
