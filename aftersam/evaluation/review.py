"""Which masks of a folder to look at first: scans by the DSC that their probabilities let expect, lowest first.

An organ that the mask does not have counts as 0: its DSC if the scan has the organ. A mask with one certain organ and
six missing ones therefore comes first."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aftersam.config import from_dict
from aftersam.errors import SAID, counted, one_line
from aftersam.files import case_name, read_json, scans_in, write_text

KEY = "expected_dsc"  # in the JSON beside a mask: {organ: value}, null where the mask has none of it


@dataclass(frozen=True)
class _Stored:
    organs: dict[str, float | None]


class Reviewed(NamedTuple):
    """What is expected of a mask."""

    case: str
    """Path of the mask below the folder, without its ending."""
    organs: dict[str, float | None]
    """Expected DSC of each organ; None for one that the mask does not have."""

    @property
    def mean(self) -> float:
        """Over all organs, with 0 for one that the mask does not have."""
        return mean_expected(self.organs.values())

    @property
    def cells(self) -> list[str]:
        """The row of a table: case, mean, the organ expected worst with its value, organs that are missing."""
        present = {name: value for name, value in self.organs.items() if value is not None}
        worst = min(present, key=lambda name: present[name], default="")
        missing = ", ".join(name for name in self.organs if name not in present)
        return [self.case, f"{self.mean:.4f}", worst, f"{present[worst]:.4f}" if worst else "", missing]


HEADINGS = ["case", "expected DSC", "least certain organ", "its expected DSC", "organs not found"]


def mean_expected(values: Iterable[float | None]) -> float:
    """Mean of the expected DSC of organs; None, an organ that was not found, counts as 0."""
    numbers = [value or 0.0 for value in values]
    return sum(numbers) / len(numbers) if numbers else 0.0


def reviewed(masks: Path, folders: Iterable[Path] | None = None) -> list[Reviewed]:
    """The masks that were predicted with --review, least certain first.

    They lie in `folders` of the folder `masks`, or anywhere below it."""
    found = []
    for path in _beside_masks(masks, folders):
        try:
            stored = read_json(path)
            values = from_dict(_Stored, {"organs": stored[KEY]}).organs
        except (*SAID, KeyError, TypeError):
            continue
        if all(value is None or 0 <= value <= 1 for value in values.values()):
            found.append(Reviewed(path.relative_to(masks).with_suffix("").as_posix(), values))
    return sorted(found, key=lambda one: (one.mean, one.case))


def _beside_masks(masks: Path, folders: Iterable[Path] | None) -> list[Path]:
    """The JSON files beside masks: a confidence map has none, a deleted mask may have left one."""
    some = _with_all_below(masks) if folders is None else (folder for folder in folders if folder.is_dir())
    named = (mask.with_name(f"{case_name(mask)}.json") for folder in some for mask in scans_in(folder))
    return [path for path in named if path.is_file()]


def _with_all_below(root: Path) -> Iterator[Path]:
    """Yield `root` and every folder below it that is not hidden."""
    for home, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(home)


def write_review(masks: Path, folders: Iterable[Path]) -> str:
    """Write review.csv of the masks in `folders` to the folder `masks`. Returns what to tell the user.

    No cell is a formula to a spreadsheet."""
    folders = sorted(folders)
    text, found = io.StringIO(), reviewed(masks, folders)
    writer = csv.writer(text, lineterminator="\n")
    for row in [HEADINGS, *(one.cells for one in found)]:
        cells = [one_line(cell) for cell in row]
        writer.writerow([f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell for cell in cells])
    write_text(masks / "review.csv", text.getvalue())
    total = len(_beside_masks(masks, folders))
    others = (
        "" if len(found) == total else "; the others were made without --review, --overwrite makes them anew"
    )
    return (
        f"{masks / 'review.csv'} lists {len(found)} of {counted(total, 'mask')}, least certain first{others}"
    )
