"""Lists the scans of a cohort: from a folder tree, a file of names, a table, an archive or a URL."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from aftersam.errors import counted, naming, sentence
from aftersam.files import (
    NIFTI,
    by_case,
    case_id,
    is_nifti,
    normal_form,
    refuse_input,
    refuse_inputs,
    scans_in,
)
from aftersam.inference.arguments import PredictArgs
from aftersam.inference.jobs import jobs_of, refuse_format
from aftersam.inference.storage import Store, files_at, is_url, open_url, packed_in, plain, reaching

TABLES = {".csv": ",", ".tsv": "\t"}
LISTS = (".txt", ".parquet", *TABLES)
CASE_COLUMNS = ("case_id", "case", "id")
PARTIAL = ".partial"  # ending of the folder that holds the masks until they are packed into the archive


class Entry(NamedTuple):
    """One scan of a cohort."""

    case: str
    """Unique id of the case. Slashes in it become folders of the output."""
    image: str
    """Path or URL of the scan; for a DICOM series its folder."""
    mask: str
    """Path of the mask below the output."""
    series: str | None = None
    """SeriesInstanceUID of the series to read, for a folder of DICOM files."""
    extra: tuple[str, ...] = ()
    """Values of the list's other columns, which are copied to the manifest."""


@dataclass(frozen=True)
class Cohort:
    """The scans of a prediction, and where their masks go."""

    entries: list[Entry]
    store: Store
    many: bool
    """Whether the input may hold several scans. A scan that fails then does not stop the others."""
    listed: bool = False
    """Whether the input is a list, a folder tree or a URL, not one scan or a flat folder."""
    skipped: list[tuple[Entry, str]] = field(default_factory=list)
    """DICOM series that are not predicted, each with the reason."""
    columns: tuple[str, ...] = ()
    """Column names of `Entry.extra`."""
    archive: Path | None = None
    """The .zip into which the output is packed at the end."""


def cohort_of(args: PredictArgs) -> Cohort:
    """The scans that `args` name, and the store of their masks.

    Raises ValueError where there is no scan, where two scans have one case id, and where a mask would replace a
    scan."""
    source, output = plain(args.input), plain(args.output)
    archive = packed_in(output)
    if archive is not None:
        output = archive.with_name(archive.name + PARTIAL)
    also_read = [*args.model, *([] if args.prompt_labels is None else [args.prompt_labels])]
    if isinstance(source, Path):
        if not source.exists():
            raise ValueError(f"{source} does not exist")
        if not (args.recursive and source.is_dir()) and source.suffix.lower() not in LISTS:
            return _plain_files(args, source, output, also_read, archive)
    single = False
    skipped: list[tuple[Entry, str]] = []
    columns: tuple[str, ...] = ()
    if str(source).lower().endswith(LISTS):
        columns, entries = _listed(source)
    elif isinstance(source, Path):
        entries, skipped = _tree(source, output)
    else:
        entries, single = _at_url(source, recursive=args.recursive)
    if isinstance(output, Path):
        refuse_input(output, [p for p in (source, *also_read) if isinstance(p, Path)])
        if single and is_nifti(output):
            entries, output = [entries[0]._replace(mask=output.name)], output.parent
        elif is_nifti(output) or output.is_file():
            raise ValueError(
                f"{source} is a list of {counted(len(entries), 'scan')}, so --output must be a folder"
            )
        refuse_format(output)
    elif single and output.lower().endswith(NIFTI):
        output, _, name = output.rpartition("/")
        entries = [entries[0]._replace(mask=name)]
    if not entries:
        raise ValueError(f"{source} holds no scan: neither NIfTI files nor CT series in DICOM")
    store = Store(output)
    _check_masks(entries, store)
    return Cohort(entries, store, not single, not single, skipped, columns, archive)


def _plain_files(
    args: PredictArgs, source: Path, output: str | Path, also_read: Sequence[Path], archive: Path | None
) -> Cohort:
    """The cohort of one scan, or of the flat folder `source`."""
    if isinstance(output, Path):
        pairs, many = jobs_of(source, output, also_read=also_read, overwrite=args.overwrite)
        root = output if many else pairs[0][1].parent
        entries = [Entry(case_id(mask), str(scan), mask.name) for scan, mask in pairs]
        return Cohort(entries, Store(root), many, archive=archive)
    scans = list(by_case(scans_in(source)).values()) if source.is_dir() else []
    entries = [Entry(case_id(scan), str(scan), mask_name(case_id(scan))) for scan in scans or [source]]
    if not scans and output.lower().endswith(NIFTI):
        output, _, name = output.rpartition("/")
        entries = [entries[0]._replace(mask=name)]
    return Cohort(entries, Store(output), bool(scans), bool(scans))


