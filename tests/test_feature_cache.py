"""Stored features: equal to fresh ones within fp16's rounding, never of other weights or pixels, never half written."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from aftersam import encode
from aftersam.config import ENCODERS, Config, EncoderSize, preset
from aftersam.data.cache import cache_cases
from aftersam.data.dataset import find_dataset
from aftersam.data.phantom import write_dataset
from aftersam.data.slice_group import SliceGroups
from aftersam.data.windows import plane_windows
from aftersam.inference.feature_cache import Embeddings
from aftersam.inference.inputs import PredictOptions, Scan
from aftersam.inference.sliding import stream_logits
from aftersam.model.build import build_aftersam
from aftersam.model.image_encoder import ImageEncoder
from aftersam.model.layers import normalise
from aftersam.model.sam_checkpoint import sam_shapes
from aftersam.predict import main as predict
from aftersam.train import main as train
from aftersam.training.arguments import check_still

HU = np.random.default_rng(0).integers(-1000, 1000, (5, 48, 90)).astype(np.int16)
BOX = (0, 48, 0, 90)  # two windows of 48 px and a half


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    changes = {"image_size": 48, "num_slices": 3, "num_blocks": 1, "fusion_init": "xavier", **changes}
    config = dataclasses.replace(preset("tiny").model, **changes)
    return build_aftersam(config, num_classes=4).eval(), config


def store_of(folder, model, **changes):
    return Embeddings(folder, model, **{"image_size": 48, "precision": torch.float32, **changes})


@pytest.fixture
def encoded(monkeypatch):
    """How many images each call of an image encoder got."""
    seen, forward = [], ImageEncoder.forward
    monkeypatch.setattr(ImageEncoder, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    return seen


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (PredictOptions(), {}),
        (PredictOptions(average=True), {}),
        (PredictOptions(label_swap={1: 2, 2: 1}), {}),
        (PredictOptions(), {"stem_slices": 3}),
    ],
    ids=str,
)
def test_prediction_from_stored_features_is_prediction(tmp_path, encoded, options, changes):
    model, config = tiny(**changes)
    stored = store_of(tmp_path, model).of(HU, BOX, batch_size=2)
    windows = len(plane_windows(HU.shape[1:], BOX, 48))
    assert windows > 1
    fresh = torch.stack([p.logits for p in stream_logits(model, Scan(HU, BOX), config, options)])
    encoded.clear()
    scan = Scan(HU, BOX, stored=stored)
    ours = torch.stack([p.logits for p in stream_logits(model, scan, config, options)])
    assert sum(encoded) == (
        0 if options.label_swap is None else windows * len(HU)
    )  # the mirror image is another
    assert 0 < (ours - fresh).abs().max() < 2e-3 * fresh.abs().max()


def test_other_weights_pixels_or_settings_are_never_taken_for_these(tmp_path):
    model, _ = tiny()
    first = store_of(tmp_path, model).of(HU, BOX)
    assert store_of(tmp_path, tiny()[0]).of(HU.copy(), BOX) == first
    other_pixel = HU.copy()
    other_pixel[2, 3, 4] += 1
    others = [
        store_of(tmp_path, model).of(other_pixel, BOX),
        store_of(tmp_path, model).of(HU, (0, 48, 0, 60)),
        store_of(tmp_path, model, precision=torch.bfloat16).of(HU, BOX),
        store_of(tmp_path, tiny(seed=1)[0]).of(HU, BOX),
        store_of(tmp_path, tiny(hu_windows=((-160.0, 240.0),))[0]).of(HU, BOX),
        store_of(tmp_path, tiny(image_size=32)[0], image_size=32).of(HU, BOX),
    ]
    with torch.no_grad():
        model.encoder.neck[0].weight[0, 0] += 1e-6
    others.append(store_of(tmp_path, model).of(HU, BOX))
    assert len({first, *others}) == 8
    assert len(list(tmp_path.iterdir())) == 8


def test_damaged_features_are_encoded_again(tmp_path):
    model, _ = tiny()
    store = store_of(tmp_path, model)
    expected = [t.clone() for t in store.of(HU, BOX).read([0, 4])]
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-8]), lambda path: path.write_text("")):
        damage(sorted(next(tmp_path.iterdir()).glob("*.npy"))[0])
        for found, level in zip(store.of(HU, BOX).read([0, 4]), expected, strict=True):
            assert torch.equal(found, level)


def test_a_run_that_dies_leaves_no_half(tmp_path, monkeypatch):
    model, _ = tiny()
    forward, calls = ImageEncoder.forward, []

    def dies(self, images):
        calls.append(images)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(ImageEncoder, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        store_of(tmp_path, model).of(HU, BOX, batch_size=2)
    assert list(tmp_path.iterdir()) == []
    stored = store_of(tmp_path, model).of(HU, BOX, batch_size=2)
    assert stored.read([4])[0].isfinite().all()


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    root = tmp_path_factory.mktemp("scans")
    write_dataset(root, cases=3, seed=0)
    return root


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_training_items_carry_the_features_of_their_own_pixels(scans, tmp_path, foreground):
    model, config = tiny()
    data = dataclasses.replace(
        preset("tiny").data, spacing_mm=(5.0, 5.0, 5.0), crops="prediction", foreground_sampling=foreground
    )
    dataset = find_dataset(scans)
    cached = cache_cases(dataset, [c.id for c in dataset.cases], data, tmp_path / "cache", training=[])
    store = store_of(tmp_path / "store", model)
    stored = {case.id: store.of(case.hu, case.box) for case in cached.values()}
    groups = SliceGroups(list(cached.values()), model=config, data=data, seed=0, label_swap={}, stored=stored)
    for epoch in range(4):
        item = groups[epoch, epoch % 3]
        with torch.no_grad():
            fresh = model.encoder(normalise(item["hu"], model.hu_windows)).embedding
        torch.testing.assert_close(item["embedding"], fresh, rtol=1e-2, atol=1e-2)


@pytest.fixture
def sam(tmp_path, monkeypatch):
    """A checkpoint in SAM's format of a ViT that is small enough to train here."""
    monkeypatch.setitem(ENCODERS, "vit_b", EncoderSize(32, 2, 2, global_blocks=(1,), window=2))
    sam_shapes.cache_clear()
    generator = torch.Generator().manual_seed(0)
    state = {k: 0.2 * torch.randn(shape, generator=generator) for k, shape in sam_shapes("vit_b").items()}
    torch.save(state, tmp_path / "sam.pth")
    yield str(tmp_path / "sam.pth")
    sam_shapes.cache_clear()


