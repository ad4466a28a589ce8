"""Write flags.md from the commands' dataclasses and errors.md from the tests' tables.    make reference

A test compares both pages with what this makes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro

from aftersam.__main__ import COMMANDS
from aftersam.config import PRESETS, Config, DataConfig, ModelConfig, Range, TrainConfig
from aftersam.evaluation.tables import markdown_table

HERE = Path(__file__).parent
FLAGS = """# Flags and configuration keys

Written by `make reference` from the dataclasses; `aftersam COMMAND --help` says the same.

A switch `--x` has a `--no-x`. A flag with several values takes them separated by spaces. Keys of the
[configuration](#configuration) are flags of `train` and `encode`; `config.json` of a run holds all of them."""
CONFIGURATION = """## Configuration

Every choice of a training. A key that is not given takes its value from `--config`, from the run of `--resume`, or from
the preset; a preset that a column does not name has the default. `--preset` is `paper` with SAM weights, else `small`.
With `--init`, the keys of model and data take their value from that run."""
ERRORS = """# Errors

Written by `make reference` from the tables in `tests/error_rows*.py`; `tests/test_sentences.py` triggers each error and
compares its sentence. An error is one line on stderr after the command's name. Exit code 2: the command could not be
done, and nothing half-written is left. Exit code 1: some scans failed, the others are done. Exit code 130 or 143:
interrupted.

`HOME` stands for a folder, `RUN` for the folder of a training, `*` for what differs between machines and versions."""


class Flag(NamedTuple):
    """A field of a dataclass, as a user sees it."""

    name: str
    values: str
    default: str
    help: str


def flags_of(kind: type) -> Iterator[Flag]:
    """Every field of the dataclass `kind` but its configuration."""
    hints, texts = get_type_hints(kind, include_extras=True), _docstrings(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hint := hints[field.name]):
            continue
        positional = tyro.conf.Positional[int].__metadata__[0] in getattr(hint, "__metadata__", ())
        names = [field.name.upper()] if positional else [*_aliases(hint), f"--{field.name.replace('_', '-')}"]
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        yield Flag(
            ", ".join(names),
            _values(hint),
            "needed" if default is dataclasses.MISSING else _shown(default),
            texts.get(field.name, ""),
        )


def _docstrings(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, in one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


def _aliases(hint: Any) -> list[str]:
    return [
        name for extra in getattr(hint, "__metadata__", ()) for name in getattr(extra, "aliases", None) or ()
    ]


def _values(hint: Any) -> str:
    """What may be given for a type: choices, a range, or the kind of value."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [_range(extra) for extra in hint.__metadata__ if isinstance(extra, Range)]
        return " ".join([_values(args[0]), *bounds])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        return " or ".join(_values(arg) for arg in args if arg is not NoneType)
    if origin is tuple:
        return f"several: {_values(args[0])}" if Ellipsis in args else f"{len(args)} numbers"
    return {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}[hint]


def _range(bounds: Range) -> str:
    """The bounds of a number; those above a million stop nobody and are left out."""
    low = f"above {bounds.low:g}" if bounds.open == "low" else f"from {bounds.low:g}"
    high = f"below {bounds.high:g}" if bounds.open == "high" else f"to {bounds.high:g}"
    return low if bounds.high >= 1e6 else f"{low} {high}"


def _shown(value: object) -> str:
    if value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(_shown(tuple(each) if isinstance(each, tuple) else each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def configuration() -> list[str]:
    """One table for each part of the configuration, with the values of the presets that differ from the default."""
    sections = [CONFIGURATION]
    for title, part, kind in (
        ("Model", "model", ModelConfig), ("Data", "data", DataConfig), ("Training", "train", TrainConfig)
    ):  # fmt: skip
        rows = [["key", "values", "default", "presets", "what it does"]]
        for flag in flags_of(kind):
            key = flag.name.removeprefix("--").replace("-", "_")
            values = {name: getattr(getattr(config, part), key) for name, config in PRESETS.items()}
            own = [f"{name} {_shown(value)}" for name, value in values.items()
                   if value != getattr(getattr(Config(), part), key)]  # fmt: skip
            rows.append([f"`{flag.name}`", flag.values, flag.default, ", ".join(own), flag.help])
        sections += [f"### {title}", _table(rows)]
    return sections


def arguments_of(command: str) -> type:
    """The dataclass of a command's flags."""
    kind: type = getattr(import_module(COMMANDS[command].module), f"{command.title()}Args")
    return kind


def known_flags() -> dict[str, set[str]]:
    """The flags of every command, with those of the configuration where it has one, and the --no- of switches."""
    found = {}
    for command in COMMANDS:
        kinds = [arguments_of(command)]
        if any(field.name == "config" for field in dataclasses.fields(kinds[0])):
            kinds += [ModelConfig, DataConfig, TrainConfig]
        flags = [flag for kind in kinds for flag in flags_of(kind)]
        found[command] = {name for flag in flags for name in flag.name.split(", ")}
        found[command] |= {f"--no-{flag.name[2:]}" for flag in flags if flag.values == "switch"}
    return found


def flags_page() -> str:
    sections = [FLAGS]
    for name, command in COMMANDS.items():
        kind = arguments_of(name)
        rows = [["flag", "values", "default", "what it does"]]
        rows += [[f"`{flag.name}`", *flag[1:]] for flag in flags_of(kind)]
        sections += [f"## aftersam {name}", f"{command.line[0].upper()}{command.line[1:]}.", _table(rows)]
    return "\n\n".join([*sections, *configuration()]) + "\n"


def errors_page() -> str:
    sys.path.append(str(HERE.parents[1] / "tests"))
    from test_sentences import TABLE

    def command_of(row: Any) -> str:
        name: str = row.command.rpartition(".")[2]
        return name

    sections = [ERRORS]
    rows_in_order = sorted(TABLE, key=lambda row: list(COMMANDS).index(command_of(row)))
    for command, rows in groupby(rows_in_order, command_of):
        sections.append(f"## aftersam {command}")
        sections += [
            f"**{row.id[0].upper()}{row.id[1:]}**, exit code {row.code}\n\n"
            f"```\naftersam {command} {row.argv}\naftersam.{command}: {row.says}\n```"
            for row in rows
        ]
    return "\n\n".join(sections) + "\n"


def _table(rows: list[list[str]]) -> str:
    return markdown_table([[cell.replace("|", "\\|") for cell in row] for row in rows], left=range(5))


PAGES = {"flags.md": flags_page, "errors.md": errors_page}

if __name__ == "__main__":
    for name, made in PAGES.items():
        (HERE / name).write_text(made(), encoding="utf-8")