def _check_masks(entries: Sequence[Entry], store: Store) -> None:
    """Raise ValueError where two scans would give one mask, or a mask would replace a scan."""
    found: dict[str, Entry] = {}
    for entry in entries:
        other = found.setdefault(normal_form(entry.mask), entry)
        if other is not entry:
            raise ValueError(
                f"{other.image} and {entry.image} are both the case {entry.case!r} and would give the same mask; "
                "rename one, or give each a case_id of its own in a .csv"
            )
    if store.local is None:
        images = {entry.image for entry in entries}
        for entry in entries:
            if str(store.path(entry.mask)) in images:
                raise ValueError(f"the output {store.path(entry.mask)} is an input; choose another --output")
        return
    if there := [store.local / entry.mask for entry in entries if store.exists(entry.mask)]:
        refuse_inputs(there, [Path(entry.image) for entry in entries if not is_url(entry.image)])


def inside(name: str) -> str:
    """`name`, of a case or a mask. Raises ValueError where it does not lie inside a folder."""
    odd = {"", ".", ".."}.intersection(name.split("/")) or is_url(name) or not name.isprintable()
    if odd:
        raise ValueError(f"{name!r} cannot name a mask; a name below --output such as site/a is needed")
    return name


def mask_name(case: str) -> str:
    """File name of a case's mask, below the output. Raises ValueError as `inside` does."""
    return f"{inside(case)}.nii.gz"


def case_of(image: str, base: str = "") -> str:
    """Case id of an image: its path below `base`, or else its whole path, without the ending.

    The id does not depend on the other images, so that it stays the same in a growing list."""
    inside = image[len(base) :] if base and image.startswith(base) else image.partition("://")[2] or image
    parts = [part for part in inside.split("/")[:-1] if part not in ("", ".", "..")]
    return "/".join([*parts, case_id(inside)])


def _listed(source: str | Path) -> tuple[tuple[str, ...], list[Entry]]:
    """(names of the other columns, scans) of a .txt, .csv, .tsv or .parquet.

    Relative paths in the list begin at the folder that contains the list."""
    header, rows = _rows(source)
    known = {name.strip().lower().replace(" ", "_"): i for i, name in enumerate(header)}
    if "image" not in known:
        raise ValueError(f"{source} has the columns {', '.join(header)}, but the column image is needed")
    at = known["image"]
    case_at = next((known[name] for name in CASE_COLUMNS if name in known), None)
    mask_at = known.get("mask")
    others = [i for i in range(len(header)) if i not in (at, case_at, mask_at)]
    base = (
        str(source.absolute().parent) + "/" if isinstance(source, Path) else source.rpartition("/")[0] + "/"
    )
    entries = []
    for number, row in enumerate(rows, 1):
        if len(row) != len(header) or not row[at]:
            raise ValueError(
                f"{source} has no image in row {number}, or the row has more or fewer values than the header"
            )
        image = row[at] if is_url(row[at]) or row[at].startswith("/") else os.path.normpath(base + row[at])
        if not isinstance(source, Path) and not is_url(row[at]):
            image = base + row[at]
        case = row[case_at] if case_at is not None and row[case_at] else case_of(image, base)
        mask = inside(row[mask_at]) if mask_at is not None and row[mask_at] else mask_name(case)
        if not mask.lower().endswith(NIFTI):
            raise ValueError(f"{source} has the mask {mask}, but a mask is written as .nii.gz or .nii")
        entries.append(Entry(case, image, mask, None, tuple(row[i] for i in others)))
    return tuple(header[i] for i in others), entries


def _rows(source: str | Path) -> tuple[list[str], Iterable[Sequence[str]]]:
    """(header, rows) of a list of scans."""
    fs, path = open_url(str(source))
    suffix = PurePosixPath(path).suffix.lower()
    with reaching(source):
        data: bytes = fs.cat_file(path)
    with naming(source, "is no list of scans"):
        if suffix == ".parquet":
            try:
                import pyarrow
                from pyarrow import parquet
            except ImportError:
                raise ValueError(
                    f"{source}: reading Parquet needs pyarrow: pip install 'aftersam[cohort]'"
                ) from None
            pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # freed memory can be used by the model
            table = parquet.ParquetFile(io.BytesIO(data))
            return list(table.schema_arrow.names), _texts(table.iter_batches(4096, use_threads=False))
        text = data.decode("utf-8-sig")
        if suffix == ".txt":
            return ["image"], [(line.strip(),) for line in text.splitlines() if line.strip()]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=TABLES[suffix], strict=True)
        header, *rows = [row for row in reader if row] or [[]]
        return header, rows


