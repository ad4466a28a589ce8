"""The accuracy table: every kind of row on toy scans, finished rows kept, masks from elsewhere in their place."""

import dataclasses
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from aftersam.config import preset
from aftersam.data.cache import cache_cases
from aftersam.data.dataset import find_dataset
from aftersam.data.phantom import LABELS, make_phantom
from aftersam.model.build import build_image_encoder
from aftersam.model.mask_decoder import BACKGROUND_LEAD
from aftersam.training.losses import segmentation_loss
from benchmarks import accuracy as accuracy_module
from benchmarks import conventions, figure
from benchmarks.accuracy import main
from benchmarks.accuracy_systems import SYSTEMS
from benchmarks.accuracy_table import draw, draw_waterfall, markdown, summarise, waterfall_of
from benchmarks.patch_training import (
    fit,
    lead_background,
    patches,
    random_patch,
    segment_by_patches,
    with_sound_gradients,
)
from benchmarks.slice_rivals import AdaptedBlock, build_after_unet, build_msa, group_loss

TINY = preset("tiny")
CPU = torch.device("cpu")
STEPS = {"small": {"cases": 3, "columns": {
    "start": {"heart": {"mean": 0.8}, "esophagus": {"mean": 0.2}, "Average": {"mean": 0.5}},
    "+ more": {"heart": {"mean": 0.8}, "esophagus": {"mean": 0.4}, "Average": {"mean": 0.6}},
}}}  # fmt: skip


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Three phantoms of ten slices at the heart, two to train on, as an nnU-Net raw data set."""
    home = tmp_path_factory.mktemp("accuracy") / "scans"
    for seed in range(3):
        phantom = make_phantom(seed)
        for folder, array in (("imagesTr", phantom.hu), ("labelsTr", phantom.labels)):
            (home / folder).mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(array[12:22].transpose(2, 1, 0), np.diag([-4.0, -4.0, 5.0, 1.0]))
            nib.save(image, home / folder / f"case{seed}{'_0000' if folder == 'imagesTr' else ''}.nii.gz")
    labels = {"background": 0, **{name: value for value, name in LABELS.items()}}
    (home / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}))
    folds = [{"train": ["case0", "case1"], "val": ["case2"]}]
    (home / "splits_final.json").write_text(json.dumps(folds))
    return home


class Inline:
    """An executor that runs its work in this process: a new one would import everything again."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        threads = torch.get_num_threads()
        try:
            value = work(*args)
        finally:
            torch.set_num_threads(threads)
        return type("Done", (), {"result": lambda self: value})()


def asked(scans, output, *more):
    small = ["--preset", "tiny", "--patch", "16", "32", "32", "--max-steps", "1", "--device", "cpu"]
    return ["--data", str(scans), "-o", str(output), *small, *more]


def table_in(output):
    return json.loads((output / "accuracy.json").read_text())


@pytest.fixture(scope="module")
def rows(scans, tmp_path_factory):
    """One row of each kind after one step, the first in a process of its own."""
    output = tmp_path_factory.mktemp("table")
    assert main(asked(scans, output, "--systems", "unet")) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy_module, "ProcessPoolExecutor", Inline)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main(asked(scans, output, "--systems", "after_unet", "msa", "aftersam_2d", "aftersam")) == 0
    return output


