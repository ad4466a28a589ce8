"""Files that are whole or not there: atomic writes of text, JSON and tensors; JSON read with clear errors; names.

A file is written under a temporary name beside its own and renamed, so that a reader or a resumed run sees the old
state or the new one. Nothing is ever unpickled. Imports neither torch nor nibabel, since every --help reads this."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aftersam.errors import naming

if TYPE_CHECKING:
    from torch import Tensor

NIFTI = (".nii.gz", ".nii")
DICOM = ".dcm"
FACTS = "aftersam"  # key of our JSON in a safetensors file's metadata


def is_nifti(path: Path) -> bool:
    """Whether the name ends in .nii or .nii.gz, in upper or lower case."""
    return path.name.lower().endswith(NIFTI)


def scans_in(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, sorted. Hidden ones are none: macOS leaves ._a.nii.gz beside a.nii.gz."""
    return sorted(path for path in folder.iterdir() if is_nifti(path) and not path.name.startswith("."))


def case_name(path: Path) -> str:
    """File name without the ending of NIfTI or DICOM."""
    ending = next((e for e in (*NIFTI, DICOM) if path.name.lower().endswith(e)), "")
    return path.name[: len(path.name) - len(ending)]


def case_id(path: Path) -> str:
    """File name without its ending and nnU-Net's channel number: what the mask of a scan is called."""
    return case_name(path).removesuffix("_0000")


def normal_form(name: str) -> str:
    """`name` in the one Unicode spelling that we compare: macOS writes ü as u and two dots."""
    return unicodedata.normalize("NFC", name)


def by_case(files: Iterable[Path]) -> dict[str, Path]:
    """{case: file}; two Unicode spellings of a name are one case.

    Raises ValueError that names both where two files are one case: one mask would replace the other."""
    found: dict[str, Path] = {}
    for path in files:
        case = normal_form(case_id(path))
        if case in found:
            raise ValueError(f"{found[case]} and {path} are both the case {case!r}; rename or remove one")
        found[case] = path
    return found


def masks_of(scans: Sequence[Path], folder: Path) -> list[tuple[Path, Path]]:
    """(scan, its mask in `folder`) of each scan.

    Raises ValueError where two scans would give one mask, or a mask would replace a scan."""
    by_case(scans)
    pairs = [(scan, folder / f"{case_id(scan)}.nii.gz") for scan in scans]
    for _, mask in pairs:
        refuse_input(mask, scans)
    return pairs


def refuse_input(output: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError where `output` is one of the inputs, under this name or through a link."""
    for path in inputs:
        if output.resolve() == path.resolve() or (
            output.exists() and path.exists() and output.samefile(path)
        ):
            raise ValueError(f"the output {output} is the input {path}; choose another name for the output")


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` with the same endings, renamed to it on success and removed on failure."""
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """`unfinished`, with an OSError that names `path` where it cannot be written."""
    try:
        with unfinished(path) as temporary:
            yield temporary
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


@contextlib.contextmanager
def renamed_folder(home: Path) -> Iterator[Path]:
    """A temporary folder to fill, renamed to `home` on success; another process that was quicker wins.

    Raises OSError that names `home` where it cannot be written."""
    temporary = _temporary(home)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, home)
    except OSError as error:
        if not home.is_dir():
            raise OSError(f"{home} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, case: str) -> None:
    """Delete what a killed process left of the files of `case` in `folder` under temporary names."""
    for left in folder.glob(f".*.{glob.escape(case)}.*"):
        process = left.name.split(".")[1]
        if process.isdigit() and process != str(os.getpid()):
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, atomically."""
    with renamed(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError on NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`, with or without Notepad's byte-order mark.

    Raises ValueError in one sentence where it is missing, no file, broken or nested without end."""
    if not path.is_file():
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    with naming(path, "is not valid JSON"):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors by name and `facts` (JSON values) as a safetensors file, atomically and through to the disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with renamed(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={FACTS: json.dumps(facts)})
        except SafetensorError as error:  # a full disk, among others
            raise OSError(str(error)) from error
        with temporary.open("rb") as written:
            os.fsync(written.fileno())


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts that `write_tensors` left. Raises ValueError on a truncated or foreign file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} does not exist; train writes best.safetensors and last.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if facts is None:
        raise ValueError(f"{path} was not written by aftersam.train")
    return tensors, facts


def _temporary(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.{path.name}")
