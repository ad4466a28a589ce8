"""dataset.json and splits_final.json as public tools and other people write them: taken, or refused in one sentence."""

import json
import unicodedata

import pytest

from aftersam.data.dataset import find_dataset, split
from toy_files import nnunet, save

LABELS = {"background": 0, "liver": 1, "spleen": 2}
CT = {"channel_names": {"0": "CT"}}
LISTED = [{"image": "imagesTr/a_0000.nii.gz", "label": "labelsTr/a.nii.gz"}]


def described(root, description, raw=None):
    """The data set in `root` with this dataset.json, or these bytes in its place."""
    nnunet(root)
    text = json.dumps({"labels": LABELS, **description}, ensure_ascii=False).encode() if raw is None else raw
    (root / "dataset.json").write_bytes(text)
    return find_dataset(root)


@pytest.mark.parametrize(
    "description",
    [
        CT,
        {"channel_names": ["CT"]},
        {"modality": {"0": "CT"}},
        {"modality": ["CTA"]},
        {"labels": {"0": "background", "1": "liver", "2": "spleen"}},
        {"labels": {"background": "0", "liver": "1", "spleen": "2"}},
        {"labels": {"liver": 1, "spleen": 2}},
        {"training": LISTED},
        {"training": [{"image": ["imagesTr/a_0000.nii.gz"], "label": ["labelsTr/a.nii.gz"]}]},
        {"training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]},
        {"dataset": {"a": {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}}},
    ],
    ids=str,
)
def test_what_public_tools_write_is_taken(tmp_path, description):
    dataset = described(tmp_path, description)
    assert dataset.labels == {1: "liver", 2: "spleen"}
    assert dataset.cases[0].id == "a"
    assert all(case.image.is_file() and case.label.is_file() for case in dataset.cases)


@pytest.mark.parametrize("name", ["CT", "ct", "low dose CT", "Low-Dose CT", "CT (PET/CT)", "CTA", "noNorm"])
def test_any_name_of_ct_is_taken(tmp_path, name):
    for i, stored in enumerate(([name], {"0": name})):
        (home := tmp_path / str(i)).mkdir()
        assert len(described(home, {"labels": LABELS, "channel_names": stored}).cases) == 2


def test_a_byte_order_mark_is_taken(tmp_path):
    raw = b"\xef\xbb\xbf" + json.dumps({"labels": LABELS, **CT}).encode()
    assert len(described(tmp_path, {}, raw=raw).cases) == 2


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({"channel_names": {"0": "CT", "1": "PET"}}, r"2 channels \(CT, PET\)"),
        ({"channel_names": ["CT", "PET"]}, r"2 channels \(CT, PET\)"),
        ({"modality": ["CT", "PET"], "training": LISTED}, "2 channels"),
        ({"modality": "CT"}, "modality 'CT', but it must be an object"),
        ({"channel_names": None}, "channel_names None"),
        ({"channel_names": {"0": "T1"}}, "the channel 'T1'; CT in Hounsfield units is needed"),
        ({"modality": {"0": "MRI"}, "training": LISTED}, "the channel 'MRI'"),
        ({"labels": ["background", "liver"]}, "labels: an object"),
        ({"labels": None}, "labels: an object"),
        ({"labels": {"background": 0, "both": [1, 2]}}, "one integer"),
        ({"labels": {"background": 0, "liver": 1.0}}, "one integer"),
        ({"labels": {"background": 0, "liver": True}}, "one integer"),
        ({"labels": {"background": 0, "liver": "²"}}, "one integer"),
        ({"labels": {"background": 0, "liver": None}}, "one integer"),
        ({"labels": {"background": 0, "liver": -1}}, "one integer"),
        ({"labels": {"background": 0, "liver": "9" * 5000}}, "one integer"),
        ({"labels": {"background": 0, "liver": 2}}, r"\[2\]; they must be 1 to 1"),
        ({"labels": {"background": 0, "liver": 1, "ignore": 2}}, "ignore"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "the label 'a' twice"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "both 'a' and 'b'"),
        ({"labels": {"0": "background", "1": None}}, "the name None"),
        ({"labels": {"background": 0, " ": 1}}, "the name ' '"),
        ({"training": {"a": 1}}, "it must be a list"),
        ({"training": 3}, "it must be a list"),
        ({"training": None}, "it must be a list"),
        ({"training": ["imagesTr/a.nii.gz"]}, "one image and one label"),
        ({"training": [{"image": "imagesTr/a.nii.gz", "label": None}]}, "one image and one label"),
        ({"training": [{"image": ["a.nii", "b.nii"], "label": "c.nii"}]}, "one image and one label"),
        ({"training": []}, "holds no scan"),
        ({"dataset": {"a": 3}}, "one image and one label"),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_refused(tmp_path, description, says):
    with pytest.raises(ValueError, match=says) as caught:
        described(tmp_path, description)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b'{"labels": {"a": 1,}}', "Köln".encode("latin-1"), b"[" * 100000, b"null"]
)
def test_what_is_no_json_object_is_refused(tmp_path, raw):
    with pytest.raises(ValueError, match=r"dataset\.json"):
        described(tmp_path, {}, raw=raw)


