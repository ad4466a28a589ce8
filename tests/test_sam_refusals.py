"""Files that are no SAM, or a SAM that has no place here, are refused in one sentence that names them."""

import warnings
from pathlib import Path

import pytest
import torch

import toy_sams
from aftersam.errors import sentence
from aftersam.model.sam_checkpoint import read_sam_checkpoint, sam_shapes
from toy_sams import folder, halves, hugging_face, in_safetensors, prefixed, saved


@pytest.fixture(autouse=True)
def small(monkeypatch):
    toy_sams.make_small(monkeypatch)
    yield
    sam_shapes.cache_clear()


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
    "SlimSAM in Hugging Face's layout": (lambda: hugging_face(slim(168, 696)), "SlimSAM"),
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
TIED = (("", "image_embedding"), ("prompt_encoder.", "embedding"))
REFUSED = {
    "two states": (lambda s: {"model": s, "ema": dict(s)}, "two state dicts of SAM, under model and under ema"),
    "two prefixes": (lambda s: prefixed("module.", s) | {TWICE: s[TWICE]}, r"without the prefix 'module\.'"),
    "a tensor beside the prefix": (lambda s: prefixed("sam.", s) | {"w": torch.zeros(1)}, "holds w$"),
    "tied and different": (
        lambda s: hugging_face(s) | {"prompt_encoder.shared_embedding.positional_embedding": torch.zeros(2, 16)},
        r"shared_embedding\.positional_embedding twice"),
    "a list": (lambda s: list(s.values()), "maps names to tensors"),
    "numbers": (lambda s: dict(enumerate(s.values())), "maps names to tensors"),
    "int8": (lambda s: s | {TWICE: torch.zeros(32, 32, 1, 1, dtype=torch.int8)}, rf"{TWICE} as torch\.int8"),
    "complex": (lambda s: s | {TWICE: torch.zeros(32, 32, 1, 1, dtype=torch.complex64)}, r"as torch\.complex64"),
    "float8": (lambda s: s | {TWICE: torch.zeros(32, 32, 1, 1).to(torch.float8_e4m3fn)}, r"as torch\.float8"),
    "sparse": (lambda s: s | {TWICE: torch.zeros(32, 32, 1, 1).to_sparse()}, r"torch\.sparse_coo"),
    "no values": (lambda s: s | {TWICE: torch.empty(32, 32, 1, 1, device="meta")}, rf"{TWICE} without its values"),
    "tied and without values": (
        lambda s: hugging_face(s) | dict.fromkeys((f"{p}shared_{q}.positional_embedding" for p, q in TIED),
                                                  torch.empty(2, 16, device="meta")), "twice"),
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
    med2d = {"model": toy_sams.sam(side=256) | toy_sams.adapters()}  # as SAM-Med2D's trainer saves it
    with_optimiser = med2d | {"optimizer": torch.optim.Adam(linear.parameters())}
    refused(
        saved(tmp_path / "med2d.pth", with_optimiser), r"pickled objects besides tensors \(torch\.optim\."
    )
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"without model\.safetensors")


def test_a_state_dict_that_holds_itself_is_read(tmp_path):
    loop = {"model": toy_sams.sam()}
    loop["self"] = loop
    assert read_sam_checkpoint(saved(tmp_path / "a.pth", loop)).left_out == ("self",)


def test_shards_that_lack_one_or_belong_to_two_models_are_refused(tmp_path):
    path = folder(
        tmp_path / "sam", halves(toy_sams.sam(), "model-0000{}-of-00002.safetensors"), in_safetensors
    )
    kept = path / "model-00001-of-00002.safetensors"
    (path / "model-00001-of-00003.safetensors").write_bytes(kept.read_bytes())
    refused(path, "is not a shard of the other files")
    for shard in path.glob("*-of-*.safetensors"):
        if shard != kept:
            shard.unlink()
    refused(path, "the file lacks .* and .* more")
