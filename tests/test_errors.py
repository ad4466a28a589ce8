"""Errors as sentences: what a file's reading raises names the file, what a command raises is one line and a code."""

import contextlib
import os
import signal
import struct
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftersam.errors import LONGEST, naming, one_line, run_command, sentence, signals_noted, stopped
from aftersam.predict import main as predict_main
from error_rows import a_bad_scan_of_two


@given(st.text())
def test_one_line_drops_line_breaks_and_control_characters_alone(text):
    said = one_line(text)
    assert said.isprintable()
    assert said.replace(" ", "") == "".join(c for c in text if c.isprintable() and c != " ")
    assert said == text.strip() or not text.strip().isprintable()
    assert len(sentence(ValueError(text * 50))) <= LONGEST + len(" …")


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (EOFError("end of stream\nand more"), ValueError, "scan.nii is truncated or damaged: end of stream"),
        (struct.error("unpack needs 4"), ValueError, "scan.nii is truncated or damaged: unpack needs 4"),
        (OverflowError("too large"), ValueError, "scan.nii is truncated or damaged: too large"),
        (OSError(28, "No space left on device"), OSError, "scan.nii: No space left on device"),
        (
            MemoryError("Unable to allocate 3 GiB"),
            MemoryError,
            "scan.nii: memory ran out: Unable to allocate",
        ),
        (ValueError("scan.nii is 2D"), ValueError, "scan.nii is 2D"),
        (
            ValueError("all decoders failed:\n  gdcm: no end\n  pillow: no start"),
            ValueError,
            "scan.nii is truncated or damaged: all decoders failed: gdcm: no end",
        ),
    ],
)
def test_errors_over_a_file_start_with_its_name(raised, kind, said):
    with pytest.raises(kind) as caught, naming("scan.nii"):
        raise raised
    assert sentence(caught.value).startswith(said)
    assert len(str(caught.value).splitlines()) == 1


def test_any_exception_that_passes_through_a_file_library_is_the_files():
    from nibabel.wrapstruct import WrapStructError

    with (
        pytest.raises(ValueError, match=r"^scan\.nii is truncated or damaged: header too short"),
        naming("scan.nii"),
    ):
        raise WrapStructError("header too short")


def test_a_dot_in_a_sentence_is_not_the_folder_here():
    with pytest.raises(ValueError, match=r"^\. is truncated or damaged: cut at byte 3\.5$"), naming("."):
        raise ValueError("cut at byte 3.5")


def test_our_own_mistakes_keep_their_type():
    with pytest.raises(TypeError, match=r"^ours$"), naming("scan.nii"):
        raise TypeError("ours")


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ValueError("scan.nii is 2D"), 2, "aftersam.check: scan.nii is 2D\n"),
        (
            OSError(2, "No such file or directory", "a.nii"),
            2,
            "aftersam.check: a.nii: No such file or directory\n",
        ),
        (MemoryError(), 2, "aftersam.check: memory ran out\n"),
        (ValueError("a\x1b[31mb\nc"), 2, "aftersam.check: a [31mb c\n"),
        (KeyboardInterrupt(), 130, "aftersam.check: interrupted\n"),
    ],
)
def test_a_command_says_one_line_and_returns_a_code(raised, code, line, capsys):
    def command():
        raise raised

    assert run_command("check", command) == code
    assert capsys.readouterr().err == line


def test_sigterm_unwinds_and_the_handler_before_is_back(tmp_path, capsys):
    def command():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            (tmp_path / "unwound").touch()

    before = signal.getsignal(signal.SIGTERM)
    assert run_command("train", command) == 143
    assert capsys.readouterr().err == "aftersam.train: terminated\n"
    assert (tmp_path / "unwound").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_console_without_the_character_shows_a_question_mark(monkeypatch, tmp_path):
    with (tmp_path / "console").open("w", encoding="ascii") as console:
        monkeypatch.setattr(sys, "stdout", console)
        assert run_command("check", lambda: print("Leber ü") or 0) == 0
    assert (tmp_path / "console").read_text() == "Leber ?\n"


@pytest.mark.parametrize("kind", ["full disk", "closed pipe", "closed"])
def test_lines_that_stderr_cannot_take_are_lost_and_the_work_goes_on(run, tmp_path, monkeypatch, kind):
    a_bad_scan_of_two(tmp_path)  # which is told of, and is the exit code
    stream = unwritable(kind)
    monkeypatch.setattr(sys, "stderr", stream)
    argv = f"-i {tmp_path}/scans -o {tmp_path}/masks -m {run} --device cpu --no-preview"
    assert predict_main(argv.split()) == 1
    assert [path.name for path in (tmp_path / "masks").glob("*.nii.gz")] == ["a.nii.gz"]
    assert predict_main([*argv.split(), "--num-parts", "2"]) == 2
    lost = stream or sys.stderr
    monkeypatch.undo()
    for part in (lost, lost.buffer, lost.buffer.raw):  # two of them hold lines that cannot be written
        with contextlib.suppress(OSError):
            part.close()


def unwritable(kind):
    if kind == "closed":
        return None
    if kind == "full disk":
        return open("/dev/full", "w", buffering=1)
    end, start = os.pipe()
    os.close(end)
    return open(start, "w", buffering=1)


def test_signals_are_noted_and_have_their_effect_when_asked_for_again():
    with signals_noted() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at once: torchrun hands on what the terminal has sent already
        assert noted == [signal.SIGTERM, signal.SIGINT]
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGINT)
        assert noted == []
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_work_that_was_brought_to_an_end_says_how_to_go_on(number, code, capsys):
    def command():
        raise stopped(number, "stopped at step 3")

    assert run_command("train", command) == code
    assert capsys.readouterr().err == "aftersam.train: stopped at step 3\n"


def test_an_error_of_a_worker_process_is_its_last_line():
    from torch._utils import ExceptionWrapper

    try:
        raise ValueError("c0 is damaged")
    except ValueError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(ValueError, match="Original Traceback") as caught:
        wrapped.reraise()
    assert sentence(caught.value) == "c0 is damaged"


def test_a_value_that_fills_pages_is_cut():
    said = sentence(ValueError("config.json: seed is " + "9" * 5000))
    assert said.startswith("config.json: seed is 999")
    assert len(said) < 1000
