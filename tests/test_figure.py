"""Results become figures and tables."""

import json

import pytest
import torch

from bench_cases import a_result, fusion_result, times
from benchmarks import figure, harness, tables
from benchmarks.speed import waterfall
from benchmarks.speed.fusion import OURS

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def result():
    return fusion_result()


def test_the_newest_result_of_a_device_becomes_figure_and_table(result, tmp_path):
    older = json.loads(json.dumps(result))
    older["environment"]["date"] = "2001-01-01T00:00:00+00:00"
    paths = [harness.write(r, tmp_path) for r in (older, result)]
    assert len({p.name for p in paths}) == 2
    assert figure.newest(tmp_path) == [json.loads(json.dumps(result))]
    figure.draw(result, tmp_path / "docs" / "bench.png")
    assert (tmp_path / "docs" / "bench.png").read_bytes().startswith(b"\x89PNG")
    header, _, row = tables.table(result).splitlines()
    assert header.count("|") == row.count("|") == 6
    assert row.startswith("| small: 3, 3×3, 16, 2 |")
    assert row.count(" MiB |") == 4
    assert [r["slices"] for r in figure.curve(result)[OURS]] == [1, 3]


def test_later_cases_of_one_subject_stand_in_the_newest_whole_result(result, tmp_path):
    fusion = result["records"]
    first, rest = fusion[:4], len(fusion) - 4
    other = [r | {"subject": "other"} for r in first]
    halved = {name: {**t, "median": 0.5 * t["median"]} for name, t in first[0]["ms"].items()}
    faster = [r | {"ms": halved} for r in first]

    def found(name, date, **environment):
        """What is newest of a whole result of 1 February and one of fusion alone."""
        for records, changed in (
            (fusion + other, {"date": "2026-02-01T00:00:00+00:00", "commit": "whole"}),
            (faster, {"date": f"{date}T00:00:00+00:00", "commit": "later"} | environment),
        ):
            where = result["environment"] | {"dirty": False} | changed
            harness.write(result | {"records": records, "environment": where}, tmp_path / name)
        (newest,) = figure.newest(tmp_path / name)
        return newest

    newest = found("later", "2026-03-01")
    assert [r.get("commit") for r in newest["records"]] == ["later"] * 4 + [None] * (rest + 4)
    assert newest["records"][0]["ms"] == halved
    assert tables.caption(newest).endswith("commit whole, 2026-02-01; commit later for cases of fusion.")
    for newest in (found("before", "2026-01-01"), found("other", "2026-03-01", torch="0.1")):
        assert not any("commit" in r for r in newest["records"])


def test_curves_run_along_slices_and_image_size():
    base = {"subject": "fusion", "provider": OURS, "ms": {}, "batch": 1, "channels": 8, "heads": 1}
    points = [(1, 16), (9, 16), (9, 24), (9, 8), (5, 16)]
    result = {"records": [base | {"slices": n, "side": side} for n, side in points]}
    assert [r["slices"] for r in figure.curve(result, "slices")[OURS]] == [1, 5, 9]
    assert [r["side"] for r in figure.curve(result, "side")[OURS]] == [8, 16, 24]


def test_the_waterfall_has_a_bar_for_each_technique_and_needs_one(result, tmp_path, monkeypatch):
    assert not figure.draw_waterfall(result, tmp_path / "none.png")
    monkeypatch.setattr(waterfall, "CPU_SHAPE", ("tiny", waterfall.Shape(3, 3, 64, "small", 1)))
    found = harness.run(
        {"waterfall": waterfall.cases(torch.device("cpu"), torch.float32)},
        dtype=torch.float32,
        budget_s=0.01,
    )
    assert [r["status"] for r in found["records"]] == ["ok"] * 6
    sections = figure.page_sections(found, tmp_path / "bench.png")
    assert any(s.endswith("(bench-waterfall.png)") for s in sections)
    assert (tmp_path / "bench-waterfall.png").exists()


def test_the_table_shows_what_was_wrong(result):
    result["records"][0].pop("ms")
    result["records"][0]["status"] = "wrong"
    assert "| wrong |" in tables.table(result)


def test_no_result_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="make bench"):
        figure.newest(tmp_path)


def test_a_loss_to_a_rival_is_shown(tmp_path):
    result = a_result({"mine": times(1, 2, 3), "theirs": times(0.5, 1, 2), "slow": times(8, 8, 8)})
    sections = figure.page_sections(result, tmp_path / "bench.png")
    assert sections[2].splitlines()[-1] == "| square, x² | theirs, 1 ms | 2 ms | 0.50× |"
    assert (tmp_path / "bench-roofline.png").exists()


def test_a_row_whose_call_is_the_best_rivals_shows_no_gain_and_is_no_loss(tmp_path):
    result = a_result({"mine": times(1, 2, 3), "theirs": times(0.5, 1, 2), "slow": times(8, 8, 8)})
    ours = next(r for r in result["records"] if r["role"] == "ours")
    ours["same_as"] = "theirs"
    assert tables.rivals_table(result).splitlines()[-1].endswith("| theirs, 1 ms | 2 ms | the same call |")
    assert tables.losses_of(result) == "On the CPU ours is slower in none of 0 timings."
    ours["same_as"] = "slow"  # a third one is faster than the call that both make
    assert tables.rivals_table(result).splitlines()[-1].endswith("| theirs, 1 ms | 2 ms | 0.50× |")
    assert "slower in 1 of 1 timing" in tables.losses_of(result)


def test_the_readme_has_six_rows_at_most_and_says_where_ours_is_slower(monkeypatch):
    monkeypatch.setitem(
        tables.README_ROWS, "cpu", (("square", "x²", "a square"), ("cube", "x³", "not measured"))
    )
    assert sum(map(len, tables.README_ROWS.values())) <= 6 + 1  # the second row above is ours
    result = a_result({"mine": times(1, 2, 3), "theirs": times(0.5, 1, 2), "slow": times(8, 8, 8)})
    table, told = tables.readme_sections([result])
    assert table.splitlines()[2:] == ["| a square, CPU | theirs | 1 | 2 | 0.50× |"]
    assert "On the CPU ours is slower in 1 of 1 timing, at worst: square 0.50×." in told
    faster = a_result({"mine": times(1, 1, 1), "theirs": times(2, 2, 2)})
    assert "On the CPU ours is slower in none of 1 timing." in tables.readme_sections([faster])[1]
