"""Checkpoints: a whole state or the old one, nothing unpickled, foreign files refused in one sentence."""

import dataclasses
import pickle
import resource

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from aftersam.config import preset
from aftersam.model.build import build_aftersam, load_weights
from aftersam.training.checkpoint import load_moments, load_training, save_training, save_weights
from aftersam.training.sharding import shard, whole_state


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
    assert load_training(tmp_path / "last.safetensors", other) == {"step": 2}
    load_moments(tmp_path / "last.safetensors", other_optimizer)
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
    model, _ = trained()
    save_weights(tmp_path / "best.safetensors", model, {"step": 2})
    with pytest.raises(ValueError, match="cannot be resumed"):
        load_training(tmp_path / "best.safetensors", model)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_run_is_stored_whole_and_goes_on_to_the_bit(tmp_path, one_process):
    """In the file an unsharded run would write, which either kind resumes; frozen weights are sharded too."""
    config = dataclasses.replace(
        preset("tiny").model, image_size=48, num_blocks=1, fusion_weights="lora", encoder="lora"
    )

    def run(steps, *, sharded, resume=False):
        torch.manual_seed(0)
        model = build_aftersam(config, 3).train()
        if resume:
            load_training(tmp_path / "last.safetensors", model)
        if sharded:
            shard(model, torch.device("cpu"))
            assert all(isinstance(p, DTensor) for p in model.parameters())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        if resume:
            load_moments(tmp_path / "last.safetensors", optimizer)
        for _ in range(steps):
            optimizer.zero_grad()
            model(200 * torch.randn(1, 3, 48, 48)).square().mean().backward()
            optimizer.step()
        return model, optimizer

    save_training(tmp_path / "last.safetensors", *run(2, sharded=True), {"step": 2})
    expected = whole_state(run(3, sharded=False)[0])
    for sharded in (True, False):
        found = whole_state(run(1, sharded=sharded, resume=True)[0])
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


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


@pytest.fixture
def small_disk():
    """No file may be larger than 4 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_old_state_and_no_debris(tmp_path, small_disk):
    path = tmp_path / "w.safetensors"
    small, large = nn.Linear(3, 2), nn.Linear(3000, 2)
    save_weights(path, small, {"step": 1})
    with pytest.raises(OSError, match=r"w\.safetensors could not be written: .*too large"):
        save_weights(path, large, {"step": 2})
    assert load_weights(path, nn.Linear(3, 2)) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
