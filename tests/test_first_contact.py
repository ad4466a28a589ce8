"""Every stage of the first minutes on new hardware ends in time and says what it found."""

import sys

import pytest

from benchmarks import first_contact

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_a_stage_ends_at_its_limit_and_keeps_what_it_said(tmp_path):
    code = "import time; print('half', flush=True); time.sleep(60)"
    slow = first_contact.run(first_contact.Stage("slow", [sys.executable, "-c", code], 2.0), tmp_path)
    assert slow.status == "out of time"
    assert slow.seconds < 20
    assert (tmp_path / "slow.log").read_text() == "half\n"
    failed = first_contact.run(
        first_contact.Stage("f", [sys.executable, "-c", "raise SystemExit(3)"], 20), tmp_path
    )
    assert failed.status == "failed"
    absent = first_contact.run(first_contact.Stage("a", ["x"], 1.0, "not installed"), tmp_path)
    assert (absent.status, absent.note) == ("skipped", "not installed")


def test_stages_without_a_gpu_say_so_and_all_end_within_ten_minutes():
    stages = first_contact.stages()
    assert [bool(s.missing) for s in stages] == [True, True, True, True, False]
    assert sum(s.limit_s for s in stages) <= 600
