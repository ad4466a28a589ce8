"""Turns exceptions that bad files, full disks and full memory raise into one sentence for the user.

An exception of this package's code keeps its traceback: it is a bug."""

from __future__ import annotations

import contextlib
import os
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
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

SAID = (ValueError, OSError, FloatingPointError, MemoryError)  # a command reports these in one line
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
    """Turns what a library raises while it reads or writes `path` into one sentence that starts with the path.

    Raises OSError for an error of the system, MemoryError where memory ran out, ValueError otherwise. An error that
    already names the path passes unchanged."""

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
    """Run `command` and return its exit code: 2 after an error, 130 after SIGINT, 143 after SIGTERM.

    Errors and warnings are one line each. SIGTERM raises an exception, so that temporary files are removed. A console
    that cannot show a character prints ?. Lines that stderr cannot take (a full disk, a closed pipe) are lost; the
    work goes on."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # of what waits to be written
                stream.reconfigure(errors="replace")
    with contextlib.redirect_stderr(_Lossy(sys.stderr)):
        return _run(name, command)


def _run(name: str, command: Callable[[], int]) -> int:
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


class _Lossy:
    """A text stream whose failures to write are ignored."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def _open_streams() -> None:
    """Open stdout and stderr that were closed by the caller: else the next file would get their descriptor."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for as long as the process lives


def stopped(signum: int, said: str) -> BaseException:
    """The exception to raise after SIGINT or SIGTERM. `said` is the message for the user; empty prints nothing."""
    return KeyboardInterrupt(said) if signum == signal.SIGINT else Terminated(said)


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of acting on them.

    A signal that is repeated after more than a second acts as usual. Within that second torchrun may forward a signal
    that the terminal has already sent to all processes."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
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
    """The message of `error` in one line of at most `LONGEST` characters."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    elif isinstance(error, MemoryError) and not str(error):
        text = "memory ran out"
    else:
        text = str(error) or type(error).__name__
    if "Original Traceback" in text:  # torch's form of an error in a worker process
        text = text.rstrip().rsplit("\n", 1)[-1].partition(": ")[2]
    return _short_line(text)


def plain_console(*, stderr: bool = False) -> Console:
    """A rich console that prints text unchanged: no markup, no emoji, no colours for numbers."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def one_line(text: object) -> str:
    """`text` in one line: each run of line breaks and control characters, with the spaces around it, is one space.

    Otherwise a name in a file could control the terminal."""
    parts = "".join(c if c.isprintable() else "\n" for c in str(text)).split("\n")
    return " ".join(part.strip() for part in parts if part.strip())


def counted(number: float, noun: str, plural: str = "") -> str:
    """`number` with its noun: 1 case, 2 cases. `plural` is needed where an s does not make it."""
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{shown} {noun if number == 1 else plural or noun + 's'}"


def tell(console: Console, text: object) -> None:
    """Print `text` as one line on a `plain_console`."""
    console.print(one_line(text), soft_wrap=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory ran out. torch raises a special type on a GPU and a RuntimeError on a CPU."""
    if isinstance(error, RuntimeError):
        return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError)


@contextlib.contextmanager
def _warning_in_a_line(name: str) -> Iterator[None]:
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"aftersam.{name}: {_short_line(message)}\n"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # matplotlib warns of names in figures
            yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def _stopping_at_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
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
    """Whether the error comes from, or passed through, a library that reads or writes files."""
    modules, trace = [type(error).__module__], error.__traceback__
    while trace is not None:
        modules.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return any(module.partition(".")[0] in _LIBRARIES for module in modules)


def _short_line(text: object) -> str:
    line = one_line(text)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


def _first_line(error: BaseException) -> str:
    """The first line of the message of `error`, with the second line where the first ends in a colon."""
    first, *more = (str(error) or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first
