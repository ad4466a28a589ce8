"""Prediction's steps replay CUDA graphs on a GPU; elsewhere they are the steps themselves."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from aftersam.config import preset
from aftersam.inference import graphs
from aftersam.inference.graphs import Replayed, capture_steps
from aftersam.inference.segmenter import load
from aftersam.model.build import build_aftersam


class Graph:
    """Stands for torch.cuda.CUDAGraph: it counts its replays and computes nothing."""

    replays = 0

    def replay(self):
        Graph.replays += 1


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors pass for a GPU's; what a graph wrote while it was captured stays what it holds."""
    Graph.replays = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(graphs, "DEVICE", "cpu")


def doubled(log):
    def step(x, skips=(), *, query_index=None):
        log.append(tuple(x.shape))
        return 2 * x, tuple(s + 1 for s in skips)

    return step


@torch.no_grad()
def test_the_third_call_of_a_shape_is_a_replay_of_the_second(gpu):
    log = []
    step = Replayed(doubled(log), torch.nn.Linear(2, 2), graphs._Shared())
    x = torch.ones(3)
    for _ in range(2):
        y, (skip,) = step(x, (x,), query_index=(1,))
    assert (Graph.replays, len(log)) == (
        1,
        2,
    )  # the first call was launched, the second captured and replayed
    assert torch.equal(y, 2 * x)
    assert torch.equal(skip, x + 1)
    again, _ = step(5 * x, (x,), query_index=(1,))
    assert (Graph.replays, len(log)) == (2, 2)
    assert torch.equal(step.recordings[next(iter(step.recordings))].inputs[0], 5 * x)  # what the graph reads
    again += 1  # a copy: the graph's own result stays
    assert torch.equal(step(x, (x,), query_index=(1,))[0], 2 * x)


@torch.no_grad()
def test_other_shapes_options_and_weights_are_other_graphs(gpu):
    log, model = [], torch.nn.Linear(2, 2)
    step = Replayed(doubled(log), model, graphs._Shared())
    for _ in range(2):
        step(torch.ones(3))
        step(torch.ones(4))
        step(torch.ones(3), query_index=(0,))
    assert len(log) == 6
    model.weight = torch.nn.Parameter(torch.zeros(2, 2))
    step(torch.ones(3))
    assert len(log) == 7
    for size in range(5, 5 + 2 * graphs.MOST_GRAPHS):
        step(torch.ones(size))
    assert len(step.recordings) == graphs.MOST_GRAPHS


def test_a_graph_recorded_in_inference_mode_serves_other_modes_and_takes_lists(gpu):
    log = []
    step = Replayed(doubled(log), torch.nn.Linear(2, 2), graphs._Shared())
    with torch.inference_mode():
        for _ in range(2):
            step(torch.ones(3), query_index=[0, 2])
    with torch.no_grad():
        step(torch.zeros(3), query_index=[0, 2])
    assert (Graph.replays, len(log)) == (2, 2)


@torch.no_grad()
def test_what_cannot_be_captured_or_computes_nothing_is_called_as_it_is(gpu, monkeypatch):
    calls = []

    def refused(x):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x + 1

    step = Replayed(refused, torch.nn.Linear(2, 2), graphs._Shared())
    for _ in range(3):
        assert torch.equal(step(torch.ones(2)), torch.full((2,), 2.0))
    passed_on = Replayed(lambda x: (x,), torch.nn.Linear(2, 2), graphs._Shared())
    for _ in range(3):
        assert torch.equal(passed_on(torch.ones(2))[0], torch.ones(2))
    assert Graph.replays == 0


def test_where_a_gradient_is_wanted_nothing_is_captured(gpu):
    log = []
    step = Replayed(doubled(log), torch.nn.Linear(2, 2), graphs._Shared())
    for _ in range(3):
        step(torch.ones(3))
    assert len(log) == 3
    assert not step.recordings


@torch.no_grad()
def test_on_a_cpu_the_steps_are_the_models_own():
    config = dataclasses.replace(preset("tiny").model, image_size=48)
    torch.manual_seed(0)
    model = build_aftersam(config, 3).eval()
    hu = torch.randn(1, config.num_slices, 48, 48)
    expected = model(hu)
    capture_steps(model)
    for _ in range(3):
        assert torch.equal(model(hu), expected)


def test_a_loaded_model_replays_its_steps_unless_told_otherwise():
    for replayed, options in ((True, {}), (False, {"graphs": False})):
        model = load("headneck", device="cpu", **options).model
        steps = model.encode, model.fuse, model.decode
        assert [isinstance(step, Replayed) for step in steps] == 3 * [replayed]


@pytest.mark.gpu
@torch.no_grad()
def test_a_replayed_model_gives_its_own_logits():
    config = dataclasses.replace(preset("tiny").model, image_size=48)
    torch.manual_seed(0)
    model = build_aftersam(config, 3).eval().cuda()
    volumes = [torch.randn(1, config.num_slices, 48, 48, device="cuda") for _ in range(4)]
    with torch.autocast("cuda", torch.bfloat16):
        expected = [model(hu, query_index=(1,)) for hu in volumes]
        capture_steps(model)
        found = [model(hu, query_index=(1,)) for hu in volumes]
    assert all(any(step.recordings.values()) for step in (model.encode, model.fuse, model.decode))
    found += [None] * len(volumes)
    with torch.autocast("cuda", torch.bfloat16):  # casts of the first context are gone
        found[len(volumes) :] = [model(hu, query_index=(1,)) for hu in volumes]
    for logits, exact in zip(found, 2 * expected, strict=True):
        assert torch.equal(logits, exact)
