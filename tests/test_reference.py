"""The specification itself, against the model called by hand, and its three ways to the same logits."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from aftersam.config import preset
from aftersam.data.windows import slice_group
from aftersam.inference.inputs import PredictOptions, Scan
from aftersam.inference.reference import divergence, naive_logits, naive_planes
from aftersam.model.build import build_aftersam


def tiny_model(**changes):
    torch.manual_seed(0)
    changes = {"image_size": 48, "num_slices": 3, "fusion_init": "xavier", **changes}
    config = dataclasses.replace(preset("tiny").model, **changes)
    return build_aftersam(config, num_classes=4).eval(), config


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"num_slices": 4, "slice_stride": 2}, {"stem_slices": 3, "slice_stride": 2}], ids=str
)
def test_the_default_is_the_centre_of_the_group_about_each_slice(changes):
    model, config = tiny_model(**changes)
    hu = np.random.default_rng(0).integers(-1000, 1000, (6, 48, 48)).astype(np.int16)
    planes = naive_planes(model, Scan(hu, (0, 48, 0, 48)), config)
    for d, plane in enumerate(planes):
        group = slice_group(d, 6, config.num_slices, config.slice_stride)
        if config.stem_slices > 1:
            group = np.stack([slice_group(i, 6, config.stem_slices) for i in group])
        logits = model(torch.from_numpy(hu[group])[None].float())[0, config.num_slices // 2]
        expected = F.interpolate(logits[None], size=(48, 48), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(plane.logits, expected)


@pytest.mark.parametrize("options", [PredictOptions(), PredictOptions(keep=2)], ids=str)
@pytest.mark.parametrize("changes", [{}, {"stem_slices": 3}, {"attention": "none"}], ids=str)
def test_encoding_once_and_decoding_less_change_no_logits_in_fp64(changes, options):
    model, config = tiny_model(**changes)
    wide = copy.deepcopy(model).double()
    wide.decoder._positions = lambda *grid: model.decoder._positions(*grid).double()
    hu = 300 * torch.randn(5, 48, 48, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    plain, _ = naive_logits(wide, hu, config, options)
    assert plain.dtype == torch.double
    for way in ({"encode_once": True}, {"kept_alone": True}, {"encode_once": True, "kept_alone": True}):
        torch.testing.assert_close(naive_logits(wide, hu, config, options, **way)[0], plain)
    single, _ = naive_logits(model, hu.float(), config, options)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), plain, rtol=1e-3, atol=1e-3)


def test_divergence_is_0_where_groups_agree_and_1_where_each_is_sure_of_another_class():
    sure = torch.eye(3)[:, :, None, None]
    assert divergence(sure).item() == pytest.approx(1)
    assert divergence(sure[:1].expand(4, -1, -1, -1)).item() == pytest.approx(0, abs=1e-6)
    assert divergence(sure[:1]).item() == 0
