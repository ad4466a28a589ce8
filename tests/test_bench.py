"""The benchmark harness times nothing that is wrong, and tells what it measured as it was."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aftersam.model.build import build_aftersam
from aftersam.model.image_encoder import build_image_encoder
from aftersam.train import main as train
from axial_fusion import reference
from benchmarks import clock, compare, figure, first_contact, harness, machine, predict_options
from benchmarks.__main__ import SUBJECTS
from benchmarks.__main__ import main as bench_main
from benchmarks.harness import Provider, measure
from benchmarks.speed import axial_attention, fusion, image_encoder, predict, rel_pos, train_step, waterfall
from benchmarks.speed import window as windowed
from benchmarks.speed.fusion import OURS, Shape
from benchmarks.targets import TARGETS, flop_share, line, targets, training_minutes

SMALL = Shape(2, 3, 3, 16, 2)
CEILING = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}
SQUARE = {"subject": "square", "name": "x²", "size": 8}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """These tests are of the harness, on the device that every machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def square(x):
    return x * x


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


def test_peak_memory_is_what_a_call_holds_at_once():
    x = torch.ones(1000, 1000)  # 4 MB, there before

    def call():
        y = x + 1  # 4 MB
        z = y + 1  # 8 MB at once
        del y
        return z + 1  # 8 MB again

    assert harness.peak_bytes(call) == pytest.approx(8e6, rel=0.01)


def test_summary_is_the_median_and_quantiles():
    assert clock.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q20": 1.8, "q80": 4.2, "n": 5}
    assert clock.summary([7.0]) == {"median": 7.0, "q20": 7.0, "q80": 7.0, "n": 1}


def test_environment_says_what_a_number_needs():
    found = machine.environment()
    assert found["kind"] == "cpu"
    assert found["torch"] == torch.__version__
    assert "threads" in found["device"]
    assert re.fullmatch(r"[0-9a-f]{12}|unknown", found["commit"])
    assert isinstance(found["dirty"], bool)


def test_every_provider_of_the_fusion_is_right():
    tensors = fusion.inputs(SMALL, torch.float32, torch.device("cpu"))
    records = measure(SQUARE, tensors, fusion.providers(SMALL), budget_s=0.01)
    assert [(r["provider"], r["status"]) for r in records] == [
        (name, "ok") for name in ("naive 3D", "SDPA 3D", "SDPA factorised", OURS)
    ]


def test_chunks_do_not_change_the_reference(monkeypatch):
    """The fp64 equations against softmax over whole rows by torch, on their own path."""
    x, *weights = fusion.inputs(SMALL, torch.float64, torch.device("cpu"))
    expected = fusion.joint_attention(x, *weights, heads=2, attend=F.scaled_dot_product_attention)
    found = fusion.reference_joint(x, *weights, heads=2)
    torch.testing.assert_close(found, expected)
    split, sizes = torch.Tensor.split, []
    monkeypatch.setattr(torch.Tensor, "split", lambda t, n, dim: sizes.append(n) or split(t, 5, dim))
    torch.testing.assert_close(fusion.reference_joint(x, *weights, heads=2), expected)
    assert sizes


@pytest.mark.parametrize("name", ["naive 3D", "SDPA factorised"])
def test_flops_are_those_that_torch_counts(name):
    provider = fusion.providers(SMALL)[name]
    tensors = fusion.inputs(SMALL, torch.float32, torch.device("cpu"))
    # The counter knows the products of the math path, not the fused kernel of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        provider.call(*tensors)
    assert counter.get_total_flops() == provider.flops


def test_encoder_flops_are_those_that_torch_counts():
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        encoder = build_image_encoder("vit_b", image_size=320)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, 320, 320))
    assert counter.get_total_flops() == image_encoder.flops("vit_b", 320)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_provider_of_the_encoder_is_right(dtype):
    shape = image_encoder.Shape("vit_b", 48, 2)
    found = image_encoder.providers(shape, torch.device("cpu"), dtype)
    gate = harness.Gate([torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)).to(dtype)])
    for name, provider in found.items():
        assert (provider.call is None) == (name == "FlexAttention")
        if provider.call is not None:
            assert gate.check(provider)["status"] == "ok", name
    image_encoder.encoder.cache_clear()
    image_encoder.weights.cache_clear()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [0, 3])
