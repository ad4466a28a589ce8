"""The one place where an exception becomes a sentence: which ones a bad file or a full machine raises, what is said.

What is nobody's input but ours to mend keeps its traceback."""

from __future__ import annotations

import contextlib
import signal
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

SAID = (ValueError, OSError, FloatingPointError, MemoryError)  # what a command tells in one line
_BY_A_FILE = (*SAID, EOFError, OverflowError, RecursionError, struct.error, zlib.error)
_LIBRARIES = frozenset(
    {"highdicom", "matplotlib", "nibabel", "PIL", "pydicom", "pylibjpeg", "safetensors", "SimpleITK"}
)


class naming(contextlib.AbstractContextManager[None]):
    """Turns whatever a library raises over the file `path` into one sentence that starts with the path.

    Raises OSError where the system refused, MemoryError where memory ran out, ValueError otherwise; an error that names
    the path already passes as it is."""

    def __init__(self, path: Path | str, what: str = "is truncated or damaged") -> None:
        self.path, self.what = path, what

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or not (isinstance(error, _BY_A_FILE) or _in_a_library(error)):
            return
        if isinstance(error, SAID) and str(self.path) in str(error):
            return
        if isinstance(error, MemoryError):
            raise MemoryError(f"{self.path}: memory ran out: {_first_line(error)}") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(f"{self.path}: {error.strerror or error}") from error
        raise ValueError(f"{self.path} {self.what}: {_first_line(error)}") from error


def run_command(name: str, command: Callable[[], int]) -> int:
    """The exit code of `command`: 2 after one line where it was refused, 130 and 143 where it was stopped.

    SIGTERM unwinds like an exception, so that no temporary file is left. A console that lacks a character shows ?."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with _stopping_at_sigterm():
            return command()
    except SAID as error:
        print(f"aftersam.{name}: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"aftersam.{name}: interrupted", file=sys.stderr)
        return 130


def sentence(error: BaseException) -> str:
    """What `error` says, in one line without control characters."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    elif isinstance(error, MemoryError) and not str(error):
        text = "memory ran out"
    else:
        text = str(error) or type(error).__name__
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


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
    sys.exit(128 + signum)


def _in_a_library(error: BaseException) -> bool:
    """Whether the error was made by a library that reads and writes files, or passed through one."""
    modules, trace = [type(error).__module__], error.__traceback__
    while trace is not None:
        modules.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return any(module.partition(".")[0] in _LIBRARIES for module in modules)


def _first_line(error: BaseException) -> str:
    """The first line of what `error` says, and the second where the first ends in a colon."""
    first, *more = (str(error) or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first
