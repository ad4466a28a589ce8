"""A plugin of pytest for first contact: each test's name before it runs and its outcome after it, as lines.

    pytest -p benchmarks.contact_tests --lines FILE --share 2/8 --seconds 60 tests/...

Tests whose outcome the file holds are not run again. `--share i/n` takes every n-th test, and no test begins once
`--seconds` of this process are over; how many were not begun is a line too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from aftersam.errors import counted
from benchmarks import journal

MOST_LOST = 2  # tests of a file that hung or crashed, after which its others are left out
MOST = 300  # characters of an error


class Lines:
    """Writes what becomes of each test."""

    def __init__(self, path: Path, share: str, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.index, self.count = (int(part) for part in share.split("/"))
        self.left = 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = {entry["test"] for entry in journal.read(self.path) if "test" in entry}
        turn: Counter[Path] = (
            Counter()
        )  # of a file: every kernel is tested early, what one breaks takes no other's time
        order = {}
        for item in items:
            # those that need a GPU first: capture, compile, more than 2³¹ elements
            order[item.nodeid] = not item.get_closest_marker("gpu"), turn[item.path]
            turn[item.path] += 1
        mine = sorted(items, key=lambda item: order[item.nodeid])[self.index :: self.count]
        chosen = [item for item in mine if item.nodeid not in known]
        lost = Counter(
            e["test"].partition("::")[0] for e in journal.read(self.path) if e.get("lost") and "test" in e
        )
        whole = [item for item in chosen if lost[item.nodeid.partition("::")[0]] < MOST_LOST]
        self.left, chosen = len(chosen) - len(whole), whole
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if journal.process_seconds() > self.seconds:
            self.left += 1
            return True  # as if it had been run
        journal.begin(self.path, {"test": item.nodeid})
        self.found: dict[str, Any] = {"test": item.nodeid, "outcome": "passed", "seconds": 0.0}
        return None

    def pytest_runtest_logfinish(self) -> None:
        journal.end(self.path, self.found)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.found["seconds"] = round(self.found["seconds"] + report.duration, 2)
        if report.failed or (report.skipped and self.found["outcome"] == "passed"):
            self.found["outcome"] = report.outcome
            self.found["error"] = _reason(report)

    def pytest_sessionfinish(self) -> None:
        if self.left:
            tests = counted(self.left, "test was", "tests were")
            reason = f"{tests} not begun: no time, or others of the same file hung or crashed"
            journal.append(self.path, {"skipped": {"subject": "tests", "from": "", "reason": reason}})


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2])[:MOST]
    return " ".join((crash.message if crash else report.longreprtext).split())[:MOST]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, required=True)
    parser.addoption("--share", default="0/1")
    parser.addoption("--seconds", type=float, default=1e9)


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--lines")
    journal.watch_compilations(path)
    config.pluginmanager.register(
        Lines(path, config.getoption("--share"), config.getoption("--seconds")), "first-contact-lines"
    )
