"""What the two wheels hold and say of themselves, and whether they install alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from aftersam import __version__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree, in which builds may leave what they like."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("aftersam", "kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def built(folder: Path, kind: str, compiler: str | None = None) -> Path:
    """The wheel or the sdist of a project folder, built offline, with a compiler of that name."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('out'))"
    environment = os.environ if compiler is None else os.environ | {"CC": compiler}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder / "out" / done.stdout.split()[-1]


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def packed(wheel: zipfile.ZipFile) -> set[str]:
    """What the wheel installs, without its metadata."""
    return {n for n in wheel.namelist() if ".dist-info/" not in n}


KERNELS = {f"axial_fusion/cpu/_kernels{EXTENSION_SUFFIXES[0]}"} if shutil.which("gcc") else set()


def files(*packages: Path) -> set[str]:
    """What a wheel of these packages must hold: modules, py.typed, what comes along, axial_fusion's version."""
    found = {p for package in packages for p in package.rglob("*.py")}
    found |= {p for package in packages for p in (package / "weights").rglob("*") if p.is_file()}
    found |= {p for package in packages for p in (package / "measured").glob("*.json")}
    found |= {package / "py.typed" for package in packages} | {ROOT / "kernels" / "axial_fusion" / "VERSION"}
    bases = {package: package.parent for package in packages}
    return {
        str(p.relative_to(base)) for p in found for package, base in bases.items() if package in p.parents
    }


@pytest.fixture(scope="module")
def wheel(source) -> zipfile.ZipFile:
    return zipfile.ZipFile(built(source, "wheel"))


@pytest.fixture(scope="module")
def kernels_wheel(source) -> zipfile.ZipFile:
    return zipfile.ZipFile(built(source / "kernels", "wheel"))


def test_the_wheel_holds_exactly_the_two_packages(wheel):
    assert packed(wheel) == files(ROOT / "aftersam", ROOT / "kernels" / "axial_fusion") | KERNELS
    assert sum(entry.compress_size for entry in wheel.infolist()) < 10e6


def test_the_kernels_wheel_holds_axial_fusion_alone_and_needs_torch_alone(wheel, kernels_wheel):
    assert packed(kernels_wheel) == files(ROOT / "kernels" / "axial_fusion") | KERNELS
    metadata = metadata_of(kernels_wheel)
    assert (metadata["Name"], metadata["License-Expression"]) == ("axial-fusion", "Apache-2.0")
    assert any(n.endswith("licenses/LICENSE") for n in kernels_wheel.namelist())
    needed = {line: Requirement(line) for line in metadata.get_all("Requires-Dist")}
    assert {r.name for r in needed.values()} == {"torch", "triton"}
    assert {str(r.marker) for r in needed.values() if r.name == "triton"} == {'platform_system == "Linux"'}
    assert set(needed) <= set(metadata_of(wheel).get_all("Requires-Dist"))


def test_both_distributions_and_both_ways_to_build_them_have_one_version(
    source, wheel, kernels_wheel, tmp_path
):
    assert metadata_of(wheel)["Version"] == metadata_of(kernels_wheel)["Version"] == __version__
    for folder, name in ((source, "aftersam"), (source / "kernels", "axial_fusion")):
        with tarfile.open(built(folder, "sdist")) as archive:
            archive.extractall(tmp_path / name, filter="data")
        again = zipfile.ZipFile(built(tmp_path / name / f"{name}-{__version__}", "wheel"))
        assert metadata_of(again)["Version"] == __version__
        assert packed(again) == packed(wheel if name == "aftersam" else kernels_wheel)


@pytest.mark.parametrize("compiler", ["the one at hand", "none", "an empty name"])
def test_the_kernels_wheel_imports_without_the_repository(source, kernels_wheel, tmp_path, compiler):
    """Silently, with the compiled kernels or without them."""
    wheel, expected = kernels_wheel, "cpu" if KERNELS else "torch"
    if compiler != "the one at hand":
        shutil.copytree(
            source / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("build", "out")
        )
        name = "" if compiler == "an empty name" else str(tmp_path / "no-compiler")
        wheel, expected = zipfile.ZipFile(built(tmp_path / "kernels", "wheel", name)), "torch"
        assert packed(wheel) == files(ROOT / "kernels" / "axial_fusion")
        shutil.rmtree(tmp_path / "kernels")
    wheel.extractall(tmp_path)
    code = (
        "import sys, axial_fusion, torch\n"
        "q = torch.randn(1, 3, 4, 2, 16)\n"
        f"assert axial_fusion.select_backend('axial_attention', q, q, q).backend == {expected!r}\n"
        f"assert axial_fusion.__file__.startswith({str(tmp_path)!r})\n"
        "x = torch.randn(1, 3, 4, 16)\n"
        "assert axial_fusion.AxialFusionAttention(16, 2)(x).shape == x.shape\n"
        "assert not {'monai', 'nibabel', 'segment_anything', 'aftersam'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(tmp_path)
    }
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_wheel_names_its_version_command_licence_and_extras(wheel):
    info = f"aftersam-{__version__}.dist-info"
    assert "aftersam = aftersam.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    metadata = metadata_of(wheel)
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = {"flash", "xformers", "dicom", "export", "accuracy", "hosts", "test", "dev"}
    extras |= {"cohort", "ray"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_constraints_pin_a_version_in_range_of_every_requirement(wheel):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    requirements = [Requirement(line) for line in metadata_of(wheel).get_all("Requires-Dist")]
    outside = {"flash-attn", "setuptools"}  # built from source against the torch that is there; a build tool
    assert {r.name for r in requirements} - outside == set(pins)
    assert all(r.specifier.contains(pins[r.name]) for r in requirements if r.name in pins)


def test_the_readme_installs_it(source, tmp_path):
    """README's line, as pip resolves and builds it; what it needs is there or not, which is the index's matter."""
    (line,) = re.findall(r"^pip install -c .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    shutil.copy(ROOT / "constraints.txt", source)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    done = subprocess.run(
        [sys.executable, "-m", *line.split(), *offline],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "aftersam" / "predict.py").is_file()
    for path in (source / "build", *source.glob("*.egg-info")):
        shutil.rmtree(path)


def test_python_versions_are_those_of_setup_py(wheel, kernels_wheel):
    claimed = metadata_of(wheel)["Requires-Python"]
    assert metadata_of(kernels_wheel)["Requires-Python"] == claimed
    oldest = claimed.removeprefix(">=")
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert re.search(r'python: \["([\d.]+)"', workflow).group(1) == oldest
    assert {"make check", "make test"} <= set(re.findall(r"- run: (.*)$", workflow, re.M))
    assert f'"py{oldest.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
    for page in ("README.md", "docs/start/install.md"):
        assert f"Python {oldest} or later" in (ROOT / page).read_text(encoding="utf-8")
