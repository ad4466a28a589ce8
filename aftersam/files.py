"""Atomic writes of text, JSON and tensors; reading of JSON and tensors with clear errors; names of scans and masks.

A file is written into a temporary folder beside it and then renamed, so that a reader or a resumed run sees the old
file or the new one. The writer holds a lock in that folder; the next run removes folders whose writer was killed.
Nothing is ever unpickled. Imports neither torch nor nibabel, since every --help imports this module."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aftersam.errors import naming

try:
    import fcntl as fcntl  # claims take it from here
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # there is none on Windows

if TYPE_CHECKING:
    from torch import Tensor

NIFTI = (".nii.gz", ".nii")
DICOM = ".dcm"
CONFIDENCE = ".confidence.nii.gz"  # of a map beside a mask
OTHER_IMAGES = (".nrrd", ".mha", ".mhd", ".nii.bz2", ".nii.xz", ".nii.zst", ".img", ".gipl", ".mgz", DICOM)
FACTS = "aftersam"  # key of our JSON in a safetensors file's metadata
_TEMPORARY = re.compile(r"\.aftersam-[0-9a-f]{12}")  # a folder beside what is written, and its lock inside
_LOCK = ".lock"
A_DAY = 86400


def is_nifti(path: Path) -> bool:
    """Whether the name ends in .nii or .nii.gz, in upper or lower case."""
    return path.name.lower().endswith(NIFTI)


def scans_in(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, sorted. Hidden files are left out: macOS leaves ._a.nii.gz beside a.nii.gz."""
    return sorted(path for path in folder.iterdir() if is_nifti(path) and not path.name.startswith("."))


def case_name(path: Path | str) -> str:
    """File name, of a path or a URL, without the ending of NIfTI or DICOM."""
    name = path.rpartition("/")[2] if isinstance(path, str) else path.name
    lower = name.lower()
    ending = next((e for e in (*NIFTI, DICOM) if lower.endswith(e)), "")
    return name[: len(name) - len(ending)]


def case_id(path: Path | str) -> str:
    """Case id: the file name without its ending and without nnU-Net's channel number. Masks are named by it."""
    return case_name(path).removesuffix("_0000")


def normal_form(name: str) -> str:
    """`name` in Unicode's composed form (NFC), for comparisons: macOS writes ü as u and two dots."""
    return unicodedata.normalize("NFC", name)


def by_case(files: Iterable[Path]) -> dict[str, Path]:
    """{case: file}; two Unicode spellings of a name are one case.

    Raises ValueError that names both where two files are one case: one mask would replace the other."""
    found: dict[str, Path] = {}
    for path in files:
        case = normal_form(case_id(path))
        if case in found:
            raise ValueError(
                f"{found[case]} and {path} are both the case {case!r} and would give the same mask; rename one"
            )
        found[case] = path
    return found


def masks_of(scans: Sequence[Path], folder: Path) -> list[tuple[Path, Path]]:
    """(scan, its mask in `folder`) of each scan.

    Raises ValueError where two scans would give one mask, or a mask would replace a scan."""
    by_case(scans)
    pairs = [(scan, folder / f"{case_id(scan)}.nii.gz") for scan in scans]
    refuse_inputs((mask for _, mask in pairs), scans)
    return pairs


