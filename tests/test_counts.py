"""A count of 1 never stands before a plural in what a user reads."""

import ast
import re
from pathlib import Path

import pytest

from aftersam import check, encode, evaluate, phantom, predict, report
from aftersam.errors import counted
from aftersam.inference import manifest

ROOT = Path(__file__).parents[1]
NOUNS = (
    "arguments|blocks|cases|channels|classes|columns|epochs|files|folders|folds|frames|GPUs|groups|heads|hours|images|"
    "kernels|labels|lines|loops|masks|minutes|models|numbers|organs|positions|processes|rows|runs|samples|scans|seconds|"
    "seeds|series|slices|spills|steps|tables|tensors|tests|threads|timings|tokens|tries|volumes|voxels|windows|workers"
)
# a word between is no verb (holds, has); slices/s is a unit
PLURAL = re.compile(rf" (?:(?!of |got )[a-z-]*[a-rt-z] )?(?:{NOUNS})\b(?!/)")
SEVERAL = {  # what stands before a plural and is never 1
    "aftersam/config.py": {"size.out_channels"},
    "aftersam/data/dataset.py": {"len(channels)"},
    "aftersam/data/volume.py": {"shapes[0]", "data.dtype"},
    "aftersam/inference/pipeline.py": {"len(args.model)"},
    "aftersam/training/setup.py": {"accelerator.num_processes"},
    "benchmarks/figure.py": {"one['side']"},
    "benchmarks/speed/hosts.py": {"shape.slices"},
    "benchmarks/speed/lora_linear.py": {"self.rows"},
    "benchmarks/speed/predict.py": {"depth", "LOOPED"},
    "benchmarks/tables.py": {"measured"},  # a commit
    "docs/reference/write.py": {"len(args)"},
    "kernels/axial_fusion/dispatch.py": {"most"},
    "kernels/axial_fusion/hosts.py": {"_shown(heads)", "len(others) + 1"},  # one head divides every C
    "kernels/axial_fusion/obstacles.py": {"facts.slices", "facts.channels", "facts.columns"},  # above a limit
}


def test_one_has_no_plural():
    assert counted(1, "case") == "1 case"
    assert counted(0, "case") == "0 cases"
    assert counted(2, "process", "processes") == "2 processes"
    assert counted(1, "scan is", "scans are") == "1 scan is"
    assert counted(1.0, "minute") == "1 minute"
    assert counted(40.0, "minute") == "40 minutes"


@pytest.mark.parametrize("folder", ["aftersam", "benchmarks", "docs", "kernels"])
def test_a_count_in_a_message_is_written_with_its_noun(folder):
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        bare = {
            ast.unparse(value.value)
            for text in ast.walk(ast.parse(path.read_text()))
            if isinstance(text, ast.JoinedStr)
            for value, after in zip(text.values, text.values[1:], strict=False)
            if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant)
            if PLURAL.match(after.value)
        }
        name = str(path.relative_to(ROOT))
        if bare:
            found[name] = bare
    assert found == {name: bare for name, bare in SEVERAL.items() if name.startswith(folder)}


def test_commands_on_one_scan_print_no_plural_of_one(run, tmp_path, capsys):
    data, masks = tmp_path / "data", tmp_path / "masks"
    images, labels = data / "imagesTr", data / "labelsTr"
    said = []

    def command(module, *argv):
        assert module.main([str(arg) for arg in argv]) == 0
        printed = capsys.readouterr()
        said.append(f"{printed.out}\n{printed.err}")

    command(phantom, "-o", data, "--cases", 1)
    command(check, data, "--preset", "tiny")
    command(encode, "--data", data, "-o", tmp_path / "features", "-m", run)
    for _ in range(2):  # the second finds the mask
        command(predict, "-i", images, "-o", masks, "-m", run, "--review", "--manifest", "on")
    command(manifest, masks)
    command(evaluate, "-p", masks, "-l", labels, "-o", tmp_path / "metrics.json")
    command(report, "-m", tmp_path / "metrics.json", "--run", run, "-o", tmp_path / "report.html")
    page = re.sub(r"<[^>]*>", " ", (tmp_path / "report.html").read_text())
    assert sum("1 scan" in text for text in said) >= 4
    assert "1 of 1 mask exists and is kept" in said[4]
    assert "1 case" in page
    for text in [*said, page]:
        assert not re.findall(rf"(?<![\d.,])1{PLURAL.pattern}", text)
