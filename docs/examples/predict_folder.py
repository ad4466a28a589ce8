"""Segment a folder of scans, and tell a callback how far it is.

    python docs/examples/predict_folder.py SCANS MASKS RUN

`aftersam predict` does more (previews, DICOM, one bad scan does not stop the others); this is the loop inside it."""

import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib

import aftersam
from aftersam.data.volume import read_image, to_nifti
from aftersam.files import case_id


def main(scans: Path, masks: Path, run: str, progress: Callable[[str, int, int], None]) -> list[Path]:
    """Write a mask for every .nii.gz file in `scans`; `progress` gets its name, the slices done, and all slices."""
    segmenter = aftersam.load(run)
    masks.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(scans.glob("*.nii.gz")):
        volume, done = read_image(path), 0
        slices = volume.array.shape[0]

        def told(new: int, name: str = path.name, slices: int = slices) -> None:
            nonlocal done
            done += new
            progress(name, done, slices)

        found = segmenter.segment(segmenter.prepare(volume), progress=told)
        written.append(masks / f"{case_id(path)}.nii.gz")
        nib.save(to_nifti(found.labels, volume, segmenter.labels), written[-1])
    return written


def show(name: str, done: int, slices: int) -> None:
    print(f"\r{name}: slice {done} of {slices}", end="" if done < slices else "\n", file=sys.stderr)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), sys.argv[3], show)
