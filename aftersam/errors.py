"""The one place where an exception becomes a sentence: which ones a bad file or a full machine raises, what is said.

A fault of this package itself keeps its traceback."""

from __future__ import annotations

import contextlib
import re
import signal
import struct
import sys
import threading
import time
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

SAID = (ValueError, OSError, FloatingPointError, MemoryError)  # what a command tells in one line
LONGEST = 800  # characters of a sentence
_BY_A_FILE = (*SAID, EOFError, OverflowError, RecursionError, struct.error, tokenize.TokenError, zlib.error)
_LIBRARIES = frozenset(
    {"highdicom", "matplotlib", "nibabel", "PIL", "pydicom", "pylibjpeg", "safetensors", "SimpleITK"}
    | {"adlfs", "aiobotocore", "aiohttp", "botocore", "_csv", "fsspec", "gcsfs", "pyarrow", "s3fs", "zipfile"}
)


class Terminated(SystemExit):
    """Exit of a process that received SIGTERM, with code 143 (128 + SIGTERM).

    `said` is the message for stderr. An empty message prints nothing."""

    def __init__(self, said: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.said = said


class naming(contextlib.AbstractContextManager[None]):
    """Turns whatever a library raises over the file `path` into one sentence that starts with the path.

    Raises OSError where the system refused, MemoryError where memory ran out, ValueError otherwise; an error that names
    the path already passes as it is."""

    def __init__(self, path: Path | str, what: str = "is truncated or damaged") -> None:
        self.path, self.what = path, what

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):
            return
        if not (isinstance(error, _BY_A_FILE) or out_of_memory(error) or _in_a_library(error)):
            return
        if isinstance(error, SAID) and self._named_in(str(error)) and len(str(error).splitlines()) == 1:
            return
        if out_of_memory(error):
            raise MemoryError(f"{self.path}: memory ran out: {_first_line(error)}") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(f"{self.path}: {error.strerror or error}") from error
        raise ValueError(f"{self.path} {self.what}: {_first_line(error)}") from error

    def _named_in(self, text: str) -> bool:
        return re.search(rf"(^|[\s'\"]){re.escape(str(self.path))}($|[\s'\":;,./)])", text) is not None


def run_command(name: str, command: Callable[[], int]) -> int:
    """The exit code of `command`: 2 after one line where it was refused, 130 and 143 where it was stopped.

    SIGTERM unwinds like an exception, so that no temporary file is left. A warning is one line as well. A console that
    lacks a character shows ?."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with _stopping_at_sigterm(), _warning_in_a_line(name):
            return command()
    except (*SAID, RuntimeError) as error:
        if not isinstance(error, SAID) and not out_of_memory(error):
            raise
        print(f"aftersam.{name}: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        said, code = stop.args[0] if stop.args else "interrupted", 128 + signal.SIGINT
    except Terminated as stop:
        said, code = stop.said, 128 + signal.SIGTERM
    if said:
        print(f"aftersam.{name}: {said}", file=sys.stderr)
    return code


def stopped(signum: int, said: str) -> BaseException:
    """What to raise where SIGINT or SIGTERM ended a work that can go on later; `said` is told, unless it is empty."""
    return KeyboardInterrupt(said) if signum == signal.SIGINT else Terminated(said)


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """SIGINT and SIGTERM become numbers in a list. One that comes over a second later has its usual effect.

    Within that second torchrun hands on what the terminal has sent to all processes already."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # no other may set a handler
        yield noted
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: usual for number, usual in found.items() if usual != signal.SIG_IGN}
    began = 0.0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal began
        usual = before[signal.Signals(signum)]
        if noted and time.monotonic() - began > 1 and callable(usual):
            usual(signum, frame)
        began = began or time.monotonic()
        noted.append(signum)

    try:
        for signum in before:
            signal.signal(signum, note)
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def sentence(error: BaseException) -> str:
    """What `error` says, in one line of at most `LONGEST` characters."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    elif isinstance(error, MemoryError) and not str(error):
        text = "memory ran out"
    else:
        text = str(error) or type(error).__name__
    if "Original Traceback" in text:  # of a worker process, as torch hands it on
        text = text.rstrip().rsplit("\n", 1)[-1].partition(": ")[2]
    return _short_line(text)


def plain_console(*, stderr: bool = False) -> Console:
    """A console on which names stand as they are: brackets are no markup, :words: no emoji, numbers not coloured."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def one_line(text: object) -> str:
    """`text` without line breaks and control characters: each run of them, with the space around it, is one space.

    A name out of a file could steer the terminal otherwise."""
    parts = "".join(c if c.isprintable() else "\n" for c in str(text)).split("\n")
    return " ".join(part.strip() for part in parts if part.strip())


def tell(console: Console, text: object) -> None:
def counted(number: float, noun: str, plural: str = "") -> str:
    """`number` with its noun: 1 case, 2 cases. `plural` is needed where an s does not make it."""
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{shown} {noun if number == 1 else plural or noun + 's'}"


    """Print `text` as one line on a console of `plain_console`."""
    console.print(one_line(text), soft_wrap=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which torch says with a type of its own on a GPU and with a text on a CPU."""
    if isinstance(error, RuntimeError):
        return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError)


@contextlib.contextmanager
def _warning_in_a_line(name: str) -> Iterator[None]:
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"aftersam.{name}: {_short_line(message)}\n"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # matplotlib's, of names in pictures
            yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def _stopping_at_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no other may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(signum: int, frame: object) -> None:
    raise Terminated("terminated")


def _in_a_library(error: BaseException) -> bool:
    """Whether the error was made by a library that reads and writes files, or passed through one."""
    modules, trace = [type(error).__module__], error.__traceback__
    while trace is not None:
        modules.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return any(module.partition(".")[0] in _LIBRARIES for module in modules)


def _short_line(text: object) -> str:
    line = one_line(text)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


def _first_line(error: BaseException) -> str:
    """The first line of what `error` says, and the second where the first ends in a colon."""
    first, *more = (str(error) or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first
