"""SAM's checkpoints: the official format is read, everything else is refused in a sentence that helps."""

import hashlib
import io
import subprocess
import sys

import pytest
import torch

from aftersam.model.sam_checkpoint import DOWNLOADS, Download, read_sam_checkpoint, sam_shapes


def official(name="vit_b", dtype=torch.float32):
    """A state dict of SAM's names and full shapes; each tensor is one number expanded, so files stay small."""
    return {key: torch.full((), 0.5, dtype=dtype).expand(shape) for key, shape in sam_shapes(name).items()}


def saved(path, state):
    torch.save(state, path)
    return path


def test_modeling_loads_without_torchvision_or_the_package_itself():
    code = (
        "import sys\n"
        "from aftersam.model.segment_anything import segment_anything_modeling\n"
        "encoder = segment_anything_modeling('image_encoder')\n"
        "assert encoder.ImageEncoderViT.__name__ == 'ImageEncoderViT'\n"
        "assert segment_anything_modeling('image_encoder') is encoder\n"
        "assert not {'segment_anything', 'torchvision'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "parameters"), [("vit_b", 93_735_472), ("vit_l", 312_342_832), ("vit_h", 641_090_608)]
)
def test_shapes_are_the_official_ones(name, parameters):
    """Counts of parameters as published with the three models; the 256 beside them are the buffer of positions."""
    shapes = sam_shapes(name)
    assert sum(shape.numel() for shape in shapes.values()) == parameters + 256
    decoder = [key for key in shapes if key.startswith("mask_decoder.")]
    prompts = [key for key in shapes if key.startswith("prompt_encoder.")]
    assert (len(decoder), len(prompts)) == (120, 17)


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h", "vit_t"])
def test_reads_and_recognises_each_architecture(name, tmp_path):
    """MedSAM's published weights are a vit_b in the same format."""
    path = saved(tmp_path / "sam.pth", official(name) | {"pixel_mean": torch.zeros(3, 1, 1)})
    read = read_sam_checkpoint(path)
    assert read.name == name
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {key: value.shape for key, value in read.state.items() if key != "pixel_mean"} == sam_shapes(name)


def test_half_precision_weights_become_fp32(tmp_path):
    state = read_sam_checkpoint(saved(tmp_path / "half.pth", official(dtype=torch.float16))).state
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("mask_decoder.iou_token.weight"), "lacks mask_decoder.iou_token.weight"),
        (
            lambda s: s.update({"image_encoder.neck.0.weight": torch.zeros(2, 2)}),
            r"neck.0.weight of shape \(2, 2\)",
        ),
        (lambda s: s.update({"adapter.weight": torch.zeros(2)}), "holds adapter.weight"),
        (lambda s: s.update({"pixel_mean": torch.zeros(4)}), "holds pixel_mean"),
        (
            lambda s: s.update({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 99)}),
            "not one of SAM's vit_b",
        ),
        (lambda s: s.update({"epoch": 3}), "maps names to tensors"),
        (lambda s: s.clear(), "not one of SAM's vit_b"),
    ],
    ids=["missing", "shape", "unknown", "buffer", "width", "no tensor", "empty"],
)
def test_refuses_other_state_dicts(change, says, tmp_path):
    state = official()
    change(state)
    path = saved(tmp_path / "foreign.pth", state)
    with pytest.raises(ValueError, match=says) as error:
        read_sam_checkpoint(path)
    assert "foreign.pth" in str(error.value)
    assert "\n" not in str(error.value)


class Harmful:
    ran = False

    def __reduce__(self):
        return setattr, (Harmful, "ran", True)


def test_refuses_pickled_code_without_running_it(tmp_path):
    path = saved(tmp_path / "harmful.pth", official() | {"extra": Harmful()})
    with pytest.raises(ValueError, match=r"harmful\.pth holds pickled objects"):
        read_sam_checkpoint(path)
    assert not Harmful.ran


@pytest.mark.parametrize("kind", ["cut", "flipped", "text", "empty"])
def test_refuses_damaged_and_foreign_files(kind, tmp_path):
    buffer = io.BytesIO()
    torch.save(official(), buffer)
    whole = buffer.getvalue()
    content = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:2] + bytes(len(whole) // 2) + whole[2 + len(whole) // 2 :],
        "text": b"<html>404 not found</html>",
        "empty": b"",
    }[kind]
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pth is (truncated|not a PyTorch)") as error:
        read_sam_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"), [("vitb", "did you mean 'vit_b'"), ("no/such.pth", "does not exist")]
)
def test_a_name_that_is_no_file_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        read_sam_checkpoint(name)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A stand-in for the official site, whose vit_b is a small file; the cache is empty."""
    path = saved(tmp_path / "sam_vit_b.pth", official())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(DOWNLOADS, "vit_b", Download(path.as_uri(), digest))
    monkeypatch.setenv("AFTERSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return path


def test_downloads_once_to_the_cache(site, tmp_path):
    first = read_sam_checkpoint("vit_b", progress=False)
    assert (first.name, first.sha256) == ("vit_b", DOWNLOADS["vit_b"].sha256)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["sam_vit_b.pth"]
    site.unlink()
    assert read_sam_checkpoint("vit_b", progress=False).sha256 == first.sha256


def test_a_download_that_is_not_the_official_file_leaves_nothing(site, tmp_path):
    site.write_bytes(site.read_bytes()[:-1])
    with pytest.raises(OSError, match="SHA-256"):
        read_sam_checkpoint("vit_b", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_says_where_to_put_the_file(site, tmp_path):
    site.unlink()
    with pytest.raises(OSError, match=r"cannot download .*put it at .*sam_vit_b\.pth"):
        read_sam_checkpoint("vit_b", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []
