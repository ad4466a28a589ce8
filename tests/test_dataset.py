"""Layouts, splits, cache, slice groups and transforms: what a training group is made of."""

import dataclasses
import json
import re
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aftersam.check import CaseReport, needs, slices_per_second, step_seconds
from aftersam.check import main as check_main
from aftersam.config import DataConfig, preset
from aftersam.data.augment import augment
from aftersam.data.cache import cache_cases
from aftersam.data.dataset import find_dataset, median_spacing, mirror_pairs, split
from aftersam.data.phantom import write_dataset
from aftersam.data.slice_group import SliceGroups
from aftersam.data.transforms import body_box, preprocess, resample
from aftersam.data.volume import AIR_HU, read_image, read_labels
from aftersam.data.windows import slice_group, window_crops
from aftersam.model.layers import normalise

REAL = Path(__file__).parents[2] / "shared" / "data"


def save(path, shape=(6, 5, 4), value=0, spacing=(2.0, 2.0, 3.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full(shape, value, np.int16)
    array[0] -= 1000 if value == 0 and "label" not in str(path) and "GT" not in path.name else 0
    array[1:3, 1:3, 1:3] += 1
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


def nnunet(root):
    for case in "ab":
        save(root / "imagesTr" / f"{case}_0000.nii.gz")
        save(root / "labelsTr" / f"{case}.nii.gz")
    (root / "dataset.json").write_text(json.dumps({"name": "N", "labels": {"background": 0, "liver": 1}}))


def decathlon(root):
    for case in "ab":
        save(root / "imagesTr" / f"{case}.nii.gz")
        save(root / "labelsTr" / f"{case}.nii.gz")
    training = [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in "ab"]
    (root / "dataset.json").write_text(
        json.dumps({"name": "M", "labels": {"0": "background", "1": "liver"}, "training": training})
    )


def segthor(root):
    for number in (1, 2):
        folder = root / f"Patient_{number:02d}"
        save(folder / f"{folder.name}.nii.gz")
        save(folder / "GT.nii.gz")


def plain(root):
    for case in "ab":
        save(root / "images" / f"{case}.nii.gz")
        save(root / "labels" / f"{case}.nii.gz")


@pytest.mark.parametrize("layout", [nnunet, decathlon, segthor, plain], ids=lambda f: f.__name__)
def test_layouts_are_found(tmp_path, layout):
    layout(tmp_path)
    dataset = find_dataset(tmp_path)
    assert len(dataset.cases) == 2
    assert all(case.image.is_file() and case.label.is_file() for case in dataset.cases)
    assert 1 in dataset.labels
    if layout in (nnunet, decathlon):
        assert dataset.labels == {1: "liver"}


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        find_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match=str(tmp_path)):
        find_dataset(tmp_path)


def test_splits_are_seeded_written_and_read_back(tmp_path):
    for case in "abcdefg":
        save(tmp_path / "images" / f"{case}.nii.gz")
        save(tmp_path / "labels" / f"{case}.nii.gz")
    dataset = find_dataset(tmp_path)
    folds = [split(dataset, fold, 0) for fold in range(5)]
    assert sorted(i for _, held in folds for i in held) == list("abcdefg")
    assert all(not set(train) & set(held) for train, held in folds)
    assert split(dataset, 0, 0) == folds[0] != split(dataset, 0, 1)
    split(dataset, 0, 0, write_to=tmp_path / "splits_final.json")
    assert split(dataset, 0, 1) == folds[0]  # the file wins
    with pytest.raises(ValueError, match="fold is 9"):
        split(dataset, 9, 0)


def test_median_spacing_and_mirror_pairs(tmp_path):
    for case, mm in (("a", 1.0), ("b", 2.0), ("c", 5.0)):
        save(tmp_path / "images" / f"{case}.nii.gz", spacing=(1, mm, 3))
        save(tmp_path / "labels" / f"{case}.nii.gz", spacing=(1, mm, 3))
    assert median_spacing(find_dataset(tmp_path).cases) == (3.0, 2.0, 1.0)
    assert mirror_pairs({1: "heart", 2: "lung_left", 3: "lung_right"}) == {2: 3, 3: 2}
    assert mirror_pairs({3: "RightParotid", 4: "LeftParotid"}) == {3: 4, 4: 3}
    with pytest.raises(ValueError, match="kidney_L"):
        mirror_pairs({1: "kidney_L"})


@settings(deadline=None)
@given(depth=st.integers(1, 60), num=st.integers(1, 12), stride=st.integers(1, 4), data=st.data())
def test_groups_are_centred_and_clamped(depth, num, stride, data):
    centre = data.draw(st.integers(0, depth - 1))
    group = slice_group(centre, depth, num, stride)
    assert len(group) == num
    assert group[num // 2] == centre
    assert (np.diff(group) >= 0).all()
    expected = [min(max(centre + stride * (i - num // 2), 0), depth - 1) for i in range(num)]
    assert group.tolist() == expected


def test_even_groups_keep_index_half():
    assert slice_group(5, 20, 4).tolist() == [3, 4, 5, 6]
    assert slice_group(5, 20, 9).tolist() == list(range(1, 10))
    assert slice_group(0, 3, 5).tolist() == [0, 0, 0, 1, 2]


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    spacing=st.tuples(*[st.floats(0.5, 5)] * 3),
    new=st.tuples(*[st.floats(0.5, 5)] * 3),
)
def test_resampling_keeps_the_extent_and_constants(shape, spacing, new):
    out = resample(np.full(shape, 37, np.int16), spacing, new)
    assert (out == 37).all()
    for n, m, old, wanted in zip(out.shape, shape, spacing, new, strict=True):
        assert n == 1 or abs(n * wanted - m * old) <= wanted / 2 + 1e-3 * m
    labels = resample(
        np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8), spacing, new, labels=True
    )
    assert labels.shape == out.shape
    assert labels.max() < 4


def test_resampling_a_ramp_is_linear():
    ramp = np.arange(20, dtype=np.float32)[:, None, None] * np.ones((1, 3, 3), np.float32)
    fine = resample(ramp, (2.0, 1.0, 1.0), (1.0, 1.0, 1.0))[:, 0, 0]
    np.testing.assert_allclose(fine[2:-2], (np.arange(40) + 0.5)[2:-2] / 2 - 0.5, atol=1e-5)


def test_windows_become_sams_normalised_channels():
    hu = torch.tensor([[-2000.0, -160.0, 40.0, 240.0, 3000.0]])
    image = normalise(hu, ((-160, 240), (-160, 240), (-160, 240)))
    expected = (torch.tensor([0, 0, 0.5, 1, 1]) * 255 - 123.675) / 58.395
    torch.testing.assert_close(image[0, 0], expected)
    assert image.shape == (3, 1, 5)
    torch.testing.assert_close(normalise(hu, ((-160, 240),)), image)
    unit = normalise(hu, ((-160, 240),), unit=True)  # MedSAM's weights were trained on [0, 1]
    torch.testing.assert_close(unit[2, 0], torch.tensor([0, 0, 0.5, 1, 1]))
    with pytest.raises(ValueError, match="1 or 3"):
        normalise(hu, ((0, 1), (0, 1)))


def test_the_body_is_found_beside_a_table():
    array = np.full((4, 60, 80), -1000, np.int16)
    array[:, 20:45, 15:60] = 30
    array[:, 52, 5:75] = 200  # the table's shell
    top, bottom, left, right = body_box(array, margin=0)
    assert (top, left) == (20, 15)
    assert (bottom, right) == (45, 60)
    assert body_box(np.full((2, 6, 7), -1000, np.int16)) == (0, 6, 0, 7)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    write_dataset(root / "scans", cases=2, seed=0)
    dataset = find_dataset(root / "scans")
    ids = [case.id for case in dataset.cases]
    return (
        dataset,
        cache_cases(dataset, ids, preset("tiny").data, root / "cache", training=ids),
        root / "cache",
    )


def test_the_cache_is_found_again_and_made_anew_for_new_content(cached):
    dataset, cases, folder = cached
    ids = [case.id for case in dataset.cases]
    before = sorted(p.name for p in folder.iterdir())
    cache_cases(dataset, ids, preset("tiny").data, folder, training=ids)
    assert sorted(p.name for p in folder.iterdir()) == before
    cache_cases(
        dataset,
        ids,
        dataclasses.replace(preset("tiny").data, spacing_mm=(5.0, 4.0, 4.0)),
        folder,
        training=ids,
    )
    assert len(list(folder.iterdir())) == 2 * len(before)
    case = cases[ids[0]]
    assert case.hu.shape == case.labels.shape == case.shape
    assert not case.hu.flags.writeable


def groups(cached, seed=0, model=None, **data):
    config = preset("tiny")
    return SliceGroups(
        list(cached[1].values()),
        model=dataclasses.replace(config.model, **(model or {})),
        data=dataclasses.replace(config.data, **data),
        seed=seed,
        label_swap={4: 5, 5: 4},
    )


def test_a_group_is_a_function_of_seed_epoch_and_case(cached):
    everything = {
        "augmentation": ("elastic", "affine", "intensity", "noise", "mirror"),
        "augmentation_probability": 1.0,
    }
    one, again = groups(cached, **everything)[(3, 1)], groups(cached, **everything)[(3, 1)]
    assert torch.equal(one["hu"], again["hu"])
    assert torch.equal(one["labels"], again["labels"])
    assert one["hu"].shape == one["labels"].shape == (3, 96, 96)
    assert (one["hu"].dtype, one["labels"].dtype) == (torch.float32, torch.int64)
    assert not torch.equal(one["hu"], groups(cached, **everything)[(4, 1)]["hu"])
    assert not torch.equal(one["hu"], groups(cached, seed=1, **everything)[(3, 1)]["hu"])


def test_foreground_sampling_finds_small_organs(cached):
    biased = groups(cached, foreground_sampling=1.0)
    assert all(biased[(epoch, 0)]["labels"][1].any() for epoch in range(20))


def test_a_stem_gets_each_slice_between_those_next_to_it(cached):
    one, three = (groups(cached, model={"stem_slices": s, "slice_stride": 2}) for s in (1, 3))
    scan = three.cached[0]
    for epoch in range(8):
        group, thick = one[epoch, 0], three[epoch, 0]
        assert thick["hu"].shape == (3, 3, *group["hu"].shape[1:])
        assert torch.equal(thick["hu"][:, 1], group["hu"])
        assert torch.equal(thick["labels"], group["labels"])
    depth = scan.shape[0]
    everything = window_crops(scan.hu, range(depth), [(0, 0)], 48, AIR_HU, stem_slices=3)
    assert torch.equal(everything[1:, 0], everything[:-1, 1])
    assert torch.equal(everything[:-1, 2], everything[1:, 1])
    assert torch.equal(everything[0, 0], everything[0, 1])  # beyond the ends the nearest again
    assert torch.equal(everything[-1, 2], everything[-1, 1])


def test_groups_cost_milliseconds(cached):
    everything = ("elastic", "affine", "intensity", "noise")
    loader = groups(cached, augmentation=everything, augmentation_probability=1.0)
    loader[(0, 0)]
    began = time.perf_counter()
    for epoch in range(10):
        loader[(epoch, 0)]
    assert (time.perf_counter() - began) / 10 < 0.15  # a few ms alone; the bound is for a busy machine


def test_mirroring_swaps_the_sides():
    images = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    labels = np.zeros((1, 4, 6), np.int64)
    labels[0, 1, 0], labels[0, 2, 5] = 4, 5
    config = DataConfig(augmentation=("mirror",), augmentation_probability=1.0)
    flipped, swapped = augment(images, labels, np.random.default_rng(0), config, {4: 5, 5: 4})
    assert np.array_equal(flipped, images[..., ::-1])
    assert swapped[0, 1, 5] == 5
    assert swapped[0, 2, 0] == 4


def test_one_elastic_field_serves_the_whole_group():
    images = np.tile(np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32), (3, 1, 1))
    labels = np.tile((images[:1] > 1).astype(np.int64), (3, 1, 1))
    config = DataConfig(augmentation=("elastic",), augmentation_probability=1.0)
    moved, moved_labels = augment(images, labels, np.random.default_rng(0), config, {})
    assert not np.allclose(moved, images)
    assert np.array_equal(moved[0], moved[2])
    assert np.array_equal(moved_labels[0], moved_labels[2])


def test_bad_labels_end_the_preprocessing_by_name(tmp_path):
    nnunet(tmp_path)
    array = np.zeros((6, 5, 4), np.uint8)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 3, 1])), tmp_path / "labelsTr" / "b.nii.gz")
    dataset = find_dataset(tmp_path)
    config = DataConfig(spacing_mm="native")
    with pytest.raises(ValueError, match=r"b\.nii\.gz is empty"):
        cache_cases(dataset, ["a", "b"], config, tmp_path / "cache", training=["a"])
    nib.save(nib.Nifti1Image(array + 3, np.diag([2.0, 2, 3, 1])), tmp_path / "labelsTr" / "b.nii.gz")
    with pytest.raises(ValueError, match="label 3"):
        cache_cases(dataset, ["a", "b"], config, tmp_path / "cache", training=["a"])


