"""Data sets, runs, checkpoints and caches whose files are damaged or a stranger's: one sentence, soon, nothing left.

A hundredth of the inputs in `make test`, all of them under the mark long. Seeds are fixed."""

import json
import resource
import shutil
import struct
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import toy_sams
from aftersam.config import Config, from_dict, preset
from aftersam.data.cache import cache_cases
from aftersam.data.dataset import find_dataset, split
from aftersam.data.slice_group import SliceGroups
from aftersam.errors import SAID, sentence
from aftersam.evaluation.figures import curves_figure
from aftersam.files import read_json
from aftersam.model.build import build_aftersam, check_weights
from aftersam.model.run_folder import read_run
from aftersam.model.sam_checkpoint import read_sam_checkpoint, sam_shapes
from aftersam.training.checkpoint import load_moments, load_training, trim_history
from aftersam.training.step import build_optimizer
from mutations import mutated_bytes, mutated_json
from toy_files import nnunet

COUNTS = [pytest.param(20, id="some"), pytest.param(2000, id="all", marks=pytest.mark.long)]
FEWER = [pytest.param(3, id="some"), pytest.param(300, id="all", marks=pytest.mark.long)]
SECONDS, MIB = 5, 256


def judged(home, work):
    """Whether `work` was refused: in one line that names a path in `home`, soon, in little memory, nothing left."""
    before, began, busy = sorted(home.rglob("*")), time.monotonic(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = ""
    try:
        work()
    except SAID as error:
        said = sentence(error)
    assert time.process_time() - busy < SECONDS
    assert time.monotonic() - began < 10 * SECONDS  # the machine may have other work
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MIB * 1024
    assert sorted(home.rglob("*")) == before
    assert not said or (str(home) in said and len(said) < 1000), said[:1000]
    return said != ""


def tried(home, path, data, count, seed, work):
    """`work` on `count` files `path` of the damaged `data`, bytes or a JSON value: how many of them were refused."""
    rng, refused = np.random.default_rng(seed), 0
    for _ in range(count):
        path.write_bytes(mutated_bytes(rng, data) if isinstance(data, bytes) else mutated_json(rng, data))
        refused += judged(home, work)
    return refused


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", ["nnU-Net 2", "nnU-Net 1", "lists"])
def test_descriptions_of_data_sets(tmp_path, count, layout):
    nnunet(tmp_path)
    description = {"name": "N", "labels": {"background": 0, "liver": 1, "spleen": 2}}
    if layout == "nnU-Net 2":
        description |= {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "numTraining": 2}
    else:
        cases = [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in "ab"]
        description |= {"modality": {"0": "CT"}, "training": cases}
    if layout == "lists":
        description["training"] = [{k: [v] for k, v in case.items()} for case in description["training"]]
    refused = tried(
        tmp_path, tmp_path / "dataset.json", description, count, 0, lambda: find_dataset(tmp_path)
    )
    assert 0.2 * count < refused < count


@pytest.mark.parametrize("count", COUNTS)
def test_splits(tmp_path, count):
    nnunet(tmp_path)
    dataset = find_dataset(tmp_path)
    folds = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    refused = tried(tmp_path, tmp_path / "splits_final.json", folds, count, 1, lambda: split(dataset, 0, 0))
    assert 0.2 * count < refused < count


@pytest.fixture
def copied(run, tmp_path):
    """The files of a trained run, to be damaged."""
    home = tmp_path / "run"
    home.mkdir()
    for name in ("config.json", "run.json", "best.safetensors", "last.safetensors", "history.jsonl"):
        shutil.copy(run / name, home)
    return home


def checked(run):
    """What stands before a model of the run is built: none may take memory."""
    config, facts = read_run(run)
    check_weights(run / "best.safetensors", config.model, num_classes=len(facts.labels) + 1)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_descriptions_of_runs(copied, count, name):
    stored = read_json(copied / name)
    refused = tried(copied, copied / name, stored, count, 2, lambda: checked(copied))
    assert 0.2 * count < refused <= count


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_blocks", 2**63), ("num_blocks", 10**6), ("image_size", 2**20), ("lora_rank", 2**40), ("num_slices", 1e9),
        ("hu_windows", [[float("nan"), 1.0]]), ("stem_slices", 10**9 + 1), ("output_stride", -1), ("num_heads", 0),
    ],
    ids=str,
)  # fmt: skip
def test_absurd_sizes_are_refused_before_memory_is_taken(copied, key, value):
    stored = read_json(copied / "config.json")
    (copied / "config.json").write_text(json.dumps({**stored, "model": {**stored["model"], key: value}}))
    assert judged(copied, lambda: checked(copied))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spacing_mm", -1), ("spacing_mm", [1, 1, -1]), ("spacing_mm", [1, 1]), ("spacing_mm", [1e-9, 1, 1]),
        ("spacing_mm", [float("nan"), 1, 1]), ("labels", {"300": "x"}), ("labels", {}), ("labels", ["x"]),
        ("labels", {"1": 3}), ("labels", {"-1": "x"}), ("labels", {"1": "x", "2": "x"}),
        ("one_piece", [7]), ("one_piece", 3), ("fold", "x"),
    ],
    ids=str,
)  # fmt: skip
def test_facts_of_the_wrong_type_or_range_are_refused(copied, key, value):
    stored = read_json(copied / "run.json")
    (copied / "run.json").write_text(json.dumps({**stored, key: value}))
    assert judged(copied, lambda: checked(copied))


