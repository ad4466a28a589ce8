"""Checkpoints: a whole state or the old one, nothing unpickled, foreign files refused in one sentence."""

import pickle

import pytest
import torch
from torch import nn

from aftersam.checkpoint import (
    load_training,
    load_weights,
    read_json,
    save_training,
    save_weights,
    write_json,
)


def trained(steps: int = 2):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()


def test_a_restored_run_goes_on_to_the_bit(tmp_path):
    model, optimizer = trained()
    save_training(tmp_path / "last.safetensors", model, optimizer, {"step": 2})
    step(model, optimizer)
    other, other_optimizer = trained(steps=0)
    assert load_training(tmp_path / "last.safetensors", other, other_optimizer) == {"step": 2}
    step(other, other_optimizer)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_of_a_training_state_load_for_prediction(tmp_path):
    model, optimizer = trained()
    save_training(tmp_path / "last.safetensors", model, optimizer, {"step": 2})
    other = nn.Linear(3, 2)
    load_weights(tmp_path / "last.safetensors", other)
    assert torch.equal(model.weight, other.weight)


def test_weights_alone_cannot_be_resumed(tmp_path):
    model, optimizer = trained()
    save_weights(tmp_path / "best.safetensors", model, {"step": 2})
    with pytest.raises(ValueError, match="cannot be resumed"):
        load_training(tmp_path / "best.safetensors", model, optimizer)


def test_another_architecture_is_refused_and_nothing_is_loaded(tmp_path):
    save_weights(tmp_path / "w.safetensors", nn.Linear(3, 2), {})
    other = nn.Linear(4, 2)
    before = other.weight.clone()
    with pytest.raises(ValueError, match=r"another architecture.*'weight'"):
        load_weights(tmp_path / "w.safetensors", other)
    assert torch.equal(other.weight, before)


def test_truncated_missing_and_pickled_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, nn.Linear(3, 2), {})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(path, nn.Linear(3, 2))
    path.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(path, nn.Linear(3, 2))
    with pytest.raises(ValueError, match="does not exist"):
        load_weights(tmp_path / "none.safetensors", nn.Linear(3, 2))


def test_a_failed_write_leaves_the_old_state_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, nn.Linear(3, 2), {"step": 1})

    def full_disk(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("aftersam.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, nn.Linear(3, 2), {"step": 2})
    monkeypatch.undo()
    assert load_weights(path, nn.Linear(3, 2)) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_json_refuses_nan_and_names_broken_files(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"dsc": float("nan")})
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not valid JSON"):
        read_json(tmp_path / "b.json")
