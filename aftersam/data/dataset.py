"""Data sets on disk to cases: nnU-Net raw, Medical Segmentation Decathlon, SegTHOR, or images/ beside labels/."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aftersam.data.volume import read_grid, read_labels
from aftersam.errors import SAID
from aftersam.files import NIFTI, OTHER_IMAGES, by_case, case_id, normal_form, read_json, scans_in, write_json

FOLDS = 5
SEGTHOR_LABELS = {1: "esophagus", 2: "heart", 3: "trachea", 4: "aorta"}
OTHER_MODALITIES = r"\b(mri?|t[12]\w*|flair|dwi|adc|swi|pet|pt|suv|spect|us|ultrasound|x-?ray|dose)\b"
SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}


@dataclass(frozen=True)
class Case:
    """One scan and its label map, if it has one."""

    id: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class Dataset:
    """Cases in the order of their ids; labels maps values to names, without background."""

    name: str
    layout: str
    root: Path
    cases: tuple[Case, ...]
    labels: dict[int, str]


def find_dataset(root: Path | str) -> Dataset:
    """The data set in the folder `root`, whichever layout it has.

    Raises ValueError where there is none, or where its description contradicts itself."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    description = _read_description(root)
    _check_channels(description, root / "dataset.json")
    if "training" in description or isinstance(description.get("dataset"), dict):
        dataset = _listed(root, description)
    elif (root / "imagesTr").is_dir():
        dataset = _nnunet(root, description)
    elif (root / "images").is_dir():
        dataset = _plain(root, description)
    else:
        dataset = _segthor(root)
    if not dataset.cases:
        raise ValueError(
            f"{root} is laid out like {dataset.layout}, but holds no scan that ends in .nii.gz or .nii"
        )
    return dataset


def split(
    dataset: Dataset, fold: int, seed: int, *, source: Path | None = None, write_to: Path | None = None
) -> tuple[list[str], list[str]]:
    """Ids to train on and to validate on: fold `fold` of the data set's splits_final.json, or of five seeded ones.

    `source` is a file of splits in place of the data set's. All folds go to `write_to`, in nnU-Net's format. A data
    set of one case has nothing to validate on.
    Raises ValueError on a fold that does not exist and on splits that name unknown cases or share one."""
    path, folds = source or dataset.root / "splits_final.json", folds_of(dataset, seed, source=source)
    if not 0 <= fold < len(folds):
        raise ValueError(
            f"fold is {fold}, but {path if path.exists() else dataset.root} has the folds 0 to {len(folds) - 1}"
        )
    if write_to is not None:
        write_json(write_to, folds)
    return folds[fold]["train"], folds[fold]["val"]


def folds_of(dataset: Dataset, seed: int, *, source: Path | None = None) -> list[dict[str, list[str]]]:
    """All folds that `split` chooses from, as {"train": ids, "val": ids}."""
    path = source or dataset.root / "splits_final.json"
    ids = [case.id for case in dataset.cases]
    if source is not None or path.exists():
        return _stored_folds(path, ids)
    order = np.random.default_rng(seed).permutation(len(ids))
    parts = np.array_split(order, min(FOLDS, len(ids))) if len(ids) > 1 else [np.array([], dtype=int)]
    held = [{ids[i] for i in part} for part in parts]
    return [{"train": [i for i in ids if i not in h], "val": [i for i in ids if i in h]} for h in held]


def median_spacing(cases: Sequence[Case]) -> tuple[float, float, float]:
    """Median voxel size (d, h, w) in mm over the cases' headers, axis by axis."""
    d, h, w = np.median([read_grid(case.image)[1] for case in cases], axis=0).round(4).tolist()
    return d, h, w


def mirror_pairs(labels: dict[int, str]) -> dict[int, int]:
    """{value: the value of the other side}, both ways, from names such as lung_left, RightParotid, kidney_L.

    Raises ValueError on a sided name without its counterpart: a mirrored scan would then be wrong."""
    values = {_tokens(name): value for value, name in labels.items()}
    pairs = {}
    for value, name in labels.items():
        tokens = _tokens(name)
        other = tuple(SIDES.get(token, token) for token in tokens)
        if other == tokens:
            continue
        if other not in values:
            raise ValueError(
                f"mirroring needs both sides of every organ, but the label {name!r} has no counterpart"
            )
        pairs[value] = values[other]
    return pairs


def _tokens(name: str) -> tuple[str, ...]:
    """Lower-case words of a label's name. L and R are sides only as words of their own: L1 is a vertebra."""
    words = []
    for chunk in re.split(r"[\W_]+", name):
        for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", chunk):
            word = word.lower()
            if word in ("l", "r") and len(chunk) > 1:
                word = "=" + word  # part of L1 or 2R
            side = next((s for s in ("left", "right") if word.startswith(s) and word != s), None)
            words += [word] if side is None else [side, word.removeprefix(side)]
    return tuple(words)


