"""Files of SAM's weights in every layout: read as the same tensors, or refused in one sentence that names them."""

import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import toy_sams
from aftersam.config import ENCODERS, ModelConfig
from aftersam.errors import sentence
from aftersam.model.build import build_aftersam, build_image_encoder
from aftersam.model.sam_checkpoint import load_image_encoder_state, read_sam_checkpoint, sam_shapes
from aftersam.model.segment_anything import segment_anything_modeling


@pytest.fixture(autouse=True)
def small(monkeypatch):
    toy_sams.make_small(monkeypatch)
    yield
    sam_shapes.cache_clear()


def saved(path, state, **options):
    torch.save(state, path, **options)
    return path


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


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


def in_safetensors(path, state):
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def folder(path, parts, write):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "sam"}')
    for name, state in parts.items():
        write(path / name, state)
    return path


def halves(state, pattern):
    names = list(state)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    return {pattern.format(i + 1): {k: state[k] for k in part} for i, part in enumerate((first, second))}


def hq(state):
    return state | toy_sams.hq_extras()


def hf(state):
    return toy_sams.hugging_face(state)


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
    "SAM-HQ": (lambda p, s: saved(p, hq(s)), "SAM-HQ,"),
    "Hugging Face": (lambda p, s: saved(p, hf(s)), "SAM in Hugging Face's layout,"),
    "Hugging Face safetensors": (lambda p, s: in_safetensors(p, hf(s)), "SAM in Hugging Face's layout,"),
    "Hugging Face SAM-HQ": (lambda p, s: saved(p, hf(s) | toy_sams.hugging_face_hq_extras()),
                            "SAM-HQ in Hugging Face's layout,"),
    "folder": (lambda p, s: folder(p, {"model.safetensors": hf(s)}, in_safetensors), "SAM in Hugging Face's layout,"),
    "folder of pickles": (lambda p, s: folder(p, {"pytorch_model.bin": hf(s)}, saved),
                          "SAM in Hugging Face's layout,"),
    "shards": (lambda p, s: folder(p, halves(hf(s), "model-0000{}-of-00002.safetensors"), in_safetensors),
               "SAM in Hugging Face's layout,"),
    "shards of pickles": (lambda p, s: folder(p, halves(hf(s), "pytorch_model-0000{}-of-00002.bin"), saved),
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
    beside = {"model": 2, "lightning": 2, "pixel mean": 1, "SAM-HQ": 25, "Hugging Face SAM-HQ": 26}
    beside |= dict.fromkeys((name for name in LAYOUTS if name not in beside and path_is_hf(name)), 1)
    used, interpolated, left_out = (int(line.split(text)[0].split()[-1]) for text in WORDS)
    assert used + left_out == len(state) + beside.get(layout, 0)
    assert interpolated == 3  # the position table, and two of the global block
    groups = line.split("left out: ")[1].split(", ")
    assert sum(int(g.partition("(")[2].rstrip(")") or 1) for g in groups) == left_out
    assert "mask_decoder.iou_token" in groups
    assert ("mask_decoder.hf_mlp (6)" in groups) == (layout == "SAM-HQ")
    assert {"optimizer", "epoch"} <= set(groups) or layout != "model"


WORDS = (" tensors used", " of them interpolated to 128 px", " left out: ")


def path_is_hf(name):
    return name.startswith(("Hugging Face", "folder", "shards"))


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
    tables = ["pos_embed", "blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"]
    assert sorted(load_image_encoder_state(other, read_sam_checkpoint(path).state)) == sorted(sorted(tables))


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
    ours = hf(toy_sams.hollow(sam_shapes("vit_b")))
    if model == "SamHQ":
        ours |= toy_sams.hugging_face_hq_extras(256, 768)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def sam2(**extra):
    """The names that tell SAM2's checkpoints: Hiera's two tables, its pyramid, the memory."""
    state = {
        "image_encoder.trunk.pos_embed": torch.zeros(1, 96, 7, 7),
        "image_encoder.trunk.pos_embed_window": torch.zeros(1, 96, 8, 8),
        "image_encoder.trunk.patch_embed.proj.weight": torch.zeros(96, 3, 7, 7),
        "image_encoder.trunk.blocks.0.norm1.weight": torch.zeros(96),
        "image_encoder.neck.convs.0.conv.weight": torch.zeros(256, 768, 1, 1),
        "maskmem_tpos_enc": torch.zeros(7, 1, 1, 64), "memory_encoder.out_proj.weight": torch.zeros(64, 256, 1, 1),
        "sam_mask_decoder.iou_token.weight": torch.zeros(1, 256),
    }  # fmt: skip
    return {"model": state | extra}


def slim(width, mlp):
    shapes = {key: shape for key, shape in sam_shapes("vit_b", 1024).items()}
    narrow = {toy_sams.SIZE.dim: width, 4 * toy_sams.SIZE.dim: mlp, 3 * toy_sams.SIZE.dim: 3 * width}
    encoder = "image_encoder."
    return toy_sams.hollow(
        {k: [narrow.get(n, n) if k.startswith(encoder) else n for n in s] for k, s in shapes.items()}
    )


RELATIVES = {
    "SAM2": (sam2, "SAM2, SAM2.1 or MedSAM2"),
    "SAM2.1": (lambda: sam2(no_obj_embed_spatial=torch.zeros(1, 64)), "SAM2, SAM2.1 or MedSAM2"),
    "SAM3": (lambda: {"model": {
        "detector.backbone.vision_backbone.trunk.pos_embed": torch.zeros(1, 577, 1024),
        "detector.backbone.vision_backbone.convs.0.conv_1x1.weight": torch.zeros(256, 1024, 1, 1),
        "tracker.maskmem_tpos_enc": torch.zeros(7, 1, 1, 64)}}, "SAM3"),
    "EfficientSAM": (lambda: {"model": {
        "image_encoder.pos_embed": torch.zeros(1, 197, 192),
        "image_encoder.blocks.0.mlp.fc1.weight": torch.zeros(768, 192),
        "prompt_encoder.bbox_top_left_embeddings.weight": torch.zeros(1, 256)}}, "EfficientSAM"),
    "EfficientViT-SAM": (lambda: {
        "image_encoder.backbone.stages.0.op_list.0.main.conv.weight": torch.zeros(32, 3, 3, 3),
        "image_encoder.neck.input_ops.0.op_list.0.conv.weight": torch.zeros(256, 512, 1, 1),
        "prompt_encoder.no_mask_embed.weight": torch.zeros(1, 256)}, "EfficientViT-SAM"),
    "SAM-Med2D": (lambda: {"model": toy_sams.sam(side=256) | toy_sams.adapters()}, "SAM-Med2D"),
    "SlimSAM-50": (lambda: slim(384, 1536), "SlimSAM"),
    "SlimSAM-77": (lambda: slim(168, 696), "SlimSAM"),
    "SlimSAM in Hugging Face's layout": (lambda: hf(slim(168, 696)), "SlimSAM"),
    "SlimSAM's states between": (lambda: toy_sams.sam() | {
        "image_encoder.blocks.0.attn.q.weight": torch.zeros(32, 32)}, "SlimSAM"),
    "LiteMedSAM": (lambda: toy_sams.sam("vit_t") | {
        "image_encoder.patch_embed.seq.0.c.weight": torch.zeros(32, 3, 1, 1)}, "LiteMedSAM"),
}  # fmt: skip


@pytest.mark.parametrize("relative", RELATIVES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_relatives_are_refused_by_name(relative, prefix, tmp_path):
    make, name = RELATIVES[relative]
    state = make()
    wrapped = "model" in state
    state = prefixed(prefix, state["model"] if wrapped else state)
    refused(saved(tmp_path / "sam_vit_b.pth", {"model": state} if wrapped else state), f"weights of .*{name}")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Sam2", "SAM2"),
        ("Sam2Video", "SAM2"),
        ("Sam3", "SAM3"),
        ("Sam3Video", "SAM3"),
        ("Sam3Tracker", "SAM3"),
    ],
)
def test_relatives_of_transformers_are_refused_by_name(model, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{model}Model"):
        pytest.skip(f"this transformers has no {model}Model")
    with torch.device("meta"):
        theirs = getattr(transformers, f"{model}Model")(
            getattr(transformers, f"{model}Config")()
        ).state_dict()
    path = saved(tmp_path / "a.pth", toy_sams.hollow({key: value.shape for key, value in theirs.items()}))
    refused(path, f"weights of {name}")


def refused(path, says):
    with pytest.raises(ValueError, match=says) as error:
        read_sam_checkpoint(path)
    text = str(error.value)
    assert str(path) in text
    assert text == sentence(error.value)
    return text


def test_names_the_nearest_architecture_and_the_first_tensors_that_differ(tmp_path):
    state = toy_sams.sam()
    gone = [key for key in state if ".mlp." in key and key.startswith("image_encoder")]
    for key in gone:
        del state[key]
    state["image_encoder.neck.0.weight"] = torch.zeros(1, 2)
    state["a.b"] = torch.zeros(1)
    text = refused(saved(tmp_path / "a.pth", state), "nearest is vit_b of SAM, but the file lacks ")
    assert f"lacks {', '.join(gone[:3])} and {len(gone) - 3} more" in text
    assert "and has image_encoder.neck.0.weight of shape (1, 2) (not (32, 32, 1, 1)) and holds a.b" in text
    words = refused(
        saved(tmp_path / "b.pth", {"head.weight": torch.zeros(2)}), "not one of SAM's vit_b, vit_l, "
    )
    assert "and holds head.weight" in words


TWICE = "image_encoder.neck.0.weight"
REFUSED = {
    "two states": (lambda s: {"model": s, "ema": dict(s)}, "two SAMs, under model and under ema"),
    "two prefixes": (lambda s: prefixed("module.", s) | {TWICE: s[TWICE]}, r"without the prefix 'module\.'"),
    "a tensor beside the prefix": (lambda s: prefixed("sam.", s) | {"w": torch.zeros(1)}, "holds w$"),
    "tied and different": (
        lambda s: hf(s) | {"prompt_encoder.shared_embedding.positional_embedding": torch.zeros(2, 16)},
        r"shared_embedding\.positional_embedding twice"),
    "a list": (lambda s: list(s.values()), "maps names to tensors"),
    "numbers": (lambda s: dict(enumerate(s.values())), "maps names to tensors"),
    "int8": (lambda s: s | {TWICE: torch.zeros(32, 32, 1, 1, dtype=torch.int8)}, rf"{TWICE} as torch\.int8"),
    "complex": (lambda s: s | {TWICE: torch.zeros(32, 32, 1, 1, dtype=torch.complex64)}, r"as torch\.complex64"),
    "float8": (lambda s: s | {TWICE: torch.zeros(32, 32, 1, 1).to(torch.float8_e4m3fn)}, r"as torch\.float8"),
    "sparse": (lambda s: s | {TWICE: torch.zeros(32, 32, 1, 1).to_sparse()}, r"torch\.sparse_coo"),
    "an encoder alone": (lambda s: {k: v for k, v in s.items() if k.startswith("image_")}, "lacks prompt_encoder"),
    "one number tracked": (lambda s: s | {"image_encoder.neck.1.num_batches_tracked": torch.tensor(1)}, "holds"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_in_one_sentence(kind, tmp_path):
    change, says = REFUSED[kind]
    refused(saved(tmp_path / "a.pth", change(toy_sams.sam())), says)


def test_refuses_a_torchscript_archive_a_model_and_an_empty_folder(tmp_path):
    linear = torch.nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(linear).save(tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "TorchScript archive")
    refused(
        saved(tmp_path / "model.pth", linear), r"pickled objects besides tensors \(torch\.nn\.modules\.linear"
    )
    refused(saved(tmp_path / "args.pth", {"model": toy_sams.sam(), "args": Path("a")}), r"\(pathlib\.")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"without model\.safetensors")


def test_a_state_dict_that_holds_itself_is_read(tmp_path):
    loop = {"model": toy_sams.sam()}
    loop["self"] = loop
    assert read_sam_checkpoint(saved(tmp_path / "a.pth", loop)).left_out == ("self",)


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
    assert "tensors used, 0 of them interpolated to 64 px" in capsys.readouterr().out
