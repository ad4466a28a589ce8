"""Ablation tables: the same split for every row, finished rows kept, means and tests as said."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aftersam.ablate import TABLES, AblateArgs, ablate, columns_of, main, markdown, row_config
from aftersam.config import to_dict
from aftersam.data.phantom import write_dataset
from aftersam.evaluation.figures import ablation_figure
from aftersam.evaluation.statistics import summarise
from aftersam.model.build import build_aftersam


@pytest.mark.parametrize("table", TABLES)
def test_every_row_builds(table):
    args = AblateArgs(Path("data"), Path("out"), preset="small" if table == "small" else "tiny")
    changes = list(TABLES[table].values())
    assert changes[-1] == {}  # the preset as it is, which the others are held to
    for change in changes:
        config = row_config(args, change, 3)
        build_aftersam(dataclasses.replace(config.model, image_size=48), 4)
        assert config.train.seed == 3
        assert all(
            value in (getattr(config.model, key, None), getattr(config.train, key, None))
            for key, value in change.items()
        )


def test_attention_is_the_only_change_of_every_column_of_fusion_but_2d():
    args = AblateArgs(Path("data"), Path("out"))
    _, *columns = columns_of(args, "fusion").items()
    assert [name for name, _ in columns] == ["adjacent slices", "slice", "axial", "axial + slice"]
    assert all(set(change) <= {"attention"} for _, change in columns)
    assert columns[0][1] == {"attention": "none"}
    paper = columns_of(dataclasses.replace(args, preset="paper"), "fusion")  # which sees no adjacent slices
    assert list(paper) == ["2D", "slice", "axial", "axial + slice"]


def test_a_finished_row_of_another_configuration_budget_or_fold_is_refused(tmp_path, monkeypatch):
    args = AblateArgs(tmp_path, tmp_path / "out", table=("4",), preset="tiny", seeds=(0,), max_steps=2)
    home = tmp_path / "out" / "base-seed-0"
    (home / "run").mkdir(parents=True)
    config = to_dict(row_config(args, {}, 0))
    config["model"]["encoder"] = "full"  # which training chose
    facts = {"labels": {"1": "heart"}, "spacing_mm": None, "fold": 0}
    monkeypatch.setattr("aftersam.ablate._rows", lambda *_: (_ for _ in ()).throw(InterruptedError("trains")))
    for part, key, value in (
        ("model", "stem", "wide"),
        ("train", "max_steps", 3),
        (None, "fold", 1),
        (None, "", 0),
    ):
        changed = {**config, part: {**config[part], key: value}} if part else config
        (home / "metrics.json").touch()
        (home / "run" / "config.json").write_text(json.dumps(changed))
        (home / "run" / "run.json").write_text(json.dumps(facts if part else {**facts, key: value}))
        said = f"{home} was trained with {key} {value}, not" if key else "trains"
        with pytest.raises(ValueError if key else InterruptedError, match=said):
            ablate(args)
    (home / "metrics.json").unlink()  # not finished: it is trained again
    with pytest.raises(InterruptedError, match="trains"):
        ablate(dataclasses.replace(args, max_steps=7))


def test_the_steps_of_small_are_of_no_other_preset(tmp_path):
    with pytest.raises(ValueError, match="not tiny"):
        ablate(AblateArgs(tmp_path, tmp_path / "out", table=("small",), preset="tiny"))


def test_means_deviations_and_the_paired_test():
    def scores(*rows):
        return {
            f"case {i}": {"heart": {"dsc": row}, "lung": {"dsc": row + 0.1}} for i, row in enumerate(rows)
        }

    base = [0.5, 0.6, 0.7, 0.8, 0.4, 0.3]
    better = [scores(*(b + 0.1 + 0.01 * i for i, b in enumerate(base))), scores(*(b + 0.1 for b in base))]
    table = summarise({"2D": [scores(*base), scores(*base)], "ours": better}, {})
    assert table["against"] == "ours"
    assert table["columns"]["2D"]["heart"] == {
        "mean": pytest.approx(0.55),
        "std": pytest.approx(0.0, abs=1e-12),
    }
    ours = table["columns"]["ours"]["heart"]
    assert ours["mean"] == pytest.approx(0.55 + 0.1 + 0.0125)
    assert ours["std"] == pytest.approx(0.025 / math.sqrt(2))
    assert table["columns"]["ours"]["Average"]["mean"] == pytest.approx(ours["mean"] + 0.05)
    assert table["tests"]["2D"]["heart"] == pytest.approx(2 / 2**6)  # all six signs alike, exact two-sided
    text = markdown("fusion", table)
    assert "| heart | 55.00 ± 0.00 (0.031) | 66.25 ± 1.77 |" in text
    assert text.splitlines()[-1].startswith("ours against 2D: heart +11.25 (p 0.031), lung +11.25")


def test_columns_that_were_told_the_labels_are_marked(tmp_path):
    scores = {f"case {i}": {"heart": {"dsc": 0.5 + i / 10}} for i in range(3)}
    table = summarise({"Box": [scores], "w.o.": [scores]}, {"Box": "box"})
    text = markdown("3", table)
    assert "|  | Box † | w.o. |" in text
    assert "† prompted from the labels" in text
    ablation_figure(table, tmp_path / "t.png", title="Table 3")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_table_on_phantoms_is_resumed_row_by_row(tmp_path, capsys):
    write_dataset(tmp_path / "scans", cases=3, seed=0)
    asked = ["--data", str(tmp_path / "scans"), "--output", str(tmp_path / "out"), "--table", "4", "--preset", "tiny",
             "--max-steps", "2", "--seeds", "0", "1", "--device", "cpu"]  # fmt: skip
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "LoRA" in printed
    assert "Finetune" in printed
    splits = {path.read_text() for path in (tmp_path / "out").glob("*/run/splits_final.json")}
    assert len(splits) == 1
    table = json.loads((tmp_path / "out" / "tables.json").read_text())["4"]
    assert table["seeds"] == 2
    assert table["prompted"] == {}
    assert (tmp_path / "out" / "table-4.png").exists()
    (tmp_path / "out" / "base-seed-1" / "metrics.json").unlink()  # as if it had been killed there
    kept = tmp_path / "out" / "base-seed-0" / "run" / "last.safetensors"
    before = kept.stat().st_mtime_ns
    assert main([*asked, "--jobs", "2"]) == 0
    assert kept.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out" / "tables.json").read_text())["4"] == table
    path = tmp_path / "out" / "base-seed-1" / "metrics.json"
    metrics = json.loads(path.read_text())
    for changed, says in (
        ([], f"{path} was not written"),
        ({**metrics, "cases": {}}, f"{path.parent} was scored on 0"),
    ):
        path.write_text(json.dumps(changed))
        capsys.readouterr()
        assert main(asked) == 2
        assert capsys.readouterr().err.startswith(f"aftersam.ablate: {says}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's list of child processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_rows_that_are_trained_at_once_end_with_the_command(tmp_path, number):
    write_dataset(tmp_path / "scans", cases=3, seed=0)
    asked = ["--data", str(tmp_path / "scans"), "--output", str(tmp_path / "out"), "--table", "4", "--preset", "tiny",
             "--max-steps", "100000", "--seeds", "0", "--device", "cpu", "--jobs", "2"]  # fmt: skip
    command = [sys.executable, "-m", "aftersam.ablate", *asked]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while len([p for p in (tmp_path / "out").glob("*/run/history.jsonl") if p.stat().st_size]) < 2:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            rows = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.send_signal(number)
            said = process.communicate(timeout=240)[1]
            assert process.returncode == 128 + number
            assert len(said.splitlines()) == 1, said
            assert len(rows) >= 2
            while any(Path("/proc", pid).exists() for pid in rows):
                assert time.monotonic() < deadline
                time.sleep(0.2)
        finally:  # a row that outlives the command would train beside all later tests
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