def test_every_form_of_relative_positions_is_right(window):
    """FlexAttention too, forward alone and not fused, as a CPU has it."""
    torch.manual_seed(0)
    if window:
        inputs = [
            torch.randn(1, 5, 4, 3, 2, 16),
            torch.randn(96),
            *(torch.randn(1, 5, 4, 2, 3) for _ in "hw"),
        ]
        expected = reference.window_attention(*inputs, window=window)
    else:
        inputs = [*torch.randn(3, 1, 16, 2, 16), torch.randn(1, 2, 4, 16), torch.randn(1, 2, 16, 4)]
        expected = reference.rel_pos_attention(*inputs, grid=(4, 4))
    for attend in rel_pos.ATTEND.values():
        y = windowed.padded(*inputs, window=window, attend=attend) if window else attend(*inputs)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def result(monkeypatch):
    """A real result of the fusion benchmark at a size that takes no time."""
    monkeypatch.setattr(harness, "ceilings", lambda dtype: CEILING)
    cpu, dtype = torch.device("cpu"), torch.float32
    shapes = [("small", SMALL), ("", SMALL._replace(slices=1))]
    cases = [fusion.case(name, shape, cpu, dtype) for name, shape in shapes]
    return harness.run(cases, dtype=dtype, budget_s=0.01)


def test_the_newest_result_of_a_device_becomes_figure_and_table(result, tmp_path):
    older = json.loads(json.dumps(result))
    older["environment"]["date"] = "2001-01-01T00:00:00+00:00"
    paths = [harness.write(r, tmp_path) for r in (older, result)]
    assert len({p.name for p in paths}) == 2
    assert figure.newest(tmp_path) == [json.loads(json.dumps(result))]
    figure.draw(result, tmp_path / "docs" / "bench.png")
    assert (tmp_path / "docs" / "bench.png").read_bytes().startswith(b"\x89PNG")
    header, _, row = figure.table(result).splitlines()
    assert header.count("|") == row.count("|") == 6
    assert row.startswith("| small: 3, 3×3, 16, 2 |")
    assert row.count(" MiB |") == 4
    assert [r["slices"] for r in figure.curve(result)[OURS]] == [1, 3]


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


def test_the_table_shows_what_was_wrong(result):
    result["records"][0].pop("ms")
    result["records"][0]["status"] = "wrong"
    assert "| wrong |" in figure.table(result)


def test_the_readme_changes_between_its_markers_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{figure.BEGIN}\nold\n{figure.END}\nafter\n")
    figure.write_readme(readme, ["| table |", "![figure](docs/x.png)"])
    once = readme.read_text()
    assert once.startswith(
        f"before\n{figure.BEGIN}\n\n| table |\n\n![figure](docs/x.png)\n\n{figure.END}\nafter\n"
    )
    figure.write_readme(readme, ["| table |", "![figure](docs/x.png)"])
    assert readme.read_text() == once
    readme.write_text(f"{figure.END} {figure.BEGIN}")
    with pytest.raises(ValueError, match=r"README\.md needs one <!-- bench:begin -->"):
        figure.write_readme(readme, ["x"])


def test_no_result_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="make bench"):
        figure.newest(tmp_path)


def test_rivals_that_are_absent_are_named():
    shape = axial_attention.Shape(1, 2, 3, 1, 16)
    found = axial_attention.providers(shape, torch.device("cpu"))
    absent = {name: p.missing for name, p in found.items() if p.call is None}
    assert absent["FlexAttention"] == "no gradient on a CPU"
    assert {"varlen", "xformers"} <= absent.keys()
    assert machine.absent("no_such_package") == "no-such-package is not installed"


def test_every_subject_has_one_provider_of_ours_and_a_rival():
    for name, cases in SUBJECTS.items():
        facts, _, providers = next(iter(cases(torch.device("cpu"), torch.float32)))
        roles = [p.role for p in providers.values()]
        assert facts["subject"].replace(" ", "_") == name
        assert roles.count("ours") == 1, name
        assert "rival" in roles, name


def test_without_a_gradient_the_forward_alone_is_timed():
    found = {"ours": Provider(square, square, 8, role="ours")}
    facts = {**SQUARE, "items": 2, "unit": "images", "bytes": 64}
    (record,) = measure(facts, [torch.ones(8)], found, budget_s=0.01)
    assert set(record["ms"]) == {"forward"}
    text = harness.line(record, CEILING)
    assert "of copy" in text
    assert "images/s" in text
    assert "backward" not in text


