"""README and docs: links lead somewhere, commands exist, what is shown runs, what is generated is current."""

import re
import shlex
import shutil
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from aftersam.__main__ import COMMANDS, main
from benchmarks.tables import README_ROWS
from toy_scans import scan, write_scans

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
SMALL = "--preset tiny --image-size 48 --num-blocks 1 --max-steps 2 --validations 0 --device cpu"


def script(path):
    """A script of docs/ as a module."""
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look there
    spec.loader.exec_module(module)
    return module


REFERENCE = script(ROOT / "docs" / "reference" / "write.py")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(page):
    """Every command line of a page's bash blocks, in words."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def anchors(page):
    """The fragments of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if fragment:
            assert fragment in anchors(target), link


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    files = [*ROOT.glob("docs/*/*.md"), *ROOT.glob("docs/examples/*.py")]
    assert [str(f) for f in files if f"({f.relative_to(ROOT / 'docs')})" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_their_flags_exist(page):
    """Of every line of bash: aftersam's commands with their flags, modules and make's targets."""
    known = REFERENCE.known_flags()
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page):
        if words[0] == "make":
            assert all(re.search(rf"^{word}:", makefile, re.M) for word in words[1:] if "=" not in word), (
                words
            )
        if words[0] == "srun":
            words = words[1:]
        if "-m" in words and words[0].endswith(("python", "torchrun")):
            module = words[words.index("-m") + 1]
            assert find_spec(module) is not None, words
            if module.startswith("aftersam."):
                words = ["aftersam", module.removeprefix("aftersam."), *words[words.index(module) + 1 :]]
        if words[0] == "aftersam":
            assert words[1] in COMMANDS, words
            flags = {word for word in words[2:] if re.match(r"--?[a-z]", word)}
            assert flags <= known[words[1]] | {"--help"}, (words, flags - known[words[1]])


@pytest.mark.parametrize("name", REFERENCE.PAGES)
def test_generated_pages_are_current(name):
    made = REFERENCE.PAGES[name]()
    assert (REFERENCE.HERE / name).read_text(encoding="utf-8") == made, "run `make reference`"


def test_every_flag_and_key_has_a_help_text():
    rows = [line for line in REFERENCE.flags_page().splitlines() if line.startswith("| `-")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert sum(map(len, README_ROWS.values())) <= 6
    assert text.count("GPU |") + text.count("CPU |") <= 6


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with what the pages' commands name: a data set in the plain layout, scans, labels, a scan."""
    home = tmp_path_factory.mktemp("docs")
    made = write_scans(home / "nnunet")
    (home / "DATASET").mkdir()
    shutil.copytree(made / "labelsTr", home / "DATASET" / "labels")
    shutil.copy(made / "dataset.json", home / "DATASET")
    (home / "DATASET" / "images").mkdir()
    for path in (made / "imagesTr").iterdir():
        shutil.copy(path, home / "DATASET" / "images" / path.name.replace("_0000", ""))
    shutil.copytree(home / "DATASET" / "images", home / "scans")
    shutil.copytree(home / "DATASET" / "labels", home / "labels")
    scan(home / "scan.nii.gz")
    weight = torch.zeros(2, 2)
    torch.save(
        {"model": {"encoder.weight": weight, "encoder.Adapter.weight": weight}}, home / "sam-med2d_b.pth"
    )
    return home


def test_the_readmes_commands_run_in_order(home, monkeypatch, capsys):
    """All but `pip install`, which test_packaging runs, and the demo, which test_headneck does."""
    monkeypatch.chdir(home)
    ran = []
    for words in commands(README):
        if words[0] == "pip" or words[1] == "demo":
            continue
        extra = {"check": "", "evaluate": "", "train": SMALL, "predict": "--device cpu --no-preview"}[
            words[1]
        ]
        assert main([*words[1:], *extra.split()]) == 0, (words, capsys.readouterr().err)
        ran.append(words[1])
    assert ran == ["predict", "check", "train", "predict", "evaluate"]
    assert sorted(p.name for p in Path("masks").glob("*.nii.gz")) == [f"case{i}.nii.gz" for i in range(3)]
    assert {"mask.nii.gz", "metrics.json"} <= {p.name for p in home.iterdir()}


OPS = [README, ROOT / "docs" / "how-to" / "lift.md"]  # their blocks are run by test_adopt and test_lift


def test_the_blocks_about_ops_are_run_elsewhere():
    for page in OPS:
        for code in blocks(page, "python"):
            assert re.search(r"\blift\(|num_heads=8|from_attention|accelerate_sam", code), code


ELSEWHERE = [ROOT / "docs" / "how-to" / "cohorts.md"]  # in test_cohort_docs, with the cluster it needs
SHOWN = [page for page in PAGES if page not in OPS + ELSEWHERE and blocks(page, "python")]


@pytest.mark.parametrize("page", SHOWN, ids=[page.name for page in SHOWN])
def test_what_a_page_shows_runs(page, home, monkeypatch):
    monkeypatch.chdir(home)
    names = {}
    for code in blocks(page, "python"):
        exec(code, names)


def example(name):
    return script(ROOT / "docs" / "examples" / f"{name}.py").main


def test_the_op_tells_which_way_a_video_runs():
    assert example("video_op")(steps=120) > 0.9


def test_a_dinov2_is_lifted_and_starts_as_the_2d_model(capsys):
    pytest.importorskip("timm")
    flat, first, trained, alone = example("lift_dinov2")(steps=2, lifted_steps=1, scans_to_train=2)
    assert first == flat
    assert all(0 <= score <= 1 for score in (trained, alone))
    assert "Block" in capsys.readouterr().out


def test_a_training_a_prediction_and_a_score_from_python(tmp_path, capsys):
    data, run, masks = write_scans(tmp_path / "data"), tmp_path / "run", tmp_path / "masks"
    assert example("train_from_python")(data, run, steps=2, image_size=48).steps == 2
    told = []
    written = example("predict_folder")(data / "imagesTr", masks, str(run), lambda *now: told.append(now))
    assert [path.name for path in written] == [f"case{i}.nii.gz" for i in range(3)]
    assert told[9] == ("case0_0000.nii.gz", 10, 10)
    metrics = example("score_masks")(data / "labelsTr", data / "labelsTr")
    assert metrics["mean_dsc"] == 1.0
    assert "mean  DSC 1.000, cases: 3" in capsys.readouterr().out
    assert example("score_masks")(masks, data / "labelsTr")["mean_dsc"] < 0.5
