"""Planes: windows blended into them, left and right exchanged, brought to another grid."""

import pytest
import torch
from torch.nn import functional as F

from aftersam.inference.planes import OUTSIDE, Plane, Tiling, resample_stream

CPU = torch.device("cpu")


@pytest.mark.parametrize("output", [(5, 20, 24), (12, 40, 33), (1, 7, 7), (7, 10, 12)], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_resampling_a_stream_equals_resampling_the_volume(depth, output):
    volume = torch.randn(3, depth, 10, 12, dtype=torch.double)
    whole = F.interpolate(volume[None], size=output, mode="trilinear", align_corners=False)[0]
    stream = resample_stream(map(Plane, volume.unbind(1)), depth, output)
    planes = torch.stack([plane.logits for plane in stream], dim=1)
    torch.testing.assert_close(planes, whole)


def test_disagreement_is_resampled_like_the_logits():
    volume = torch.rand(4, 5, 10, 12)
    whole = list(resample_stream(map(Plane, volume.unbind(1)), 5, (8, 20, 7)))
    parted = (Plane(plane[:3], plane[3:]) for plane in volume.unbind(1))
    for ours, expected in zip(resample_stream(parted, 5, (8, 20, 7)), whole, strict=True):
        assert torch.equal(torch.cat(ours), expected.logits)


def test_one_window_is_pasted_and_the_rest_is_background():
    tiling = Tiling.over((10, 12), (0, 8, 0, 8), 8, CPU)
    assert tiling.windows == [(0, 0)]
    logits, disagreement = torch.randn(1, 3, 8, 8), torch.rand(1, 1, 8, 8)
    plane = tiling.assemble(logits, disagreement)
    assert torch.equal(plane.logits[:, :8, :8], logits[0])
    assert torch.equal(plane.disagreement[:, :8, :8], disagreement[0])
    background = tiling.background(3, disagreement=True)
    for ours, empty in zip(plane, background, strict=True):
        assert torch.equal(ours[:, 8:], empty[:, 8:])
        assert torch.equal(ours[:, :, 8:], empty[:, :, 8:])
    assert (background.logits[0] == OUTSIDE).all()
    assert not background.logits[1:].any()
    assert not background.disagreement.any()


def test_windows_that_agree_blend_into_what_they_say():
    """Also half as many pixels as the window, and a window that reaches beyond the plane."""
    tiling = Tiling.over((6, 20), (0, 6, 0, 20), 8, CPU)
    assert len(tiling.windows) > 2
    values = torch.tensor([2.0, -1.0, 0.5])
    said = values[None, :, None, None].expand(len(tiling.windows), 3, 4, 4)
    plane = tiling.assemble(said)
    assert plane.disagreement is None
    torch.testing.assert_close(plane.logits, values[:, None, None].expand(3, 6, 20))


def test_a_plane_mirrored_twice_is_itself():
    plane, swap = Plane(torch.randn(4, 5, 6), torch.rand(1, 5, 6)), {1: 2, 2: 1}
    turned = plane.mirrored(swap)
    assert torch.equal(turned.logits, plane.logits[[0, 2, 1, 3]].flip(-1))
    assert torch.equal(turned.disagreement, plane.disagreement.flip(-1))
    for again, first in zip(turned.mirrored(swap), plane, strict=True):
        assert torch.equal(again, first)
    assert not torch.equal(turned.logits, plane.logits.flip(-1))