@pytest.mark.parametrize("name", ["config.json", "run.json", "best.safetensors"])
def test_a_fifo_and_a_folder_in_place_of_a_file_are_refused_at_once(copied, name):
    import os

    for make in (os.mkfifo, os.mkdir):
        (copied / name).rename(copied / "kept")
        make(copied / name)
        assert judged(copied, lambda: checked(copied))
        (copied / name).rmdir() if (copied / name).is_dir() else (copied / name).unlink()
        (copied / "kept").rename(copied / name)
    checked(copied)


@pytest.fixture
def learner(copied):
    """A model of the run and its optimiser, which a checkpoint is read into."""
    config = from_dict(Config, read_json(copied / "config.json"))
    model = build_aftersam(config.model, 7)
    return model, build_optimizer(model, config.train)


def resumed(path, model, optimizer):
    load_training(path, model)
    load_moments(path, optimizer)


@pytest.mark.parametrize("count", COUNTS)
def test_headers_of_checkpoints(copied, learner, count):
    """The header's JSON is changed, its length told rightly or not, and the tensors after it kept."""
    path = copied / "last.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    rng, refused = np.random.default_rng(3), 0
    for _ in range(count):
        text = mutated_json(rng, header)
        length = len(text) if rng.random() < 0.9 else int(rng.integers(0, 2**62))
        path.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])
        refused += judged(copied, lambda: resumed(path, *learner))
    assert 0.5 * count < refused <= count


@pytest.mark.parametrize("count", FEWER)
@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors"])
def test_checkpoints(copied, learner, count, name):
    path, seed = copied / name, 4
    work = (lambda: resumed(path, *learner)) if name == "last.safetensors" else (lambda: checked(copied))
    tried(copied, path, path.read_bytes(), count, seed, work)


@pytest.mark.parametrize("count", FEWER)
def test_histories(copied, count):
    path, rng = copied / "history.jsonl", np.random.default_rng(5)
    lines = path.read_text().splitlines()
    for _ in range(count):
        damaged = [
            mutated_json(rng, json.loads(line)) if rng.random() < 0.3 else line.encode() for line in lines
        ]
        path.write_bytes(b"\n".join(damaged))
        trim_history(path, 3)
        curves_figure(path)