@pytest.mark.parametrize("encoder", ["lora", "frozen"])
def test_every_form_of_a_training_step_is_right(encoder):
    """In fp32, loss and gradient; what is timed in bf16 is the same function to its rounding."""
    config = dataclasses.replace(train_step.SMALL, image_size=64, num_slices=3, num_blocks=1, encoder=encoder)
    _, inputs, found = train_step.case("small", config, torch.device("cpu"), torch.bfloat16)
    gate = harness.Gate(inputs)
    for name, provider in found.items():
        assert gate.check(provider)["status"] == "ok", name
        loss = provider.call(*inputs)
        assert loss != provider.checked(*inputs), "autocast is not on"
        assert loss.item() == pytest.approx(provider.checked(*inputs).item(), rel=1e-2)
    assert inputs[1].numel() == sum(
        p.numel() for p in build_aftersam(config, train_step.CLASSES).parameters() if p.requires_grad
    )


def test_minutes_of_training_follow_from_a_step():
    record = {"subject": "train step", "role": "ours", "image_size": 1024, "encoder": "frozen",
              "ms": {"forward_backward": times(90, 100, 110)}}  # fmt: skip
    assert training_minutes(1024)({"records": [record]}).value == pytest.approx(27.5)
    assert training_minutes(512)({"records": [record]}) is None


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
    assert "spent after 1 cases" in found["skipped"][0]["reason"]
    assert found["skipped"][1]["reason"] == "no such model"


def times(*ms):
    return {"median": ms[1], "q20": ms[0], "q80": ms[2], "n": 5}


def a_result(provider_ms):
    """A result of one case, forward times by provider; the first one is ours."""
    records = [
        {"subject": "square", "name": "x²", "provider": name, "role": "rival" if i else "ours", "status": "ok",
         "flops": 8, "bytes": 4, "ms": {"forward": ms}, "peak_bytes": {"forward": 4}}
        for i, (name, ms) in enumerate(provider_ms.items())
    ]  # fmt: skip
    where = {
        "device": "d",
        "kind": "cpu",
        "torch": "2",
        "triton": None,
        "commit": "c",
        "dirty": False,
        "date": "2026",
    }
    return {"environment": where, "dtype": "float32", "ceilings": CEILING, "records": records}


def test_compare_says_what_exceeds_the_spread(tmp_path, capsys):
    a = a_result({"mine": times(1, 2, 3), "theirs": times(1, 2, 3), "third": times(4, 5, 6)})
    b = a_result({"mine": times(3.5, 4, 5), "theirs": times(2, 3, 4), "third": times(1, 2, 3)})
    changes = compare.compare(a, b)
    assert [(c.ratio, c.verdict) for c in changes] == [
        (2.0, "slower"),
        (1.5, "within the spread"),
        (0.4, "faster"),
    ]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, result in zip(paths, (a, b), strict=True):
        path.write_text(json.dumps(result))
    assert compare.main([str(p) for p in paths]) == 1
    assert "2.00×  slower" in capsys.readouterr().out
    assert compare.main([str(paths[0])] * 2) == 0
    assert compare.main([str(tmp_path / "absent.json"), str(paths[0])]) == 2


def test_a_loss_to_a_rival_is_shown(tmp_path):
    result = a_result({"mine": times(1, 2, 3), "theirs": times(0.5, 1, 2), "slow": times(8, 8, 8)})
    sections = figure.page_sections(result, tmp_path / "bench.png")
    assert sections[2].splitlines()[-1] == "| square, x² | theirs, 1 ms | 2 ms | 0.50× |"
    assert figure.short_table(result).splitlines()[-1] == "| square, x² | theirs | 1 | 2 | 0.50× |"
    assert (tmp_path / "bench-roofline.png").exists()
    readme = tmp_path / "README.md"
    readme.write_text(f"{figure.BEGIN}\n{figure.END}\n")
    figure.write_readme(readme, sections)
    assert "0.50×" in readme.read_text().split(figure.END)[0]


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


def test_targets_have_a_value_or_a_reason(result):
    listed = targets(result)
    assert all(t["value"] is not None or t["reason"] for t in listed)
    assert {t["number"] for t in listed} == {f"T{i}" for i in range(1, 11)}
    assert all(t["value"] is None for t in listed[: len(TARGETS)])  # they are a GPU's


