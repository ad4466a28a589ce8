"""Measurements ship as one JSON a device; a user's own are preferred, and both say where they come from."""

import json
import os
import subprocess
import sys

import pytest
import torch

from axial_fusion import dispatch, tune, tuned
from axial_fusion.gpu.tiles import Key, Tile

FACTS = {
    "device": "GPU of this test",
    "arch": 90,
    "by": "this test",
    "date": "2026-01-01",
    "commit": "c",
    "triton": "3",
}
SHIPPED = {"op": "slice_attention", "dtype": "bfloat16", "head_dim": 32}


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.CACHE, str(tmp_path))
    tuned.measurements.cache_clear()
    yield tmp_path / "measured"
    tuned.measurements.cache_clear()


def test_what_ships_names_device_commit_and_date():
    for path in tuned.SHIPPED.glob("*.json"):
        known = json.loads(path.read_text())
        assert path == tuned.path_of(known["device"], tuned.SHIPPED)
        assert known["commit"] in tuned.source(known)
        assert known["date"] in tuned.source(known)


def test_a_users_own_measurement_is_preferred_and_read_again(home):
    key = dispatch.SliceKey((9, 0), torch.bfloat16, 32)
    before = dispatch._measured(lambda m, e: e["backend"])
    assert before[key] == "triton"
    tuned.write(FACTS, {"backends": [SHIPPED | {"backend": "sdpa_cudnn"}]}, home)
    assert dispatch._measured(lambda m, e: e["backend"]) == before | {key: "sdpa_cudnn"}
    assert dispatch._measured(lambda m, e: tuned.source(m))[key].startswith(
        "GPU of this test, this test, 2026"
    )
    path = tuned.write(
        FACTS,
        {"backends": [SHIPPED | {"backend": "flash"}, SHIPPED | {"head_dim": 16, "backend": "sdpa"}]},
        home,
    )
    assert [e["backend"] for e in json.loads(path.read_text())["backends"]] == ["flash", "sdpa"]


def test_a_file_that_is_not_a_measurement_is_left_out(home):
    known = len(tuned.measurements())
    home.mkdir()
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"device": "d"}')):
        (home / f"{name}.json").write_text(text)
    tuned.measurements.cache_clear()
    assert len(tuned.measurements()) == known


def test_a_candidate_as_json_comes_back_as_the_tile_it_was(home):
    key, tile = Key("axial_attention", 90, torch.float16, 9, 32), Tile(16, 4, 1, 8)
    entry = tune.entry(key, tune.Measured(tile, 0.1, None))
    assert entry["dtype"] == "float16"
    assert Key(entry["op"], 90, getattr(torch, entry["dtype"]), entry["slices"], entry["head_dim"]) == key
    assert Tile(*json.loads(json.dumps(entry))["tile"]) == tile


def test_tiles_that_give_the_same_kernel_are_measured_once():
    """Of one head, a program takes one, whatever it could take."""
    sizes = tune.Sizes(9, 32, heads=1)
    same = [Tile(16, 8, 1, 8), Tile(16, 4, 1, 4), Tile(16, 2, 1, 2), Tile(16, 1, 1, 1), Tile(32, 1, 1, 1)]
    assert list(tune._distinct(same, sizes)) == [same[0], same[4]]
    assert list(tune._distinct(same, sizes._replace(heads=8))) == same


@pytest.mark.parametrize(
    "entries",
    [
        {
            "tiles": [
                {"op": "axial_attention", "dtype": "bfloat16", "slices": 9, "head_dim": 32, "tile": [16, 4]}
            ]
        },
        {"tiles": [{"op": "axial_attention"}]},
        {"backends": [SHIPPED | {"backend": None}]},
        {"backends": [SHIPPED | {"dtype": "float4", "backend": "sdpa"}]},
        {"right": ["axial_attention"]},
        {"arch": "sm_90"},
        {"tiles": 5},
    ],
    ids=str,
)
def test_a_file_of_another_form_is_skipped_and_import_works(home, entries):
    shipped = len(tuned.measurements())
    home.mkdir(parents=True)
    (home / "other.json").write_text(json.dumps(FACTS | entries))
    tuned.measurements.cache_clear()
    assert len(tuned.measurements()) == shipped
    code = "import axial_fusion; import axial_fusion.gpu.tiles"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