def _texts(batches: Iterable[Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of Arrow's batches, with every value as text."""
    for batch in batches:
        columns = [["" if v is None else str(v) for v in column.to_pylist()] for column in batch.columns]
        yield from zip(*columns, strict=True)


def _at_url(url: str, *, recursive: bool) -> tuple[list[Entry], bool]:
    """(scans at a URL, whether the URL is one file).

    Scans are NIfTI files and folders of DICOM files; each folder is one scan."""
    path, names = files_at(url, recursive=recursive)
    if names == [""]:
        case = case_id(path)
        return [Entry(case, url, mask_name(case))], True
    nifti = [name for name in names if name.lower().endswith(NIFTI)]
    images = [*nifti, *sorted({name.rpartition("/")[0] for name in names if name.lower().endswith(SLICES)})]
    entries = []
    for name in images:
        case = case_of(name, "") if name in nifti else name or case_id(path)
        entries.append(Entry(case or "scan", _joined(url, name), mask_name(case or "scan")))
    return entries, False


SLICES = (".dcm", ".dicom", ".ima")


def _joined(url: str, name: str) -> str:
    """The URL of `name` in the folder `url`. In a chain of URLs (a::b) the first one is the folder."""
    first, separator, rest = url.partition("::")
    protocol, _, folder = first.partition("://")
    return f"{protocol}://{folder.rstrip('/')}{'/' if folder and name else ''}{name}{separator}{rest}"


def _tree(root: Path, output: str | Path) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """(scans, skipped series with reasons) of `root` and all folders below it except `output`.

    Scans are NIfTI files and CT series in DICOM."""
    entries: list[Entry] = []
    skipped: list[tuple[Entry, str]] = []
    for home, files in _folders(root, output):
        below = os.path.relpath(home, root).replace(os.sep, "/")
        prefix = "" if below == "." else below + "/"
        names = [name for name in files if name.lower().endswith(NIFTI)]
        for name in names:
            case = case_of(prefix + name, "")
            entries.append(Entry(case, os.path.join(home, name), mask_name(case)))
        if any(_maybe_dicom(home, name) for name in files if name not in names):
            found, others = _series(Path(home), prefix.rstrip("/") or root.absolute().name)
            entries += found
            skipped += others
    return entries, skipped


def _folders(root: Path, output: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, its file names, sorted) for `root` and every folder below it.

    Links are followed. Hidden names and the folder `output` are left out. Raises OSError where a folder cannot be read:
    its scans would be missing without notice."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    leave = os.path.realpath(output) if isinstance(output, Path) else None
    for home, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        facts = os.stat(home)
        if (facts.st_dev, facts.st_ino) in seen or os.path.realpath(home) == leave:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield home, sorted(name for name in files if not name.startswith("."))


def _maybe_dicom(home: str, name: str) -> bool:
    """Whether a file has a DICOM ending, or has no ending and begins like a DICOM file."""
    if name.lower().endswith(SLICES):
        return True
    if "." in name and not name.replace(".", "").isdigit():  # a UID has dots but is no ending
        return False
    try:
        with open(os.path.join(home, name), "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _series(folder: Path, case: str) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """(CT series in a folder, other series with the reason why each is skipped).

    A folder whose series cannot be listed counts as one scan; reading the scan then reports the error."""
    from aftersam.data.dicom import series_in

    try:
        found = series_in(folder)
    except (ValueError, OSError) as error:
        if "pydicom" in sentence(error):
            raise
        return [Entry(case, str(folder), mask_name(case))], []
    scans = [uid for uid, why in found.items() if why is None]
    left_out = [
        (Entry(f"{case}/{uid}", str(folder), mask_name(f"{case}/{uid}"), uid), why)
        for uid, why in found.items()
        if why is not None
    ]
    if len(scans) == 1:
        return [Entry(case, str(folder), mask_name(case), scans[0])], left_out
    return [Entry(f"{case}/{uid}", str(folder), mask_name(f"{case}/{uid}"), uid) for uid in scans], left_out
