"""Configuration to model: official SAM weights through training, resume and prediction, in each way to adapt them."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from aftersam.config import STEMS, ModelConfig, from_dict, preset, to_dict
from aftersam.data.phantom import write_dataset
from aftersam.files import read_json, write_json
from aftersam.model.build import build_aftersam, check_weights, resolve_encoder
from aftersam.model.lora import merge_lora
from aftersam.model.sam_checkpoint import read_sam_checkpoint, sam_shapes
from aftersam.predict import main as predict_main
from aftersam.train import main as train_main


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A full-size ViT-B state dict in SAM's format with random weights of a network's usual scale."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in sam_shapes("vit_b").items():
        norm = "norm" in key or "neck.1" in key or "neck.3" in key or "output_upscaling.1" in key
        if norm and key.endswith("weight"):
            state[key] = torch.ones(shape)
        else:
            state[key] = 0.02 * torch.randn(shape, generator=generator)
    path = tmp_path_factory.mktemp("sam") / "sam_vit_b.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    root = tmp_path_factory.mktemp("scans")
    write_dataset(root, cases=3, seed=0)
    return root


SHORT = ["--image-size", "64", "--num-slices", "3", "--num-blocks", "2", "--device", "cpu", "--precision", "fp32",
         "--spacing-mm", "5", "6", "6", "--validations", "1"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--preset", "paper", "--decoder-attention", "image_to_token", "--supervision", "centre"],
        ["--preset", "best", "--decoder", "lora", "--prompts", "box", "--activation-checkpointing"],
    ],
    ids=["paper", "best"],
)
def test_trains_resumes_and_predicts_from_sam_weights(options, official, scans, tmp_path):
    run = tmp_path / "run"
    asked = ["--data", str(scans), "--output", str(run), "--sam-checkpoint", str(official), *options, *SHORT]
    assert train_main([*asked, "--max-steps", "2"]) == 0
    facts, config = read_json(run / "run.json"), read_json(run / "config.json")
    assert facts["sam_sha256"] == read_sam_checkpoint(official).sha256
    assert config["model"]["encoder"] == "lora"
    before = load_file(run / "last.safetensors")

    config["train"]["max_steps"] = 3  # a longer run goes on where the short one ended, without the SAM file
    write_json(run / "config.json", config)
    assert train_main(["--data", str(scans), "--output", str(run), "--resume", "--device", "cpu"]) == 0
    after = load_file(run / "last.safetensors")
    changed = {
        key for key in before if before[key].is_floating_point() and not torch.equal(before[key], after[key])
    }
    assert any("lora" in key and key.startswith("encoder.") for key in changed)
    frozen = [k for k in changed if k.startswith("encoder.") and "lora" not in k]
    assert not frozen, "the encoder's own weights must stay"

    prompts = ["--prompt-labels", str(scans / "labelsTr")] if "--prompts" in options else []
    masks = ["-i", str(scans / "imagesTr"), "-o", str(tmp_path / "masks"), "-m", str(run), "--device", "cpu"]
    assert predict_main([*masks, *prompts, "--checkpoint", "last"]) == 0
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 3


@pytest.mark.slow
def test_merged_lora_gives_the_same_logits_and_step_0_is_sam(official):
    """Zero-initialised fusion and LoRA leave SAM's features as they are; merging trained LoRA changes nothing."""
    sam = read_sam_checkpoint(official)
    config = dataclasses.replace(
        preset("paper").model, image_size=64, num_slices=3, num_blocks=1, encoder="lora"
    )
    torch.manual_seed(0)
    model = build_aftersam(config, 4, sam=sam).eval()
    hu = 200 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = build_aftersam(
            dataclasses.replace(config, attention="none", encoder="frozen"), 4, sam=sam
        ).eval()
        torch.testing.assert_close(model(hu), plain(hu), rtol=1e-4, atol=1e-4)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.05)
        adapted = model(hu)
        assert (adapted - plain(hu)).abs().max() > 1e-3
        merge_lora(model)
        torch.testing.assert_close(model(hu), adapted, rtol=1e-3, atol=1e-3)


def test_frozen_random_weights_are_refused():
    config = dataclasses.replace(
        preset("best"), model=dataclasses.replace(preset("best").model, encoder="frozen")
    )
    with pytest.raises(ValueError, match="--sam-checkpoint"):
        resolve_encoder(config, pretrained=False)
    assert resolve_encoder(preset("best"), pretrained=False).model.encoder == "full"
    assert resolve_encoder(preset("best"), pretrained=True).model.encoder == "lora"


def test_unit_normalisation_reaches_the_encoder():
    """MedSAM's weights were trained on [0, 1]; SAM's mean and deviation would move that to about -2 to 2.6."""
    hu, seen = torch.tensor([-3000.0, 0.0, 3000.0]).expand(1, 48, 3).repeat(1, 1, 16), {}
    for kind in ("sam", "unit"):
        model = build_aftersam(
            dataclasses.replace(preset("tiny").model, image_size=48, normalisation=kind), 3
        )
        model.encoder.register_forward_pre_hook(lambda _, given, kind=kind: seen.update({kind: given[0]}))
        model.encode(hu)
    assert (seen["unit"].min(), seen["unit"].max()) == (0, 1)
    assert seen["sam"].min() < -1.5


