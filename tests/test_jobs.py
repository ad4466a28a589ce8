"""What a prediction is asked for: no mask replaces a scan, a label or another mask; every refusal is one sentence."""

from pathlib import Path

import pytest

from aftersam.inference.jobs import jobs_of, prompt_file
from toy_scans import scan


def test_each_scan_of_a_folder_has_its_mask(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a_0000.nii.gz", "b.NII", "._a_0000.nii.gz"):
        (tmp_path / "in" / name).write_text("")
    jobs, folder = jobs_of(tmp_path / "in", tmp_path / "out.v2")
    assert folder
    assert [(read.name, mask.name) for read, mask in jobs] == [
        ("a_0000.nii.gz", "a.nii.gz"),
        ("b.NII", "b.nii.gz"),
    ]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_onto_what_is_read_is_refused(tmp_path, overwrite):
    home = tmp_path / "in"
    home.mkdir()
    scan(home / "a_0000.nii.gz")
    (tmp_path / "link").symlink_to(home)
    labels = tmp_path / "labels"
    labels.mkdir()
    for output in (home, tmp_path / "link", labels, home / ".." / "in"):
        with pytest.raises(ValueError, match="is the input"):
            jobs_of(home, output, also_read=[labels], overwrite=overwrite)
    for output in (home, home / "a_0000.nii.gz"):  # of one scan; a folder then is where its mask would go
        if output.is_dir():
            (home / "a.nii.gz").hardlink_to(home / "a_0000.nii.gz")
        with pytest.raises(ValueError, match="is the input"):
            jobs_of(home / "a_0000.nii.gz", output, overwrite=overwrite)
    series = tmp_path / "series"
    series.mkdir()
    (series / "0.dcm").touch()  # a slice, maybe; a segmentation beside the slices is none of them
    for output in (series / "mask.nii.gz", series / "0.dcm", series):
        with pytest.raises(ValueError, match="is the input"):
            jobs_of(series, output, overwrite=overwrite)
    new = series / "mask.dcm"
    assert jobs_of(series, new, overwrite=overwrite) == ([(series, new)], False)


@pytest.mark.parametrize("name", ["m.nrrd", "m.seg.nrrd", "m.MHA", "m.nii.bz2", "m.hdr", "m.png", "m.jp2"])
def test_a_format_that_is_not_written_is_refused_naming_those_that_are(tmp_path, name):
    alone = scan(tmp_path / "a.nii.gz")
    (tmp_path / "in").mkdir()
    scan(tmp_path / "in" / "a.nii.gz")
    for source in (alone, tmp_path / "in"):
        with pytest.raises(ValueError, match=r"a mask is written as \.nii\.gz, \.nii or"):
            jobs_of(source, tmp_path / name)
    (tmp_path / name).mkdir()
    assert jobs_of(alone, tmp_path / name) == ([(alone, tmp_path / name / "a.nii.gz")], False)


def test_prompts_are_found_by_case(tmp_path):
    path = tmp_path / "a_0000.NII"
    path.write_text("")
    assert prompt_file(tmp_path, Path("scans/a.nii.gz")) == path
    with pytest.raises(ValueError, match=r"no label b\.nii\.gz"):
        prompt_file(tmp_path, Path("scans/b_0000.nii.gz"))


def test_images_of_another_format_beside_scans_are_told_of(tmp_path):
    for name in ("a.nii.gz", "b.nrrd", "c.MHA"):
        (tmp_path / name).write_text("")
    with pytest.warns(UserWarning, match=r"b\.nrrd is not read, nor is any other file in .*; convert"):
        jobs, _ = jobs_of(tmp_path, tmp_path / "out")
    assert len(jobs) == 1
