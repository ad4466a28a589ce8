"""Learning rates, progress, and the order of groups over processes."""

import dataclasses
import multiprocessing
import time

import pytest

from aftersam.config import TrainConfig, preset
from aftersam.training.schedule import (
    Progress,
    average_share,
    batches,
    group_batches,
    learning_rate,
    steps_in_epoch,
    workers,
)


def test_schedules():
    step = preset("paper").train
    assert learning_rate(step, 0.0) == learning_rate(step, 499.9 / 550) == 1e-4
    assert learning_rate(step, 500.1 / 550) == pytest.approx(1e-5)
    poly = preset("small").train
    assert learning_rate(poly, 0.0) < learning_rate(poly, poly.warmup / 2) < learning_rate(poly, poly.warmup)
    assert learning_rate(poly, 1.0) == 0


def test_the_average_is_a_plain_mean_and_then_goes_over_a_share_of_the_run():
    config = dataclasses.replace(preset("small").train, max_steps=100, average=0.1)
    shares = [average_share(config, (step - 1) / 100, step) for step in range(1, 101)]
    assert shares[:10] == [pytest.approx(1 / step) for step in range(1, 11)]
    assert shares[10:] == [pytest.approx(0.1)] * 90
    longer = [average_share(config, (step - 1) / 1000, step) for step in range(1, 1001)]
    assert longer[99:] == [pytest.approx(0.01)] * 901
    assert average_share(dataclasses.replace(config, average=1e-9), 0.5, 51) == 1.0
    assert average_share(dataclasses.replace(config, average=0.0), 0.5, 51) == 0.0


def test_progress_follows_the_first_limit_to_be_reached():
    config = dataclasses.replace(preset("small").train, max_steps=100, max_minutes=1.0)
    assert Progress(step=10, seconds=30).fraction(config, 7) == 0.5
    assert Progress(step=90, seconds=30).fraction(config, 7) == 0.9
    epochs = dataclasses.replace(config, max_steps=None, max_minutes=None, epochs=10)
    assert Progress(step=35, seconds=30).fraction(epochs, 7) == 0.5


def test_an_epoch_visits_every_case_and_processes_share_it():
    alone = batches(3, 10, 4, rank=0, world=1, start=0)
    pair = [batches(3, 10, 2, rank=rank, world=2, start=0) for rank in range(2)]
    for _ in range(2):  # two epochs of three steps
        epoch = [next(alone) for _ in range(steps_in_epoch(10, 4))]
        assert {case for batch in epoch for _, case in batch} == set(range(10))
        assert epoch == [next(pair[0]) + next(pair[1]) for _ in epoch]
    parts = batches(3, 10, 1, rank=0, world=1, start=0, accumulate=4)
    for whole in (next(batches(3, 10, 4, rank=0, world=1, start=s)) for s in range(4)):
        assert whole == [group for _ in range(4) for group in next(parts)]
    late = batches(3, 10, 4, rank=0, world=1, start=6)
    assert next(late) == next(alone)


def test_groups_for_a_gpu_are_loaded_beside_the_training_unless_told_otherwise():
    config = TrainConfig()
    assert [workers(config, device) for device in ("cuda", "cpu", "mps")] == [4, 0, 0]
    for count in (0, 3):
        told = dataclasses.replace(config, num_workers=count)
        assert workers(told, "cuda") == workers(told, "cpu") == count


class SlowFromTheThird:
    """Groups of which a process loads the first two at once."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.asked += 1
        time.sleep(3600 * (self.asked > 2))
        return {"case": str(index)}


@pytest.mark.timeout(300)
def test_closing_the_batches_ends_the_processes_that_load_busy_ones_too():
    config = dataclasses.replace(TrainConfig(), num_workers=2, batch_size=1)
    others = multiprocessing.active_children()
    source = group_batches(SlowFromTheThird(), config, rank=0, world=1, start=0)
    assert len(next(source)["case"]) == 1
    processes = [child for child in multiprocessing.active_children() if child not in others]
    assert len(processes) == 2
    source.close()
    assert [process.is_alive() for process in processes] == [False, False]
