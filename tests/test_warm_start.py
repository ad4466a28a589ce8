"""Training from another run's weights: shared organs' masks at step 0 are that run's, whatever else changes."""

import dataclasses
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import aftersam
from aftersam.data.phantom import LABELS
from aftersam.files import write_json
from aftersam.model import run_folder
from aftersam.model.build import build_aftersam
from aftersam.model.run_folder import read_run
from aftersam.train import main
from aftersam.training.checkpoint import save_weights
from aftersam.training.warm_start import (
    check_architecture,
    load_start,
    read_start,
    token_shares,
    token_sources,
)
from toy_scans import write_scans

FAST = ["--preset", "tiny", "--image-size", "48", "--num-blocks", "1", "--precision", "fp32"]
FOUR = ["heart", "lung_left", "trachea", "spinal_cord"]  # in another order than the phantoms'
STILL = ["--max-steps", "1", "--learning-rate", "1e-60", "--validations", "0", "--precision", "fp32"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("phantoms"))


def of_organs(data, home, organs):
    """The scans of `data` in `home` with the labels `organs` alone, a name (old, new) renamed."""
    names = [organ if isinstance(organ, tuple) else (organ, organ) for organ in organs]
    values = {name: value for value, name in LABELS.items()}
    for folder in ("imagesTr", "labelsTr"):
        (home / folder).mkdir(parents=True)
        for file in (data / folder).iterdir():
            if folder == "imagesTr":
                (home / folder / file.name).symlink_to(file)
                continue
            image = nib.load(file)
            array = np.asarray(image.dataobj)
            kept = sum((i + 1) * (array == values.get(old, 99)) for i, (old, _) in enumerate(names))
            nib.save(nib.Nifti1Image(kept.astype(np.uint8), image.affine), home / folder / file.name)
    labels = {"background": 0} | {new: i + 1 for i, (_, new) in enumerate(names)}
    write_json(home / "dataset.json", {"channel_names": {"0": "CT"}, "labels": labels})
    return home


def train(data, run, *more):
    return main(["--data", str(data), "--output", str(run), "--device", "cpu", *more])


@pytest.fixture(scope="module")
def start(phantoms, tmp_path_factory):
    """A run of four organs that names all of them somewhere, and whose tokens and positions all matter."""
    home = tmp_path_factory.mktemp("start")
    data = of_organs(phantoms, home / "four", FOUR)
    assert train(data, home / "run", *FAST, *STILL[:2], "--validations", "0") == 0
    shake(home / "run")
    return home / "run"


def shake(run):
    """Noise in place of what so few steps leave alike."""
    path, generator = run / "best.safetensors", torch.Generator().manual_seed(4)
    weights = load_file(path)
    for name, value in weights.items():
        noise = torch.randn(value.shape, generator=generator)
        if name.startswith("fusion."):
            value += 0.1 * noise
        elif name == "decoder.class_bias":
            value.zero_()
        elif "hypernetworks" in name or name.startswith(("decoder.class_tokens", "decoder.transformer")):
            value += noise * value.std().nan_to_num(0.0) * (4 if ".layers.2." in name else 0.5)
    save_file(weights, path, metadata={"aftersam": "{}"})


def masks(run, scan, names, checkpoint="best"):
    """{organ: its mask of `scan` by `run`}, of every part."""
    model = aftersam.load(run, checkpoint=checkpoint, device="cpu")
    model = dataclasses.replace(model, one_piece=())
    found = np.asarray(model.predict(nib.load(scan)).dataobj)
    return {name: found == value for value, name in model.labels.items() if name in names}


def assert_same_masks(run, other, data, names):
    scans = sorted((data / "imagesTr").iterdir())[:2]
    for scan in scans:
        ours, theirs = masks(run, scan, names, "last"), masks(other, scan, names)
        assert ours.keys() == theirs.keys() == set(names)
        for name in names:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert all(mask.any() for mask in theirs.values())