def test_every_kind_of_row_is_trained_and_scored(rows):
    table = table_in(rows)
    assert [row["title"] for row in table["rows"]] == [
        "U-Net", "AFTer-UNet", "MSA", "AFTer-SAM 2D tiny", "AFTer-SAM tiny",
    ]  # fmt: skip
    assert table["organs"] == list(LABELS.values())
    assert table["cases"] == ["case2"]
    for row in table["rows"]:
        assert (row["protocol"], row["steps"], row["seeds"]) == ("equal budget", 1, 1)
        assert row["parameters"] > 1e5
        assert row["cpu_minutes"] > 0
        assert row["ice"] > 0
    assert [row["prompted"] for row in table["rows"]] == [None, None, "point", None, None]
    text = (rows / "accuracy.md").read_text()
    assert "| MSA † |" in text
    assert "Equal budget: 1 steps of training a row on 1 processor thread" in text
    assert "**CoTr**: not run: no maintained package" in text
    assert "Own recipe:" not in text
    assert (rows / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    mask = nib.load(rows / "rows" / "unet-seed-0" / "masks" / "case2.nii.gz")
    np.testing.assert_allclose(mask.affine, np.diag([-4.0, -4.0, 5.0, 1.0]))


def test_a_finished_row_is_kept_and_a_half_trained_one_starts_afresh(scans, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_module, "ProcessPoolExecutor", Inline)
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    home = tmp_path / "table" / "rows" / "unet-seed-0"
    weights = home / "weights.safetensors"
    stamp = weights.stat().st_mtime_ns
    (home / "row.json").unlink()  # killed while it was scored
    assert main(asked(scans, tmp_path / "table", "--systems", "unet")) == 0
    assert weights.stat().st_mtime_ns == stamp
    kept = ("mean", "organs", "ice", "parameters", "steps", "to_best")
    for old, new in zip(table_in(rows)["rows"], table_in(tmp_path / "table")["rows"], strict=True):
        assert [old[key] for key in kept] == [new[key] for key in kept]
    (home / "row.json").unlink()
    (home / "spent.json").unlink()  # killed while it was trained
    (home / "half").touch()
    assert main(asked(scans, tmp_path / "table", "--systems", "unet")) == 0
    assert weights.stat().st_mtime_ns > stamp
    assert not (home / "half").exists()
    assert (home / "row.json").exists()


def test_other_settings_are_refused_for_a_row_that_is_there(scans, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy_module, "ProcessPoolExecutor", Inline)
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    assert main(asked(scans, tmp_path / "table", "--systems", "unet", "--threads", "2")) == 1
    assert "was made with other settings" in capsys.readouterr().err
    assert "other settings" in table_in(tmp_path / "table")["failed"]["U-Net"]


def test_masks_from_elsewhere_are_scored_and_placed(scans, rows, tmp_path, capsys):
    shutil.copytree(rows, tmp_path / "table", symlinks=True)
    masks = tmp_path / "masks"
    masks.mkdir()
    shutil.copy(scans / "labelsTr" / "case2.nii.gz", masks)
    given = ["--data", str(scans), "-o", str(tmp_path / "table"), "--predictions", f"TransUNet={masks}"]
    assert main(given) == 0
    table = table_in(tmp_path / "table")
    found = table["rows"][-1]
    assert (found["title"], found["protocol"], found["mean"], found["to_best"]) == (
        "TransUNet", "own recipe", 1.0, None,
    )  # fmt: skip
    scores = table["rows"][0]["organs"]
    both = [score - 1 for organ, score in scores.items() if found["organs"][organ] is not None]
    assert len(both) >= 4  # an organ that the scan lacks is no score of a mask that lacks it, too
    assert table["rows"][0]["to_best"]["mean"] == pytest.approx(np.mean(both), abs=1e-6)
    assert table["rows"][0]["to_best"]["lost"] == 1
    assert "TransUNet" not in table["not_run"]
    text = (tmp_path / "table" / "accuracy.md").read_text()
    assert text.index("## Equal budget") < text.index("| AFTer-SAM tiny |") < text.index("## Own recipe")
    assert text.index("## Own recipe") < text.index("| TransUNet | 100.0 |")
    (masks / "case2.nii.gz").rename(masks / "case7.nii.gz")
    assert main(given) == 2
    assert "no mask for the case case2" in capsys.readouterr().err
    assert main([*given[:-1], "TransUNet"]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err


def found_row(system, seed, scores, *, prompted=None, minutes=40.0):
    """A row.json and its metrics.json of one organ a column, one case a line."""
    row = {"system": system, "title": SYSTEMS[system].title, "seed": seed, "protocol": "equal budget", "note": "",
           "prompted": prompted, "minutes": minutes, "steps": 100,
           "limits": {"max_minutes": minutes, "max_steps": None, "threads": 1, "fold": 0}}  # fmt: skip
    organs = [f"organ {i}" for i in range(len(scores[0]))]
    cases = {f"case {c}": {o: {"dsc": s, "ice": 0.1} for o, s in zip(organs, line, strict=True)}
             for c, line in enumerate(scores)}  # fmt: skip
    return row, {"cases": cases, "organs": {o: {"missed": 1, "hd95_mm_penalised": 4.0} for o in organs}}


def test_means_over_seeds_cases_and_organs_and_the_difference_to_the_best():
    table = summarise(
        [
            found_row("aftersam", 0, [[0.8, 0.6], [0.6, None]]),
            found_row("aftersam", 1, [[0.6, 0.8], [0.8, None]]),
            found_row("unet", 0, [[0.5, 0.5], [0.7, 0.1]]),
            found_row("msa", 0, [[1.0, 1.0], [1.0, 1.0]], prompted="point"),
        ]
    )
    unet, msa, ours = table["rows"]
    assert (ours["mean"], ours["seeds"], ours["to_best"]) == (pytest.approx(0.7), 2, None)
    assert ours["organs"] == {"organ 0": pytest.approx(0.7), "organ 1": pytest.approx(0.7)}
    assert ours["seed_deviation"] == pytest.approx(np.std([0.65, 0.75], ddof=1), abs=1e-6)
    assert ours["missed"] == 2
    # by organ: (−0.2 + 0) / 2 over two cases, −0.2 over the one that both have
    assert unet["to_best"]["mean"] == pytest.approx(-0.15)
    assert (unet["to_best"]["won"], unet["to_best"]["lost"]) == (0, 1)
    low, high = unet["to_best"]["interval"]
    assert -0.2 <= low <= -0.15 <= high <= 0
    assert msa["to_best"]["mean"] == pytest.approx(0.3)  # held to the best, never it: it was prompted
    text = markdown({"data": "x", "failed": {}, **table})
    span = f"{100 * low:+.1f} … {100 * high:+.1f}"
    assert f"| U-Net | 45.0 | 40.0 … 50.0 | -15.0 ({span}) | 60.0 | 30.0 |" in text


def test_a_table_names_each_machine_once_with_its_commits():
    rows = [found_row("unet", 0, [[0.5]]), found_row("dynunet", 0, [[0.5]])]
    for (row, _), commit in zip(rows, ("a1", "b2"), strict=True):
        row["environment"] = {"device": "x", "torch": "2.13", "commit": commit, "dirty": commit == "b2"}
    text = markdown({"data": "x", "failed": {}, **summarise(rows)})
    assert "x, torch 2.13, commits a1, b2 with local changes." in text


def test_rows_without_a_consistency_error_are_drawn_without_it(tmp_path):
    table = summarise([found_row("unet", 0, [[0.5]]), found_row("dynunet", 0, [[0.6]])])
    table["rows"][0]["ice"], table["rows"][1]["interval"] = None, [None, None]
    draw({"data": "x", "failed": {}, **table}, tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="no finished row"):
        summarise([])
    with pytest.raises(ValueError, match="80"):
        summarise([found_row("unet", 0, [[0.5]]), found_row("dynunet", 0, [[0.5]], minutes=80.0)])
    with pytest.raises(ValueError, match="differ in cases: case 1"):
        summarise([found_row("unet", 0, [[0.5]]), found_row("dynunet", 0, [[0.5], [0.5]])])


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.kind == "patch"])
def test_every_network_of_patches_builds_and_is_about_as_large_as_ours(name):
    system = SYSTEMS[name]
    if system.missing():
        pytest.skip(system.missing())
    network = system.build(4).eval()
    assert 3e6 < sum(p.numel() for p in network.parameters()) < 7e6
    side = max(system.multiple, 16)
    image = torch.randn(1, 1, 2 * side, side, side)
    with torch.inference_mode():
        logits = network(image)
        led = lead_background(network, 4)(image)
    assert logits.shape == (1, 4, 2 * side, side, side)
    torch.testing.assert_close(led[:, 0], logits[:, 0] + BACKGROUND_LEAD)
    assert torch.equal(led[:, 1:], logits[:, 1:])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bfloat16_gradients_of_shallow_convolutions_read_no_foreign_memory(depth):
    convolution = torch.nn.Conv3d(32, 32, 3, padding=1, bias=False)
    names = list(convolution.state_dict())
    network = with_sound_gradients(torch.nn.Sequential(convolution))[0]
    assert list(network.state_dict()) == names
    image, gradient = torch.randn(2, 2, 32, depth, 4, 4)
    (exact,) = torch.autograd.grad(network(image), network.weight, gradient)
    for _ in range(8):
        scraps = [torch.full((1 << size,), 1e30) for size in range(8, 21)]
        del scraps  # so that memory which nobody writes is large
        with torch.autocast("cpu", torch.bfloat16):
            result = network(image)
        (found,) = torch.autograd.grad(result, network.weight, gradient.to(result.dtype))
        assert (found - exact).norm() < 0.01 * exact.norm()


