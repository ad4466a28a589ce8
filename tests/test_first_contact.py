"""First contact keeps every line that was finished, names what hangs or crashes, and ends within its budget."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bench_cases import CEILING
from benchmarks import contact_summary, first_contact, journal
from benchmarks.first_contact import LINES, Stage
from benchmarks.targets import CPU_TARGETS, TARGETS

ROOT = Path(first_contact.ROOT)
WORKER = """
import json, os, sys, time
path, share, count, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
until = time.time() + seconds
def add(*entries):
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, "".join(json.dumps(e) + chr(10) for e in entries).encode())
    os.close(file)
known = set()
for line in open(path):
    try:
        known.add(json.loads(line).get("test"))
    except ValueError:  # cut off
        pass
for name in sys.argv[5:][share::count]:
    if name in known:
        continue
    if time.time() > until:
        add({"skipped": {"subject": "tests", "from": name, "reason": "no time"}})
        break
    add({"begin": {"test": name}, "pid": os.getpid()})
    if "hangs" in name:
        time.sleep(30)
    if "crashes" in name:
        os._exit(11)
    time.sleep(0.02)
    add({"test": name, "outcome": "passed", "seconds": 0.02}, {"begin": None, "pid": os.getpid()})
"""


def work(folder, *names, processes=2, unit_s=1.0):
    """A stage of processes that go through `names` without importing torch."""
    lines = folder / LINES
    commands = [[sys.executable, "-S", "-c", WORKER, str(lines), str(i), str(processes), "{seconds}", *names]
                for i in range(processes)]  # fmt: skip
    return Stage("work", commands, 1.0, unit_s, least_s=1.0)


def outcomes(folder):
    return {e["test"]: e for e in journal.read(folder / LINES) if "test" in e}


def test_what_hangs_or_crashes_is_named_and_the_rest_goes_on(tmp_path):
    (tmp_path / LINES).touch()
    names = ["a", "hangs", "b", "crashes", "c", "d", "crashes too", "e"]
    status, why = first_contact.run(work(tmp_path, *names), tmp_path, time.time() + 20)
    assert (status, why) == ("ok", "")
    found = outcomes(tmp_path)
    assert found.keys() == set(names)
    assert found["hangs"]["error"] == "gave no result in 1 s"
    assert found["crashes"]["error"] == found["crashes too"]["error"] == "the process ended with code 11"
    assert sum(entry["outcome"] == "passed" for entry in found.values()) == 5
    text = contact_summary.summary(journal.read(tmp_path / LINES))
    assert "WRONG (3)" in text


def test_a_stage_ends_in_time_and_leaves_what_was_under_way_for_the_next_run(tmp_path):
    (tmp_path / LINES).touch()
    began = time.time()
    status, why = first_contact.run(work(tmp_path, "a", "hangs", processes=1, unit_s=60), tmp_path, began + 2)
    assert time.time() - began < 6
    assert status == "out of time"
    assert why.endswith("hangs")
    assert outcomes(tmp_path).keys() == {"a"}


def _in_a_process(folder, names, seconds):
    first_contact.all_stages([work(folder, *names)], folder, time.time() + seconds)


def test_ten_kills_lose_no_finished_line_and_a_resumed_run_repeats_none(tmp_path):
    lines = tmp_path / LINES
    lines.touch()
    names = [f"unit {i}" for i in range(600)]
    draw = random.Random(0)
    fork = multiprocessing.get_context("fork")
    seen: set[str] = set()
    for _ in range(10):
        process = fork.Process(target=_in_a_process, args=(tmp_path, names, 60))
        process.start()
        time.sleep(draw.uniform(0.15, 0.5))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        time.sleep(0.1)  # the system ends the workers with their parent
        size = lines.stat().st_size
        now = set(outcomes(tmp_path))
        assert seen <= now
        seen = now
        time.sleep(0.05)
        assert lines.stat().st_size == size  # nobody writes any more
        if draw.random() < 0.5:
            with lines.open("a") as file:
                file.write('{"test": "unit 1')  # as a machine that stops in a write
        journal.mend(lines)
    assert 0 < len(seen) < len(names)
    _in_a_process(tmp_path, names, 60)
    counts = Counter(e["test"] for e in journal.read(lines) if "test" in e)
    assert counts.keys() == set(names)
    assert set(counts.values()) == {1}
    stage = [e for e in journal.read(lines) if "stage" in e][-1]
    assert (stage["stage"], stage["status"]) == ("work", "ok")
    before = lines.stat().st_size
    _in_a_process(tmp_path, names, 60)
    assert lines.stat().st_size == before  # a stage that is done is not begun again


def test_stages_share_the_seconds_and_say_why_they_cannot_run(tmp_path):
    (tmp_path / LINES).touch()
    slow = [f"unit {i}" for i in range(500)]
    stages = [work(tmp_path, *slow)._replace(name=str(i)) for i in range(3)]
    stages.insert(1, Stage("counters", [["ncu"]], 9.0, missing="ncu is not installed"))
    began = time.time()
    first_contact.all_stages(stages, tmp_path, began + 9)
    assert time.time() - began < 12
    found = {e["stage"]: e for e in journal.read(tmp_path / LINES) if "stage" in e}
    assert (found["counters"]["status"], found["counters"]["why"]) == ("skipped", "ncu is not installed")
    assert found["0"]["status"] == "out of time"
    assert 1 < found["0"]["seconds"] < 5  # a third, not all of it


def test_each_pytest_outcome_is_a_line_and_known_ones_are_not_run_again(tmp_path):
    lines, suite = tmp_path / LINES, tmp_path / "test_suite.py"
    lines.touch()
    suite.write_text(
        "import pytest, torch\n"
        "def test_right(): pass\n"
        "@pytest.mark.parametrize('shape', [(1, 9, 7)])\n"
        "def test_wrong(shape): torch.testing.assert_close(torch.zeros(shape), torch.eye(9, 7)[None])\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_skipped(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.contact_tests", "-p", "no:cacheprovider",
               "-c", os.devnull, "--rootdir", str(tmp_path), "--lines", str(lines), "--seconds", "300"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    for expected in (1, 5):  # a failed test, then none that is not known
        done = subprocess.run([*command, str(suite)], env=environment, capture_output=True, text=True)
        assert done.returncode == expected, done.stdout
        found = {name.partition("::")[2]: entry for name, entry in outcomes(tmp_path).items()}
        assert {name: e["outcome"] for name, e in found.items()} == {
            "test_right": "passed", "test_wrong[shape0]": "failed", "test_skipped": "skipped"
        }  # fmt: skip
        assert "Mismatched elements: 7 / 63" in found["test_wrong[shape0]"]["error"]
        assert "no GPU" in found["test_skipped"]["error"]


def test_the_command_refuses_to_mix_runs_and_names_its_stages(tmp_path, capsys):
    journal.append(tmp_path / LINES, {"stage": "machine", "status": "ok", "why": "", "seconds": 1})
    for options, message in (
        (["--out", str(tmp_path)], "go on with --resume"),
        (["--resume", str(tmp_path / "none")], "begin with --out"),
        (["--resume", str(tmp_path), "--only", "nothing"], "there are machine, tests, ours"),
    ):
        with pytest.raises(SystemExit):
            first_contact.main(options)
        assert message in capsys.readouterr().err


def _invented(subject, provider, role, *, ms=1.0, step=None, **facts):
    """A record whose numbers are invented for this test."""
    found = {"forward": {"median": ms, "q20": ms, "q80": ms, "n": 5}}
    if step is not None:
        found["forward_backward"] = {"median": step, "q20": step, "q80": step, "n": 5}
    return {"subject": subject, "name": "invented", **facts, "provider": provider, "role": role, "status": "ok",
            "flops": 8, "error": {"forward": 0.0, "backward": 0.0, "element": 0.0}, "ms": found, "clock": "graph",
            "peak_bytes": {kind: 2**30 if role == "other" else 2**20 for kind in found}}  # fmt: skip


def _beside(subject, *rivals, ours=1.0, **facts):
    """Ours at a millisecond, each of `rivals` at four and more, with backward."""
    listed = [_invented(subject, "ours", "ours", ms=ours, step=3 * ours, **facts)]
    for i, rival in enumerate(rivals):
        role = "other" if rival in ("frozen", "naive 3D", "SDPA 3D") else "rival"
        listed.append(_invented(subject, rival, role, ms=(4 + i) * ours, step=(12 + i) * ours, **facts))
    return listed


def invented_records():
    axial = [
        record for b in (1, 4)
        for record in _beside("axial", "SDPA", "multiply-sum, compiled", ours=0.04 * b, slices=9, positions=4096,
                              head_dim=32, batch=b, bytes=b * 75_000_000, bytes_backward=b * 132_000_000)
    ]  # fmt: skip
    lora = {"rows": 36_864, "k": 768, "n": 2304, "rank": 4}
    records = [
        *axial,
        *_beside("axial half", "library", channels=256),
        *_beside("lora", "frozen", "PEFT form", **lora),
    ]
    records += [r for d in (32, 64) for r in _beside("slice", "sdpa_cudnn", head_dim=d, positions=4096)]
    records += [*_beside("rel_pos", "SDPA, bias"), *_beside("window", "SDPA, bias")]
    for side in (1024, 512, 256):
        records += _beside("encoder", "SDPA, bias, compiled", ours=20.0, image_size=side, model="vit_b", items=8,
                           unit="images")  # fmt: skip
    for side in (64, 32):
        records += _beside("transformer", "SDPA factorised", "naive 3D", "SDPA 3D", side=side)
    for side in (1024, 512):
        records += _beside("predict", "re-encoding", ours=500.0, image_size=side, depth=200, encoder="vit_b")
        records += _beside("train step", "SDPA factorised", ours=30.0, image_size=side, encoder="frozen")
    return records


def test_lines_become_a_result_with_a_verdict_of_every_target_figures_and_tables(tmp_path, capsys):
    """Device and numbers are invented for this test."""
    root, lines = tmp_path / "root", tmp_path / LINES
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text(
        "<!-- bench:begin -->\n<!-- bench:end -->\n<!-- accuracy:begin --><!-- accuracy:end -->"
    )
    where = {"device": "Invented GPU", "kind": "gpu", "cpu": "c", "torch": "2", "triton": "3", "commit": "c",
             "dirty": False, "date": "2026-01-01T00:00:00", "driver": "1", "cuda": "13", "cudnn": 9,
             "python": "3.12", "arch": 130}  # fmt: skip
    ceilings = CEILING | {"copy_bytes_per_s": 3e12, "matmul_bfloat16_flops_per_s": 7e14, "launch_s": 4e-6}
    head = {"environment": where, "dtype": "bfloat16", "timing": "graph", "ceilings": ceilings}
    journal.append(lines, {"head": head}, *invented_records())
    journal.append(
        lines,
        {
            "test": "test_row_norm.py::wrong[D 32]",
            "outcome": "failed",
            "seconds": 1,
            "error": "1 / 63 elements",
        },
    )
    sizes = {"op": "axial_attention", "dtype": "bfloat16", "slices": 9, "head_dim": 32}
    for tile, ms, refused in (
        ([16, 4, 1, 8], 0.04, None),
        ([32, 2, 1, 1], 0.05, None),
        ([64, 4, 1, 1], None, "wrong"),
    ):
        journal.append(lines, {**sizes, "tile": tile, "ms": ms, "refused": refused})
    assert first_contact.main(["--collect", str(tmp_path), "--root", str(root)]) == 0
    (written,) = (root / "benchmarks" / "results").glob("invented-gpu-2026-01-01*.json")
    result = json.loads(written.read_text())
    gpus = [t for t in result["targets"] if t["number"] != "T10"]
    assert len(gpus) == len(TARGETS) == len(result["targets"]) - len(CPU_TARGETS)
    for target in gpus:
        assert target["value"] is not None, target
        assert target["verdict"] in ("met", "missed")
        assert target["target"]
    assert sum(bool(t["rival"]) for t in gpus) >= 15
    assert result["failed_tests"][0]["error"] == "1 / 63 elements"
    (shipped,) = (root / "kernels" / "axial_fusion" / "measured").glob("*.json")
    measured = json.loads(shipped.read_text())
    assert measured["tiles"] == [{**sizes, "tile": [16, 4, 1, 8]}]
    assert {b["backend"] for b in measured["backends"]} == {"sdpa_cudnn"}
    assert {r["op"] for r in measured["right"]} == {
        "axial_attention", "slice_attention", "rel_pos_attention", "window_attention", "lora_linear"
    }  # fmt: skip
    assert (measured["arch"], measured["commit"], measured["date"]) == (130, "c", "2026-01-01")
    assert "Invented GPU" in (root / "README.md").read_text()
    assert list((root / "docs" / "explanation").glob("*roofline.png"))
    text = contact_summary.summary(journal.read(lines))
    assert text.index("wrong[D 32]") < text.index("T1  ")
    assert len(contact_summary.summary(journal.read(lines) + invented_records() * 9)) < 10_000


def test_compiled_kernels_travel_with_the_run_and_into_the_next(tmp_path, monkeypatch):
    """Binaries and what describes them, the newest first, to the place that they came from."""
    place, run = tmp_path / "cache", tmp_path / "run"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(place))
    monkeypatch.setattr(first_contact, "MOST_BYTES", 3000)
    (place / "key").mkdir(parents=True)
    run.mkdir()
    for i, name in enumerate(("old.cubin", "new.cubin", "new.json", "new.ttir")):
        (place / "key" / name).write_bytes(bytes(2000 if "cubin" in name else 10))
        os.utime(place / "key" / name, (i, i))
    (run / first_contact.LOG).write_bytes(b"x" * 5000 + b"end")
    first_contact.pack(run)
    assert (run / first_contact.LOG).read_bytes()[-3:] == b"end"
    assert (run / first_contact.LOG).stat().st_size == 3000
    shutil.rmtree(place)
    first_contact.unpack(run / first_contact.CACHE)
    assert {p.name for p in place.rglob("*.*")} == {"new.cubin", "new.json"}


def test_every_stage_can_run_on_a_gpu_and_counts_what_is_furthest_from_the_ceilings(tmp_path, monkeypatch):
    monkeypatch.setattr(first_contact.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(first_contact.shutil, "which", lambda name: name)
    lines = tmp_path / LINES
    head = {"environment": {}, "dtype": "bfloat16", "ceilings": CEILING}
    slow = [_invented(name, "ours", "ours", ms=ms, bytes=10**7)
            for name, ms in (("axial", 2), ("axial half", 8), ("lora", 3), ("window", 5), ("slice", 99))]  # fmt: skip
    journal.append(lines, {"head": head}, *slow)
    stages = {stage.name: stage for stage in first_contact.stages(lines)}
    assert not any(stage.missing for stage in stages.values())
    assert list(stages)[:4] == ["machine", "tests", "ours", "rivals"]
    counted = [command[command.index("--subjects") + 1] for command in stages["counters"].commands()]
    assert counted == ["axial_half", "window", "lora"]
    names = [
        command[2] for stage in stages.values() if not callable(stage.commands) for command in stage.commands
    ]
    assert {"benchmarks", "pytest", "axial_fusion.tune"} <= set(names)
    for file in first_contact.TESTS:
        assert (ROOT / file).exists()


def test_seconds_that_stages_leave_go_to_those_that_had_too_few(tmp_path, monkeypatch):
    monkeypatch.setattr(first_contact, "LEAST_S", 1.0)
    (tmp_path / LINES).touch()
    long = work(tmp_path, *[f"unit {i}" for i in range(120)], processes=1)._replace(name="long", weight=0.2)
    absent = Stage("counters", [["ncu"]], 1.0, missing="ncu is not installed")
    first_contact.all_stages([long, absent, work(tmp_path, "short")], tmp_path, time.time() + 12)
    runs = [(e["stage"], e["status"]) for e in journal.read(tmp_path / LINES) if "stage" in e]
    assert runs[:3] == [("long", "out of time"), ("counters", "skipped"), ("work", "ok")]
    assert runs[-1] == ("long", "ok")
    assert set(Counter(e["test"] for e in journal.read(tmp_path / LINES) if "test" in e).values()) == {1}
    assert [name for name, _ in runs].count("counters") == 1
