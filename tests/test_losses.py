"""Dice and cross-entropy: hand-computed numbers, absent classes, gradients that reach small organs."""

import pytest
import torch

from aftersam.training.losses import segmentation_loss


def certain(labels, classes, scale=20.0):
    """Logits (B, N, K+1, H, W) that put all weight on `labels`."""
    return scale * torch.nn.functional.one_hot(labels, classes).movedim(-1, 2).double()


def test_perfect_prediction_costs_nothing():
    labels = torch.randint(0, 4, (2, 3, 8, 8))
    loss = segmentation_loss(certain(labels, 4), labels)
    assert loss.total < 1e-6


def test_dice_of_half_an_organ_by_hand():
    labels = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    labels[..., :2] = 1  # 8 voxels
    prediction = torch.zeros_like(labels)
    prediction[..., :1] = 1  # 4 of them: Dice = 2·4 / (4 + 8)
    loss = segmentation_loss(certain(prediction, 3, 50.0), labels)
    torch.testing.assert_close(loss.dice, torch.tensor(1 - 2 * 4 / 12), atol=1e-6, rtol=0)


def test_absent_organs_count_only_when_asked():
    labels = torch.zeros(1, 2, 4, 4, dtype=torch.long)
    labels[0, 0, 0, 0] = 1
    logits = certain(labels, 3)
    assert segmentation_loss(logits, labels).dice < 1e-6
    everything = segmentation_loss(logits, labels, dice="all").dice
    torch.testing.assert_close(everything, torch.tensor(0.5), atol=1e-3, rtol=0)  # class 2 scores 0


def test_a_group_is_one_sample_and_groups_are_averaged():
    labels = torch.zeros(2, 2, 4, 4, dtype=torch.long)
    labels[0, 0] = 1
    labels[1, 1, :2] = 2
    logits = torch.randn(2, 2, 3, 4, 4, dtype=torch.double)
    both = segmentation_loss(logits, labels).dice
    single = [segmentation_loss(logits[i : i + 1], labels[i : i + 1]).dice for i in range(2)]
    torch.testing.assert_close(both, torch.stack(single).mean())


def test_cross_entropy_is_torchs_weighted_one():
    labels = torch.randint(0, 3, (1, 2, 5, 7))
    logits = torch.randn(1, 2, 3, 5, 7)
    ours = segmentation_loss(logits, labels, ce_foreground_weight=5.0).ce
    torchs = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(0, 1), weight=torch.tensor([1.0, 5.0, 5.0])
    )
    torch.testing.assert_close(ours, torchs)


def test_cross_entropy_of_the_hardest_voxels_of_each_group_by_hand():
    labels = torch.randint(0, 3, (2, 2, 5, 7))
    logits = torch.randn(2, 2, 3, 5, 7)
    ours = segmentation_loss(logits, labels, ce_hardest=0.1).ce
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), reduction="none")
    hardest = each.view(2, 70).sort(descending=True).values[:, :7]  # a tenth of a group's 2·5·7 voxels
    torch.testing.assert_close(ours, hardest.mean())
    weighted = segmentation_loss(logits, labels, ce_foreground_weight=5.0, ce_hardest=0.999).ce
    torch.testing.assert_close(weighted, segmentation_loss(logits, labels, ce_foreground_weight=5.0).ce)


def test_logits_are_upsampled_and_labels_never_downsampled():
    labels = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    labels[0, 0, 3, 3] = 1  # one voxel, lost on a 2×2 grid of labels
    coarse = torch.randn(1, 1, 2, 2, 2)
    fine = torch.nn.functional.interpolate(coarse[0], size=(8, 8), mode="bilinear")[None]
    assert segmentation_loss(coarse, labels).dice > 0
    for ours, expected in zip(
        segmentation_loss(coarse, labels), segmentation_loss(fine, labels), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_a_group_without_organs_has_no_dice_term():
    labels = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    loss = segmentation_loss(torch.zeros(1, 1, 3, 4, 4, requires_grad=True), labels)
    assert loss.dice == 0
    loss.total.backward()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="labels"):
        segmentation_loss(torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.long))
