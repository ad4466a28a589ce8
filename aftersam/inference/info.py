"""Print the facts of a model or of a mask.    aftersam info RUN|MASK --json"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from aftersam.errors import plain_console, run_command, tell
from aftersam.files import is_nifti, read_json
from aftersam.inference.jobs import beside
from aftersam.model.run_folder import bundled_runs, find_run, model_id, read_run


@dataclass(frozen=True)
class InfoArgs:
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|MASK")]
    """Folder of a training run, the name of a model that comes along, or a mask (.nii.gz, .nii)."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Info:
    """The facts of a model or of a mask, as JSON values by name."""

    facts: dict[str, Any]


def info(args: InfoArgs) -> Info:
    """The facts of a run or of a mask. Raises ValueError where the path is neither."""
    if is_nifti(args.path):
        return Info(_of_mask(args.path))
    if not args.path.exists() and str(args.path) not in bundled_runs():
        raise ValueError(
            f"{args.path} is neither a training run, nor a mask, nor one of {', '.join(bundled_runs())}"
        )
    return Info(_of_run(find_run(args.path)))


def _of_run(run: Path) -> dict[str, Any]:
    import math

    from aftersam.files import tensor_headers
    from aftersam.model.build import TRAINING_STATE

    config, facts = read_run(run)
    stored = read_json(run / "run.json")
    checkpoints = {}
    for name in ("best", "last"):
        weights = run / f"{name}.safetensors"
        if weights.exists():
            found = tensor_headers(weights).items()
            parameters = sum(math.prod(h.shape) for key, h in found if not key.startswith(TRAINING_STATE))
            checkpoints[name] = {"model": model_id([run], name), "parameters": parameters}
    return {
        "kind": "model",
        "path": str(run),
        "labels": facts.labels,
        "spacing_mm": facts.spacing_mm,
        "image_size": config.model.image_size,
        "num_slices": config.model.num_slices,
        "image_encoder": config.model.image_encoder,
        "prompts": config.model.prompts,
        "temperature": facts.temperature,
        "checkpoints": checkpoints,
        **{key: stored[key] for key in ("commit", "versions") if key in stored},
    }


def _of_mask(mask: Path) -> dict[str, Any]:
    import numpy as np

    from aftersam.data.volume import read_labels

    volume = read_labels(mask)
    path = beside(mask, ".json")
    stored = read_json(path) if path.is_file() else {}
    named = stored.get("labels", {}) if isinstance(stored, dict) else {}
    names = {value: name for name, value in named.items() if isinstance(value, int)}
    counts = np.bincount(volume.array.ravel(), minlength=max(names, default=0) + 1)
    ml = float(np.prod(volume.spacing_mm)) / 1000
    return {
        "kind": "mask",
        "path": str(mask),
        "shape_dhw": list(volume.array.shape),
        "spacing_mm": [round(mm, 6) for mm in volume.spacing_mm],
        "organs": {
            names.get(value, f"label {value}"): {"voxels": count, "ml": round(count * ml, 4)}
            for value, count in enumerate(counts.tolist())
            if value and (count or value in names)
        },
        **{key: stored[key] for key in ("model", "version", "prompted") if key in stored},
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("info", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = tyro.cli(InfoArgs, args=argv, description=__doc__)
    facts = info(args).facts
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for name, value in facts.items():
        tell(plain_console(), f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
