"""Reads scans from, and writes masks to, folders on disk and at URLs. fsspec opens every URL."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aftersam.errors import naming
from aftersam.files import renamed

# protocols that can create a file only if it does not exist
ATOMIC = frozenset({"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})


def is_url(place: str | Path) -> bool:
    """Whether `place` is a URL, or a chain of URLs in fsspec's notation (a::b), not a path."""
    return "://" in str(place) or "::" in str(place)


def plain(place: str | Path) -> str | Path:
    """`place` as a Path where it is a local file or folder (also file://), else as a URL. A .zip becomes zip://."""
    text = str(place)
    if text.startswith("file://") and "::" not in text:
        text = text.removeprefix("file://")
    if text.lower().endswith(".zip") and "::" not in text and not text.startswith("zip://"):
        return f"zip://::{text if is_url(text) else os.path.abspath(text)}"
    return text if is_url(text) else Path(text)


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it.

    Raises ValueError on a protocol that is unknown or whose package is missing."""
    import fsspec

    with reaching(url):
        try:
            fs, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise ValueError(f"{url} cannot be opened: {error}") from None
        return fs, path.rstrip("/")


class reaching(contextlib.AbstractContextManager[None]):
    """Turns what a library raises over `url` into one sentence that starts with the URL, as `naming` does for files."""

    def __init__(self, url: str | Path) -> None:
        self.url = url

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{self.url} does not exist") from error
        naming(self.url, "cannot be reached").__exit__(kind, error, trace)


def files_at(url: str, *, recursive: bool) -> tuple[str, list[str]]:
    """(path of `url` in its file system, sorted names of the files below it). The names are [""] if `url` is a file.

    Without `recursive`, files in subfolders are left out. Raises ValueError where there is no file."""
    fs, path = open_url(url)
    with reaching(url):
        found = fs.find(path, maxdepth=None if recursive else 1)
    names = sorted(name[len(path) :].strip("/") for name in found)
    if not names:
        raise ValueError(f"{url} does not exist, or is an empty folder")
    return path, [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def fetched(url: str, folder: Path) -> Path:
    """Copy the file or the folder of files at `url` into the local `folder`. Returns the path of the copy."""
    fs, path = open_url(url)
    home = folder / (path.rsplit("/", 1)[-1] or "scan")
    with reaching(url):
        fs.invalidate_cache()
        if fs.isdir(path):
            home.mkdir()
            for name in fs.find(path, maxdepth=1):
                fs.get_file(name, str(home / name.rsplit("/", 1)[-1]))
        else:
            fs.get_file(path, str(home))
    return home


class Store:
    """The output folder of masks, on disk or at a URL. Names of files are paths below it, with slashes."""

    def __init__(self, root: str | Path) -> None:
        self.root = root
        self.fs: Any = None
        self.base = str(root)
        if isinstance(root, str):
            self.fs, self.base = open_url(root)

    @property
    def atomic(self) -> bool:
        """Whether only one process succeeds if several `create` the same file at once."""
        return self.fs is None or not ATOMIC.isdisjoint(
            [self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol
        )

    @property
    def local(self) -> Path | None:
        """The folder as a path; None if it is at a URL."""
        return self.root if isinstance(self.root, Path) else None

    def path(self, name: str) -> Path | str:
        """Full location of `name`: a Path in a local folder, else a URL."""
        return self.root / name if isinstance(self.root, Path) else f"{self.root.rstrip('/')}/{name}"

    def names(self, below: str = "") -> set[str]:
        """Names of all files, or of the files in the folder `below`."""
        if self.fs is None:
            return {
                os.path.relpath(os.path.join(home, name), self.base).replace(os.sep, "/")
                for home, _, files in os.walk(os.path.join(self.base, below))
                for name in files
            }
        with reaching(self.path(below)):
            self.fs.invalidate_cache()
            return {name[len(self.base) :].strip("/") for name in self.fs.find(self._at(below))}

    def exists(self, name: str) -> bool:
        """Whether the file `name` exists now."""
        if self.fs is None:
            return os.path.exists(os.path.join(self.base, name))
        with reaching(self.path(name)):
            self.fs.invalidate_cache()
            found: bool = self.fs.exists(self._at(name))
        return found

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file at a URL. Returns False where the file exists. Not for local folders."""
        with reaching(self.path(name)):
            try:
                self.fs.pipe_file(self._at(name), data, mode="create")
            except FileExistsError:
                return False
            return True

    def read(self, name: str) -> bytes:
        """Content of a file. Raises ValueError where it cannot be read."""
        if self.fs is None:
            with naming(self.path(name)):
                return (Path(self.base) / name).read_bytes()
        with reaching(self.path(name)):
            self.fs.invalidate_cache()
            data: bytes = self.fs.cat_file(self._at(name))
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file. On disk the replacement is atomic: readers see the old or the new content."""
        if self.fs is None:
            with renamed(Path(self.base) / name) as temporary:
                temporary.write_bytes(data)
            return
        with reaching(self.path(name)):
            self.fs.pipe_file(self._at(name), data)

    def put(self, file: Path, name: str) -> None:
        """Copy a local file to a URL."""
        with reaching(self.path(name)):
            self.fs.put_file(str(file), self._at(name))

    def delete(self, name: str) -> None:
        """Remove a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            if self.fs is None:
                os.unlink(os.path.join(self.base, name))
                return
            with reaching(self.path(name)), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self.base}/{name}" if self.base else name


def packed_in(output: str | Path) -> Path | None:
    """Path of the archive if `output` is a local one, else None. Raises ValueError on an archive that is not local."""
    if not str(output).startswith("zip://"):
        return None
    inside, _, archive = str(output).removeprefix("zip://").partition("::")
    if not archive or is_url(archive) or inside:
        raise ValueError(
            f"--output {output} is no archive on disk; masks are packed into a file such as masks.zip"
        )
    return Path(archive)


def names_in(archive: Path) -> set[str]:
    """Names of the files in a .zip; empty if the archive does not exist."""
    if not archive.exists():
        return set()
    with naming(archive, "is no whole .zip"), zipfile.ZipFile(archive) as packed:
        return set(packed.namelist())


def pack(folder: Path, archive: Path) -> None:
    """Add the files below `folder` to the .zip `archive`; they replace files of the same name.

    The archive is written anew and replaced atomically."""
    new = {str(path.relative_to(folder)): path for path in _files(folder)}
    with renamed(archive) as temporary, zipfile.ZipFile(temporary, "w") as packed:
        if archive.exists():
            with naming(archive, "is no whole .zip"), zipfile.ZipFile(archive) as before:
                for item in before.infolist():
                    if item.filename not in new:
                        packed.writestr(item, before.read(item))
        for name, path in new.items():
            packed.write(path, name)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
