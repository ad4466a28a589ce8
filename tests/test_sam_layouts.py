"""Files of SAM's weights in every layout are read as the same tensors, features and masks."""

import zipfile
from pathlib import Path

import pytest
import torch

import toy_sams
from aftersam.config import ENCODERS, ModelConfig
from aftersam.model.build import build_aftersam, build_image_encoder
from aftersam.model.sam_checkpoint import load_image_encoder_state, read_sam_checkpoint, sam_shapes
from aftersam.model.segment_anything import segment_anything_modeling
from toy_sams import folder, halves, hugging_face, in_safetensors, prefixed, saved


@pytest.fixture(autouse=True)
def small(monkeypatch):
    toy_sams.make_small(monkeypatch)
    yield
    sam_shapes.cache_clear()


def optimizer(state):
    moments = {
        i: {"step": torch.tensor(3.0), "exp_avg": value.clone()} for i, value in enumerate(state.values())
    }
    return {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}


def compressed(path, state):
    plain = saved(path.with_name("plain"), state)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
    return path


LAYOUTS = {  # how a state dict of SAM's names is written, and as what the file is recognised
    "official": (lambda p, s: saved(p, s), "SAM,"),
    "before zip files": (lambda p, s: saved(p, s, _use_new_zipfile_serialization=False), "SAM,"),
    "compressed": (compressed, "SAM,"),
    "safetensors": (in_safetensors, "SAM,"),
    "safetensors named .pth": (lambda p, s: in_safetensors(p.with_suffix(".pth"), s), "SAM,"),
    "pickle named .safetensors": (lambda p, s: saved(p.with_suffix(".safetensors"), s), "SAM,"),
    "model": (lambda p, s: saved(p, {"model": s, "optimizer": optimizer(s), "epoch": 3}), "SAM, under model,"),
    "state_dict": (lambda p, s: saved(p, {"state_dict": s}), "SAM, under state_dict,"),
    "module.": (lambda p, s: saved(p, prefixed("module.", s)), "SAM, under module,"),
    "sam.": (lambda p, s: saved(p, prefixed("sam.", s)), "SAM, under sam,"),
    "lightning": (lambda p, s: saved(p, {"state_dict": prefixed("net.sam.", s), "loops": {"a": {"b": 1}},
                                         "hyper_parameters": {"lr": 1e-4}}), "SAM, under state_dict.net.sam,"),
    "distributed": (lambda p, s: saved(p, {"model": prefixed("module.", s)}), "SAM, under model.module,"),
    "pixel mean": (lambda p, s: saved(p, s | {"pixel_mean": torch.zeros(3, 1, 1)}), "SAM,"),
    "SAM-HQ": (lambda p, s: saved(p, s | toy_sams.hq_extras()), "SAM-HQ,"),
    "Hugging Face": (lambda p, s: saved(p, hugging_face(s)), "SAM in Hugging Face's layout,"),
    "Hugging Face safetensors": (lambda p, s: in_safetensors(p, hugging_face(s)), "SAM in Hugging Face's layout,"),
    "Hugging Face SAM-HQ": (lambda p, s: saved(p, hugging_face(s) | toy_sams.hugging_face_hq_extras()),
                            "SAM-HQ in Hugging Face's layout,"),
    "folder": (lambda p, s: folder(p, {"model.safetensors": hugging_face(s)}, in_safetensors),
               "SAM in Hugging Face's layout,"),
    "folder of pickles": (lambda p, s: folder(p, {"pytorch_model.bin": hugging_face(s)}, saved),
                          "SAM in Hugging Face's layout,"),
    "shards": (lambda p, s: folder(p, halves(hugging_face(s), "model-0000{}-of-00002.safetensors"), in_safetensors),
               "SAM in Hugging Face's layout,"),
    "shards of pickles": (lambda p, s: folder(p, halves(hugging_face(s), "pytorch_model-0000{}-of-00002.bin"), saved),
                          "SAM in Hugging Face's layout,"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_reads_every_layout_as_the_same_fp32_tensors(layout, dtype, tmp_path):
    state = {key: value.to(dtype) for key, value in toy_sams.sam().items()}
    write, recognised = LAYOUTS[layout]
    read = read_sam_checkpoint(write(tmp_path / "weights", state))
    assert read.name == "vit_b"
    assert read.state.keys() == state.keys()
    for key, value in read.state.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].float()), key
    assert f"vit_b of {recognised} {str(dtype).removeprefix('torch.')}" in read.about


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accounts_for_every_tensor_of_the_file(layout, tmp_path):
    """Used and left out are all there is: the tensors of the state dict, and what lies beside it."""
    state = toy_sams.sam()
    path = LAYOUTS[layout][0](tmp_path / "weights", state)
    said = []
    config = ModelConfig(image_size=128, num_slices=3, num_blocks=1)
    build_aftersam(config, 3, sam=read_sam_checkpoint(path), say=said.append)
    (line,) = said
    assert line.startswith(str(path))
    tied = layout.startswith(("Hugging Face", "folder", "shards"))
    beside = {"model": 2, "lightning": 2, "pixel mean": 1, "SAM-HQ": 25, "Hugging Face SAM-HQ": 26}
    used, interpolated, left_out = (int(line.split(text)[0].split()[-1]) for text in WORDS)
    assert used + left_out == len(state) + beside.get(layout, int(tied))
    assert interpolated == 3  # the position table, and two of the global block
    groups = line.split("left out: ")[1].split(", ")
    assert sum(int(g.partition("(")[2].rstrip(")") or 1) for g in groups) == left_out
    assert "mask_decoder.iou_token" in groups
    assert ("mask_decoder.hf_mlp (6)" in groups) == (layout == "SAM-HQ")
    assert {"optimizer", "epoch"} <= set(groups) or layout != "model"


