"""The accuracy table: means, intervals and differences, and what may not be compared."""

import numpy as np
import pytest

from aftersam.files import read_json
from benchmarks.accuracy.systems import SYSTEMS
from benchmarks.accuracy.table import draw, draw_waterfall, markdown, published, summarise, waterfall_of
from benchmarks.machine import RESULTS
from toy_scans import STEPS


def found_row(system, seed, scores, *, prompted=None, minutes=40.0):
    """A row.json and its metrics.json of one organ a column, one case a line."""
    row = {"system": system, "title": SYSTEMS[system].title, "seed": seed, "protocol": "equal budget", "note": "",
           "prompted": prompted, "minutes": minutes, "steps": 100,
           "limits": {"max_minutes": minutes, "max_steps": None, "threads": 1, "fold": 0}}  # fmt: skip
    organs = [f"organ {i}" for i in range(len(scores[0]))]
    cases = {f"case {c}": {o: {"dsc": s, "ice": 0.1} for o, s in zip(organs, line, strict=True)}
             for c, line in enumerate(scores)}  # fmt: skip
    return row, {"cases": cases, "organs": {o: {"missed": 1, "hd95_mm_penalised": 4.0} for o in organs}}


def test_means_over_seeds_cases_and_organs_and_the_difference_to_the_best():
    table = summarise(
        [
            found_row("aftersam", 0, [[0.8, 0.6], [0.6, None]]),
            found_row("aftersam", 1, [[0.6, 0.8], [0.8, None]]),
            found_row("unet", 0, [[0.5, 0.5], [0.7, 0.1]]),
            found_row("msa", 0, [[1.0, 1.0], [1.0, 1.0]], prompted="point"),
        ]
    )
    unet, msa, ours = table["rows"]
    assert (ours["mean"], ours["seeds"], ours["to_best"]) == (pytest.approx(0.7), 2, None)
    assert ours["organs"] == {"organ 0": pytest.approx(0.7), "organ 1": pytest.approx(0.7)}
    assert ours["seed_deviation"] == pytest.approx(np.std([0.65, 0.75], ddof=1), abs=1e-6)
    assert ours["missed"] == 2
    # by organ: (−0.2 + 0) / 2 over two cases, −0.2 over the one that both have
    assert unet["to_best"]["mean"] == pytest.approx(-0.15)
    assert (unet["to_best"]["won"], unet["to_best"]["lost"]) == (0, 1)
    low, high = unet["to_best"]["interval"]
    assert -0.2 <= low <= -0.15 <= high <= 0
    assert msa["to_best"]["mean"] == pytest.approx(0.3)  # held to the best, never it: it was prompted
    text = markdown({"data": "x", "failed": {}, **table})
    span = f"{100 * low:+.1f} … {100 * high:+.1f}"
    assert f"| U-Net | 45.0 | 40.0 … 50.0 | -15.0 ({span}) | 60.0 | 30.0 |" in text


def test_a_prompted_row_alone_is_not_called_the_best():
    table = summarise([found_row("msa", 0, [[0.9]], prompted="point")])
    text = markdown({"data": "x", "failed": {}, **table})
    assert table["rows"][0]["to_best"] is None
    assert "no row is called the best" in text
    assert "| best |" not in text
    assert "highest mean" not in text


def test_masks_of_another_tool_are_no_seed_of_the_system_of_their_name():
    ours, elsewhere = found_row("unet", 0, [[0.5]]), found_row("unet", 0, [[0.9]])
    elsewhere[0]["system"] = "u-net"  # as --predictions U-Net=FOLDER names it
    for row, _ in (ours, elsewhere):
        row["protocol"] = "own recipe"
    assert sorted(row["mean"] for row in summarise([ours, elsewhere])["rows"]) == [0.5, 0.9]


