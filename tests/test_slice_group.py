"""Training groups: functions of seed, epoch and case, about organs where asked, quick to make."""

import dataclasses
import time

import pytest
import torch

from aftersam.config import preset
from aftersam.data.cache import CachedCase, cache_cases
from aftersam.data.dataset import find_dataset
from aftersam.data.phantom import write_dataset
from aftersam.data.slice_group import SliceGroups
from aftersam.data.volume import AIR_HU
from aftersam.data.windows import window_crops


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> list[CachedCase]:
    root = tmp_path_factory.mktemp("set")
    write_dataset(root / "scans", cases=2, seed=0)
    dataset = find_dataset(root / "scans")
    ids = [case.id for case in dataset.cases]
    return list(cache_cases(dataset, ids, preset("tiny").data, root / "cache", training=ids).values())


def groups(cached, seed=0, model=None, **data):
    config = preset("tiny")
    return SliceGroups(
        cached,
        model=dataclasses.replace(config.model, **(model or {})),
        data=dataclasses.replace(config.data, **data),
        seed=seed,
        label_swap={4: 5, 5: 4},
    )


def test_a_group_is_a_function_of_seed_epoch_and_case(cached):
    everything = {
        "augmentation": ("elastic", "affine", "intensity", "noise", "mirror"),
        "augmentation_probability": 1.0,
    }
    one, again = groups(cached, **everything)[(3, 1)], groups(cached, **everything)[(3, 1)]
    assert torch.equal(one["hu"], again["hu"])
    assert torch.equal(one["labels"], again["labels"])
    assert one["hu"].shape == one["labels"].shape == (3, 96, 96)
    assert (one["hu"].dtype, one["labels"].dtype) == (torch.float32, torch.int64)
    assert not torch.equal(one["hu"], groups(cached, **everything)[(4, 1)]["hu"])
    assert not torch.equal(one["hu"], groups(cached, seed=1, **everything)[(3, 1)]["hu"])


def test_foreground_sampling_finds_small_organs(cached):
    biased = groups(cached, foreground_sampling=1.0)
    assert all(biased[(epoch, 0)]["labels"][1].any() for epoch in range(20))


def test_a_stem_gets_each_slice_between_those_next_to_it(cached):
    one, three = (groups(cached, model={"stem_slices": s, "slice_stride": 2}) for s in (1, 3))
    scan = three.cached[0]
    for epoch in range(8):
        group, thick = one[epoch, 0], three[epoch, 0]
        assert thick["hu"].shape == (3, 3, *group["hu"].shape[1:])
        assert torch.equal(thick["hu"][:, 1], group["hu"])
        assert torch.equal(thick["labels"], group["labels"])
    depth = scan.shape[0]
    everything = window_crops(scan.hu, range(depth), [(0, 0)], 48, AIR_HU, stem_slices=3)
    assert torch.equal(everything[1:, 0], everything[:-1, 1])
    assert torch.equal(everything[:-1, 2], everything[1:, 1])
    assert torch.equal(everything[0, 0], everything[0, 1])  # beyond the ends the nearest again
    assert torch.equal(everything[-1, 2], everything[-1, 1])


def test_groups_cost_milliseconds(cached):
    everything = ("elastic", "affine", "intensity", "noise")
    loader = groups(cached, augmentation=everything, augmentation_probability=1.0)
    loader[(0, 0)]
    began = time.perf_counter()
    for epoch in range(10):
        loader[(epoch, 0)]
    assert (time.perf_counter() - began) / 10 < 0.15  # a few ms alone; the bound is for a busy machine