WORDS = (" tensors used", " position tables interpolated to 128 px", " left out: ")


@torch.no_grad()
def test_mobile_sam_with_and_without_hq_is_read(tmp_path):
    state = toy_sams.sam("vit_t")
    plain = read_sam_checkpoint(saved(tmp_path / "mobile.pt", prefixed("module.", state)))
    high = read_sam_checkpoint(saved(tmp_path / "hq.pth", state | toy_sams.hq_extras(256, 160)))
    assert "vit_t of MobileSAM, under module," in plain.about
    assert "vit_t of SAM-HQ," in high.about
    assert plain.state.keys() == high.state.keys() == state.keys()
    assert all(torch.equal(plain.state[key], high.state[key]) for key in state)


@torch.no_grad()
@pytest.mark.parametrize("side", [32, 96])
def test_tables_of_another_grid_are_taken_as_they_are_or_interpolated(side, tmp_path):
    """SAM-Med2D without adapters is for 256 px: at that size its features are those of SAM's own code."""
    state = toy_sams.sam(side=side)
    path = saved(tmp_path / "med2d.pth", {"model": state})
    ours = build_image_encoder("vit_b", image_size=side)
    assert load_image_encoder_state(ours, read_sam_checkpoint(path).state) == []
    size = toy_sams.SIZE
    theirs = segment_anything_modeling("image_encoder").ImageEncoderViT(
        img_size=side, patch_size=16, embed_dim=size.dim, depth=size.depth, num_heads=size.num_heads,
        out_chans=size.out_channels, use_rel_pos=True, window_size=size.window,
        global_attn_indexes=size.global_blocks,
    )  # fmt: skip
    prefix = "image_encoder."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(ours(images).embedding, theirs(images), rtol=1e-4, atol=1e-4)
    other = build_image_encoder("vit_b", image_size=64)
    tables = ["blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w", "pos_embed"]
    assert sorted(load_image_encoder_state(other, read_sam_checkpoint(path).state)) == tables


