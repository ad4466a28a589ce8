"""The temperature of a run: found where it is known, kept in run.json, and no worse than none on the scans it is of."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aftersam import load
from aftersam.export import main as export
from aftersam.files import read_json, write_json
from aftersam.inference.planes import Plane
from aftersam.model.run_folder import read_run
from aftersam.train import main
from aftersam.training import validation
from toy_scans import write_scans


def found(monkeypatch, logits, labels):
    """The calibration of a model that gives `logits` (D, K+1, H, W) where `labels` (D, H, W) are right."""
    case = SimpleNamespace(id="a", hu=np.zeros(labels.shape), box=(0, 1, 0, 1), labels=labels)
    monkeypatch.setattr(validation, "output_planes", lambda *_, **__: iter([Plane(one) for one in logits]))
    return validation.calibrate(
        None,
        [case],
        None,
        precision=torch.float32,
        stored={},
        progress=lambda _: None,
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(monkeypatch, temperature):
    """Labels drawn from softmax(z / T): the logits z are that much too sure."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4, 3, 120, 120)) * temperature
    logits[:, 0] -= temperature
    shares = torch.from_numpy(logits / temperature).softmax(1).numpy().cumsum(1)
    labels = (rng.random((4, 1, 120, 120)) > shares).sum(1).clip(max=2)
    result = found(monkeypatch, torch.from_numpy(logits).float(), labels)
    assert result.temperature == pytest.approx(temperature, rel=0.1)
    before, after = result.ece
    assert after < 0.02
    assert before == pytest.approx(after, abs=1e-6) if temperature == 1 else before > 3 * after


def test_the_error_is_that_of_the_formula(monkeypatch):
    """Two kinds of voxels: 0.6 sure and right half of the time, 0.9 sure and right always."""
    p = np.array([[0.4, 0.6], [0.1, 0.9]])[np.arange(200) % 2]  # (voxels, classes)
    labels = np.where(np.arange(200) % 4 == 0, 0, 1)
    plane = torch.from_numpy(np.log(p).T.reshape(1, 2, 10, 20)).float()
    spread = plane.repeat_interleave(2, -1).repeat_interleave(2, -2)  # every second voxel counts
    shown = labels.reshape(1, 10, 20).repeat(2, -1).repeat(2, -2)
    result = found(monkeypatch, spread, shown)
    assert result.ece[0] == pytest.approx((abs(0.6 - 0.5) + abs(0.9 - 1)) / 2, abs=1e-6)


def test_without_a_voxel_that_is_not_plainly_background_there_is_nothing_to_fit(monkeypatch):
    logits = torch.zeros(2, 3, 8, 8)
    logits[:, 0] = 20.0
    assert found(monkeypatch, logits, np.zeros((2, 8, 8), int)) == (1.0, None)


def test_a_run_keeps_its_temperature_and_a_resumed_one_the_same(tmp_path, capsys):
    data, run = write_scans(tmp_path / "scans"), tmp_path / "run"
    command = ["--data", str(data), "--output", str(run), "--device", "cpu", "--precision", "fp32"]
    more = ["--preset", "tiny", "--image-size", "48", "--num-blocks", "1", "--max-steps", "4"]
    assert main([*command, *more, "--ce-foreground-weight", "50"]) == 0
    facts = read_json(run / "run.json")
    assert facts["ece"][1] <= facts["ece"][0]
    assert read_run(run)[1].temperature == facts["temperature"]
    assert f"temperature {facts['temperature']:.3g}: calibration error" in capsys.readouterr().out
    assert main([*command, "--resume"]) == 0
    assert read_json(run / "run.json") == facts
    write_json(run / "run.json", facts | {"temperature": 2.0})
    found = {which: load(run, checkpoint=which, device="cpu").temperature for which in ("best", "last")}
    assert found == {"best": 2.0, "last": 1.0}  # it was fitted to the best weights
    for which in found:
        flags = ["-o", str(tmp_path / which), "--format", "weights", "--checkpoint", which]
        assert export(["-m", str(run), *flags]) == 0
        assert load(tmp_path / which, device="cpu").temperature == found[which]
        assert ("ece" in read_json(tmp_path / which / "run.json")) == (which == "best")
