"""Cohorts whose processes or Ray actors are killed at random moments and started again.

    python tests/cohort_trials.py processes|ray TRIALS SCANS HOME RUN

Prints one JSON line: trials, kills, scans, rows. Raises AssertionError where a mask differs from an undisturbed
process's, where a scan was computed after it was finished, or where the manifest has another number of rows."""

import json
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from trials import child, ended

LOG = "AFTERSAM_TRIAL_LOG"  # environment variable: the file that events go to
DIES = "AFTERSAM_TRIAL_DIES"  # environment variable: the number of finished scans at which the process dies


def note_events(log=None):
    """Write to the file `log`, by default the one that LOG names, when this process begins and finishes a scan."""
    from aftersam.inference import pipeline
    from aftersam.inference.work import Work

    if log is not None:
        os.environ[LOG] = str(log)
    compute, write = Work.compute, pipeline.write_outputs

    def computing(self, job, progress):
        _note("begun", job.entry.mask)
        return compute(self, job, progress)

    def writing(args, names, job, found):
        said = write(args, names, job, found)
        _note("finished", job.entry.mask)
        if sum(what == "finished" for _, what, *_ in events(Path(os.environ[LOG]))) >= int(
            os.environ.get(DIES, 10**9)
        ):
            _die_once()
        return said

    Work.compute, pipeline.write_outputs = computing, writing


def _note(what, mask):
    line = json.dumps([time.monotonic(), what, mask, os.getpid()]).encode() + b"\n"
    with open(os.environ[LOG], "ab", buffering=0) as file:
        file.write(line)


def _die_once():
    """Kill this process between its mask and the end of its claim, unless another has died so."""
    with suppress(FileExistsError):
        Path(f"{os.environ[LOG]}.died").touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)


def events(log):
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(log, count):
    """Return when there were `count` events."""
    while len(events(log)) < count:
        time.sleep(0.02)


def masks(home):
    return {str(p.relative_to(home)): p.read_bytes() for p in sorted(home.rglob("*.nii.gz"))}


def check(home, log, expected):
    """The acceptance of one trial; the number of rows."""
    from aftersam.inference.manifest import ManifestArgs, manifest

    found = masks(home)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    assert found == expected, [name for name in found if found[name] != expected[name]]
    finished = {}
    for seconds, what, mask, _ in events(log):
        if what == "finished":
            finished.setdefault(mask, seconds)
    again = [
        mask
        for seconds, what, mask, _ in events(log)
        if what == "begun" and seconds > finished.get(mask, seconds)
    ]
    assert not again, again
    merged = manifest(ManifestArgs(home))
    assert len(merged.rows) == len(expected), len(merged.rows)
    assert {row["status"] for row in merged.rows} == {"done"}
    assert not [p for p in home.rglob(".*")], [p for p in home.rglob(".*")]
    return len(merged.rows)


def processes(count, scans, home, run):
    """Four processes on one folder, of which two are killed and started again."""
    import aftersam.inference.segmenter  # noqa: F401  # torch, once for all children

    options = ["-m", str(run), "--device", "cpu", "--no-preview", "--manifest", "on"]
    whole = home / "whole"
    assert ended(child(["-i", str(scans), "-o", str(whole), *options])) == 0
    expected = masks(whole)
    draw, kills, computed, rows = random.Random(0), 0, [], 0
    for trial in range(count):
        output, log = home / str(trial), home / f"{trial}.events"
        command, noting = ["-i", str(scans), "-o", str(output), *options], partial(note_events, log)
        living = [child(command, noting) for _ in range(4)]
        for moment in sorted(draw.randint(1, max(1, len(expected) * 3 // 2)) for _ in range(2)):
            wait_for(log, moment)
            time.sleep(draw.uniform(0, 0.2))
            victim = living.pop(draw.randrange(len(living)))
            os.kill(victim, signal.SIGKILL)
            kills += ended(victim) == -signal.SIGKILL
            living.append(child(command, noting))
        codes = [ended(process) for process in living]
        assert codes == [0] * 4, (codes, Path(f"{output}.log").read_text())
        # One more process does what a process had in hand that was killed last.
        assert ended(child(command, noting)) == 0
        rows = check(output, log, expected)
        computed.append(sum(what == "begun" for _, what, _, _ in events(log)))
    return {"trials": count, "kills": kills, "scans": len(expected), "computed": computed, "rows": rows}


def ray(count, scans, home, run):
    """A local Ray with two actors, of which one is killed."""
    import ray

    from aftersam.inference.arguments import PredictArgs
    from aftersam.inference.pipeline import predict_files
    from aftersam.inference.ray import predict_on_ray

    whole = home / "whole"
    fixed = {"input": scans, "model": (run,), "device": "cpu", "preview": False, "manifest": "on"}
    predict_files(PredictArgs(output=whole, **fixed))
    expected, kills, draw = masks(whole), 0, random.Random(0)
    for trial in range(count):
        output, log = home / str(trial), home / f"{trial}.log"
        moment, killed = draw.randint(1, max(1, len(expected) * 3 // 4)), []
        own = (
            {DIES: str(moment)} if trial % 2 == 0 else {}
        )  # an actor dies by itself, or is killed at any time
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            runtime_env={"worker_process_setup_hook": note_events, "env_vars": {LOG: str(log), **own}},
        )  # fmt: skip

        def kill(log=log, moment=moment, killed=killed):
            wait_for(log, moment)
            killed.append(events(log)[-1][3])
            os.kill(killed[0], signal.SIGKILL)

        if not own:
            threading.Thread(target=kill, daemon=True).start()
        done = predict_on_ray(PredictArgs(output=output, engine="ray", workers=2, **fixed))
        ray.shutdown()
        kills += len(killed) + Path(f"{log}.died").exists()
        assert (done.code, len(done.written) + len(done.kept)) == (0, len(expected)), done
        rows = check(output, log, expected)
    return {"trials": count, "kills": kills, "scans": len(expected), "rows": rows}


if __name__ == "__main__":
    mode, count, scans, home, run = sys.argv[1:]
    found = {"processes": processes, "ray": ray}[mode](int(count), Path(scans), Path(home), Path(run))
    print(json.dumps(found))
