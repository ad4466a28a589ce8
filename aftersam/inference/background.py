"""Background threads. After a signal the process ends without waiting for their work."""

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
    """A daemon thread that runs submitted functions one after another.

    All scans share one thread, since the allocator does not reuse in one thread the memory that another freed."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, work: Callable[..., T], *args: Any) -> Future[T]:
        """Run `work(*args)` in the thread. Returns a future of its result or exception."""
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(work(*args))
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def close(self) -> None:
        """End the thread after everything that was submitted."""
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # it refers to the arrays of a scan


def leave_behind(future: Future[Any] | None, code: int) -> None:
    """Let the process exit with `code` while `future` still runs, after all other exit handlers.

    Call it when nothing else remains to be done. An interpreter that shuts down around a thread in native code may
    crash."""
    if future is not None and not future.done():
        atexit.register(_end, future, code)


def _end(future: Future[Any], code: int) -> None:
    if not future.done():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
