"""What aftersam.check says of a data set and of a run on it."""

import dataclasses
import re
import time

from aftersam.check import CaseReport, main, needs, slices_per_second, step_seconds
from aftersam.config import preset
from aftersam.data.dataset import find_dataset
from aftersam.data.slice_group import SliceGroups
from toy_files import nnunet, save


def test_check_reports_each_case_and_what_is_wrong(tmp_path, capsys):
    nnunet(tmp_path)
    assert main([str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 scans usable" in said
    loaded, wanted = map(
        float,
        re.search(
            r"loading gives (\S+) slices/s with 0 worker processes; training takes (\S+)", said
        ).groups(),
    )
    assert loaded > 0
    assert wanted > 0
    save(tmp_path / "labelsTr" / "b.nii.gz", shape=(6, 5, 3))
    assert main([str(tmp_path)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "b.nii.gz" in out
    assert "1 of 2 scans usable" in out
    assert main([str(tmp_path / "none")]) == 2


def test_a_bad_label_of_a_set_that_names_no_organs_costs_its_case_alone(tmp_path, capsys):
    nnunet(tmp_path)
    (tmp_path / "dataset.json").unlink()
    for old, new in (("imagesTr", "images"), ("labelsTr", "labels")):
        (tmp_path / old).rename(tmp_path / new)
    (tmp_path / "labels" / "b.nii.gz").write_bytes(b"no scan")
    assert main([str(tmp_path)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "b.nii.gz is truncated or damaged" in out
    assert "1 of 2 scans usable" in out


def test_loading_is_measured_with_nothing_to_wait_for(tmp_path, monkeypatch):
    """A loader that sleeps 50 ms a group gives its 5 slices at less than 100 a second, and workers give more."""
    nnunet(tmp_path)
    dataset = find_dataset(tmp_path)
    item = SliceGroups.__getitem__

    def slow(self, index):
        time.sleep(0.05)
        return item(self, index)

    monkeypatch.setattr(SliceGroups, "__getitem__", slow)
    config = preset("small")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, augmentation=()))
    ids = [case.id for case in dataset.cases]
    alone = slices_per_second(dataset, ids, config, seconds=0.3)
    assert 0 < alone < 100
    helped = dataclasses.replace(config, train=dataclasses.replace(config.train, num_workers=2))
    assert slices_per_second(dataset, ids, helped, seconds=0.6) > 1.2 * alone


def test_what_a_run_needs_grows_with_the_work():
    reports = [CaseReport("a", (100, 80, 90), (2.5, 3.0, 3.0), (-1000.0, 1000.0), (1,))]
    small, paper = (needs(reports, preset(name), 4) for name in ("small", "paper"))
    assert paper.step_tflop > 100 * small.step_tflop > 0
    assert paper.memory_gb > 10 * small.memory_gb > 0
    assert small.steps == preset("small").train.max_steps
    assert paper.steps == 550
    assert step_seconds(preset("tiny"), 4, "cpu") > 0
