"""The group-by-group prediction, on groups whose logits are written down; test_sliding.py has it with a model."""

import dataclasses

import pytest
import torch

from aftersam.config import preset
from aftersam.inference.reference import sliding_disagreement, sliding_logits

CONFIG = dataclasses.replace(preset("tiny").model, num_slices=3, slice_stride=2)
SHAPE = (5, 4, 6)


def numbered(slices, positions):
    """Two classes on a grid of 2 × 3: 10 times the slice and 1 for the place in the group that it was seen at."""
    values = torch.tensor([10.0 * int(slices[p]) + p for p in positions])
    return torch.stack([values, -values], 1)[:, :, None, None].expand(-1, -1, 2, 3)


def test_the_centre_of_each_group_is_kept_and_brought_to_the_plane():
    logits = sliding_logits(numbered, SHAPE, CONFIG)
    assert logits.shape == (5, 2, 4, 6)
    for d, plane in enumerate(logits):
        assert plane[0].unique().tolist() == [10 * d + 1]
        assert torch.equal(plane[1], -plane[0])


def test_a_slice_is_the_mean_of_the_groups_that_keep_it_without_repeats_beyond_the_ends():
    logits = sliding_logits(numbered, SHAPE, CONFIG, positions=range(3))
    # Slice 0 is the centre of group 0 and the first of group 2; the first of group 0 is a repeat of it, not kept.
    means = [10 * d + m for d, m in enumerate([0.5, 0.5, 1, 1.5, 1.5])]
    torch.testing.assert_close(logits[:, 0, 0, 0], torch.tensor(means))
    apart = sliding_logits(numbered, (6, 4, 6), CONFIG, centres=[2, 3], positions=range(3))
    assert apart[:, 0, 0, 0].tolist() == [0, 10, 21, 31, 42, 52]


def test_half_precision_is_averaged_in_single():
    def halved(slices, positions):
        return numbered(slices, positions).bfloat16()

    assert sliding_logits(halved, SHAPE, CONFIG).dtype == torch.float32


@pytest.mark.parametrize(("sure_of", "expected"), [("its place", 1.0), ("the slice", 0.0)])
def test_disagreement_is_one_where_each_group_is_sure_of_another_class_and_zero_where_all_agree(
    sure_of, expected
):
    def group(slices, positions):
        classes = torch.tensor([p if sure_of == "its place" else int(slices[p]) % 3 for p in positions])
        logits = 200.0 * torch.nn.functional.one_hot(classes, 3)
        return logits[:, :, None, None].expand(-1, -1, 2, 3)

    found = sliding_disagreement(group, SHAPE, CONFIG)
    assert found.shape == SHAPE
    torch.testing.assert_close(found, torch.full(SHAPE, expected))
    alone = dataclasses.replace(CONFIG, num_slices=1)
    assert not sliding_disagreement(group, SHAPE, alone).any()