@pytest.mark.parametrize("count", FEWER)
@pytest.mark.parametrize("name", ["hu.npy", "labels.npy", "foreground.npy", "case.json"])
def test_caches(tmp_path, count, name):
    """Made again, or as good as new but for voxels, or named where a group is drawn."""
    nnunet(tmp_path / "scans")
    dataset, config = find_dataset(tmp_path / "scans"), preset("tiny")
    (case,) = cache_cases(dataset, ["a"], config.data, tmp_path / "cache", training=["a"]).values()
    path = case.folder / name
    good = path.read_bytes()

    def drawn():
        (again,) = cache_cases(dataset, ["a"], config.data, tmp_path / "cache", training=["a"]).values()
        groups = SliceGroups([again], model=config.model, data=config.data, seed=0, label_swap={})
        for epoch in range(3):
            assert int(groups[epoch, 0]["labels"].max()) <= 1

    if name == "case.json":
        tried(tmp_path, path, json.loads(good), count, 6, drawn)
    tried(tmp_path, path, good, count, 6, drawn)


class Code:
    ran = False

    def __reduce__(self):
        return setattr, (Code, "ran", True)


CHANGES = {  # of a tensor of SAM; every one must be refused
    "dropped": lambda state, key: state.pop(key),
    "of another shape": lambda state, key: state.update({key: state[key][..., :-1].clone()}),
    "with another rank": lambda state, key: state.update({key: state[key][None]}),
    "under another name": lambda state, key: state.update({f"{key}s": state.pop(key)}),
    "beside another": lambda state, key: state.update({f"{key}.more": torch.zeros(3)}),
    "int8": lambda state, key: state.update({key: state[key].to(torch.int8)}),
    "bool": lambda state, key: state.update({key: state[key] > 0}),
    "float8": lambda state, key: state.update({key: state[key].to(torch.float8_e4m3fn)}),
    "complex": lambda state, key: state.update({key: state[key].to(torch.complex64)}),
    "sparse": lambda state, key: state.update({key: state[key].to_sparse()}),
    "a number": lambda state, key: state.update({key: 3}),
    "code": lambda state, key: state.update({key: Code()}),
    "code beside": lambda state, key: state.update({"more": Code()}),
}
NO_SAFETENSORS = ("sparse", "a number", "code", "code beside")
SHAPES = {
    "SAM": lambda state: state,
    "SAM-HQ": lambda state: state | toy_sams.hq_extras(),
    "Hugging Face": toy_sams.hugging_face,
    "wrapped": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
}


def damaged_sam(rng, path):
    """Write SAM's state dict in one of the layouts and formats, damaged in one way. Whether it must be refused."""
    state, kind = toy_sams.sam(), str(rng.choice([*CHANGES, *["bytes"] * len(CHANGES)]))
    if kind != "bytes":
        CHANGES[kind](state, str(rng.choice([k for k in state if k != toy_sams.TIED])))
    layout = "SAM" if "code" in kind or kind == "a number" else str(rng.choice(list(SHAPES)))
    state = SHAPES[layout](state)
    if layout != "wrapped" and kind not in NO_SAFETENSORS and rng.random() < 0.4:
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=bool(rng.random() < 0.7))
    if kind == "bytes":
        path.write_bytes(mutated_bytes(rng, path.read_bytes()))
    return kind != "bytes"


@pytest.mark.parametrize(
    "count", [pytest.param(60, id="some"), pytest.param(900, id="all", marks=pytest.mark.long)]
)
def test_sam_files(tmp_path, monkeypatch, count):
    """Read whole or refused: never a part of SAM, a traceback, or a line of code run."""
    toy_sams.make_small(monkeypatch)
    expected, path, rng, refused = (
        sam_shapes("vit_b", toy_sams.SIDE),
        tmp_path / "sam.pth",
        np.random.default_rng(7),
        0,
    )

    def read():
        state = read_sam_checkpoint(path).state
        assert {key: value.shape for key, value in state.items()} == expected
        assert {value.dtype for value in state.values()} == {torch.float32}

    for _ in range(count):
        must = damaged_sam(rng, path)
        said = judged(tmp_path, read)
        assert said or not must
        refused += said
    sam_shapes.cache_clear()
    assert 0.6 * count < refused < count
    assert not Code.ran