def _read_description(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    if not path.exists():
        return {}
    description = read_json(path)
    if not isinstance(description, dict):
        raise ValueError(f"{path} holds a {type(description).__name__}, but must be an object")
    return description


def _check_channels(description: dict[str, Any], where: Path) -> None:
    """Raise ValueError unless the scans have one channel, and it is not called by another modality than CT."""
    key = "channel_names" if "channel_names" in description else "modality"
    stored = description.get(key, {})
    if not isinstance(stored, (dict, list)):
        raise ValueError(f'{where} has {key} {stored!r}, but it must be an object such as {{"0": "CT"}}')
    channels = [str(name) for name in (stored.values() if isinstance(stored, dict) else stored)]
    if len(channels) > 1:
        raise ValueError(f"{where} has {len(channels)} channels ({', '.join(channels)}); CT alone is one")
    if any(
        re.search(OTHER_MODALITIES, name, re.IGNORECASE) and not re.search(r"\bct", name, re.IGNORECASE)
        for name in channels
    ):
        raise ValueError(f"{where} has the channel {channels[0]!r}; CT in Hounsfield units is needed")


def label_names(description: Any, where: Path) -> dict[int, str]:
    """Value to name of the `labels` in a JSON file, whichever way round they are written, background left out.

    Raises ValueError where a value is no integer, or a value or a name stands twice."""
    stored = description.get("labels") if isinstance(description, dict) else None
    if not isinstance(stored, dict):
        raise ValueError(f"{where} needs labels: an object of names and values")
    names: dict[int, str] = {}
    for key, entry in stored.items():
        value, name = (key, entry) if _is_value(key) else (entry, key)
        if not _is_value(value):
            raise ValueError(f"{where} gives the label {key!r} the value {entry!r}; one integer is needed")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where} gives the value {value} the name {name!r}; a word is needed")
        if int(value) in names:
            raise ValueError(f"{where} gives the value {value} to both {names[int(value)]!r} and {name!r}")
        if name in names.values():
            raise ValueError(f"{where} has the label {name!r} twice; every label needs its own name")
        names[int(value)] = name
    names.pop(0, None)
    return dict(sorted(names.items()))


def _class_names(description: dict[str, Any], where: Path) -> dict[int, str]:
    """The `label_names` of a data set, which number its classes."""
    names = label_names(description, where)
    if "ignore" in names.values():
        raise ValueError(f"{where} has an ignore label, which is not supported")
    if not names:
        raise ValueError(f"{where} has no label besides background")
    if sorted(names) != list(range(1, len(names) + 1)):
        raise ValueError(f"{where} has the label values {sorted(names)}; they must be 1 to {len(names)}")
    return names


def _is_value(value: object) -> bool:
    """Whether JSON's `value` is a label's: an integer from 0 on, or its digits."""
    return not isinstance(value, bool) and re.fullmatch("[0-9]{1,9}", str(value)) is not None


def _nnunet(root: Path, description: dict[str, Any]) -> Dataset:
    names = _class_names(description, root / "dataset.json")
    return _paired(root, "nnU-Net raw", root / "imagesTr", root / "labelsTr", names)


def _plain(root: Path, description: dict[str, Any]) -> Dataset:
    labels = root / "labels"
    if "labels" in description:
        names = _class_names(description, root / "dataset.json")
    else:
        highest = 0
        for path in scans_in(labels) if labels.is_dir() else ():
            with contextlib.suppress(*SAID):  # where the case is read, its label is refused
                highest = max(highest, int(read_labels(path).array.max()))
        names = {value: f"label_{value}" for value in range(1, highest + 1)}
        if not names:
            raise ValueError(f"{root} has neither a dataset.json with labels nor label maps in {labels}")
    return _paired(root, "images/ and labels/", root / "images", labels, names)


def _paired(root: Path, layout: str, images: Path, labels: Path, names: dict[int, str]) -> Dataset:
    scans, masks = (_nifti_by_case(folder) if folder.is_dir() else {} for folder in (images, labels))
    # a label without its scan is a case whose scan is missing, of which check and train tell
    missing = {name: images / masks[name].name for name in masks if name not in scans}
    cases = [Case(name, path, masks.get(name)) for name, path in sorted((scans | missing).items())]
    return Dataset(root.resolve().name, layout, root, tuple(cases if scans else ()), names)


