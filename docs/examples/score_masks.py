"""Score the masks of any tool.    python docs/examples/score_masks.py MASKS LABELS

Masks and references are NIfTI of the same names. Prints DSC and HD95 of every organ, as `aftersam evaluate` does."""

import sys
from pathlib import Path

from aftersam.evaluation.scoring import Metrics, ScoringOptions, score_folder


def main(masks: Path, labels: Path) -> Metrics:
    """The scores of all cases; `metrics["cases"]` has them one by one."""
    metrics = score_folder(masks, labels, ScoringOptions(nsd_tolerance_mm=5.0), quiet=True)
    for name, organ in metrics["organs"].items():
        print(f"{name:>16}  DSC {organ['dsc'] or 0:.3f}  HD95 {organ['hd95_mm_penalised'] or 0:.1f} mm")
    print(f"{'mean':>16}  DSC {metrics['mean_dsc'] or 0:.3f}, cases: {metrics['num_cases']}")
    return metrics


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
