"""Peak memory of a prediction on a CPU.    python -m benchmarks.prediction_memory --organs 117 --slices 1000

A cylinder of soft tissue in fat, 512 × 512 pixels of 0.8 mm and slices of 1 mm, as .nii.gz, goes through
`aftersam predict` with an untrained model of the preset tiny, which works at 3 mm. The peak is that of the whole
process: Python, torch, the scan, the mask and all between. --noise gives every organ voxels everywhere, the worst case
for dropping small parts; without it the untrained model sees background alone."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aftersam.config import preset, to_dict
from aftersam.data.volume import AIR_HU
from aftersam.errors import counted
from aftersam.files import read_json, write_json
from benchmarks import machine

PIXELS, PIXEL_MM, SLICE_MM = 512, 0.8, 1.0


def write_scan(path: Path, slices: int) -> None:
    """A cylinder of 40 HU in a tube of fat, both with noise, in air."""
    import nibabel as nib

    across = np.hypot(*np.ogrid[-1 : 1 : PIXELS * 1j, -1 : 1 : PIXELS * 1j])
    rng = np.random.default_rng(0)
    array = np.full((PIXELS, PIXELS, slices), AIR_HU, np.int16, order="F")
    for z in range(slices):
        noise = rng.integers(-20, 21, (PIXELS, PIXELS))
        array[..., z] = np.where(across < 0.7, 40 + noise, np.where(across < 0.8, -100 + noise, AIR_HU))
    nib.save(nib.Nifti1Image(array, np.diag([PIXEL_MM, PIXEL_MM, SLICE_MM, 1.0])), path)


def write_run(run: Path, organs: int, *, noise: bool) -> None:
    """What a training leaves, of a model that has not been trained."""
    import torch

    from aftersam.model.build import build_aftersam
    from aftersam.training.checkpoint import save_weights

    config = preset("tiny")
    model = build_aftersam(config.model, organs + 1)
    if noise:
        torch.nn.init.zeros_(model.decoder.class_bias)  # background leads no longer
    run.mkdir()
    write_json(run / "config.json", to_dict(config))
    values = list(range(1, organs + 1))
    labels = {str(value): f"organ {value}" for value in values}
    write_json(run / "run.json", {"labels": labels, "spacing_mm": [3.0, 3.0, 3.0], "one_piece": values})
    save_weights(run / "best.safetensors", model, dataclasses.asdict(config))


def peak_mib(organs: int, slices: int, flags: Sequence[str], *, noise: bool) -> float:
    """The largest resident memory of one prediction in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_scan(home / "scan.nii.gz", slices)
        write_run(home / "run", organs, noise=noise)
        command = [
            "-i",
            home / "scan.nii.gz",
            "-o",
            home / "mask.nii.gz",
            "-m",
            home / "run",
            "--device",
            "cpu",
        ]
        command += ["--timings", *flags]
        subprocess.run([sys.executable, "-m", "aftersam.predict", *map(str, command)], check=True)
        return float(read_json(home / "mask.timings.json")["peak_host_mib"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--organs", type=int, default=117)
    parser.add_argument("--slices", type=int, default=1000)
    parser.add_argument("--noise", action="store_true", help="every organ everywhere")
    parser.add_argument("flags", nargs="*", help="of aftersam predict, after --")
    args = parser.parse_args(argv)
    peak = peak_mib(args.organs, args.slices, args.flags, noise=args.noise)
    where = machine.environment()["device"]
    organs = counted(args.organs, "organ")
    print(f"{organs}, {PIXELS} × {PIXELS} × {args.slices}: peak {peak:.0f} MiB ({where})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