def cached(scans, tmp_path):
    return list(
        cache_cases(find_dataset(scans), ["case0", "case1"], TINY.data, tmp_path, training=["case0"]).values()
    )


def test_patches_are_parts_of_the_scan_with_air_beyond_it(scans, tmp_path):
    scan = cached(scans, tmp_path)[0]
    depth = scan.shape[0]
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(20):
        hu, labels = random_patch(scan, (depth + 4, 24, 24), rng)
        assert hu.shape == labels.shape == (depth + 4, 24, 24)
        assert (hu[:2] == -1000).all()
        assert (hu[-2:] == -1000).all()
        assert not labels[:2].any()
        inner = hu[2:-2]
        places = np.lib.stride_tricks.sliding_window_view(scan.hu[0], (24, 24))
        assert (places == inner[0]).all((-2, -1)).any()
        held += bool(labels.any())
    assert held >= 13


def test_the_patch_loop_learns_and_repeats_itself(scans, tmp_path):
    config = dataclasses.replace(TINY.train, max_steps=30, learning_rate=0.1)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        network = torch.nn.Conv3d(1, 7, 1)
        losses = []

        def loss(model, batch, losses=losses):
            value = torch.nn.functional.cross_entropy(model(batch["image"]), batch["labels"][:, 0])
            losses.append(value.item())
            return value

        source = patches(cached(scans, tmp_path), (8, 16, 16), config)
        spent = fit(network, source, loss, config, device=CPU, precision=torch.float32)
        assert spent.steps == 30
        assert spent.peak_mib > 10
        found.append((losses, network.weight.detach().clone()))
    assert np.mean(found[0][0][-5:]) < np.mean(found[0][0][:5]) - 0.2
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_a_row_without_a_limit_and_a_loss_that_is_not_finite_are_refused():
    config = dataclasses.replace(TINY.train, max_steps=None)
    with pytest.raises(ValueError, match="--max-minutes"):
        fit(torch.nn.Linear(1, 1), iter([]), group_loss, config, device=CPU, precision=torch.float32)
    config = dataclasses.replace(config, max_steps=3)
    with pytest.raises(FloatingPointError, match="step 1"):
        fit(torch.nn.Linear(1, 1), iter([{}]), lambda model, _: model.weight.sum() * float("nan"), config,
            device=CPU, precision=torch.float32)  # fmt: skip


