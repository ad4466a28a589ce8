"""The benchmark harness times nothing that is wrong, and tells what it measured as it was."""

import json
import weakref
from pathlib import Path

import pytest
import torch

from axial_fusion import select_backend
from axial_fusion.cpu import compiled
from bench_cases import CEILING, SQUARE, square
from benchmarks import harness, journal
from benchmarks.__main__ import main as bench_main
from benchmarks.harness import Provider, measure
from benchmarks.speed import slice_attention

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def records_of(**calls):
    """Measure callables that ought to square their input; the record of each by name."""
    x = torch.linspace(-1, 1, 8, requires_grad=True)
    found = {name: Provider(call, square, flops=8) for name, call in calls.items()}
    return {r["provider"]: r for r in measure(SQUARE, [x], found, budget_s=0.01)}


def test_a_right_provider_is_timed_and_a_wrong_one_is_not():
    calls = {"right": 0, "wrong": 0}

    def right(x):
        calls["right"] += 1
        return x * x

    def wrong(x):
        calls["wrong"] += 1
        return x * x * 1.0001

    found = records_of(right=right, wrong=wrong)
    assert found["right"]["status"] == "ok"
    assert found["right"]["error"]["forward"] < 1e-6
    assert set(found["right"]["ms"]) == {"forward", "forward_backward"}
    assert found["right"]["ms"]["forward"]["n"] >= 3
    assert found["wrong"]["status"] == "wrong"
    assert found["wrong"]["error"]["forward"] == pytest.approx(1e-4, rel=0.05)
    assert "ms" not in found["wrong"]
    assert calls["wrong"] == 1  # for the comparison, never for the clock
    assert calls["right"] > 3


@pytest.mark.parametrize(
    "call",
    [lambda x: x * x.detach(), lambda x: x * x + 0 * x.sqrt(), lambda x: x.detach() ** 2 + 0 * x],
    ids=["half a gradient", "NaN", "no gradient"],
)
def test_a_wrong_gradient_and_a_nan_are_wrong(call):
    found = records_of(wrong=call)["wrong"]
    assert found["status"] == "wrong"
    assert "ms" not in found


def test_what_cannot_run_is_named_and_the_others_are_measured():
    def too_big(x):
        return x * torch.empty(2**60)

    def broken(x):
        raise ValueError("no kernel for this")

    x = torch.ones(8, requires_grad=True)
    found = {
        "absent": Provider(None, square, 8, missing="xformers is not installed"),
        "too big": Provider(too_big, square, 8),
        "broken": Provider(broken, square, 8),
        "right": Provider(square, square, 8),
    }
    records = {r["provider"]: r for r in measure(SQUARE, [x], found, budget_s=0.01)}
    assert {name: r["status"] for name, r in records.items()} == {
        "absent": "missing", "too big": "out of memory", "broken": "failed", "right": "ok"
    }  # fmt: skip
    assert records["absent"]["reason"] == "xformers is not installed"
    assert records["broken"]["reason"] == "no kernel for this"
    assert [name for name, r in records.items() if "ms" in r] == ["right"]
    lines = [harness.line(r, CEILING) for r in records.values()]
    assert "missing: xformers is not installed" in lines[0]


def test_what_a_call_without_memory_held_is_gone_before_the_next():
    held = []

    class Cycle:
        pass

    def too_big(x):
        cycle = Cycle()
        cycle.itself = cycle  # as frames and their errors hold one another
        held.append(weakref.ref(cycle))
        raise MemoryError

    def right(x):
        assert all(reference() is None for reference in held)
        return square(x)

    found = {"too big": Provider(too_big, square, 8), "right": Provider(right, square, 8)}
    records = measure(SQUARE, [torch.ones(8)], found, budget_s=0.01)
    assert [r["status"] for r in records] == ["out of memory", "ok"]
    assert held


def test_peak_memory_is_what_a_call_holds_at_once():
    x = torch.ones(1000, 1000)  # 4 MB, there before

    def call():
        y = x + 1  # 4 MB
        z = y + 1  # 8 MB at once
        del y
        return z + 1  # 8 MB again

    assert harness.peak_bytes(call) == pytest.approx(8e6, rel=0.01)


def test_a_part_of_the_output_may_be_compared_beside_others():
    """As attention over all tokens is, whose fp64 form would take minutes on the whole."""

    def part(x):
        return square(x[:3])

    found = {
        "whole": Provider(square, square, 8, role="ours"),
        "part": Provider(square, part, 8, checked=part),
        "wrong part": Provider(square, part, 8, checked=lambda x: 1.01 * part(x)),
    }
    for order in (found, dict(reversed(found.items()))):
        records = measure(SQUARE, [torch.linspace(-1, 1, 8, requires_grad=True)], order, budget_s=0.01)
        statuses = {r["provider"]: r["status"] for r in records}
        assert statuses == {"whole": "ok", "part": "ok", "wrong part": "wrong"}