@pytest.mark.parametrize(
    "organs",
    [
        pytest.param(list(LABELS.values()), id="more"),
        pytest.param(FOUR, id="the same"),
        pytest.param(["heart", "trachea"], id="fewer"),
        pytest.param(["lung_right", "spinal_cord", "esophagus", "heart"], id="some others"),
    ],
)
def test_masks_of_shared_organs_at_step_0_are_the_runs(phantoms, start, tmp_path, capsys, organs):
    data = of_organs(phantoms, tmp_path / "data", organs)
    assert train(data, tmp_path / "run", "--init", str(start), *STILL) == 0
    shared = [name for name in organs if name in FOUR]
    assert_same_masks(tmp_path / "run", start, data, shared)
    ours, theirs = load_file(tmp_path / "run" / "last.safetensors"), load_file(start / "best.safetensors")
    for name, value in theirs.items():
        if not name.startswith(("decoder.class", "decoder.output_hypernetworks")):
            assert torch.equal(ours[name], value), name
    for name in shared:
        old, new = FOUR.index(name) + 1, organs.index(name) + 1
        for key in ("class_tokens.weight", "class_bias"):
            assert torch.equal(ours[f"decoder.{key}"][new], theirs[f"decoder.{key}"][old])
        for key in [k for k in theirs if k.startswith(f"decoder.output_hypernetworks_mlps.{old}.")]:
            assert torch.equal(ours[key.replace(f"mlps.{old}.", f"mlps.{new}.")], theirs[key])
    said = capsys.readouterr().out
    for name in organs:
        assert f"| {name} | {name} | carried |" in said if name in FOUR else f"| {name} | new," in said
    for name in set(FOUR) - set(organs):
        assert f"| {name} | {name} |  | background here |" in said


def test_a_run_that_began_with_a_run_is_a_start_and_is_resumed(phantoms, start, tmp_path, capsys):
    """Organs come, go and come back: tokens that were background's already are kept too."""
    data = of_organs(phantoms, tmp_path / "two", ["esophagus", "heart"])
    assert train(data, tmp_path / "second", "--init", str(start), *STILL) == 0
    assert len(read_run(tmp_path / "second")[0].model.token_shares) == 3 + 3
    more = of_organs(phantoms, tmp_path / "three", ["heart", "lung_left", "lung_right"])
    assert train(more, tmp_path / "third", "--init", str(tmp_path / "second"), *STILL) == 0
    assert_same_masks(tmp_path / "third", start, more, ["heart"])
    shares = read_run(tmp_path / "third")[0].model.token_shares
    assert sum(shares) == pytest.approx(5)  # as many as the first run's tokens count
    again = ["--init", str(tmp_path / "second"), "--resume", "--max-steps", "2"]
    assert train(more, tmp_path / "third", *again) == 0
    other = ["--init", str(start), "--resume", "--max-steps", "3"]
    assert train(more, tmp_path / "third", *other) == 2
    assert "is not what the run in" in capsys.readouterr().err


def fresh(start, labels, spacing_mm, **choices):
    """A model of `labels` that starts from `start` with other choices, and its configuration."""
    torch.manual_seed(0)
    config = dataclasses.replace(start.config.model, token_shares=token_shares(start, labels), **choices)
    model = build_aftersam(config, len(labels) + 1)
    load_start(start, model, config, labels, spacing_mm)
    return model.eval(), config


@pytest.mark.parametrize("table", ["factored", "full"])
@pytest.mark.parametrize("decoder", ["two_way", "image_to_token"])
def test_other_slices_image_and_spacing_interpolate_positions(start, table, decoder):
    """From 3 slices of 5 mm to 5 of 2.5 mm: every other place is one of the run's, the rest lie between."""
    found = read_start(start)
    choices = {"position_embedding": table, "decoder_attention": decoder}
    config = dataclasses.replace(found.config, model=dataclasses.replace(found.config.model, **choices))
    torch.manual_seed(1)
    old = build_aftersam(config.model, 5).eval()
    for value in (old.fusion.position, old.fusion.slice_position, old.encoder.pos_embed):
        if value is not None:
            torch.nn.init.normal_(value)
    save_weights(start.parent / "old.safetensors", old, {})
    found = found._replace(weights=start.parent / "old.safetensors", config=config)
    labels = found.facts.names
    near, _ = fresh(found, labels, (2.5, 4.0, 4.0), num_slices=5)
    theirs, ours = (m.fusion.positions(6, 6) for m in (old, near))
    assert torch.equal(ours[::2], theirs)
    torch.testing.assert_close(ours[1::2], (theirs[1:] + theirs[:-1]) / 2)
    far, _ = fresh(found, labels, (5.0, 4.0, 4.0), num_slices=5)
    assert torch.equal(far.fusion.positions(6, 6), theirs[[0, 0, 1, 2, 2]])  # none is farther than the ends
    strided, _ = fresh(found, labels, (2.5, 4.0, 4.0), slice_stride=2)
    assert torch.equal(strided.fusion.positions(6, 6), theirs)
    large, _ = fresh(found, labels, (5.0, 4.0, 4.0), image_size=96)
    assert large.fusion.position.shape[1:3] == large.encoder.pos_embed.shape[1:3] == (12, 12)
    torch.testing.assert_close(large.fusion.positions(12, 12), old.fusion.positions(12, 12))
    hu = torch.randint(-1000, 1000, (1, 3, 48, 48)).float()
    seven, _ = fresh(found, {**labels, 5: "a", 6: "b"}, (5.0, 4.0, 4.0))
    with torch.no_grad():
        logits, before = seven(hu)[0], old(hu)[0]
    torch.testing.assert_close(logits[:, :5], before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, 5:], (before[:, :1] - 5).expand(-1, 2, -1, -1), rtol=1e-4, atol=1e-4)


