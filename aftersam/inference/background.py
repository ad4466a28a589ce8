"""Threads that a signal may leave behind: the process then ends without waiting for what they do."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """A thread that does one thing after another and does not keep the process from ending.

    One thread for all scans: memory that one thread frees is not given to another."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, work: Callable[..., T], *args: Any) -> Future[T]:
        """What `work(*args)` will have returned or raised."""
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(work(*args))
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def close(self) -> None:
        """End the thread when all that was submitted is done."""
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # and what it holds of a scan


def leave_behind(future: Future[Any] | None, code: int) -> None:
    """Let the process end with `code` though `future` still runs, at a point where nothing else remains to be done.

    An interpreter that shuts down around a thread in native code may crash."""
    if future is not None and not future.done():
        atexit.register(_end, future, code)


def _end(future: Future[Any], code: int) -> None:
    if not future.done():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
