"""Prompts from labels: SAM's own embeddings, places inside the organs, and a whole prompted run."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

import aftersam
from aftersam.config import ModelConfig
from aftersam.data.phantom import write_dataset
from aftersam.evaluation.scoring import score_folder
from aftersam.model.build import build_aftersam
from aftersam.model.prompts import LabelPrompts, box_corners, clicks
from aftersam.model.segment_anything import segment_anything_modeling
from aftersam.predict import main as predict_main
from aftersam.train import main as train_main


def labels_with_a_ring() -> torch.Tensor:
    """(1, 16, 20): class 1 a box, class 2 a ring whose centroid is a hole, class 3 absent."""
    labels = torch.zeros(1, 16, 20, dtype=torch.int64)
    labels[0, 2:5, 3:9] = 1
    labels[0, 7:14, 9:16] = 2
    labels[0, 9:12, 11:14] = 0
    return labels


def test_boxes_and_points_of_hand_made_masks():
    masks = labels_with_a_ring() == torch.tensor([1, 2])[:, None, None]
    assert box_corners(masks).tolist() == [[[3, 2], [8, 4]], [[9, 7], [15, 13]]]
    one, three = clicks(masks, 1), clicks(masks, 3)
    assert one[0].tolist() in ([[5, 3]], [[6, 3]])
    assert torch.equal(three[:, :1], one)
    corners = three[0, 1:]  # one at either end; which of two equally far ones is the machine's choice
    assert sorted(corners[:, 0].tolist()) == [3, 8]
    assert set(corners[:, 1].tolist()) <= {2, 4}
    for mask, points in zip(masks, three.long(), strict=True):
        assert mask[points[:, 1], points[:, 0]].all()
        assert len(set(map(tuple, points.tolist()))) == 3


@pytest.mark.parametrize(("kind", "count"), [("box", 2), ("point", 1), ("points", 3)])
def test_tokens_are_those_of_sams_prompt_encoder(kind, count):
    torch.manual_seed(0)
    ours = LabelPrompts(kind, 32)
    sam = segment_anything_modeling("prompt_encoder").PromptEncoder(32, (2, 2), (16, 20), mask_in_chans=4)
    sam.load_state_dict(ours.state_dict(), strict=False)
    labels = labels_with_a_ring()
    tokens = ours(labels, 4)
    assert tokens.shape == (1, 3, count, 32)
    masks = labels == torch.tensor([1, 2])[:, None, None]
    if kind == "box":
        expected = sam(points=None, boxes=box_corners(masks).flatten(1), masks=None)[0]
    else:
        expected = sam(points=(clicks(masks, count), torch.ones(2, count)), boxes=None, masks=None)[0][
            :, :count
        ]
    torch.testing.assert_close(tokens[0, :2], expected)
    torch.testing.assert_close(tokens[0, 2], ours.not_a_point_embed.weight.expand_as(tokens[0, 2]))


def test_a_prompted_model_follows_its_prompts_and_needs_them():
    torch.manual_seed(0)
    config = ModelConfig(
        image_encoder="tiny",
        image_size=48,
        num_blocks=1,
        num_heads=4,
        num_slices=3,
        output_stride=1,
        prompts="box",
    )
    model = build_aftersam(config, 4).eval()
    hu = torch.randn(1, 3, 48, 48) * 100
    labels = torch.zeros(1, 3, 48, 48, dtype=torch.int64)
    labels[:, :, 5:20, 8:30] = 1
    moved = labels.roll(9, dims=-1)
    with torch.no_grad():
        first, second = model(hu, labels=labels), model(hu, labels=moved)
        centre = model(hu, labels=labels, query_index=(1,))
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(centre[:, 0], first[:, 1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="prompts=box"):
        model(hu)


def test_a_prompted_run_is_marked_to_the_score(tmp_path, capsys):
    write_dataset(tmp_path / "scans", cases=3, seed=0)
    with pytest.MonkeyPatch.context() as patch:  # so few steps would leave nothing but background to compare
        patch.setattr("aftersam.model.mask_decoder.BACKGROUND_LEAD", 0.0)
        code = train_main(
            ["--data", str(tmp_path / "scans"), "--output", str(tmp_path / "run"), "--preset", "tiny", "--prompts",
             "points", "--image-size", "48", "--num-blocks", "1", "--max-steps", "2", "--device", "cpu", "--precision",
             "fp32"]
        )  # fmt: skip
    assert code == 0
    images, labels = tmp_path / "scans" / "imagesTr", tmp_path / "scans" / "labelsTr"
    asked = ["-i", str(images), "-o", str(tmp_path / "masks"), "-m", str(tmp_path / "run"), "--device", "cpu"]
    assert predict_main(asked) == 2  # before any scan is read
    assert "--prompt-labels" in capsys.readouterr().err
    assert predict_main([*asked, "--prompt-labels", str(labels)]) == 0
    assert all(
        json.loads(path.read_text())["prompted"] == "points" for path in (tmp_path / "masks").glob("*.json")
    )
    assert score_folder(tmp_path / "masks", labels, quiet=True)["prompted"] == "points"

    scan, label = sorted(images.iterdir())[0], sorted(labels.iterdir())[0]
    mask = aftersam.load(tmp_path / "run", device="cpu").predict(
        nib.load(scan), prompt_labels=nib.load(label)
    )
    stored = nib.load(tmp_path / "masks" / label.name)
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(stored.dataobj))