def test_check_reports_each_case_and_what_is_wrong(tmp_path, capsys):
    nnunet(tmp_path)
    assert check_main([str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 scans usable" in said
    loaded, wanted = map(
        float, re.search(r"0 workers load (\S+) slices a second, the model takes (\S+)", said).groups()
    )
    assert loaded > 0
    assert wanted > 0
    save(tmp_path / "labelsTr" / "b.nii.gz", shape=(6, 5, 3))
    assert check_main([str(tmp_path)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "b.nii.gz" in out
    assert "1 of 2 scans usable" in out
    assert check_main([str(tmp_path / "none")]) == 2


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


@pytest.mark.parametrize("name", ["OpenKBP7", "TSThoraxCTA", "TSExampleAbdomen"])
def test_real_scans_load_and_preprocess(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"needs the real CT set {name} beside the checkout")
    dataset = find_dataset(REAL / name)
    case = dataset.cases[0]
    image = read_image(case.image)
    labels = read_labels(case.label, like=image)
    assert set(np.unique(labels.array)) == {0, *dataset.labels}
    ready = preprocess(image, (2.5, 3.0, 3.0))
    assert ready.array.dtype == np.int16
    top, bottom, left, right = ready.box
    assert 0 <= top < bottom <= ready.array.shape[1]
    assert 0 <= left < right <= ready.array.shape[2]


def test_what_a_run_needs_grows_with_the_work():
    reports = [CaseReport("a", (100, 80, 90), (2.5, 3.0, 3.0), (-1000.0, 1000.0), (1,))]
    small, paper = (needs(reports, preset(name), 4) for name in ("small", "paper"))
    assert paper["step_tflop"] > 100 * small["step_tflop"] > 0
    assert paper["memory_gb"] > 10 * small["memory_gb"] > 0
    assert small["steps"] == preset("small").train.max_steps
    assert paper["steps"] == 550
    assert step_seconds(preset("tiny"), 4, "cpu") > 0
