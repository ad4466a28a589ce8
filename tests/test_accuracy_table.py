"""The accuracy table: means, intervals and differences, and what may not be compared."""

import json

import numpy as np
import pytest

from aftersam.evaluation.statistics import bootstrap_over_seeds, mean_over_organs
from aftersam.files import read_json
from benchmarks.accuracy.plots import draw, draw_waterfall, waterfall_of
from benchmarks.accuracy.summary import summarise
from benchmarks.accuracy.systems import SYSTEMS
from benchmarks.accuracy.table import markdown, opening, published
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
    assert -0.3 <= low <= -0.15 <= high <= 0.1
    assert unet["to_ours"] == unet["to_best"]
    assert msa["to_best"]["mean"] == pytest.approx(0.3)  # held to the best, never it: it was prompted
    text = markdown({"data": "x", **table})
    difference = f"-15.0 ({100 * low:+.1f} … {100 * high:+.1f})"
    assert f"| U-Net | 1 | 45.0 | 40.0 … 50.0 | {difference} | {difference} | 60.0 | 30.0 |" in text
    assert "| AFTer-SAM | 2 | 70.0 ± 7.1 |" in text
    assert "± the standard deviation of this mean over seeds" in text


def test_the_json_suffices_to_compute_means_and_intervals_again():
    rng = np.random.default_rng(0)
    names = [name for name in SYSTEMS if name not in ("aftersam_best", "aftersam_paper")]
    table = summarise(
        [found_row(name, seed, rng.random((9, 7)).tolist()) for name in names for seed in (0, 1, 2)]
    )
    text = json.dumps(table, indent=1)
    assert len(names) == 13
    assert len(text) < 300_000
    rows = json.loads(text)["rows"]
    values = [np.array(row["dsc"], float) for row in rows]  # (seeds, cases, organs)
    assert values[0].shape == (3, 9, 7)
    (best,) = (i for i, row in enumerate(rows) if row["to_best"] is None)
    for row, own in zip(rows, values, strict=True):
        assert mean_over_organs(own.mean(0)) == pytest.approx(row["mean"], abs=1e-6)
        assert bootstrap_over_seeds(own) == row["interval"]
        if row["to_best"] is not None:
            assert bootstrap_over_seeds(own, values[best]) == row["to_best"]["interval"]


def test_ours_is_compared_with_each_row_and_the_best_is_of_the_equal_budget():
    rows = [
        found_row("unet", 0, [[0.5]]),
        found_row("nnunet_3d", 0, [[0.9]]),
        found_row("aftersam", 0, [[0.7]]),
    ]
    rows[1][0]["protocol"] = "own recipe"
    unet, ours, elsewhere = summarise(rows)["rows"]
    assert (ours["to_best"], ours["to_ours"]) == (None, None)
    assert (unet["to_ours"]["mean"], elsewhere["to_ours"]["mean"]) == pytest.approx((-0.2, 0.2))
    assert elsewhere["to_best"] == elsewhere["to_ours"]
    text = markdown({"data": "x", **summarise(rows)})
    assert "AFTer-SAM has the highest mean DSC." in text
    for row, _ in rows:
        row["protocol"] = "own recipe"
    assert all(row["to_best"] is None for row in summarise(rows)["rows"])
    assert "no row is called the best" in markdown({"data": "x", **summarise(rows)})


def test_a_row_is_close_to_the_best_where_its_interval_has_0_and_it_was_not_prompted():
    table = summarise(
        [
            found_row("unet", 0, [[0.1], [0.1]]),
            found_row("dynunet", 0, [[0.9], [0.4]]),
            found_row("msa", 0, [[0.9], [0.4]], prompted="point"),
            found_row("aftersam", 0, [[0.6], [0.8]]),
        ]
    )
    text = markdown({"data": "x", **table})
    assert "includes 0 for DynUNet: 2 scans do not separate them from it." in text
    table["rows"][1]["to_best"]["interval"] = [0.1, 0.2]
    assert "includes 0" not in markdown({"data": "x", **table})


