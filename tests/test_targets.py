"""Targets have a value, a rival and a verdict where a result allows it."""

import pytest

from bench_cases import fusion_result, times
from benchmarks.targets import TARGETS, flop_share, line, memory_ratio, targets, training_minutes

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_minutes_of_training_follow_from_a_step():
    record = {"subject": "train step", "role": "ours", "image_size": 1024, "encoder": "frozen",
              "ms": {"forward_backward": times(90, 100, 110)}}  # fmt: skip
    assert training_minutes(1024)({"records": [record]}).value == pytest.approx(27.5)
    assert training_minutes(512)({"records": [record]}) is None


@pytest.fixture
def result():
    return fusion_result()


def test_memory_is_compared_where_both_forms_ran():
    def record(provider, role, peak, **facts):
        case = {"subject": "transformer", "name": "a", "side": 64, "ms": {"forward": {"median": 1.0}}}
        return case | {"provider": provider, "role": role, "peak_bytes": {"forward": peak}} | facts

    known = [record("naive 3D", "other", 600), record("transformer", "ours", 3)]
    found = memory_ratio("transformer", "naive 3D", side=64)
    assert found({"records": known})[:2] == (200, "naive 3D")
    assert found({"records": known[1:]}) is None
    assert memory_ratio("transformer", "naive 3D", side=32)({"records": known}) is None


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


def test_a_gain_as_part_of_the_flop_ratio():
    case = {"subject": "predict", "name": "a", "encoder": "vit_b"}
    records = [
        case | {"provider": "loop", "role": "rival", "flops": 60, "ms": {"forward": {"median": 50.0}}},
        case | {"provider": "ours", "role": "ours", "flops": 10, "ms": {"forward": {"median": 10.0}}},
    ]
    assert flop_share("predict", "loop", encoder="vit_b")({"records": records}).value == pytest.approx(5 / 6)
    assert flop_share("predict", "loop", encoder="vit_h")({"records": records}) is None