def test_patches_slide_over_a_scan_and_their_logits_return_to_its_grid():
    """A network that is a threshold: its labels on a grid of twice the size are the threshold of the interpolation."""

    class Threshold(torch.nn.Module):
        def forward(self, x):
            return torch.cat([torch.zeros_like(x), 20 * (x - 0.5)], 1)

    hu = np.random.default_rng(0).integers(-200, 400, (9, 20, 22)).astype(np.int16)
    labels = segment_by_patches(Threshold(), hu, (8, 8, 8), (9, 40, 44), device=CPU, precision=torch.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(hu)[None].float(), (40, 44), mode="bilinear")[0]
    sure = (smooth - 100).abs() > 1
    assert ((torch.from_numpy(labels) == 1) == (smooth > 100))[sure].all()


def group_model(build):
    torch.manual_seed(0)
    model = dataclasses.replace(
        TINY.model, image_size=48, **({"prompts": "point"} if build is build_msa else {})
    )
    return build(model, 4).eval()


def test_after_unet_looks_at_the_neighbouring_slices():
    network = group_model(build_after_unet)
    hu = torch.randn(1, 3, 48, 48) * 100
    other = hu.clone()
    other[:, 0] += 300
    with torch.inference_mode():
        one, two = (network(x, query_index=(1,)) for x in (hu, other))
    assert one.shape == (1, 1, 4, 48, 48)
    assert (one - two).abs().max() > 1e-3