def test_a_target_has_its_rival_and_a_verdict_and_absolute_ones_go_by_the_gpus_own_ceilings(result):
    """Numbers invented for this test."""

    def record(provider, role, ms, **facts):
        return {"provider": provider, "role": role, "flops": 1, "ms": {"forward": {"median": ms}}, **facts}

    slice_case = {"subject": "slice", "name": "P 1024, D 32", "head_dim": 32}
    encoder = {"subject": "encoder", "name": "a", "model": "vit_b", "image_size": 1024, "items": 8}
    gpu = {
        "environment": result["environment"] | {"kind": "gpu"},
        "ceilings": {"copy_bytes_per_s": 3e12, "matmul_bfloat16_flops_per_s": 591e12},
        "records": [
            record("cudnn", "rival", 3.0, **slice_case), record("flash", "rival", 5.0, **slice_case),
            record("slice_attention", "ours", 2.0, **slice_case), record("image_encoder", "ours", 25.0, **encoder),
            record("stream_logits", "ours", 2500.0, subject="predict", name="p", image_size=1024, depth=200),
        ],
    }  # fmt: skip
    found = {t["what"]: t for t in targets(gpu) if t["value"] is not None}
    own = found["slice attention, D 32: the same at the case where ours gains least"]
    assert (own["value"], own["rival"], own["case"], own["verdict"]) == (1.5, "cudnn", "P 1024, D 32", "met")
    images = found["SAM ViT-B encoder, 1024 px: images a second"]
    assert (images["value"], images["target"], images["scaled"], images["verdict"]) == (
        320,
        "≥ 400",
        "≥ 300",
        "met",
    )
    seconds = found["prediction of 200 slices at 1024 px: seconds"]
    assert (seconds["value"], seconds["scaled"], seconds["verdict"]) == (2.5, "≤ 2.87", "met")
    assert "T6  met  SAM ViT-B encoder, 1024 px: images a second: 320" in line(images)


def test_the_flops_of_prediction_are_those_that_running_it_takes():
    shape = predict.Shape("tiny", 7, 3, 48)
    hu = 300 * torch.randn(7, 48, 48, generator=torch.Generator().manual_seed(0))
    found, counted = [], []
    for call in (predict.stream, predict.loop):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            found.append(call(hu, shape))
        counted.append(counter.get_total_flops())
    assert counted == pytest.approx(predict.flops(shape), rel=1e-3)  # positions are made once a batch
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0].double(), predict.exact(hu.double(), shape), rtol=1e-4, atol=1e-4)


def test_a_gain_as_part_of_the_flop_ratio():
    case = {"subject": "predict", "name": "a", "encoder": "vit_b"}
    records = [
        case | {"provider": "loop", "role": "rival", "flops": 60, "ms": {"forward": {"median": 50.0}}},
        case | {"provider": "ours", "role": "ours", "flops": 10, "ms": {"forward": {"median": 10.0}}},
    ]
    assert flop_share("predict", "loop", encoder="vit_b")({"records": records}).value == pytest.approx(5 / 6)
    assert flop_share("predict", "loop", encoder="vit_h")({"records": records}) is None


def test_options_are_measured_on_the_cases_that_the_run_did_not_train_on(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abc":
        labels = rng.integers(0, 3, (32, 30, 6)).astype(np.uint8)
        hu = (rng.integers(-200, 300, labels.shape) + 200 * labels).astype(np.int16)
        for folder, array in (("images", hu), ("labels", labels)):
            (tmp_path / "scans" / folder).mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(array, np.diag([4.0, 4.0, 5.0, 1.0]))
            nib.save(image, tmp_path / "scans" / folder / f"{name}.nii.gz")
    keys = [
        "--preset",
        "tiny",
        "--image-size",
        "32",
        "--num-blocks",
        "1",
        "--max-steps",
        "2",
        "--device",
        "cpu",
    ]
    run, output = tmp_path / "run", tmp_path / "options.json"
    assert train(["--data", str(tmp_path / "scans"), "--output", str(run), *keys, "--precision", "fp32"]) == 0
    asked = ["-m", str(run), "--data", str(tmp_path / "scans"), "--device", "cpu", "-o", str(output)]
    assert predict_options.main(asked) == 0
    facts = json.loads(output.read_text())
    assert facts["cases"] == json.loads((run / "splits_final.json").read_text())[0]["val"]
    rows = {row["option"]: row for row in facts["rows"]}
    exact = rows["none"]
    assert {"--keep 3", "--overlap average", "--tta mirror", "--roi body", "--save-probabilities"} < set(rows)
    assert exact["times"] == 1
    assert all(row["seconds"] > 0 for row in rows.values())
    for same in ("--roi body", "--save-probabilities", "--confidence"):
        assert rows[same]["dsc_of_organs"] == exact["dsc_of_organs"]
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in rows)
    assert predict_options.main([*asked, "--cases", "nobody"]) == 2
    assert "no case 'nobody'" in capsys.readouterr().err


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
    head, *records = lines.read_text().splitlines()
    lines.write_text("\n".join([head, records[0]]) + "\n")  # as a run that was killed after its first case
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