def test_a_description_that_is_no_file_is_refused(tmp_path):
    nnunet(tmp_path)
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "dataset.json").mkdir()
    with pytest.raises(ValueError, match=r"dataset\.json is not a file"):
        find_dataset(tmp_path)


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".NRRD", ".nii.bz2", ".img"])
def test_an_image_of_another_format_is_named_where_its_case_has_no_nifti(tmp_path, folder, ending):
    nnunet(tmp_path)
    (tmp_path / folder / f"a{ending}").touch()  # beside a.nii.gz: nothing is lost
    (tmp_path / folder / "readme.txt").touch()
    assert len(find_dataset(tmp_path).cases) == 2
    (tmp_path / folder / f"c{ending}").touch()
    with pytest.raises(ValueError, match=rf"{folder}/c{ending} ends in .*; convert it to \.nii\.gz"):
        find_dataset(tmp_path)


def test_a_label_without_its_scan_is_a_case_that_lacks_it(tmp_path):
    nnunet(tmp_path)
    save(tmp_path / "labelsTr" / "c.nii.gz")
    (case,) = (case for case in find_dataset(tmp_path).cases if case.id == "c")
    assert case.image == tmp_path / "imagesTr" / "c.nii.gz"
    assert not case.image.exists()


def test_names_in_two_unicode_forms_are_one_case_in_folders_lists_and_splits(tmp_path):
    forms = [unicodedata.normalize(form, "Müller") for form in ("NFD", "NFC")]
    nnunet(tmp_path)
    save(tmp_path / "imagesTr" / f"{forms[0]}_0000.nii.gz")
    save(tmp_path / "labelsTr" / f"{forms[1]}.nii.gz")
    dataset = find_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == [forms[1], "a", "b"]
    assert all(case.label.is_file() for case in dataset.cases)
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps([{"train": [forms[0]], "val": ["a"]}]))
    assert split(dataset, 0, 0) == ([forms[1]], ["a"])
    listed = [{"image": f"imagesTr/{forms[0]}_0000.nii.gz", "label": f"labelsTr/{forms[1]}.nii.gz"}]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS, "training": listed}))
    assert [case.id for case in find_dataset(tmp_path).cases] == [forms[1]]


@pytest.mark.parametrize(
    ("folds", "says"),
    [
        ([{"train": ["a", "zzz"], "val": ["b"]}], "the case 'zzz', which the data set does not have"),
        ([{"train": ["a_0000"], "val": ["b"]}], "the case 'a_0000'"),
        ([{"train": ["a", "b"], "val": ["b"]}], "the case 'b' on both sides"),
        ({"train": ["a"], "val": ["b"]}, "not a list of folds"),
        ([[["a"], ["b"]]], "a fold is an object with lists train and val"),
        ([{"train": ["a"]}], "a fold is an object"),
        ([{"train": "a", "val": "b"}], "a fold is an object"),
        ([{"train": [0], "val": [1]}], "a fold is an object"),
        ([{"train": [], "val": ["a"]}], "without a training case"),
        ([], "not a list of folds"),
        (None, "not a list of folds"),
    ],
    ids=str,
)
def test_splits_that_cannot_be_right_are_refused(tmp_path, folds, says):
    nnunet(tmp_path)
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    with pytest.raises(ValueError, match=says) as caught:
        split(find_dataset(tmp_path), 0, 0)
    assert str(tmp_path / "splits_final.json") in str(caught.value)


def test_a_case_twice_in_a_part_counts_once_and_another_file_of_splits_wins(tmp_path):
    nnunet(tmp_path)
    for name, train in (("splits_final.json", ["a", "a"]), ("other.json", ["b"])):
        (tmp_path / name).write_text(json.dumps([{"train": train, "val": []}]))
    dataset = find_dataset(tmp_path)
    assert split(dataset, 0, 0) == (["a"], [])
    assert split(dataset, 0, 0, source=tmp_path / "other.json") == (["b"], [])
    with pytest.raises(ValueError, match="does not exist"):
        split(dataset, 0, 0, source=tmp_path / "none.json")
