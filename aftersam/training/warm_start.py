"""A run's weights as the start of a training on other data: organs matched by name, positions interpolated.

At step 0 the masks of all organs that both have are the run's. A new organ's token starts as a copy of background's,
whose weight in the attention both then share, and its logits below background's by BACKGROUND_LEAD. The token of an
organ that the data lack becomes a further token of background."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftersam.config import Config, ModelConfig, to_dict
from aftersam.errors import one_line
from aftersam.evaluation.tables import markdown_table
from aftersam.files import normal_form, read_tensors
from aftersam.model.aftersam import AfterSAM
from aftersam.model.build import check_finite, check_weights
from aftersam.model.mask_decoder import BACKGROUND_LEAD
from aftersam.model.run_folder import RunFacts, find_run, read_run
from aftersam.model.sam_checkpoint import interpolated, sha256

# choices of a model that a run's weights do not depend on, or only through tables of positions
MAY_DIFFER = {
    "image_size", "num_slices", "slice_stride", "encoder", "lora_dropout", "fusion_init", "token_shares"
}  # fmt: skip
Spacing = tuple[float, float, float] | None  # (d, h, w) in mm; None: each scan's own


class WarmStart(NamedTuple):
    """A run to begin with."""

    weights: Path
    config: Config
    facts: RunFacts
    sha256: str
    """Of the file of the weights."""

    @property
    def shares(self) -> tuple[float, ...]:
        """`token_shares` of the run, of every token."""
        return self.config.model.token_shares or (1.0,) * (len(self.facts.labels) + 1)


def read_start(name: Path) -> WarmStart:
    """The best weights of the run `name`, as `find_run` finds it. Raises ValueError on a bad run."""
    run = find_run(name)
    config, facts = read_run(run)
    weights = run / "best.safetensors"
    check_weights(weights, config.model, len(facts.labels) + 1)
    check_finite(weights, read_tensors(weights)[0])
    return WarmStart(weights, config, facts, sha256(weights))


def check_architecture(start: WarmStart, model: ModelConfig) -> None:
    """Raise ValueError where a model of the run's weights cannot have the choices in `model`."""
    ours, theirs = to_dict(model), to_dict(start.config.model)
    lora = "lora" in (model.encoder, model.fusion_weights, model.decoder)
    may_differ = MAY_DIFFER if lora else MAY_DIFFER | {"lora_rank", "lora_alpha"}
    if "lora" in (ours["encoder"], theirs["encoder"]):
        may_differ = may_differ - {"encoder"}
    for key, value in ours.items():
        if value != theirs[key] and key not in may_differ:
            raise ValueError(
                f"{key} is {value}, but the weights in {start.weights} are of a model with {theirs[key]}; leave it "
                "out, or the --preset or --config that sets it"
            )


def token_sources(start: WarmStart, labels: dict[int, str]) -> list[int]:
    """For each token of a model of `labels`, the run's token that it starts from; 0, background's, for a new organ.

    After the classes come the tokens that are background now: of organs that `labels` lack, and those that were
    background's before. Names match where they are equal, or equal but for case, spaces and signs."""
    names = start.facts.names
    found: dict[int, int] = {}  # new value: the run's
    for spelling in (str, _letters):
        left = {v: spelling(name) for v, name in names.items() if v not in found.values()}
        for value, name in labels.items():
            same = [v for v, other in left.items() if other == spelling(name)]
            rivals = [
                v for v, other in labels.items() if v not in found and spelling(other) == spelling(name)
            ]
            if value not in found and len(same) == len(rivals) == 1 and spelling(name):
                found[value] = same[0]
    organs = [found.get(value, 0) for value in sorted(labels)]
    further = [v for v in range(1, len(start.shares)) if v not in organs]
    return [0, *organs, *further]


def _letters(name: str) -> str:
    return "".join(c for c in normal_form(name).casefold() if c.isalnum())


def token_shares(start: WarmStart, labels: dict[int, str]) -> tuple[float, ...]:
    """`ModelConfig.token_shares` with which copies of a token count as much together as the one did."""
    sources = token_sources(start, labels)
    shares = tuple(start.shares[s] / sources.count(s) for s in sources)
    return () if set(shares) == {1.0} and len(sources) == len(labels) + 1 else shares


