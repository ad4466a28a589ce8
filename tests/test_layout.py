"""The shape of the repository: where imports point, how fast and silent they are."""

from __future__ import annotations

import ast
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from aftersam import __version__
from aftersam.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(p for folder in ("aftersam", "kernels", "benchmarks") for p in (ROOT / folder).rglob("*.py"))

# Imports point down these floors or stay on one; kernels, below them all, has a test of its own.
FLOORS = [
    {"__init__", "config", "errors", "files", "device"},
    {"data", "model"},
    {"inference", "evaluation"},
    {"training"},
    set(COMMANDS),
    {"__main__"},
]
HEAVY = ("torch", "monai", "nibabel", "matplotlib", "accelerate", "scipy")


def run(*command: str | Path, path: tuple[Path, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository without the settings that this test process has made for itself."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", *path)))
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**clean, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def python(code: str, *, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter in which every warning is an error."""
    return run(sys.executable, "-W", "error", "-c", code, path=path)


def assert_silent(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere, `from a import b` as a.b too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or "axial_fusion" in path.parts, f"{path} has a relative import"
            module = node.module or ""
            names.update(
                [module, *(f"{module}.{alias.name}" for alias in node.names)] if not node.level else []
            )
    return names


def test_kernels_is_a_folder_and_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [p.name for p in (ROOT / "kernels").iterdir() if (p / "__init__.py").exists()] == ["axial_fusion"]


def test_another_distribution_named_kernels_wins_over_the_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'\n")
    done = python("import kernels, axial_fusion; assert kernels.get_kernel == 'theirs'", path=(tmp_path,))
    assert_silent(done)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels" / "axial_fusion").rglob("*.py")), ids=lambda p: "/".join(p.parts[-2:])
)
def test_kernels_import_torch_and_triton_alone(path):
    allowed = {"torch", "triton", "axial_fusion", ""} | sys.stdlib_module_names
    if path.parts[-2:] == ("ops", "slice_attention.py"):  # backends of its own choosing, imported where named
        allowed |= {"flash_attn", "xformers"}
    assert {name.split(".")[0] for name in imported(path)} <= allowed


def modules(package: Path) -> dict[str, Path]:
    """The files of a package by their dotted names."""
    named = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def import_graph(package: Path, *, types: bool) -> dict[str, set[str]]:
    """Which modules of a package each of them imports, also inside functions; for type hints too if asked."""
    files = modules(package)
    return {name: _edges(name, path, files, types=types) for name, path in files.items()}


def _edges(own: str, path: Path, files: dict[str, Path], *, types: bool) -> set[str]:
    found = set()
    home = own.split(".") if path.stem == "__init__" else own.split(".")[:-1]
    for node in _imports(ast.parse(path.read_text(encoding="utf-8")), types=types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = ".".join([*home[: len(home) - node.level + 1], *filter(None, [node.module])])
        if not node.level:
            base = node.module or ""
        for alias in node.names:
            name = f"{base}.{alias.name}"
            found.add(name if name in files else base)
    return {name for name in found if name in files} - {own}


def _imports(node: ast.AST, *, types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements in `node`; with `types` False those under `if TYPE_CHECKING` are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif types or not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _imports(child, types=types)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first again at the end; empty where there is no ring."""
    finished: set[str] = set()

    def follow(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in finished:
            for other in sorted(graph[name]):
                if found := follow(other, [*way, name]):
                    return found
            finished.add(name)
        return []

    return next((found for name in graph if (found := follow(name, []))), [])


def test_circles_are_seen(tmp_path):
    package = tmp_path / "ring"
    package.mkdir()
    lines = {
        "__init__": "from .a import f",
        "a": "def f():\n    from ring import b",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ring.a import f\nfrom ring.c import x",
        "c": "from .a import f",
    }
    for name, text in lines.items():
        (package / f"{name}.py").write_text(text)
    assert circle(import_graph(package, types=False)) == ["ring.a", "ring.b", "ring.c", "ring.a"]
    (package / "c.py").write_text("from math import pi")
    assert circle(import_graph(package, types=False)) == []
    assert circle(import_graph(package, types=True)) == ["ring.a", "ring.b", "ring.a"]


@pytest.mark.parametrize("package", ["aftersam", "kernels/axial_fusion", "benchmarks"])
def test_no_two_files_import_each_other(package):
    assert circle(import_graph(ROOT / package, types=False)) == []


def floor(module: str) -> int:
    """The floor of a dotted module of aftersam."""
    name = module.split(".")[1] if "." in module else "__init__"
    found = [i for i, names in enumerate(FLOORS) if name in names]
    assert found, f"aftersam.{name} has no floor; give it one in FLOORS"
    return found[0]


def test_imports_point_down_the_floors():
    for own, names in import_graph(ROOT / "aftersam", types=True).items():
        for name in names:
            assert floor(name) <= floor(own), f"{own} imports {name} from a floor above its own"


def test_model_and_data_know_of_each_other_by_types_alone():
    for own, names in import_graph(ROOT / "aftersam", types=False).items():
        wing = own.split(".")[1:2]
        other = {"data": "model", "model": "data"}.get(*wing) if wing else None
        assert not [name for name in names if name.startswith(f"aftersam.{other}.")], own


def test_no_command_imports_a_command():
    graph = import_graph(ROOT / "aftersam", types=True)
    commands = {command.module for command in COMMANDS.values()}
    assert {own: graph[own] & commands for own in commands} == {own: set() for own in commands}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_takes_one_arguments_object_and_returns_a_typed_result(name):
    home, called = f"{COMMANDS[name].module.partition('.')[2].replace('.', '/')}.py", name
    if name == "predict":  # demo and ablate predict too, and no command imports another
        home, called = "inference/pipeline.py", "predict_files"
    tree = ast.parse((ROOT / "aftersam" / home).read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == called)
    assert re.fullmatch(rf"\w+: {name.capitalize()}Args", ast.unparse(function.args))
    result = ast.unparse(function.returns)
    assert not re.search(r"\b(int|Any|None)\b", result), result


def test_the_root_holds_commands_and_little_else():
    assert len(list((ROOT / "aftersam").glob("*.py"))) <= 16


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_product_files_keep_the_house_rules(path):
    text = path.read_text(encoding="utf-8")
    assert not {name.split(".")[0] for name in imported(path)} & {"torchvision", "timm"}
    assert "../shared" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node), f"line {node.lineno} would unpickle code"


def test_axial_fusion_imports_silently_without_triton_and_queries_no_device():
    assert_silent(
        python(
            "import sys, torch\n"
            "def refuse(*_): raise AssertionError('asked for a device at import')\n"
            "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = refuse\n"
            "sys.modules['triton'] = None\n"
            "import axial_fusion\n"
            "assert axial_fusion.axial_fusion_attention and axial_fusion.AxialFusionAttention\n"
        )
    )


def test_imports_are_quick():
    """In seconds of processor time, which other work on the machine does not change."""
    assert_silent(
        python(
            "import sys, time, torch\n"
            "began = time.process_time(); import axial_fusion\n"
            "assert time.process_time() - began < 2, time.process_time() - began\n"
        )
    )
    assert_silent(
        python(
            "import sys, time\n"
            "began = time.process_time(); import aftersam\n"
            "assert time.process_time() - began < 0.5\n"
            f"assert not set({HEAVY}) & set(sys.modules)\n"
        )
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once(command):
    """Each --help, in processor time, and without the libraries that its work needs."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(sys.executable, "-m", COMMANDS[command].module, "--help")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 3
    loaded = python(
        f"import sys\nfrom {COMMANDS[command].module} import main\n"
        "try: code = main(['--help'])\nexcept SystemExit as end: code = end.code\n"
        f"sys.exit(code or ', '.join(set({HEAVY}) & set(sys.modules)) or 0)"
    )
    assert (loaded.returncode, loaded.stderr) == (0, "")


def test_the_command_hands_over_to_its_module(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["aftersam"])
    monkeypatch.setattr(import_module("aftersam.demo"), "main", lambda argv: seen.append(argv) or 7)
    assert main(["demo", "--seed", "3"]) == 7
    assert seen == [["--seed", "3"]]
    assert sys.argv[0] == "aftersam demo"


def test_the_command_lists_its_commands_and_its_version(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(
        re.search(rf"^  {name} .*{re.escape(line)}$", listed, re.M) for name, (_, line) in COMMANDS.items()
    )
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"aftersam {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["trian"], "did you mean 'train'?"), (["xyz"], "no command 'xyz'"), ([], "usage:")],
    ids=str,
)
def test_an_unknown_command_is_an_error_that_helps(argv, says, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err


def test_make_help_explains_every_target():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = run("make", "help")
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert done.returncode == 0, done.stderr
    for target in phony.group(1).split():
        assert re.search(rf"^ +make {target} +\S", done.stdout, re.M), target


def test_ci_runs_the_checks_and_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"make check", "make test"} <= {
        line.removesuffix(' "$@"') for line in script.read_text().splitlines()
    }