def test_without_a_gradient_the_forward_alone_is_timed():
    found = {"ours": Provider(square, square, 8, role="ours")}
    facts = {**SQUARE, "items": 2, "unit": "images", "bytes": 64}
    (record,) = measure(facts, [torch.ones(8)], found, budget_s=0.01)
    assert set(record["ms"]) == {"forward"}
    text = harness.line(record, CEILING)
    assert "of copy" in text
    assert "images/s" in text
    assert "backward" not in text


def test_a_spent_budget_is_named(monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda dtype: CEILING)
    case = (SQUARE, [torch.ones(8)], {"ours": Provider(square, square, 8, role="ours")})

    def broken():
        raise ValueError("no such model")
        yield

    found = harness.run(
        {"square": [case] * 3, "broken": broken(), "cube": [case]}, dtype=torch.float32, budget_s=0.01, total_s=0
    )  # fmt: skip
    assert len(found["records"]) == 2
    assert [s["subject"] for s in found["skipped"]] == ["square", "broken"]
    assert found["skipped"][0]["reason"].endswith("spent after 1 case")
    assert found["skipped"][1]["reason"] == "no such model"


def test_a_run_that_was_stopped_goes_on_from_its_lines_and_can_be_collected(tmp_path, monkeypatch, capsys):
    calls = []

    def counted(x):
        calls.append(1)
        return x * x

    def cases():
        for name in ("a", "b"):
            facts = {**SQUARE, "name": name}
            yield facts, [torch.ones(8)], {"ours": Provider(counted, square, 8, role="ours")}

    lines = tmp_path / "lines.jsonl"
    first = harness.run(cases(), dtype=torch.float32, budget_s=0.01, lines=lines)
    written = lines.read_text().splitlines(keepends=True)
    first_record = next(i for i, text in enumerate(written) if '"status"' in text)
    lines.write_text(
        "".join(written[: first_record + 1]) + '{"sub'
    )  # killed after its first case, in a write
    journal.mend(lines)
    before = len(calls)
    again = harness.run(cases(), dtype=torch.float32, budget_s=0.01, lines=lines)
    assert [r["name"] for r in again["records"]] == ["a", "b"]
    assert again["records"][0] == first["records"][0]
    assert again["ceilings"] == first["ceilings"]
    assert before < len(calls) < 2 * before
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness.write, "__defaults__", (tmp_path,))
    assert bench_main(["quick", "--collect", str(lines)]) == 0
    written = json.loads(Path(capsys.readouterr().out.split()[-1]).read_text())
    assert written["records"] == again["records"]
    assert {t["number"] for t in written["targets"]} == {f"T{i}" for i in range(1, 11)}


def test_what_hung_at_one_case_is_not_called_at_the_next_and_rivals_bring_ours_along(tmp_path):
    calls = []

    def named(name, role):
        def call(x):
            calls.append(name)
            return x * x

        return Provider(call, square, 8, role=role)

    def cases():
        for name in ("a", "b"):
            providers = {
                n: named(n, "ours" if n == "ours" else "rival")
                for n in ("hung", "rival", "ours", "it, compiled")
            }
            yield {**SQUARE, "name": name}, [torch.ones(8)], providers

    def run(*groups):
        calls.clear()
        found = harness.run(cases(), dtype=torch.float32, budget_s=0.01, lines=lines, groups=groups)
        return set(calls), [(r["name"], r["provider"]) for r in found["records"]]

    lines = tmp_path / "lines.jsonl"
    lost = {
        **SQUARE,
        "name": "a",
        "provider": "hung",
        "role": "rival",
        "flops": 8,
        "status": "failed",
        "lost": True,
    }
    journal.append(lines, lost)
    assert run("ours")[0] == {"ours"}
    assert run("eager")[0] == {"ours", "rival"}
    called, records = run("eager")
    assert called == set()
    assert sorted(records) == [("a", "hung"), ("a", "ours"), ("a", "rival"), ("b", "ours"), ("b", "rival")]
    assert run("compiled")[0] == {"ours", "it, compiled"}
    journal.append(
        lines,
        {
            **SQUARE,
            "name": "a",
            "provider": harness.TIMING,
            "role": "other",
            "status": "failed",
            "lost": True,
        },
    )
    assert run("ours", "eager", "compiled")[0] == set()


def test_the_record_of_ours_names_the_rival_whose_call_it_makes(monkeypatch):
    monkeypatch.setattr(compiled, "missing", lambda: "not built")
    shape = slice_attention.Shape(1, 2, 128, 1, 8)
    qkv = [torch.randn(1, 2, 128, 1, 8, requires_grad=True) for _ in range(3)]
    facts = {"subject": "slice", "name": "tiny"}
    found = {
        r["provider"]: r for r in measure(facts, qkv, slice_attention.providers(shape, qkv), budget_s=0.01)
    }
    ours = found.pop(slice_attention.OURS)
    assert ours["same_as"] == select_backend("slice_attention", *qkv).backend == "sdpa"
    assert found["sdpa"]["role"] == "rival"
    assert not any("same_as" in r for r in found.values())
    assert harness.place(ours) == harness.place({**facts, "provider": slice_attention.OURS})