def load_start(
    start: WarmStart, model: AfterSAM, config: ModelConfig, labels: dict[int, str], spacing_mm: Spacing
) -> None:
    """Load the run's weights into `model`, built by `config` for the organs `labels`.

    Tables of positions in a plane are interpolated to its grid, those across slices to its distances, in mm where
    both spacings are known."""
    sources = token_sources(start, labels)
    tensors, _ = read_tensors(start.weights)
    of_fusion = ("fusion.position", "fusion.slice_position")
    state = model.state_dict()
    for key, ours in state.items():
        part, _, rest = key.removeprefix("decoder.").partition(".")
        if part in ("class_tokens", "class_bias"):
            value = tensors[key][list(sources)]
        elif part == "output_hypernetworks_mlps":
            index, _, rest = rest.partition(".")
            value = tensors[f"decoder.{part}.{sources[int(index)]}.{rest}"]
        else:
            value = tensors[key]
        value = value.float() if value.is_floating_point() else value
        if key in of_fusion:
            if value.shape[1:3] != ours.shape[1:3]:
                value = interpolated("pos_embed", value, ours.shape)
            if len(value) > 1 or len(ours) > 1:
                value = _across(value, *_distances(start, config, spacing_mm))
        elif value.shape != ours.shape:
            value = interpolated(key.removeprefix("encoder."), value, ours.shape)
        state[key] = value
    new = [value for value in labels if not sources[value]]
    state["decoder.class_bias"][new] -= BACKGROUND_LEAD
    model.load_state_dict(state)


def _distances(start: WarmStart, config: ModelConfig, spacing_mm: Spacing) -> tuple[np.ndarray, np.ndarray]:
    """Distances of a group's slices from its centre, in the run and here: in mm, or in slices where one is unknown."""
    known = start.facts.spacing_mm is not None and spacing_mm is not None
    pairs = ((start.config.model, start.facts.spacing_mm), (config, spacing_mm))
    theirs, ours = (
        (np.arange(m.num_slices) - m.num_slices // 2) * m.slice_stride * (mm[0] if known and mm else 1.0)
        for m, mm in pairs
    )
    return theirs, ours


def _across(table: Tensor, theirs: np.ndarray, ours: np.ndarray) -> Tensor:
    """`table` (N, ...) of slices at the distances `theirs` -> of slices at `ours`; beyond the ends, the ends."""
    place = np.interp(ours, theirs, np.arange(len(theirs)))
    below = torch.from_numpy(np.floor(place).astype(int))
    above = (below + 1).clamp(max=len(theirs) - 1)
    share = torch.from_numpy(place).to(table) - below.to(table)
    return torch.lerp(table[below], table[above], share.reshape(-1, *[1] * (table.dim() - 1)))


def table(start: WarmStart, config: ModelConfig, labels: dict[int, str], spacing_mm: Spacing) -> str:
    """What is carried over, interpolated and new, for people."""
    names, theirs, sources = start.facts.names, start.config.model, token_sources(start, labels)
    pairs = [(name, sources[value]) for value, name in labels.items()]
    lacked = [names[s] for s in sources[len(labels) + 1 :] if s in names]
    across = "carried" if _same(*_distances(start, config, spacing_mm)) else "positions interpolated"
    plane = "carried" if config.image_size == theirs.image_size else "positions interpolated"
    rows = [
        ["", "run", "here", ""],
        *([name, names[s], name, "carried"] for name, s in pairs if s),
        *([name, "", name, "new, starts as background"] for name, s in pairs if not s),
        *([name, name, "", "background here"] for name in lacked),
        ["slices of a group", _slices(theirs), _slices(config), across],
        ["image in px", str(theirs.image_size), str(config.image_size), plane],
        [
            "voxel in mm",
            _millimetres(start.facts.spacing_mm),
            _millimetres(spacing_mm),
            "weights as they are",
        ],
    ]
    cells = [[one_line(cell) for cell in row] for row in rows]
    return f"weights of {start.weights}\n{markdown_table(cells, left=range(4))}"


def _same(theirs: np.ndarray, ours: np.ndarray) -> bool:
    return theirs.shape == ours.shape and np.allclose(theirs, ours)


def _slices(model: ModelConfig) -> str:
    return f"{model.num_slices}, {model.slice_stride} apart"


def _millimetres(spacing_mm: Spacing) -> str:
    return "each scan's own" if spacing_mm is None else " × ".join(f"{mm:.3g}" for mm in spacing_mm)