def _nifti_by_case(folder: Path) -> dict[str, Path]:
    """{case: its NIfTI file}. Raises ValueError on an image of another format whose case has none."""
    found = by_case(scans_in(folder))
    for path in sorted(folder.iterdir()):
        ending = next((e for e in OTHER_IMAGES if path.name.lower().endswith(e)), "")
        if ending and not path.name.startswith(".") and not by_case([path.with_suffix("")]).keys() & found:
            raise ValueError(f"{path} ends in {ending}, which is not read; convert it to .nii.gz")
    return found


def _listed(root: Path, description: dict[str, Any]) -> Dataset:
    """The cases that dataset.json lists: under training, as Decathlon and nnU-Net 1 do, or dataset, as nnU-Net 2."""
    where = root / "dataset.json"
    if "training" in description:
        listed = description["training"]
    else:
        entries = description["dataset"].values()
        listed = [{**e, "image": e.get("images")} if isinstance(e, dict) else e for e in entries]
    if not isinstance(listed, list):
        raise ValueError(f"{where} has training {listed!r:.60}, but it must be a list of images and labels")
    cases = []
    for entry in listed:
        stored = [entry.get(key) for key in ("image", "label")] if isinstance(entry, dict) else []
        stored = [file[0] if isinstance(file, list) and len(file) == 1 else file for file in stored]
        files = [root / file for file in stored if isinstance(file, str) and file]
        if len(files) < 2:
            raise ValueError(
                f"{where} lists the training case {entry!r:.200}; one image and one label are needed"
            )
        image, label = files
        if not image.exists():  # nnU-Net 1 lists imagesTr/a.nii.gz for the file imagesTr/a_0000.nii.gz
            image = next(
                (p for e in NIFTI if (p := image.with_name(f"{case_id(image)}_0000{e}")).exists()), image
            )
        cases.append(Case(case_id(image), image, label))
    ids = {path: name for name, path in by_case(case.image for case in cases).items()}
    cases = [dataclasses.replace(case, id=ids[case.image]) for case in cases]
    return Dataset(
        str(description.get("name", root.resolve().name)),
        "Medical Segmentation Decathlon",
        root,
        tuple(sorted(cases, key=lambda case: case.id)),
        _class_names(description, where),
    )


def _segthor(root: Path) -> Dataset:
    folder = root / "train" if (root / "train").is_dir() else root
    cases = []
    for home in sorted(p for p in folder.iterdir() if p.is_dir()):
        files = by_case(scans_in(home))
        if (name := normal_form(home.name)) in files:
            cases.append(Case(name, files[name], files.get("GT")))
    if not cases:
        raise ValueError(
            f"{root} is no data set: there is neither imagesTr/ nor images/ nor a dataset.json nor SegTHOR's "
            "Patient_01/Patient_01.nii.gz"
        )
    return Dataset("SegTHOR", "SegTHOR", root, tuple(cases), SEGTHOR_LABELS)


def _stored_folds(path: Path, ids: list[str]) -> list[dict[str, list[str]]]:
    """The folds that nnU-Net's splits_final.json holds; a case that stands twice in a part counts once."""
    found = read_json(path)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} is not a list of folds with train and val")
    folds = []
    for fold in found:
        stored = [fold.get(part) for part in ("train", "val")] if isinstance(fold, dict) else []
        parts = [part for part in stored if isinstance(part, list) and all(isinstance(i, str) for i in part)]
        if len(parts) < 2:
            raise ValueError(
                f"{path} has the fold {fold!r:.60}, but a fold is an object with lists train and val"
            )
        train, validation = (list(dict.fromkeys(normal_form(i) for i in part)) for part in parts)
        unknown = sorted({*train, *validation} - set(ids))
        if unknown:
            raise ValueError(f"{path} names the case {unknown[0]!r}, which the data set does not have")
        if both := sorted(set(train) & set(validation)):
            raise ValueError(f"{path} has the case {both[0]!r} on both sides of a fold")
        if not train:
            raise ValueError(f"{path} has a fold without a training case")
        folds.append({"train": train, "val": validation})
    return folds


def link_cases(dataset: Dataset, ids: Collection[str], home: Path) -> None:
    """Make home/images and home/labels: links, named by case, to the scans and labels of the cases `ids`.

    Raises ValueError on a case without a label."""
    for case in dataset.cases:
        if case.id not in ids:
            continue
        if case.label is None:
            raise ValueError(f"{case.image} has no label to be scored by")
        for folder, file in (("images", case.image), ("labels", case.label)):
            (home / folder).mkdir(parents=True, exist_ok=True)
            ending = ".nii.gz" if file.name.lower().endswith(".gz") else ".nii"
            link = home / folder / f"{case.id}{ending}"
            if link.is_symlink() and link.resolve() != file.resolve():  # the data set has moved
                link.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):  # of a command before, or beside this one
                link.symlink_to(file.resolve())