def test_organs_match_by_name_in_any_spelling_that_is_the_only_one(start):
    found = read_start(start)
    assert token_sources(found, {1: "Lung Left", 2: "TRACHEA", 3: "liver"}) == [0, 2, 3, 0, 1, 4]
    assert token_sources(found, {1: "Heart", 2: "heart"}) == [0, 0, 1, 2, 3, 4]
    assert token_sources(found, {1: "HEART", 2: "hear-t"}) == [0, 0, 0, 1, 2, 3, 4]
    assert token_sources(found, {1: "\u809d", 2: "\u8113"}) == [0, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--num-blocks", "2"],
            "num_blocks is 2, but the weights in .* are of a model with 1; leave it out, or the",
        ),
        (["--preset", "small"], "image_encoder is small, but the weights in .* are of a model with tiny"),
        (["--hu-windows", "0", "1"], "hu_windows is"),
        (["--encoder", "lora"], "encoder is lora, but"),
        (["--sam-checkpoint", "vit_b"], "--sam-checkpoint and --init both"),
    ],
    ids=str,
)
def test_another_architecture_is_refused_in_one_sentence(phantoms, start, tmp_path, capsys, more, says):
    assert train(phantoms, tmp_path / "run", "--init", str(start), *more) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(says, error), error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_name_that_no_model_has_lists_those_that_come_along(phantoms, start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_folder, "WEIGHTS", tmp_path / "weights")
    assert train(phantoms, tmp_path / "run", "--init", "hednek") == 2
    assert (
        "hednek is not a training run: it has no config.json; of models that come along there is none"
        in capsys.readouterr().err
    )
    shutil.copytree(start, tmp_path / "weights" / "headneck")
    assert train(phantoms, tmp_path / "run", "--init", "hednek") == 2
    assert "there is headneck; did you mean 'headneck'?" in capsys.readouterr().err
    assert read_start("headneck").sha256 == read_start(start).sha256


@pytest.mark.parametrize("part", ["encoder", "fusion_weights", "decoder"])
def test_lora_is_carried_over(start, part):
    found = read_start(start)
    config = dataclasses.replace(
        found.config, model=dataclasses.replace(found.config.model, **{part: "lora"})
    )
    torch.manual_seed(1)
    old = build_aftersam(config.model, 5).eval()
    for name, value in old.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(value, std=0.1)
    save_weights(start.parent / "lora.safetensors", old, {})
    found = found._replace(weights=start.parent / "lora.safetensors", config=config)
    six, _ = fresh(found, {**found.facts.names, 5: "a", 6: "b"}, (5.0, 4.0, 4.0))
    hu = torch.randint(-1000, 1000, (1, 3, 48, 48)).float()
    with torch.no_grad():
        torch.testing.assert_close(six(hu)[0][:, :5], old(hu)[0], rtol=1e-4, atol=1e-4)
    trains = {name for name, value in six.named_parameters() if value.requires_grad}
    assert trains >= {name for name, value in old.named_parameters() if value.requires_grad}
    with pytest.raises(ValueError, match="lora"):
        check_architecture(found, dataclasses.replace(config.model, **{part: "full"}))


def test_weights_in_half_precision_are_a_start_and_a_model(phantoms, start, tmp_path):
    half, data = tmp_path / "half", of_organs(phantoms, tmp_path / "data", ["heart", "aorta"])
    shutil.copytree(start, half)
    weights = {name: value.half() for name, value in load_file(half / "best.safetensors").items()}
    save_file(weights, half / "best.safetensors", metadata={"aftersam": "{}"})
    assert train(data, tmp_path / "run", "--init", str(half), *STILL) == 0
    assert_same_masks(tmp_path / "run", half, data, ["heart"])
    assert load_file(tmp_path / "run" / "last.safetensors")["fusion.position"].dtype == torch.float32
