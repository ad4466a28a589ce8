"""Every number of every command and key has bounds; what lies outside is one sentence that names it."""

import dataclasses
import typing
from importlib import import_module

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aftersam.__main__ import COMMANDS
from aftersam.config import Config, Range, _bounds, checked, from_dict, to_dict
from aftersam.evaluation.scoring import ScoringOptions
from aftersam.inference.inputs import PredictOptions
from aftersam.inference.pipeline import PredictArgs
from aftersam.training.arguments import TrainArgs

ODD = [0, -1, -3, 2**31 + 1, 2**63, -(2**63), 10**30, 1e-320, -0.5, 1.5, 1e300, float("nan"), float("inf")]


def arguments():
    """The dataclasses whose fields are the flags of the commands, and what the API takes beside them."""
    found = {PredictArgs, TrainArgs, PredictOptions, ScoringOptions, *map(type, vars(Config()).values())}
    for command in COMMANDS.values():
        members = vars(import_module(command.module)).values()
        found |= {m for m in members if isinstance(m, type) and m.__name__.endswith("Args")}
    return sorted(found, key=lambda kind: kind.__name__)


def numbers():
    """(dataclass, field, its type) of every number."""
    for kind in arguments():
        hints = typing.get_type_hints(kind, include_extras=True)
        for each in dataclasses.fields(kind):
            leaves = set(leaf_types(hints[each.name]))
            if (
                {int, float} & leaves
                and not dataclasses.is_dataclass(hints[each.name])
                and each.name != "label_swap"
            ):
                yield kind, each.name, hints[each.name]


def leaf_types(hint):
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal or not inner:
        return [hint]
    if hasattr(hint, "__metadata__"):
        return leaf_types(inner[0])
    return [leaf for member in inner for leaf in leaf_types(member)]


FLAGS = list(numbers())


def instance(kind, **values):
    """A dataclass with these values, whatever else it asks for."""
    needed = {f.name: f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    needed = {name: Config() if name == "config" else name for name in needed}
    if any(f.default_factory is not dataclasses.MISSING for f in dataclasses.fields(kind)):
        needed = {}
    return kind(**{**needed, **values})


def test_every_command_is_among_them():
    names = {kind.__name__ for kind in arguments()}
    assert {f"{name.capitalize()}Args" for name in COMMANDS} <= names
    assert len(FLAGS) > 40


@pytest.mark.parametrize(("kind", "name", "hint"), FLAGS, ids=lambda v: getattr(v, "__name__", str(v))[:40])
def test_a_number_outside_its_bounds_is_one_sentence(kind, name, hint):
    bounds = _bounds(hint)
    assert bounds, f"{kind.__name__}.{name} has no bounds"
    nested = typing.get_origin(hint) is tuple or any(
        typing.get_origin(m) is tuple for m in typing.get_args(hint)
    )

    @settings(max_examples=40, deadline=None)
    @given(st.one_of(st.sampled_from(ODD), st.floats(), st.integers()))
    def try_value(value):
        held = (value, value, value) if nested else value
        inside = all(b.has(value) for b in bounds)
        try:
            checked(instance(kind, **{name: held}))
        except ValueError as error:
            said = str(error)
        else:
            said = None
        assert (said is None) == inside
        assert said is None or (
            said.startswith((f"{name} is ", f"--{name.replace('_', '-')} is ")) and "\n" not in said
        )

    try_value()


def test_defaults_and_ends_lie_inside():
    for kind in arguments():
        checked(instance(kind))
    for text, inside, outside in (
        (Range(0, 1), (0, 0.5, 1), (-1e-9, 1.1)),
        (Range(0, 1, "low"), (1e-9, 1), (0, 2)),
        (Range(0, 1, "high"), (0, 0.9), (1, -1)),
    ):
        assert all(map(text.has, inside))
        assert not any(map(text.has, (*outside, float("nan"), float("inf"))))


@settings(deadline=None)
@given(st.sampled_from([10**30, -1, 2**63, float("inf"), 10**400]), st.data())
def test_a_configuration_from_a_stranger_is_refused_by_key(value, data):
    stored = to_dict(Config())
    part = data.draw(st.sampled_from(sorted(stored)))
    numeric = [k for k, v in stored[part].items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    name = data.draw(st.sampled_from(numeric))
    stored[part][name] = value
    with pytest.raises(ValueError, match=name):
        checked(from_dict(Config, stored))
