"""metrics.json as the report needs it, validated when read: any program may have written it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aftersam.config import from_dict
from aftersam.errors import naming
from aftersam.files import read_json

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class OrganResult:
    """An organ's scores over the cases."""

    dsc: float | None
    dsc_interval: Interval
    hd95_mm: float | None
    missed: int
    nsd: float | None
    ice: float | None
    gaps: int


@dataclass(frozen=True)
class CaseResult:
    """An organ's score in one case."""

    dsc: float | None


@dataclass(frozen=True)
class Result:
    """The part of metrics.json that the report shows."""

    mean_dsc: float | None
    mean_dsc_interval: Interval
    interval_reliable: bool
    num_cases: int
    convention: str
    nsd_tolerance_mm: float
    organs: dict[str, OrganResult]
    cases: dict[str, dict[str, CaseResult]]
    problems: dict[str, str]


def read_result(path: Path) -> Result:
    """The result in the file `path`. Raises ValueError in one sentence on any other JSON."""
    stored = read_json(path)
    if not isinstance(stored, dict) or "mean_dsc" not in stored:
        raise ValueError(f"{path} was not written by aftersam.evaluate: it has no mean_dsc")
    with naming(path, "was not written by aftersam.evaluate"):
        tolerance = stored.get("nsd_tolerance_mm")
        key = f"nsd_{tolerance:g}mm" if isinstance(tolerance, (int, float)) else ""
        organ = functools.partial(_known, OrganResult)
        of_case = functools.partial(_each, function=functools.partial(_known, CaseResult))
        known = _known(Result, stored)
        known["organs"] = _each(stored.get("organs"), lambda row: organ({**row, "nsd": row.get(key)}))
        known["cases"] = _each(stored.get("cases"), of_case)
        result: Result = from_dict(Result, known, where=str(path))
    return result


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The `values` that the dataclass `cls` has a field for."""
    return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}


def _each(values: Any, function: Any) -> Any:
    """`function` applied to each object in `values`; other values are returned as they are and refused later."""
    if not isinstance(values, dict):
        return values
    return {key: function(value) if isinstance(value, dict) else value for key, value in values.items()}