def test_networks_of_slice_groups_go_by_the_loss_of_the_preset():
    network = group_model(build_after_unet)
    batch = {"hu": torch.randn(1, 3, 48, 48) * 100, "labels": torch.zeros(1, 3, 48, 48, dtype=torch.long)}
    batch["labels"][..., 10:20, 10:20] = 1
    keys = {"dice": "all", "ce_foreground_weight": 3.0, "ce_hardest": 0.2}
    with torch.inference_mode():
        expected = segmentation_loss(network(batch["hu"]), batch["labels"], **keys).total
        assert group_loss(network, batch, config=dataclasses.replace(TINY.train, **keys)) == expected
        assert group_loss(network, batch, config=TINY.train) != expected


def test_an_adapter_starts_as_the_block_that_it_adapts():
    encoder = build_image_encoder("tiny", image_size=48)
    x = torch.randn(2, 6, 6, 128)
    for block in encoder.blocks:
        torch.testing.assert_close(AdaptedBlock(block, 128)(x), block(x))


def test_msa_gives_each_organ_the_lead_over_background_of_its_own_prompt():
    network = group_model(build_msa)
    labels = torch.zeros(1, 1, 48, 48, dtype=torch.long)
    labels[..., 10:20, 10:20], labels[..., 30:40, 5:9] = 1, 3
    hu = torch.randn(1, 1, 48, 48) * 100
    with torch.inference_mode():
        logits = network(hu, labels=labels)
        network.decoder.organ = 3
        alone = network(hu, labels=labels)
    assert logits.shape == (1, 1, 4, 48, 48)
    assert not logits[:, :, 0].any()
    torch.testing.assert_close(logits[:, :, 3], alone[:, :, 1] - alone[:, :, 0])
    network.decoder.organ = None
    assert group_loss(network, {"hu": hu, "labels": labels}, config=TINY.train).isfinite()
    assert network.decoder.organ is None


def test_a_waterfall_shows_the_steps_of_small_and_the_organ_that_gained_most(tmp_path):
    waterfall = waterfall_of(STEPS, "phantoms")
    assert waterfall["organ"] == "esophagus"
    assert [(s["name"], s["mean_dsc"], s["organ_dsc"]) for s in waterfall["steps"]] == [
        ("start", 0.5, 0.2), ("+ more", 0.6, 0.4),
    ]  # fmt: skip
    draw_waterfall(waterfall, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a waterfall needs"):
        waterfall_of({"fusion": {}}, "phantoms")


def test_the_readme_gets_the_table_in_short_and_docs_in_full(rows, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    assert figure.accuracy_sections(results, tmp_path) == []
    (results / "phantoms.json").write_text(
        json.dumps({**table_in(rows), "waterfall": waterfall_of(STEPS, "phantoms")})
    )
    told, short, link = figure.accuracy_sections(results, tmp_path)
    assert "1 held-out scans" in told
    assert short.count("\n| ") == 6
    assert "docs/accuracy.md" in link
    page = (tmp_path / "accuracy.md").read_text()
    for name in ("accuracy-phantoms.png", "accuracy-phantoms-waterfall.png"):
        assert f"]({name})" in page
        assert (tmp_path / name).exists()


def test_the_mishaps_of_the_conventions_and_half_the_resolution():
    array = np.zeros((8, 6, 4), np.uint8)
    array[2:4, 2:4], array[4:6, :2] = conventions.HEART, conventions.TRACHEA
    image = nib.Nifti1Image(array, np.diag([-2.0, -2.0, 5.0, 1.0]))
    for case, there in enumerate([({2}, {2}), ({2}, {2, 6}), ({2, 6}, {6}), ({2, 6}, {2, 6})]):
        pair = conventions.mishaps(case, image)
        assert tuple(set(np.unique(p.dataobj)) - {0} for p in pair) == there
    half = conventions.halved(image)
    assert half.shape == (4, 3, 4)
    np.testing.assert_array_equal(half.dataobj, array[::2, ::2])
    centre = half.affine @ [1, 1, 0, 1]
    np.testing.assert_allclose(centre, image.affine @ [2.5, 2.5, 0, 1])


@pytest.mark.slow
def test_nnunet_is_stopped_at_the_limit(scans, tmp_path, monkeypatch):
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed")
    assert main(asked(scans, tmp_path, "--systems", "nnunet_3d")) == 0
    (row,) = table_in(tmp_path)["rows"]
    assert (row["title"], row["steps"]) == ("nnU-Net 3D", 1)
    assert row["mean"] is not None