def test_a_row_that_other_work_slowed_down_is_marked():
    rows = [found_row("unet", 0, [[0.5]]), found_row("dynunet", 0, [[0.5]]), found_row("cotr", 0, [[0.4]])]
    for (row, _), share in zip(rows, (0.97, 0.85, 0.5), strict=True):
        row |= {"cpu_minutes": 40.0 * share, "parameters": 1e6, "peak_mib": 1.0, "prediction_s": 1.0}
    text = markdown({"data": "x", "failed": {}, **summarise(rows)})
    assert text.count("| DynUNet ‡ |") == text.count("| CoTr ‡ |") == 2
    assert "| U-Net |" in text
    assert text.count("‡ processor time below 90 % of the minutes of one thread") == 1
    machine = {"kind": "gpu", "device": "H100", "torch": "2.13", "commit": "c", "dirty": False}
    for change in ({"environment": machine}, {"limits": {**rows[0][0]["limits"], "threads": 2}}):
        others = [
            ({**row, **change}, metrics) for row, metrics in rows
        ]  # whose processor waits on a quiet machine too
        assert "‡" not in markdown({"data": "x", "failed": {}, **summarise(others)})
    for row, _ in rows:
        row["limits"] |= {"max_minutes": None, "max_steps": 100}  # steps do not depend on the load
    assert "‡" not in markdown({"data": "x", "failed": {}, **summarise(rows)})


def test_the_papers_tables_are_its_figures_to_the_last_digit():
    paper = read_json(RESULTS / "accuracy" / "published" / "paper.json")
    thorax, segthor = paper["tables"]
    assert (len(thorax["rows"]), len(segthor["rows"])) == (11, 9)
    for table in paper["tables"]:
        for average, *organs in table["rows"].values():
            assert len(organs) == len(table["columns"]) - 1
            assert average == pytest.approx(np.mean(organs), abs=0.011)
    text = published(paper)
    assert "| AFTer-SAM | 92.75 | 82.34 | 91.89 | 91.24 | 97.85 | 97.98 | 95.17 |" in text
    assert "| MSA | 92.16 | 82.98 | 94.11 | 94.94 | 96.62 |" in text


def test_a_table_names_each_machine_once_with_its_commits():
    rows = [found_row("unet", 0, [[0.5]]), found_row("dynunet", 0, [[0.5]])]
    for (row, _), commit in zip(rows, ("a1", "b2"), strict=True):
        row["environment"] = {"device": "x", "torch": "2.13", "commit": commit, "dirty": commit == "b2"}
    text = markdown({"data": "x", "failed": {}, **summarise(rows)})
    assert "x, torch 2.13, commits a1, b2 with local changes." in text


def test_rows_without_a_consistency_error_are_drawn_without_it(tmp_path):
    table = summarise([found_row("unet", 0, [[0.5]]), found_row("dynunet", 0, [[0.6]])])
    table["rows"][0]["ice"], table["rows"][1]["interval"] = None, [None, None]
    draw({"data": "x", "failed": {}, **table}, tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="no finished row"):
        summarise([])
    with pytest.raises(ValueError, match="80"):
        summarise([found_row("unet", 0, [[0.5]]), found_row("dynunet", 0, [[0.5]], minutes=80.0)])
    with pytest.raises(ValueError, match="differ in cases: case 1"):
        summarise([found_row("unet", 0, [[0.5]]), found_row("dynunet", 0, [[0.5], [0.5]])])


def test_a_waterfall_shows_the_steps_of_small_and_the_organ_that_gained_most(tmp_path):
    waterfall = waterfall_of(STEPS, "phantoms")
    assert waterfall["organ"] == "esophagus"
    assert [(s["name"], s["mean_dsc"], s["organ_dsc"]) for s in waterfall["steps"]] == [
        ("start", 0.5, 0.2), ("+ more", 0.6, 0.4),
    ]  # fmt: skip
    draw_waterfall(waterfall, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a waterfall needs"):
        waterfall_of({"fusion": {}}, "phantoms")
