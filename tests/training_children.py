"""Trainings in processes of their own, to be killed or to run out of disk; forked from one that has torch already."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys

import torch
from safetensors.torch import load_file

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["training_children", "aftersam.training.run", "torch.utils.tensorboard", "matplotlib.backends.backend_agg",
     "scipy.ndimage", "nibabel"]
)  # fmt: skip
FAST = [
    "--preset",
    "tiny",
    "--image-size",
    "48",
    "--num-blocks",
    "1",
    "--precision",
    "fp32",
    "--device",
    "cpu",
]
LIMITS = ["--max-steps", "8", "--checkpoint-steps", "2"]


def start(data, run, *more, fault=()):
    """Begin a training of a few steps, or go on with it where there is a checkpoint; `fault` is that of `_train`."""
    again = ["--resume"] if (run / "last.safetensors").exists() else [*FAST, *LIMITS]
    argv = ["--data", str(data), "--output", str(run), *again, *more]
    ours, theirs = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_train, args=(argv, theirs, fault))
    child.start()
    theirs.close()
    child.said = ours
    return child


def kill(child):
    child.kill()
    child.join()
    child.said.close()


def finish(data, run, *more, fault=()):
    """The exit code of a training that nobody stops, and the last line that it says."""
    child = start(data, run, *more, fault=fault)
    with child.said, contextlib.suppress(EOFError):
        lines = child.said.recv().strip().splitlines()
        child.join(60)
        return child.exitcode, lines[-1]
    child.join(60)
    return child.exitcode, ""


def _train(argv, ours, fault):
    """Run aftersam.train. `fault`: ("rename", n, before) kills this process at the n-th rename, before or after it;
    ("limit", n) allows no file above n bytes."""
    from aftersam.train import main

    sys.stdout = sys.stderr = said = io.StringIO()
    torch.set_num_threads(1)
    if fault and fault[0] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault[1], resource.RLIM_INFINITY))
    if fault and fault[0] == "rename":
        for name in ("rename", "replace"):
            setattr(os, name, _deadly(getattr(os, name), *fault[1:]))
    code = main(argv)
    ours.send(said.getvalue())
    os._exit(code)


CALLS = []


def _deadly(rename, number, before):
    def called(*args, **keys):
        CALLS.append(1)
        if before and len(CALLS) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args, **keys)
        if not before and len(CALLS) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return called


def records(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def hidden(home):
    """What has a temporary name below `home`."""
    return [path for path in home.rglob(".*")]


def assert_same(run, other):
    """Weights, moments, generators and the logged losses of two runs, to the bit."""
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(run / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
    for ours, theirs in zip(records(run), records(other), strict=True):
        assert {**ours, "minutes": 0} == {**theirs, "minutes": 0}
