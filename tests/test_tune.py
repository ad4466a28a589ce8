"""The tuner: right tiles are timed, wrong ones are refused before they are."""

import pytest
import torch

from axial_fusion import select_backend, tune
from axial_fusion.cpu import compiled
from axial_fusion.dispatch import FASTEST
from axial_fusion.gpu import axial_attention as kernels
from axial_fusion.gpu.tiles import MEASURED, Key, Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = tune.Sizes(9, 16, heads=1, positions=8, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("op", [op for op in tune.OPS if op != "slice_attention"])
def test_every_right_candidate_is_timed(op):
    before = dict(MEASURED)
    key, results = tune.tune(op, SMALL, tiles=[Tile(16, 4, 1), Tile(64, 4, 1)], timer=lambda run: 1.0)
    assert isinstance(key, Key)
    assert key.op == op
    assert [result.refused for result in results] == [None, None]
    assert before == MEASURED


def test_a_wrong_tile_is_refused_and_never_timed(monkeypatch):
    real = kernels.packed

    def short(tile, num_queries, num_keys, heads):
        chosen = real(tile, num_queries, num_keys, heads)
        if chosen["TILE"].GROUP * num_keys > 60:  # a tile that holds more rows than its block
            chosen["TILE"] = chosen["TILE"]._replace(BLOCK_K=32, BLOCK_Q=32)
        return chosen

    monkeypatch.setattr(kernels, "packed", short)
    monkeypatch.setattr(kernels, "_config", kernels._config.__wrapped__)  # without its cache
    timed = []
    _, results = tune.tune(
        "axial_attention",
        SMALL,
        tiles=[Tile(64, 4, 1), Tile(16, 4, 1)],
        timer=lambda run: timed.append(1) or 2.0,
    )
    assert [r.tile.rows for r in results] == [16, 64]
    assert results[0].refused is None
    assert results[1].refused.startswith("wrong by")
    assert len(timed) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="what a CPU refuses, a GPU may run")
def test_backends_of_slice_attention_are_measured_and_their_table_is_what_auto_takes(monkeypatch):
    monkeypatch.setattr(compiled, "missing", lambda: "not built")
    before = dict(FASTEST)
    key, results = tune.tune("slice_attention", SMALL, timer=lambda run: 1.0)
    assert {r.tile for r in results if r.refused is None} == {"sdpa", "sdpa_flash"}
    refused = {r.tile: r.refused for r in results if r.refused is not None}
    assert refused.keys() == {"triton", "cpu", "sdpa_cudnn", "sdpa_efficient", "flash", "xformers"}
    assert all("cannot run slice_attention here" in reason for reason in refused.values())
    assert before == FASTEST
    q = torch.randn(1, 9, 128, 1, 16)
    assert select_backend("slice_attention", q).backend == "sdpa"
    monkeypatch.setitem(FASTEST, key, "sdpa_flash")
    assert select_backend("slice_attention", q).backend == "sdpa_flash"
    assert select_backend("slice_attention", q[..., :8]).backend == "sdpa"  # another head size
    monkeypatch.setitem(FASTEST, key, "flash")  # measured elsewhere, not installed here
    assert select_backend("slice_attention", q).backend == "sdpa"


def test_unknown_ops_are_refused_and_the_command_says_that_it_needs_a_gpu(capsys):
    with pytest.raises(ValueError, match="slice_attention"):
        tune.tune("axial", SMALL)
    if DEVICE == "cpu":
        assert tune.main(["axial_attention"]) == 2
        assert "GPU" in capsys.readouterr().err