def test_a_prompted_row_alone_is_not_called_the_best():
    table = summarise([found_row("msa", 0, [[0.9]], prompted="point")])
    text = markdown({"data": "x", **table})
    assert table["rows"][0]["to_best"] is None
    assert "no row is called the best" in text
    assert "| best |" not in text
    assert "has the highest mean DSC" not in text


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
    text = markdown({"data": "x", **summarise(rows)})
    assert text.count("| DynUNet ‡ |") == text.count("| CoTr ‡ |") == 2
    assert "| U-Net |" in text
    assert text.count("‡ processor time below 90 % of the minutes of one thread") == 1
    machine = {
        "kind": "gpu",
        "device": "H100",
        "torch": "2.13",
        "commit": "c",
        "dirty": False,
        "date": "2026-01-01",
    }
    for change in ({"environment": machine}, {"limits": {**rows[0][0]["limits"], "threads": 2}}):
        others = [
            ({**row, **change}, metrics) for row, metrics in rows
        ]  # whose processor waits on a quiet machine too
        assert "‡" not in markdown({"data": "x", **summarise(others)})
    for row, _ in rows:
        row["limits"] |= {"max_minutes": None, "max_steps": 100}  # steps do not depend on the load
    assert "‡" not in markdown({"data": "x", **summarise(rows)})


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


def test_a_table_says_which_commit_trained_each_seed_and_when():
    rows = [found_row("unet", seed, [[0.5]]) for seed in (1, 0)]
    for (row, _), commit in zip(rows, ("a1", "b2"), strict=True):
        row["environment"] = {"device": "x", "torch": "2.13", "commit": commit, "dirty": commit == "b2",
                              "date": f"2026-01-0{row['seed'] + 1}T10:00:00+00:00"}  # fmt: skip
    table = summarise(rows)
    assert table["rows"][0]["trained"][0] == {
        "seed": 0, "commit": "b2", "dirty": True, "date": "2026-01-01T10:00:00+00:00", "minutes": 40.0,
    }  # fmt: skip
    text = markdown({"data": "x", **table})
    assert "| U-Net | 0: b2 dirty, 2026-01-01, 40.0; 1: a1, 2026-01-02, 40.0 |" in text
    assert "1 held-out scan; x, torch 2.13." in text
    for row in table["rows"]:  # a table from before rows had it
        del row["trained"], row["to_ours"], row["dsc"]
    old = markdown({"data": "x", **table})
    assert "x, torch 2.13, commits a1, b2 with local changes." in old
    assert "to AFTer-SAM |" not in old


def test_seeds_that_were_trained_in_another_way_are_not_averaged():
    def two(**changes):
        rows = [found_row("aftersam", seed, [[0.5]]) for seed in (0, 1)]
        for row, _ in rows:
            row |= {"parameters": 5, "config": {"model": {"stem": "wide"}}, "training": ["a", "b"]}
            row["limits"] |= {"device": "cpu"}
        rows[1][0].update(changes)
        return rows

    assert summarise(two(limits={**two()[0][0]["limits"], "device": "auto"}))["rows"][0]["seeds"] == 2
    names = "rows/aftersam-seed-0 and rows/aftersam-seed-1"
    with pytest.raises(
        ValueError, match=f"{names} .*: config.model.stem is wide in one and slim in the other"
    ):
        summarise(two(config={"model": {"stem": "slim"}}))
    with pytest.raises(ValueError, match=f"{names} .*: parameters is 5 in one and 6 in the other"):
        summarise(two(parameters=6))
    with pytest.raises(ValueError, match=f"{names} were trained on different scans"):
        summarise(two(training=["a", "c"]))


def test_systems_without_a_row_are_named_with_the_reason():
    table = summarise([found_row("unet", 0, [[0.5]])], {"CoTr, seed 0": "ValueError: x"})
    assert "CoTr" not in table["not_run"]
    assert table["not_run"]["DynUNet"] == "no finished row in this folder"
    text = markdown({"data": "x", **table})
    assert "- **CoTr, seed 0**: failed: ValueError: x." in text
    assert "- **DynUNet**: not run: no finished row in this folder." in text


def test_rows_of_two_budgets_are_shown_side_by_side_where_the_networks_are_the_same():
    short, long = (
        {
            "data": "x",
            **summarise([found_row(name, 0, [[dsc]], minutes=minutes) for name in ("unet", "cotr")]),
        }
        for dsc, minutes in ((0.5, 40.0), (0.6, 120.0))
    )
    long["rows"][1]["parameters"] = 7
    text = "\n".join(opening([short, long]))
    assert "| method | 40 minutes | 120 minutes | difference |" in text
    assert "| U-Net | 50.0 | 60.0 | +10.0 |" in text
    assert "CoTr" not in text
    assert "DSC at each budget" not in "\n".join(opening([short]))


def test_rows_without_a_consistency_error_are_drawn_without_it(tmp_path):
    table = summarise([found_row("unet", 0, [[0.5]]), found_row("dynunet", 0, [[0.6]])])
    table["rows"][0]["ice"], table["rows"][1]["interval"] = None, [None, None]
    draw({"data": "x", **table}, tmp_path / "table.png")
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
