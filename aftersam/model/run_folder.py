"""What a run's weights need beside them, read from a folder that anyone may have made: config.json and run.json."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from aftersam.config import Config, Index, Range, checked, from_dict, validate
from aftersam.errors import naming
from aftersam.files import read_json

WEIGHTS = Path(__file__).parents[1] / "weights"  # models that come along: a run folder each, by name
# no case's file has one of these names: a case called run leaves run.json beside its mask
LEFT_BY_TRAINING = ("best.safetensors", "last.safetensors", "history.jsonl")
Length = Annotated[float, Range(1e-3, 1e3)]  # mm, of a voxel that a model works at
Extent = Annotated[float, Range(0, 1e6)]  # mm


@dataclass(frozen=True)
class RunFacts:
    """run.json, as far as it is read again."""

    labels: dict[str, str]
    """Values, in digits, to names; background left out."""
    spacing_mm: tuple[Length, Length, Length] | None
    """(d, h, w) that the model works at; None: each scan's own."""
    one_piece: tuple[int, ...] = ()
    """Organs that are one connected piece in every training label."""
    longest_mm: tuple[Extent, Extent] | None = None
    """Shortest and longest of the training scans, each along its longest axis."""
    fold: Index = 0
    temperature: Annotated[float, Range(0.01, 100)] = 1.0
    """What logits are divided by before they become probabilities, fitted on the validation scans."""
    sam_sha256: str | None = None
    """Of the SAM weights that training began with."""
    init_sha256: str | None = None
    """Of the run's weights that training began with."""

    @property
    def names(self) -> dict[int, str]:
        """Label values to names."""
        return {int(value): name for value, name in self.labels.items()}


def bundled_runs() -> dict[str, Path]:
    """The models that come along with this package: {name: run folder}."""
    return {path.parent.name: path.parent for path in sorted(WEIGHTS.glob("*/config.json"))}


def find_run(name: Path | str) -> Path:
    """The run folder that `name` means: itself where it exists, or the model of that name that comes along.

    A folder that is no run, such as one of masks, does not hide a model of its name. Raises ValueError that lists the
    names there are."""
    path, known = Path(name), bundled_runs()
    if str(name) in known and not ((path / "config.json").exists() or _runs_in(path)):
        return known[str(name)]
    if path.exists():
        return path
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"{name} is not a training run: it has no config.json; of models that come along there "
        f"{'is' if len(known) < 2 else 'are'} {', '.join(known) or 'none'}{hint}"
    )


def find_runs(names: Sequence[Path | str]) -> list[Path]:
    """The run folders that `names` mean, each as `find_run` finds it; a folder of runs, such as folds, means all.

    Raises ValueError where there is none, with the models that come along."""
    if not names:
        known = [
            f"{name} ({', '.join(read_run(run)[1].names.values())})" for name, run in bundled_runs().items()
        ]
        raise ValueError(
            "no model is given: -m RUN is the folder of a training run, -m RUN1 RUN2 the mean of several, "
            f"-m NAME a model that comes along: {'; '.join(known) or 'there is none'}"
        )
    found: list[Path] = []
    for run in map(find_run, names):
        found += _runs_in(run) or [run]
    return found


def model_id(runs: Sequence[Path], checkpoint: str) -> str:
    """SHA-256 of the weights and the configuration of the runs: the same for the same masks, in any place."""
    import hashlib

    digest = hashlib.sha256()
    for run in runs:
        for name in ("config.json", "run.json", f"{checkpoint}.safetensors"):
            with naming(run / name), (run / name).open("rb") as file:
                digest.update(f"{name}\0{os.fstat(file.fileno()).st_size}\0".encode())
                while chunk := file.read(2**20):
                    digest.update(chunk)
    return digest.hexdigest()


def _runs_in(folder: Path) -> list[Path]:
    """The runs in a folder that is none itself, fold_2 before fold_10; also those that lack some of their files."""
    if (folder / "config.json").exists():
        return []
    runs = {path.parent for name in LEFT_BY_TRAINING for path in folder.glob(f"*/{name}")}
    return sorted(runs, key=lambda path: (len(path.name), path.name))


def read_run(run: Path) -> tuple[Config, RunFacts]:
    """The configuration and the facts of the run in the folder `run`.

    Raises ValueError in one sentence where a file is missing or has a value of the wrong type or range."""
    if not (run / "config.json").is_file():
        several = _runs_in(run)
        hint = f"; give a run in it, such as {several[0]}" if several else ""
        raise ValueError(f"{run} is not a training run: it has no config.json{hint}")
    where, path = run / "config.json", run / "run.json"
    config = from_dict(Config, read_json(where), where=str(where))
    stored = read_json(path)
    known = [field.name for field in dataclasses.fields(RunFacts)]
    if isinstance(stored, dict):  # other keys are notes for people
        stored = {key: value for key, value in stored.items() if key in known}
    facts: RunFacts = from_dict(RunFacts, stored, where=str(path))
    values = [str(value) for value in range(1, len(facts.labels) + 1)]
    if not values or sorted(facts.labels) != sorted(values):
        raise ValueError(
            f"{path} has the labels {list(facts.labels)[:9]}, but they must be 1 to their number"
        )
    if len(set(facts.labels.values())) < len(values):
        raise ValueError(f"{path} has one label name twice; every label needs its own name")
    if not {str(value) for value in facts.one_piece} <= facts.labels.keys():
        raise ValueError(f"{path} has one_piece {facts.one_piece[:9]}, of which some are no labels")
    with naming(path, "cannot be used"):
        checked(facts)
    with naming(where, "cannot be used"):
        return validate(config), facts
