"""Exported graphs: equal to eager at any batch, of ops that every torch and ONNX runtime has, whole or not there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import aftersam
from aftersam.config import Config, ModelConfig, to_dict
from aftersam.data.windows import slice_group
from aftersam.export import main, parts, preprocessing
from aftersam.files import read_tensors, write_json
from aftersam.inference.inputs import Scan
from aftersam.inference.sliding import stream_logits
from aftersam.model.aftersam import GroupDecoder, SliceEncoder
from aftersam.model.build import build_aftersam
from aftersam.training.checkpoint import save_weights

LABELS = {1: "heart", 2: "aorta"}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def write_run(folder, **changes):
    """A run's folder of a random model with LoRA, as training leaves it."""
    keys = {
        "image_encoder": "tiny", "image_size": 40, "num_slices": 3, "num_blocks": 1, "num_heads": 4,
        "fusion_init": "xavier", "encoder": "lora", "fusion_weights": "lora", "output_stride": 1,
    }  # fmt: skip
    config = Config(model=ModelConfig(**(keys | changes)))
    torch.manual_seed(0)
    model = build_aftersam(config.model, num_classes=len(LABELS) + 1)
    for name, parameter in model.named_parameters():
        if "lora" in name or "rel_pos" in name:
            parameter.data.normal_(std=0.05)
    torch.nn.init.zeros_(model.decoder.class_bias)  # untrained, it would leave nothing but background
    folder.mkdir()
    write_json(folder / "config.json", to_dict(config))
    write_json(folder / "run.json", {"labels": LABELS, "spacing_mm": [2.5, 3.0, 3.0]})
    save_weights(folder / "best.safetensors", model, {})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")  # 5 × 5 tokens in windows of 6: one is padded


