"""Which masks of a folder to look at first: scans by the DSC that their probabilities let expect, lowest first."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aftersam.config import from_dict
from aftersam.errors import SAID, counted, one_line
from aftersam.evaluation.statistics import mean_of
from aftersam.files import case_name, read_json, scans_in, write_text

KEY = "expected_dsc"  # in the JSON beside a mask: {organ: value}, null where the mask has none of it


@dataclass(frozen=True)
class _Stored:
    organs: dict[str, float | None]


class Reviewed(NamedTuple):
    """What is expected of a mask."""

    case: str
    organs: dict[str, float | None]
    """Expected DSC of each organ; None for one that the mask does not have."""

    @property
    def mean(self) -> float:
        """Over the organs of the mask; 0 where it has none."""
        found = [value for value in self.organs.values() if value is not None]
        return mean_of(found) if found else 0.0

    @property
    def cells(self) -> list[str]:
        """The row of a table: case, mean, the organ expected worst with its value, organs that are missing."""
        present = {name: value for name, value in self.organs.items() if value is not None}
        worst = min(present, key=lambda name: present[name], default="")
        missing = ", ".join(name for name in self.organs if name not in present)
        return [self.case, f"{self.mean:.4f}", worst, f"{present[worst]:.4f}" if worst else "", missing]


HEADINGS = ["case", "expected DSC", "least certain organ", "its expected DSC", "organs not found"]


def reviewed(masks: Path) -> list[Reviewed]:
    """The masks of a folder that were predicted with --review, least certain first."""
    found = []
    for path in _beside_masks(masks):
        try:
            stored = read_json(path)
            values = from_dict(_Stored, {"organs": stored[KEY]}).organs
        except (*SAID, KeyError, TypeError):
            continue
        if all(value is None or 0 <= value <= 1 for value in values.values()):
            found.append(Reviewed(path.stem, values))
    return sorted(found, key=lambda one: (one.mean, one.case))


def _beside_masks(masks: Path) -> list[Path]:
    """The JSON files beside the masks of a folder: a confidence map has none, a deleted mask may have left one."""
    named = (mask.with_name(f"{case_name(mask)}.json") for mask in scans_in(masks))
    return [path for path in named if path.is_file()]


def write_review(masks: Path) -> str:
    """Write review.csv of the folder `masks`; what to tell the user. No cell is a formula to a spreadsheet."""
    text, found = io.StringIO(), reviewed(masks)
    writer = csv.writer(text, lineterminator="\n")
    for row in [HEADINGS, *(one.cells for one in found)]:
        cells = [one_line(cell) for cell in row]
        writer.writerow([f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell for cell in cells])
    write_text(masks / "review.csv", text.getvalue())
    total = len(_beside_masks(masks))
    others = (
        "" if len(found) == total else "; the others were made without --review, --overwrite makes them anew"
    )
    return (
        f"{masks / 'review.csv'} lists {len(found)} of {counted(total, 'mask')}, least certain first{others}"
    )