KEYS = ["--preset", "paper", "--image-size", "64", "--spacing-mm", "5", "6", "6", "--precision", "fp32"]
STILL = ["--encoder", "frozen", "--crops", "prediction", "--augmentation"]


def test_training_with_stored_features_is_training(sam, scans, tmp_path, encoded):
    store = tmp_path / "store"
    asked = ["--data", str(scans), "--sam-checkpoint", sam, "--device", "cpu", *KEYS]
    short = ["--num-blocks", "1", "--num-slices", "3", "--max-steps", "4", "--validations", "1", *STILL]
    assert train([*asked, "--output", str(tmp_path / "plain"), *short]) == 0
    assert encode.main([*asked, "--output", str(store)]) == 0
    encoded.clear()
    assert train([*asked, "--output", str(tmp_path / "run"), "--embeddings", str(store), *short]) == 0
    assert encoded == []  # neither a step nor the validation needs the encoder
    logs = [(tmp_path / name / "history.jsonl").read_text().splitlines() for name in ("plain", "run")]
    losses, again = ([json.loads(line)["loss"] for line in log if '"loss"' in line] for log in logs)
    assert len(losses) == 4
    assert again == pytest.approx(losses, rel=1e-3)
    folders = set(store.iterdir())
    command = ["-i", str(scans / "imagesTr"), "-o", str(tmp_path / "masks"), "-m", str(tmp_path / "run")]
    assert predict([*command, "--device", "cpu", "--embeddings", str(store), "--no-preview"]) == 0
    assert encoded == []  # a frozen encoder is SAM's still
    encoder = ["--data", str(scans), "--output", str(store), "-m", str(tmp_path / "run"), "--device", "cpu"]
    assert encode.main(encoder) == 0
    assert set(store.iterdir()) == folders


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["--encoder", "lora", "--crops", "prediction", "--augmentation"], "--encoder frozen (it is lora)"),
        (["--encoder", "frozen", "--crops", "prediction"], "an empty --augmentation (it is elastic)"),
        (["--encoder", "frozen", "--augmentation"], "--crops prediction (it is random)"),
    ],
    ids=str,
)
def test_training_on_what_changes_is_refused_in_one_line(sam, scans, tmp_path, capsys, keys, says):
    asked = ["--data", str(scans), "--output", str(tmp_path / "run"), "--sam-checkpoint", sam, *KEYS, *keys]
    assert train([*asked, "--device", "cpu", "--embeddings", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert says in error
    assert not (tmp_path / "store").exists()


def test_no_augmentation_at_all_is_as_good_as_an_empty_one():
    config = preset("paper")
    still = dataclasses.replace(config.data, crops="prediction", augmentation_probability=0.0)
    check_still(Config(dataclasses.replace(config.model, encoder="frozen"), still))


def test_encode_needs_weights_and_reports_a_bad_scan(sam, scans, tmp_path, capsys):
    asked = ["--data", str(scans), "--output", str(tmp_path / "store"), "--device", "cpu"]
    assert encode.main(asked) == 2
    assert "give a run (-m) or SAM weights" in capsys.readouterr().err
    assert encode.main([*asked, "--sam-checkpoint", sam, *KEYS, "--spacing-mm", "median"]) == 2
    assert "median" in capsys.readouterr().err
    folder = tmp_path / "scans"
    folder.mkdir()
    whole = next((scans / "imagesTr").iterdir())
    (folder / "a.nii.gz").write_bytes(whole.read_bytes())
    (folder / "b.nii.gz").write_bytes(whole.read_bytes()[:1000])
    asked[1] = str(folder)
    assert encode.main([*asked, "--sam-checkpoint", sam, *KEYS]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aftersam.encode: ")]
    assert len(errors) == 1
    assert "b.nii.gz" in errors[0]
    assert len(list((tmp_path / "store").iterdir())) == 1
