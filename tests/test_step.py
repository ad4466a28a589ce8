"""One optimiser step: what the loss adds up, gradients clipped at their true size."""

import contextlib
import dataclasses

import pytest
import torch

from aftersam.config import preset
from aftersam.model.build import build_aftersam
from aftersam.training.losses import segmentation_loss
from aftersam.training.step import Learner, build_optimizer, group_loss


def configured(**train):
    config = preset("tiny")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, image_size=48, num_blocks=1),
        train=dataclasses.replace(config.train, **train),
    )


def batch_of(config, groups=2):
    generator = torch.Generator().manual_seed(0)
    shape = (groups, config.model.num_slices, 48, 48)
    hu = 300 * torch.randn(shape, generator=generator)
    return {"hu": hu, "labels": (hu > 200).long() + (hu > 400), "case": ["a", "b"][:groups]}


def model_of(config):
    torch.manual_seed(0)
    return build_aftersam(config.model, 3)


class Scaling:
    """What a step asks of accelerate, with the gradient scaler that accelerate puts about steps in fp16."""

    device = torch.device("cpu")
    autocast = staticmethod(contextlib.nullcontext)

    def __init__(self, optimizer):
        self.optimizer, self.scaler = optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**12)
        self.param_groups, self.zero_grad = optimizer.param_groups, optimizer.zero_grad

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def clip_grad_norm_(self, parameters, norm):
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    def reduce(self, value, _how):
        return value

    def step(self):
        """The optimiser's, as accelerate wraps it."""
        self.scaler.step(self.optimizer)
        self.scaler.update()


def test_scaled_gradients_are_clipped_at_their_true_size():
    """fp16's gradient scaler changes no clipped step: plain SGD moves the weights by as much as without it."""
    from accelerate import Accelerator

    config = configured(clip_norm=0.01, ce_hardest=1.0)
    weights = []
    for scaled in (False, True):
        model = model_of(config)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        accelerator = Scaling(optimizer) if scaled else Accelerator(cpu=True, mixed_precision="no")
        learner = Learner(model, accelerator if scaled else optimizer, accelerator, config)
        before = [p.detach().clone() for p in model.parameters()]
        losses = learner.step([batch_of(config)], rate=1.0, number=1)
        assert losses["loss"] > 0.1
        weights.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    moved = torch.cat([move.flatten() for move in weights[0]]).norm()
    assert moved == pytest.approx(0.01, rel=1e-4)  # the largest norm that is let through
    for plain, other in zip(*weights, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-8)


def test_deep_supervision_adds_the_loss_of_the_coarse_logits():
    config = configured(deep_supervision=0.25, ce_hardest=1.0)
    model, batch = model_of(config), batch_of(config)
    _, coarse = model(batch["hu"], coarse=True)
    weight = config.train.ce_foreground_weight
    extra = segmentation_loss(coarse, batch["labels"], ce_foreground_weight=weight)
    loss = group_loss(model, batch, config)
    assert extra.total > 0.1
    torch.testing.assert_close(loss.total, (loss.dice + loss.ce) / 2 + 0.25 * extra.total)


def test_supervision_of_the_centre_leaves_other_slices_out():
    config = configured(supervision="centre", deep_supervision=0.0)
    model, batch = model_of(config), batch_of(config)
    other = batch["labels"].clone()
    other[:, 0] = 0
    expected = group_loss(model, batch, config)
    assert group_loss(model, {**batch, "labels": other}, config).total == expected.total
    other[:, 1] = 0
    assert group_loss(model, {**batch, "labels": other}, config).total != expected.total


def test_a_loss_that_is_not_finite_changes_no_weight():
    from accelerate import Accelerator

    config = configured()
    model, batch = model_of(config), batch_of(config)
    learner = Learner(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        Accelerator(cpu=True, mixed_precision="no"),
        config,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch["hu"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 7 on a, b"):
        learner.step([batch], rate=1.0, number=7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def learner_of(config):
    from accelerate import Accelerator

    model = model_of(config)
    optimizer = build_optimizer(model, config.train)
    return Learner(model, optimizer, Accelerator(cpu=True, mixed_precision="no"), config)


def test_the_kept_weights_are_a_moving_average():
    config = configured(average=0.5)
    learner, batch, states = learner_of(config), batch_of(config), []
    shares = (1.0, 0.5, 0.4)
    for number, share in enumerate(shares, start=1):
        learner.step([batch], rate=1e-2, number=number, average=share)
        states.append([p.detach().clone() for p in learner.model.parameters()])
    with learner.kept_model() as kept:
        averages = [p.detach().clone() for p in kept.parameters()]
    for ours, average, (a, b, c) in zip(
        learner.model.parameters(), averages, zip(*states, strict=True), strict=True
    ):
        assert torch.equal(ours, c)
        torch.testing.assert_close(average, (a + b) / 2 * 0.6 + 0.4 * c)
    assert any(not torch.equal(average, c) for average, c in zip(averages, states[-1], strict=True))


def test_without_an_average_the_weights_themselves_are_kept():
    config = configured(average=0.0)
    learner = learner_of(config)
    learner.step([batch_of(config)], rate=1e-2, number=1)
    before = [p.detach().clone() for p in learner.model.parameters()]
    with learner.kept_model() as kept:
        assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), before, strict=True))


def test_weights_come_back_after_an_error_while_their_averages_are_in_place():
    config = configured(average=0.5)
    learner = learner_of(config)
    for number in (1, 2):
        learner.step([batch_of(config)], rate=1e-2, number=number, average=1 / number)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    with pytest.raises(InterruptedError), learner.kept_model():
        raise InterruptedError
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