def hugging_face_model(size=toy_sams.SIZE, side=toy_sams.SIDE):
    """A random SamModel of transformers with the geometry of `size`, position tables included."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": size.dim, "num_hidden_layers": size.depth, "num_attention_heads": size.num_heads,
            "output_channels": size.out_channels, "image_size": side, "window_size": size.window,
            "global_attn_indexes": list(size.global_blocks), "mlp_dim": 4 * size.dim,
            "num_pos_feats": size.out_channels // 2,
        },
        prompt_encoder_config={"hidden_size": size.out_channels, "image_size": side},
        mask_decoder_config={"hidden_size": size.out_channels, "mlp_dim": 8 * size.out_channels},
    )  # fmt: skip
    model = transformers.SamModel(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return model


@torch.no_grad()
def test_features_and_masks_are_those_of_hugging_face(tmp_path):
    theirs = hugging_face_model()
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
    read = read_sam_checkpoint(tmp_path / "saved")
    ours = build_image_encoder("vit_b", image_size=toy_sams.SIDE)
    load_image_encoder_state(ours, read.state)
    images = torch.randn(2, 3, toy_sams.SIDE, toy_sams.SIDE)
    features = theirs.get_image_embeddings(images)
    torch.testing.assert_close(ours(images).embedding, features, rtol=0, atol=1e-5)

    sam = segment_anything_modeling("sam")
    transformer = segment_anything_modeling("transformer").TwoWayTransformer(2, 32, 8, 256)
    prompts = sam.PromptEncoder(32, (4, 4), (64, 64), mask_in_chans=16)
    decoder = sam.MaskDecoder(transformer_dim=32, transformer=transformer)
    for part, name in ((prompts, "prompt_encoder."), (decoder, "mask_decoder.")):
        part.load_state_dict({k.removeprefix(name): v for k, v in read.state.items() if k.startswith(name)})
    points, labels = torch.tensor([[[20.0, 30.0], [40.0, 9.0]]]), torch.tensor([[1, 0]])
    box = torch.tensor([[5.0, 7.0, 50.0, 60.0]])
    mask = torch.randn(1, 1, 16, 16)
    sparse, dense = prompts((points, labels), box, mask)
    masks, quality = decoder(features[:1], prompts.get_dense_pe(), sparse, dense, multimask_output=True)
    expected = theirs(
        image_embeddings=features[:1], input_points=points[None], input_labels=labels[None], input_boxes=box[None],
        input_masks=mask, multimask_output=True,
    )  # fmt: skip
    torch.testing.assert_close(masks, expected.pred_masks[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quality, expected.iou_scores[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_features_of_a_full_size_model_are_those_of_hugging_face(monkeypatch, tmp_path):
    monkeypatch.undo()
    sam_shapes.cache_clear()
    theirs = hugging_face_model(ENCODERS["vit_b"], 256)
    theirs.save_pretrained(tmp_path / "saved")
    read = read_sam_checkpoint(tmp_path / "saved" / "model.safetensors")
    ours = build_image_encoder("vit_b", image_size=256)
    assert load_image_encoder_state(ours, read.state) == []
    images = torch.randn(1, 3, 256, 256)
    features = theirs.get_image_embeddings(images)
    torch.testing.assert_close(ours(images).embedding, features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["Sam", "SamHQ"])
def test_our_lists_of_names_are_those_of_transformers(model, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.undo()
    sam_shapes.cache_clear()
    with torch.device("meta"):
        theirs = getattr(transformers, f"{model}Model")(
            getattr(transformers, f"{model}Config")()
        ).state_dict()
    ours = hugging_face(toy_sams.hollow(sam_shapes("vit_b")))
    if model == "SamHQ":
        ours |= toy_sams.hugging_face_hq_extras(256, 768)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("layout", ["official", "safetensors", "model", "Hugging Face", "shards"])
def test_fp32_tensors_stay_in_the_file(layout, tmp_path):
    """The whole of a ViT-H is 2.5 GB: the pages of its file, and one copy, the model's."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("where memory is mapped from is told by Linux alone")
    path = LAYOUTS[layout][0](tmp_path / "weights", toy_sams.sam())
    state = read_sam_checkpoint(path).state
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(path) in line
    ]
    for key, value in state.items():
        assert any(low <= value.data_ptr() < high for low, high in spans), key


def test_trains_from_hugging_face_and_says_what_it_took(tmp_path, capsys):
    from aftersam.data.phantom import write_dataset
    from aftersam.encode import main as encode
    from aftersam.train import main as train

    write_dataset(tmp_path / "scans", cases=3, seed=0)
    path = LAYOUTS["folder"][0](tmp_path / "sam", toy_sams.sam())
    keys = ["--data", str(tmp_path / "scans"), "--sam-checkpoint", str(path), "--image-size", "64", "--device", "cpu",
            "--spacing-mm", "5", "6", "6", "--precision", "fp32"]  # fmt: skip
    short = ["--num-blocks", "1", "--num-slices", "3", "--max-steps", "1", "--validations", "1"]
    assert train([*keys, "--output", str(tmp_path / "run"), *short]) == 0
    said = capsys.readouterr().out
    assert f"{path}: vit_b of SAM in Hugging Face's layout, float32: " in said
    assert encode([*keys, "--output", str(tmp_path / "features")]) == 0
    assert "tensors used, 0 position tables interpolated to 64 px" in capsys.readouterr().out
