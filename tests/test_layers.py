"""Layers that parts of the model share."""

import pytest
import torch

from aftersam.model.layers import ConvStem, normalise


def test_windows_become_sams_normalised_channels():
    hu = torch.tensor([[-2000.0, -160.0, 40.0, 240.0, 3000.0]])
    image = normalise(hu, ((-160, 240), (-160, 240), (-160, 240)))
    expected = (torch.tensor([0, 0, 0.5, 1, 1]) * 255 - 123.675) / 58.395
    torch.testing.assert_close(image[0, 0], expected)
    assert image.shape == (3, 1, 5)
    torch.testing.assert_close(normalise(hu, ((-160, 240),)), image)
    unit = normalise(hu, ((-160, 240),), unit=True)  # MedSAM's weights were trained on [0, 1]
    torch.testing.assert_close(unit[2, 0], torch.tensor([0, 0, 0.5, 1, 1]))
    with pytest.raises(ValueError, match="1 or 3"):
        normalise(hu, ((0, 1), (0, 1)))


def test_a_stem_alone_gives_skips():
    stem = ConvStem(3, channels=(4, 8, 16))
    assert stem.skip_channels == (4, 8, 16)
    assert [tuple(s.shape) for s in stem(torch.zeros(2, 3, 16, 24))] == [
        (2, 4, 16, 24),
        (2, 8, 8, 12),
        (2, 16, 4, 6),
    ]
