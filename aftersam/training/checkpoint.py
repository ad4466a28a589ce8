"""A run's files: weights and training state as one safetensors file each, and what made the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from aftersam.files import read_tensors, write_tensors, write_text
from aftersam.model.build import TRAINING_STATE, load_tensors
from aftersam.training.sharding import whole, whole_state

OPTIMIZER, RNG = TRAINING_STATE  # prefixes of tensors besides weights, which carry their own names


def save_weights(path: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Write the model's state dict and `facts` (JSON values) to `path`, atomically."""
    write_tensors(path, whole_state(model), facts)


def save_training(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
    *,
    write: bool = True,
) -> None:
    """Write all that an exact resume needs: weights, optimiser moments, torch's generator, `facts`.

    With sharded weights every process must call it, because shards are gathered; the one with `write` writes."""
    tensors = whole_state(model)
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"{OPTIMIZER}{index}/{name}"] = whole(torch.as_tensor(value))
    tensors[f"{RNG}cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"{RNG}cuda"] = torch.cuda.get_rng_state()
    if write:
        write_tensors(path, tensors, facts)


def load_training(path: Path, model: nn.Module) -> dict[str, Any]:
    """Restore the weights and the generator that `save_training` wrote and return its facts.

    Raises ValueError like `load_weights`."""
    tensors, facts = read_tensors(path)
    if f"{RNG}cpu" not in tensors:
        raise ValueError(f"{path} holds weights without training state, so it cannot be resumed")
    load_tensors(path, model, tensors)
    try:
        torch.set_rng_state(tensors[f"{RNG}cpu"])
        if torch.cuda.is_available() and f"{RNG}cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{RNG}cuda"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no state of torch's generator: {error}") from error
    return facts


def load_moments(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimiser's moments, each sharded like its parameter.

    Raises ValueError on moments that are not of these parameters."""
    tensors, _ = read_tensors(path)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {str(index) for index in range(len(parameters))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(OPTIMIZER):
            index, _, name = key.removeprefix(OPTIMIZER).partition("/")
            parameter = parameters[int(index)] if index in numbers else None
            if parameter is None or value.shape not in (parameter.shape, ()):
                raise ValueError(f"{path} holds the moment {key!r:.200} of no parameter that trains")
            if isinstance(parameter, DTensor) and value.dim():
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            elif value.dim():  # the fused optimiser reads both as they lie in memory
                value = torch.empty_like(parameter, device=value.device).copy_(value)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def trim_history(path: Path, step: int) -> None:
    """Drop the lines that a killed run logged after its last checkpoint, at `step`: those steps are done again.

    Lines in another format are dropped, too. The file is replaced by a new one, so that no link to it changes."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _is_record(line, step)]
        write_text(path, "".join(line + "\n" for line in kept))


def _is_record(line: str, step: int) -> bool:
    """Whether `line` is JSON that a run up to `step` logged: of a step, or of a validation."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return False
    keys = ("val_mean_dsc",) if "val_mean_dsc" in record else ("loss", "dice", "ce", "lr")
    values = [record.get(key) for key in ("minutes", *keys)]
    if "val_mean_dsc" in record:
        scores = record.get("val_dsc")
        values += scores.values() if isinstance(scores, dict) else [""]
        values = [0.0 if value is None else value for value in values]
    return 0 <= record["step"] <= step and all(isinstance(value, (int, float)) for value in values)


def provenance() -> dict[str, Any]:
    """What made a run: {"commit": of this source tree, "versions": of the libraries}."""
    from importlib.metadata import version

    return {"commit": source_commit(), "versions": {n: version(n) for n in ("torch", "monai", "accelerate")}}


def source_commit() -> str | None:
    """The git commit of this source tree, with "+" where it has local changes; None for an installed package."""
    import subprocess

    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")
