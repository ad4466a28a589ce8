"""A step's gradients replay a CUDA graph where one can hold them, and are those of the step launched by itself."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from aftersam.config import preset
from aftersam.model.build import build_aftersam
from aftersam.training.graphs import RecordedGradients
from aftersam.training.step import Learner, _capturable, build_optimizer


class Graph:
    """Stands for torch.cuda.CUDAGraph: a replay computes again what was computed during the capture."""

    captured = None
    replays = 0

    def replay(self):
        Graph.replays += 1
        Graph.captured()


class Stream:
    device = torch.device("cpu")

    def wait_stream(self, _):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors pass for a GPU's."""
    Graph.replays, Graph.captured = 0, None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())


def squares(w, batches):
    """The mean of (w·x)² over batches, and its gradient."""
    with torch.enable_grad():
        loss = torch.stack([(w * batch["x"]).square().mean() for batch in batches]).mean()
    return loss.detach(), torch.autograd.grad(loss, w)[0]


class Squares:
    """`squares` as gradients of a step, written where a graph writes them; `calls` counts launches and captures."""

    def __init__(self):
        self.w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.frozen = torch.nn.Parameter(torch.ones(2))
        self.calls = 0

    def __call__(self, batches):
        self.calls += 1
        result, self.w.grad = torch.zeros(3), torch.zeros(2)
        gradient = self.w.grad

        def compute():
            loss, exact = squares(self.w, batches)
            result.fill_(loss)
            gradient.copy_(exact)

        compute()
        Graph.captured = compute
        return result


def batches_of(*values, size=2):
    return [{"x": torch.full((size,), float(v)), "case": ["a"]} for v in values]


def test_the_third_call_replays_the_second_on_its_own_batches_and_weights(gpu):
    step = Squares()
    recorded = RecordedGradients(step, [step.w, step.frozen], torch.device("cpu"))
    for number, values in enumerate([(1, 2), (2, 3), (4, 1), (0, 5)]):
        step.w.grad = None  # as an optimiser does before each step
        found, gradient = recorded(batches_of(*values)).clone(), step.w.grad.clone()
        expected, exact = squares(step.w, batches_of(*values))
        torch.testing.assert_close(found, expected.expand(3))
        torch.testing.assert_close(gradient, exact)
        assert Graph.replays == number  # launched first, then captured and replayed
        assert step.frozen.grad is None
        with torch.no_grad():
            step.w -= 0.1 * gradient  # in place, as optimisers write
    assert step.calls == 2


def test_batches_of_another_shape_are_launched(gpu):
    step = Squares()
    recorded = RecordedGradients(step, [step.w], torch.device("cpu"))
    for _ in range(2):
        recorded(batches_of(1))
    assert step.calls == 2
    recorded(batches_of(1, 2))  # more batches a step
    recorded(batches_of(1, size=1))
    assert (step.calls, Graph.replays) == (4, 1)
    recorded(batches_of(3))
    assert (step.calls, Graph.replays) == (4, 2)


@pytest.mark.parametrize(
    "error", [RuntimeError("not permitted when stream is capturing"), torch.OutOfMemoryError()]
)
def test_a_capture_that_fails_is_tried_once_and_leaves_the_step_as_it_was(gpu, error):
    step, seen = Squares(), []

    def refused(batches):
        seen.append(1)
        if len(seen) == 2:
            step.w.grad = torch.full((2,), torch.nan)
            raise error
        return step(batches)

    recorded = RecordedGradients(refused, [step.w], torch.device("cpu"))
    for number in range(4):
        with pytest.warns(UserWarning, match="kernel by kernel") if number == 1 else contextlib.nullcontext():
            assert torch.equal(recorded(batches_of(2)), torch.full((3,), 10.0))
        assert torch.equal(step.w.grad, torch.tensor([4.0, 8.0]))
    assert (len(seen), Graph.replays) == (5, 0)


def test_steps_of_several_processes_and_such_that_wait_for_the_host_are_not_captured():
    train = preset("tiny").train
    alone = SimpleNamespace(device=torch.device("cuda"), num_processes=1, scaler=None)
    assert _capturable(alone, train)
    for other in ({"device": torch.device("cpu")}, {"num_processes": 2}, {"scaler": object()}):
        assert not _capturable(SimpleNamespace(**vars(alone) | other), train)
    assert not _capturable(alone, dataclasses.replace(train, activation_checkpointing=True))


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", ["none", "box", "points"])
def test_a_training_replayed_is_the_training_launched(prompts):
    from accelerate import Accelerator

    config = preset("small")
    model_config = dataclasses.replace(config.model, prompts=prompts)
    config = dataclasses.replace(config, model=model_config)
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(8):
        hu = 300 * torch.randn(2, 5, 3, 96, 96, generator=generator)
        steps.append([{"hu": hu, "labels": (hu[:, :, 1] > 200).long(), "case": ["a", "b"]}])
    losses = []
    for replayed in (False, True):
        accelerator = Accelerator(mixed_precision="bf16")
        torch.manual_seed(0)
        model = build_aftersam(config.model, 2).cuda()
        optimizer = build_optimizer(model, config.train)
        learner = Learner(accelerator.prepare(model), accelerator.prepare(optimizer), accelerator, config)
        if not replayed:
            learner.gradients = learner._gradients
        losses.append([learner.step(b, rate=1e-3, number=i)["loss"] for i, b in enumerate(steps)])
        if replayed:
            assert learner.gradients.recording
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
