"""The `aftersam` command: `aftersam train ...` is `python -m aftersam.train ...`, and so on."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A module with `main(argv) -> int`, and its line in --help."""

    module: str
    line: str


COMMANDS = {
    "train": Command("aftersam.train", "train a model on a CT data set"),
    "predict": Command("aftersam.predict", "segment CT volumes with a trained model"),
    "encode": Command(
        "aftersam.encode", "store the image encoder's features of scans, for train and predict"
    ),
    "manifest": Command("aftersam.inference.manifest", "merge the tables that predict writes for a cohort"),
    "info": Command("aftersam.inference.info", "print the facts of a model or a mask"),
    "export": Command("aftersam.export", "write a trained model for torch.export and ONNX runtimes"),
    "evaluate": Command("aftersam.evaluate", "score masks against reference masks"),
    "report": Command("aftersam.report", "write one HTML page of curves, scores and overlays"),
    "ablate": Command("aftersam.ablate", "make the paper's ablation tables on your data"),
    "check": Command("aftersam.check", "check a data set before training on it"),
    "demo": Command("aftersam.demo", "run everything on synthetic scans: training, masks, scores, report"),
    "phantom": Command("aftersam.phantom", "write synthetic thorax scans with their labels"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.line}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: aftersam COMMAND [OPTIONS]",
            "",
            "Segment organs in CT with SAM, LoRA and attention across neighbouring slices.",
            "",
            *lines,
            "",
            "aftersam COMMAND --help explains a command; aftersam --version prints the release.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names and return its exit code; 2 for an unknown command."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        from aftersam import __version__

        print(f"aftersam {__version__}")
        return 0
    if name not in COMMANDS:
        if not name:
            print(usage(), file=sys.stderr)
            return 2
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else "."
        print(f"aftersam: no command {name!r}{hint} There are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    sys.argv[0] = f"aftersam {name}"  # the command's own --help shows this as its name
    code: int = import_module(COMMANDS[name].module).main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