def refuse_input(output: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError where `output` is one of the inputs, under this name or through a link."""
    own = _identity(output)
    for path in inputs:
        if _identity(path) == own:
            raise _is_input(output, path)


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise ValueError where one of the outputs is one of the inputs, under this name or through a link."""
    known = {_identity(path): path for path in inputs}
    missing = any(isinstance(key, str) for key in known)
    for output in outputs:
        if (missing or os.path.exists(output)) and (same := known.get(_identity(output))):
            raise _is_input(output, same)


def _identity(path: Path) -> tuple[int, int] | str:
    """Device and inode of a file, equal for all its names. For a missing file, the path with links resolved."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    real = os.path.realpath(path)  # resolve() fails on a link to itself
    with contextlib.suppress(OSError):
        found = os.stat(real)
        return found.st_dev, found.st_ino
    return real


def _is_input(output: Path, path: Path) -> ValueError:
    return ValueError(f"the output {output} is the input {path}; choose another name for the output")


def check_place(output: Path, *, folder: bool = False) -> None:
    """Raise ValueError where the file or folder `output` could not be written, OSError where its name is too long.

    It may be a device, which a rename would replace, or lie below a file or in a read-only folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        output.stat()
        if not (output.is_dir() if folder else output.is_file()):
            wanted = "folder" if folder else "file"
            raise ValueError(f"the output {output} exists, but is not a {wanted}; choose another name")
    places = [*([output] if folder else []), *output.absolute().parents]
    place = next(path for path in places if os.path.lexists(path))
    if not place.is_dir():
        raise ValueError(f"{output} cannot be written, since {place} is not a folder")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{output} cannot be written, since {place} is read-only")


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A temporary file of the same name to write, moved to `path` on success and removed on failure."""
    with workplace(path.parent) as place:
        temporary = place / path.name
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """`unfinished`, but an OSError names `path` as the file that could not be written."""
    try:
        with unfinished(path) as temporary:
            yield temporary
    except OSError as error:
        raise _not_written(path, error) from error


@contextlib.contextmanager
def renamed_folder(home: Path) -> Iterator[Path]:
    """A temporary folder to fill, moved to `home` on success. If another process was faster, its folder is kept.

    Raises OSError that names `home` where it cannot be written."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with workplace(home.parent) as place:
            temporary = place / home.name
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _to_disk(file)
            try:
                os.rename(temporary, home)
            except OSError:
                if not home.is_dir():
                    raise
    except OSError as error:
        raise _not_written(home, error) from error


def reserve(path: Path) -> None:
    """Allocate the disk space of a sparse file. Raises OSError where the disk is too full.

    Writing to a memory map on a full disk would kill the process without a message."""
    with path.open("rb+") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            return
        while block := file.read(2**20):  # macOS and Windows: zeros written into a hole take space as well
            file.seek(-len(block), os.SEEK_CUR)
            file.write(block)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary folders of killed processes in `folder`. A living process holds a lock in its folder.

    Locks of another machine may be invisible here, so its folders are deleted only after a day."""
    if fcntl is None or not folder.is_dir():
        return
    for place in folder.iterdir():
        if not _TEMPORARY.fullmatch(place.name) or place.is_symlink():
            continue
        with contextlib.suppress(OSError):  # the owner lives, or has just removed the folder
            lock = os.open(place / _LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                marked = os.read(lock, 64)
                ours = (
                    marked == machine() if marked else len(os.listdir(place)) == 1
                )  # killed before it could lock
                if ours or time.time() - os.fstat(lock).st_mtime > A_DAY:
                    shutil.rmtree(place)
            finally:
                os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, atomically."""
    with renamed(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError on NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`, with or without Notepad's byte-order mark.

    Raises ValueError in one sentence where it is missing, not a file, broken or nested too deeply."""
    if not path.is_file():
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    with naming(path, "is not valid JSON"):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors by name and `facts` (JSON values) as a safetensors file, atomically and through to the disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with renamed(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata={FACTS: json.dumps(facts)})
            temporary.chmod(
                mode
            )  # the usual mode of a new file; safetensors makes it readable to the owner alone
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"{path} could not be written: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) that `write_tensors` wrote. Raises ValueError on a truncated or foreign file."""
    with _opened(path) as file:
        facts = json.loads((file.metadata() or {}).get(FACTS, "null"))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    if not isinstance(facts, dict):
        raise ValueError(f"{path} was not written by aftersam.train")
    return tensors, facts


class Header(NamedTuple):
    """What a safetensors file says of a tensor. `dtype` is its name there, such as F32 or I8."""

    dtype: str
    shape: tuple[int, ...]


def tensor_headers(path: Path) -> dict[str, Header]:
    """Headers of the tensors in a file, without their values. Raises ValueError as `read_tensors` does."""
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a dict
        return {key: Header(found.get_dtype(), tuple(found.get_shape())) for key, found in slices.items()}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    if not path.is_file():
        raise ValueError(f"{path} does not exist; train writes best.safetensors and last.safetensors")
    with naming(path, "is not a whole safetensors file"), safe_open(path, framework="pt") as file:
        yield file


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder` with a unique name. It is locked, and removed at the end.

    Temporary folders of killed processes in `folder` are removed the first time that this process writes there."""
    _remove_leftovers_once(folder)
    place, lock = _locked_place(folder)
    try:
        yield place
    finally:
        os.close(lock)
        shutil.rmtree(place, ignore_errors=True)


def _locked_place(folder: Path) -> tuple[Path, int]:
    while True:
        place = folder / f".aftersam-{secrets.token_hex(6)}"
        place.mkdir()
        try:
            lock = os.open(place / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError:
            removed = not place.exists()  # another process removed it before it was locked
            shutil.rmtree(place, ignore_errors=True)
            if removed:
                continue
            raise
        if fcntl is not None:
            with contextlib.suppress(
                OSError
            ):  # a file system without locks: nothing is written into the lock
                fcntl.flock(lock, fcntl.LOCK_EX)
                os.write(lock, machine())
        if os.fstat(lock).st_nlink:
            return place, lock
        os.close(lock)


@functools.cache
def machine() -> bytes:
    """Id of the running kernel. Processes with the same id see each other's locks."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    return b""


_remove_leftovers_once = functools.cache(remove_leftovers)


def _to_disk(file: Path) -> None:
    """Flush the file to the disk, so that no crash leaves an empty file under the final name."""
    with file.open("rb+") as written:
        os.fsync(written.fileno())


def _not_written(path: Path, error: OSError) -> OSError:
    """An OSError that says why `path` could not be written; the message of `error` where it already is a sentence."""
    if error.errno is None:
        return OSError(re.sub(rf"{_TEMPORARY.pattern}[/\\\\]", "", str(error)))  # a file in `renamed_folder`
    return OSError(f"{path} could not be written: {error.strerror or error}")
