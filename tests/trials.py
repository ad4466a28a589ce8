"""Predictions that are killed, run side by side or out of disk space: forked children of one process, which has torch.

    python tests/trials.py MODE COUNT SCANS HOME RUN

Prints one JSON line: how many trials, kills and of what."""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from aftersam.predict import main

EXTRAS = ("--save-probabilities", "--statistics", "--confidence", "--timings")


def child(command, prepare=lambda: None):
    """The process id of a child that predicts; its sentences go to a file beside the output."""
    process = os.fork()
    if process:
        return process
    try:
        log = os.open(f"{command[3]}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        prepare()
        code = main(command)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    os._exit(code)


def ended(process):
    """The exit code of a child, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(point):
    """Kill this process before its n-th rename, or right after it: points 2 n and 2 n + 1."""
    passed = itertools.count()

    def fatal(rename):
        def killing(*names, **options):
            if next(passed) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*names, **options)
            if next(passed) == point:
                os.kill(os.getpid(), signal.SIGKILL)

        return killing

    os.replace, os.rename = fatal(os.replace), fatal(os.rename)


def content(home):
    """Every file of a folder as bytes, but for what tells seconds."""
    files = {p.relative_to(home): p for p in sorted(home.rglob("*")) if p.is_file()}
    return {str(name): b"" if ".timings." in name.name else p.read_bytes() for name, p in files.items()}


class Trials:
    """Trials on one folder of scans, compared with an undisturbed prediction of it."""

    def __init__(self, scans, home, run):
        self.home, self.number = home, itertools.count()
        self.fixed = ["-i", str(scans), "-o"]
        self.options = ["-m", str(run), "--device", "cpu", "--no-preview", *EXTRAS, "--embeddings"]
        whole = self.new()
        began = time.monotonic()
        assert ended(child(whole)) == 0
        self.seconds = time.monotonic() - began
        self.expected = content(Path(whole[3]).parent)

    def new(self):
        """The command of a prediction into a new folder."""
        home = self.home / str(next(self.number))
        home.mkdir()
        return [*self.fixed, str(home / "masks"), *self.options, str(home / "embeddings")]

    def check(self, command):
        """All files as undisturbed, and nothing else."""
        home = Path(command[3]).parent
        log = home / "masks.log"
        said = log.read_text()
        assert "Traceback" not in said, said
        log.unlink()
        found = content(home)
        log.write_text(said)
        expected = {name: data for name, data in self.expected.items() if name != "masks.log"}
        assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
        assert found == expected, [name for name in found if found[name] != expected[name]]
        assert not [p for p in home.rglob(".*")]

    def renames(self, count):
        """Kill at every point, or at `count` of them; then predict again."""
        kills = 0
        for point in itertools.count():
            if count and point % 17 >= count:  # a few points of a scan with as many
                continue
            command = self.new()
            code = ended(child(command, lambda point=point: kill_at(point)))
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL)
            assert ended(child(command)) == 0
            self.check(command)
            if code == 0 or (count and point > 17):
                return {"trials": point + 1, "kills": kills}

    def random(self, count):
        """Kill at random, twice at most; then predict again."""
        kills, draw = 0, random.Random(0)
        for _ in range(count):
            command = self.new()
            for _ in range(draw.choice((1, 2))):
                process = child(command)
                time.sleep(draw.uniform(0, 1.1 * self.seconds))
                os.kill(process, signal.SIGKILL)
                kills += ended(process) == -signal.SIGKILL
            assert ended(child(command)) == 0
            self.check(command)
        return {"trials": count, "kills": kills}

    def pairs(self, count):
        """Two processes on one folder, one a little later than the other."""
        for number in range(count):
            command = self.new()
            first = child(command)
            time.sleep(self.seconds * number / (2 * count))
            second = child(command)
            assert (ended(first), ended(second)) == (0, 0)
            self.check(command)
        return {"trials": count}


if __name__ == "__main__":
    mode, count, scans, home, run = sys.argv[1:]
    print(json.dumps(getattr(Trials(Path(scans), Path(home), Path(run)), mode)(int(count))))