@pytest.mark.parametrize(
    ("stem_slices", "shape"), [(1, (1, 3, 3, 48, 48)), (3, (1, 3, 48, 48)), (3, (1, 3, 2, 48, 48))]
)
def test_another_number_of_slices_than_the_stem_sees_is_refused(stem_slices, shape):
    config = dataclasses.replace(preset("tiny").model, image_size=48, stem_slices=stem_slices)
    model = build_aftersam(config, num_classes=4)
    with pytest.raises(ValueError, match=f"a stem of {stem_slices} needs"):
        model(torch.zeros(shape))


def test_every_block_matters():
    """A model of two fusion blocks is another function than its first block alone, and each block has a gradient."""
    torch.manual_seed(0)
    small = dataclasses.replace(
        preset("tiny").model, image_size=48, num_blocks=2, fusion_init="xavier", encoder="full"
    )
    deep = build_aftersam(small, 3).eval()
    hu = 200 * torch.randn(1, 3, 48, 48)
    logits = deep(hu, query_index=(1,))
    logits.square().mean().backward()
    for name, parameter in deep.named_parameters():
        assert parameter.grad is not None, name
    for block in deep.fusion.blocks:
        assert all(p.grad.abs().max() > 0 for n, p in block.named_parameters() if n.endswith("weight"))
    whole = deep(hu)
    deep.fusion.blocks = deep.fusion.blocks[:1]
    assert (deep(hu) - whole).abs().max() > 1e-3


def test_an_untrained_model_says_background_and_sam_says_its_masks(official):
    torch.manual_seed(0)
    config = dataclasses.replace(preset("tiny").model, image_size=48, attention="none")
    fresh = build_aftersam(config, 4)(torch.zeros(1, 1, 48, 48)).softmax(2)
    assert 0.9 < fresh[:, :, 0].mean() < 0.999
    config = dataclasses.replace(preset("paper").model, image_size=64, attention="none", encoder="lora")
    model = build_aftersam(config, 4, sam=read_sam_checkpoint(official))
    assert not model.decoder.class_bias.any()  # every class starts as SAM's one mask, none ahead


def test_coarse_logits_train_encoder_and_fusion_without_the_skips():
    """Where skips alone can lower the loss, nothing else makes a model from scratch use its tokens."""
    torch.manual_seed(0)
    model = build_aftersam(dataclasses.replace(preset("tiny").model, image_size=48), num_classes=4)
    hu = torch.randn(2, 3, 48, 48) * 300
    logits, coarse = model(hu, coarse=True)
    assert logits.shape == (2, 3, 4, 48, 48)
    assert coarse.shape == (2, 3, 4, 6, 6)  # tokens of 8 pixels
    assert torch.equal(logits, model(hu))
    asked = model(hu, query_index=(1,), coarse=True)[1]
    torch.testing.assert_close(asked, coarse[:, 1:2])
    coarse.log_softmax(2)[:, :, 1].sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"encoder.blocks.0.attn.qkv.weight", "fusion.blocks.0.attention.inter.out.weight"} <= reached
    assert not any("fusions" in name or "upscaling" in name or "hypernetworks" in name for name in reached)


def test_a_wide_stem_widens_what_uses_it_and_a_config_without_the_key_has_the_slim_one():
    config = preset("small").model
    wide = build_aftersam(config, 3)
    written = to_dict(config)
    assert written.pop("stem") == "wide"
    slim = build_aftersam(from_dict(ModelConfig, written), 3)
    for model, (channels, width) in ((wide, STEMS["wide"]), (slim, STEMS["slim"])):
        assert model.encoder.stem.skip_channels == channels
        for key, fusion in model.decoder.fusions.items():
            skip = channels[model.decoder.skip_levels[int(key)]]
            stage = fusion.block[0][0] if width > 1 else fusion.block[0]
            assert stage.weight.shape[0] == width * (stage.weight.shape[1] - skip)
    hu = 100 * torch.randn(1, 5, 3, 96, 96)
    gradients = torch.autograd.grad(wide(hu).sum(), list(wide.decoder.fusions.parameters()))
    assert all(g.abs().max() > 0 for g in gradients)


def test_fewer_token_shares_than_classes_are_refused(tmp_path):
    config = dataclasses.replace(preset("tiny").model, image_size=48, token_shares=(1.0, 0.5))
    with pytest.raises(
        ValueError, match="token_shares has 2 numbers, but needs at least 4, one for each class"
    ):
        build_aftersam(config, num_classes=4)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'config.json'} cannot be used: token_shares has 2"):
        check_weights(tmp_path / "best.safetensors", config, num_classes=4)