@torch.no_grad()
def test_a_stem_of_several_slices_is_an_axis_of_the_input(tmp_path):
    segmenter = aftersam.load(write_run(tmp_path / "run", encoder="full", stem_slices=3), device="cpu")
    program = parts(segmenter)["encoder"].program
    hu = 500 * torch.randn(3, 3, 40, 40)
    for ours, eager in zip(program.module()(hu), SliceEncoder(segmenter.model)(hu), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert preprocessing(segmenter)["stem_slices"] == 3


@pytest.fixture(scope="module")
def exported(run):
    folder = run.parent / "exported"
    assert main(["-m", str(run), "-o", str(folder)]) == 0
    return folder


def run_torch(path, *inputs):
    outputs = torch.export.load(path).module()(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run_onnx(path, *inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return tuple(map(torch.from_numpy, found))


RUNTIMES = {"pt2": run_torch, "onnx": run_onnx}


@pytest.mark.parametrize("ending", RUNTIMES)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_both_parts_equal_eager(run, exported, ending, batch):
    segmenter = aftersam.load(run, device="cpu")
    generator = torch.Generator().manual_seed(batch)
    hu = 500 * torch.randn(batch, 40, 40, generator=generator)
    expected = SliceEncoder(segmenter.model)(hu)
    found = RUNTIMES[ending](exported / f"encoder.{ending}", hu)
    assert len(found) == len(expected) == 4
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    embedding, *skips = expected
    groups = torch.randn(batch, 3, *embedding.shape[1:], generator=generator)
    (logits,) = RUNTIMES[ending](exported / f"decoder.{ending}", groups, *skips)
    assert logits.shape == (batch, 3, 40, 40)
    eager = GroupDecoder(segmenter.model, 1)(groups, *skips)
    torch.testing.assert_close(logits, eager, rtol=1e-4, atol=1e-4)
    assert eager.std() > 1e-3


def test_the_parts_and_the_json_suffice_to_predict(run, exported):
    """A caller with onnxruntime and preprocessing.json alone gets what streaming gives."""
    facts = json.loads((exported / "preprocessing.json").read_text())
    assert facts["labels"] == {"0": "background", "1": "heart", "2": "aorta"}
    assert facts["spacing_mm"] == [2.5, 3.0, 3.0]
    size = facts["image_size"]
    hu = np.random.default_rng(0).integers(-1000, 1000, (4, size, size)).astype(np.int16)
    embedding, *skips = run_onnx(exported / "encoder.onnx", torch.from_numpy(hu).float())
    groups = [slice_group(d, 4, facts["num_slices"], facts["slice_stride"]) for d in range(4)]
    (logits,) = run_onnx(exported / "decoder.onnx", torch.stack([embedding[g] for g in groups]), *skips)
    logits = F.interpolate(logits, size=(size, size), mode="bilinear")
    segmenter = aftersam.load(run, device="cpu")
    ours = stream_logits(segmenter.model, Scan(hu, (0, size, 0, size)), segmenter.config.model)
    ours = torch.stack([plane.logits for plane in ours])
    torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-4)


def test_the_graphs_need_nothing_of_this_package(exported):
    code = f"""
import sys, torch
for part in ("encoder", "decoder"):
    program = torch.export.load(f"{exported}/{{part}}.pt2")
    names = {{str(node.target) for node in program.graph.nodes if node.op == "call_function"}}
    assert not [name for name in names if "axial_fusion" in name], names
assert not {{"axial_fusion", "aftersam"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    import onnx

    for part in ("encoder", "decoder"):
        model = onnx.load(exported / f"{part}.onnx")
        onnx.checker.check_model(model)
        assert {node.domain for node in model.graph.node} == {""}  # ONNX's own operators
        assert not model.functions


@pytest.mark.long
def test_torch_compiles_the_graphs_ahead_of_time(exported, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    code = f"""
import torch
program = torch.export.load("{exported}/decoder.pt2")
package = torch._inductor.aoti_compile_and_package(program, package_path="{tmp_path}/decoder_aot.pt2")
inputs = [torch.randn(3, *i.shape[1:]) for i in program.example_inputs[0]]
ours = torch._inductor.aoti_load_package(package)(*inputs)
torch.testing.assert_close(ours, program.module()(*inputs), rtol=1e-4, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_weights_alone_are_the_run_in_half_precision(run, tmp_path):
    handed = tmp_path / "handed"
    assert main(["-m", str(run), "-o", str(handed), "--format", "weights"]) == 0
    assert {path.name for path in handed.iterdir()} == {"config.json", "run.json", "best.safetensors"}
    assert (handed / "best.safetensors").stat().st_mode & 0o777 == (
        handed / "run.json"
    ).stat().st_mode & 0o777
    (exact, _), (found, _) = (read_tensors(folder / "best.safetensors") for folder in (run, handed))
    assert exact.keys() == found.keys()
    for name, value in exact.items():
        assert torch.equal(found[name], value.half() if value.is_floating_point() else value)
    hu = 300 * torch.randn(1, 3, 40, 40)
    ours, theirs = (aftersam.load(folder, device="cpu").model(hu) for folder in (handed, run))
    assert (ours - theirs).norm() < 2e-3 * theirs.norm()


@pytest.mark.parametrize("format", ["torch", "onnx", "weights"])
def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_nothing(run, tmp_path, format):
    code = f"""
import resource, sys
from aftersam.export import main
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
sys.exit(main(["-m", "{run}", "-o", "{tmp_path}/out", "--format", "{format}"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENV)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"aftersam.export: {tmp_path}/out")
    assert "could not be written: " in line
    assert ".aftersam-" not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "more", "says"),
    [
        ({"prompts": "box"}, [], "prompts=box"),
        (None, [], "config.json"),
        ({}, ["exists"], "exists already"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, capsys, changes, more, says):
    model, output = tmp_path / "run", tmp_path / "exported"
    if changes is not None:
        write_run(model, **changes)
    if more:
        output.mkdir()
    before = sorted(Path(tmp_path).iterdir())
    assert main(["-m", str(model), "-o", str(output)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("aftersam.export: ")
    assert len(error.splitlines()) == 1
    assert says in error
    assert sorted(Path(tmp_path).iterdir()) == before


def test_onnx_without_its_package_is_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aftersam.export.find_spec", lambda name: None)
    assert main(["-m", str(run), "-o", str(tmp_path / "exported")]) == 2
    assert "aftersam[export]" in capsys.readouterr().err
