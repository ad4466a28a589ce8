"""Cohorts as lists: every scan found once, named as the input's tree or by its id, no mask on another's place."""

import csv
import errno
import json
import os
import subprocess
import sys
import zipfile

import fsspec
import pytest

from aftersam.errors import plain_console
from aftersam.inference.arguments import PredictArgs
from aftersam.inference.cohort import cohort_of
from aftersam.inference.pipeline import Report, own_entries
from aftersam.inference.processes import Part, part_of_this_process
from toy_scans import scan
from toy_series import random_scan, series_files


def cohort(source, output, **options):
    return cohort_of(PredictArgs(input=source, output=output, **options))


def names(found):
    """Mask -> image of what was found."""
    return {entry.mask: entry.image for entry in found.entries}


def write_series(folder, uid="1.2.2", prefix="slice", **attributes):
    """A CT series of five slices, with these attributes instead of a CT's."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(series_files(random_scan())):
        part.SeriesInstanceUID = uid
        for name, value in attributes.items():
            setattr(part, name, value)
        part.save_as(folder / f"{prefix}{i}.dcm", implicit_vr=False, little_endian=True)


@pytest.fixture
def tree(tmp_path):
    """Scans of one name in several folders, hidden ones, and other files."""
    home = tmp_path / "tree"
    for name in (
        "a_0000.nii.gz",
        "x/ct.nii.gz",
        "x/deep/ct.NII",
        "y/ct.nii.gz",
        ".hidden/ct.nii.gz",
        "x/._ct.nii.gz",
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "x" / "notes.txt").touch()
    return home


def test_a_tree_is_mirrored_and_its_output_is_no_input(tree, tmp_path):
    for output in (tmp_path / "masks", tree / "masks"):
        found = cohort(tree, output, recursive=True)
        assert names(found) == {
            "a.nii.gz": str(tree / "a_0000.nii.gz"),
            "x/ct.nii.gz": str(tree / "x/ct.nii.gz"),
            "x/deep/ct.nii.gz": str(tree / "x/deep/ct.NII"),
            "y/ct.nii.gz": str(tree / "y/ct.nii.gz"),
        }
        (tree / "masks").mkdir(exist_ok=True)
        (tree / "masks" / "old.nii.gz").touch()


def test_a_folder_that_cannot_be_read_is_named_instead_of_left_out(tree, tmp_path, monkeypatch):
    listed = os.scandir

    def refusing(path):
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refusing)  # tests may run as root, whom no permission stops
    with pytest.raises(PermissionError, match="deep"):
        cohort(tree, tmp_path / "masks", recursive=True)


def test_a_ring_of_links_is_walked_once(tree, tmp_path):
    (tree / "x" / "again").symlink_to(tree)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.nii.gz").touch()
    (tree / "linked").symlink_to(tmp_path / "more")
    assert len(names(cohort(tree, tmp_path / "masks", recursive=True))) == 5


@pytest.mark.parametrize("ending", ["txt", "csv", "tsv", "parquet"])
def test_a_list_names_scans_below_its_folder_elsewhere_and_by_url(tree, tmp_path, ending):
    elsewhere = tmp_path / "elsewhere" / "b.nii.gz"
    images = ["x/ct.nii.gz", "y/ct.nii.gz", str(elsewhere), "s3://bucket/c/d.nii.gz"]
    source = tree / f"list.{ending}"
    if ending == "txt":
        source.write_text("\ufeff" + "\r\n".join(images) + "\n\n")
    elif ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"age": [1, 2, None, 4], "Image": images}), source)
    else:
        with source.open("w", newline="") as file:
            rows = csv.writer(file, delimiter="\t" if ending == "tsv" else ",")
            rows.writerows([["age", "Image"], *zip([1, 2, "", 4], images, strict=True)])
    found = cohort(source, tmp_path / "masks")
    assert names(found) == {
        "x/ct.nii.gz": str(tree / "x/ct.nii.gz"),
        "y/ct.nii.gz": str(tree / "y/ct.nii.gz"),
        f"{elsewhere.parent}/b.nii.gz".lstrip("/"): str(elsewhere),
        "bucket/c/d.nii.gz": "s3://bucket/c/d.nii.gz",
    }
    if ending != "txt":
        assert found.columns == ("age",)
        assert [entry.extra for entry in found.entries] == [("1",), ("2",), ("",), ("4",)]


def test_ids_and_masks_of_a_table_name_the_output(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("image,case id,mask,site\na.nii.gz,one/1,,A\nb.nii.gz,two,deep/m.nii,B\nc.nii.gz,,,\n")
    found = cohort(table, tmp_path / "masks")
    assert [(e.case, e.mask, e.extra) for e in found.entries] == [
        ("one/1", "one/1.nii.gz", ("A",)),
        ("two", "deep/m.nii", ("B",)),
        ("c", "c.nii.gz", ("",)),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image,case_id\na.nii,1\nb.nii,1\n", "a.nii and .*b.nii are both the case '1'"),
        ("image\nx/a.nii\nx/a.nii.gz\n", "are both the case 'x/a'"),
        ("image,case_id\na.nii,u\u0308\nb.nii,\xfc\n", "are both the case"),
        ("image,case_id\na.nii,../b\n", r"'\.\./b' cannot name a mask"),
        ("image,case_id\na.nii,/etc/b\n", "'/etc/b' cannot name a mask"),
        ("image,mask\na.nii,../b.nii.gz\n", "cannot name a mask"),
        ("image,mask\na.nii,b.nrrd\n", "has the mask b.nrrd, but a mask is written as"),
        ("image,case_id\na.nii,a\x07b\n", "cannot name a mask"),
        ("path,case_id\na.nii,1\n", "has the columns path, case_id, but the column image is needed"),
        ("image,case_id\na.nii\n", "has no image in row 1"),
        ("image,case_id\n,1\n", "has no image in row 1"),
        ("image\n", "holds no scan"),
        ("", "but the column image is needed"),
        ('image\n"a.nii', "is no list of scans"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_in_a_sentence(tmp_path, text, says):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        cohort(tmp_path / "t.csv", tmp_path / "masks")
    assert len(str(caught.value).splitlines()) == 1


def test_a_mask_on_the_place_of_a_scan_is_refused(tmp_path):
    scan(tmp_path / "a.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.nii.gz").hardlink_to(tmp_path / "a.nii.gz")
    (tmp_path / "t.csv").write_text("image,case_id\na.nii.gz,b\n")
    with pytest.raises(ValueError, match="is the input"):
        cohort(tmp_path / "t.csv", tmp_path / "out")
    fsspec.filesystem("memory").pipe_file("/bucket/a.nii.gz", b"")
    with pytest.raises(ValueError, match="is an input"):
        cohort("memory://bucket", "memory://bucket")


def test_every_ct_series_of_a_tree_is_found_and_the_others_are_told_of(tmp_path):
    home = tmp_path / "archive"
    write_series(home / "p1" / "one")
    write_series(home / "p2" / "both", uid="1.2.3")
    write_series(home / "p2" / "both", uid="1.2.4", prefix="second")
    write_series(
        home / "p2" / "both", uid="1.2.5", prefix="scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    write_series(home / "p3" / "mr", uid="1.2.6", Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    found = cohort(home, tmp_path / "masks", recursive=True)
    assert sorted(names(found)) == [
        "p1/one.nii.gz",
        "p2/both/1.2.3.nii.gz",
        "p2/both/1.2.4.nii.gz",
    ]
    assert [(entry.series, why) for entry, why in found.skipped] == [("1.2.5", "localizer"), ("1.2.6", "MR")]


def test_the_files_of_an_archive_and_of_a_url_are_listed(tree, tmp_path):
    archive = tmp_path / "scans.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(tree.rglob("*")):
            if path.is_file():
                packed.write(path, path.relative_to(tree))
        packed.writestr("dicom/1.dcm", "")
    for source in (archive, f"zip://::{archive}", f"zip://::file://{archive}"):
        found = names(cohort(source, tmp_path / "masks", recursive=True))
        assert set(found) == {
            "a.nii.gz", "x/ct.nii.gz", "x/deep/ct.nii.gz", "y/ct.nii.gz", "dicom.nii.gz"
        }  # fmt: skip
        assert found["x/ct.nii.gz"].startswith("zip://x/ct.nii.gz::")
    assert set(names(cohort(archive, tmp_path / "masks"))) == {"a.nii.gz"}
    assert set(names(cohort(f"file://{tree}", tmp_path / "masks", recursive=True))) == {
        "a.nii.gz", "x/ct.nii.gz", "x/deep/ct.nii.gz", "y/ct.nii.gz"
    }  # fmt: skip
    one = cohort(f"zip://x/ct.nii.gz::{archive}", tmp_path / "new.nii.gz")
    assert (one.many, names(one)) == (False, {"new.nii.gz": f"zip://x/ct.nii.gz::{archive}"})


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nothing://a/b", "cannot be reached: Protocol not known: nothing"),
        ("memory://empty/folder", "does not exist, or is an empty folder"),
        ("zip://::/nowhere/a.zip", "does not exist"),
        ("hdfs://a/b", "hdfs://a/b cannot be"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_sentence(tmp_path, source, says):
    with pytest.raises(ValueError, match=says) as caught:
        cohort(source, tmp_path / "masks")
    assert str(caught.value).startswith(source)


SLURM = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}
BATCH = {"AWS_BATCH_JOB_ARRAY_INDEX": "1", "AWS_BATCH_JOB_ARRAY_SIZE": "3"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("given", "env", "part"),
    [
        ((None, None), {}, (0, 1)),
        ((4, 3), {}, (3, 4)),
        ((None, None), SLURM, (2, 4)),
        ((1, None), SLURM, (0, 1)),
        ((8, 7), SLURM, (7, 8)),
        ((None, None), BATCH, (1, 3)),
        ((6, None), {"JOB_COMPLETION_INDEX": "5"}, (5, 6)),
        ((None, None), TORCHRUN, (1, 2)),
        ((None, None), SLURM | TORCHRUN, (5, 8)),
        ((3, 1), TORCHRUN, (3, 6)),
    ],
)
def test_the_part_is_the_flags_or_the_schedulers(given, env, part):
    found = part_of_this_process(*given, env)
    assert (found.index, found.count) == part


@pytest.mark.parametrize(
    ("given", "env", "says"),
    [
        ((None, 3), {}, "--part-id is 3, but --num-parts is not given"),
        ((3, None), {}, "neither --part-id nor one of SLURM_ARRAY_TASK_ID, AWS_BATCH_JOB_ARRAY_INDEX, JOB_"),
        ((3, 3), {}, "part 3 of 3, but parts are numbered from 0 to 2"),
        (
            (None, None),
            {"JOB_COMPLETION_INDEX": "5"},
            "JOB_COMPLETION_INDEX is 5, but --num-parts is not given",
        ),
        ((None, None), SLURM | {"SLURM_ARRAY_TASK_ID": "9"}, "SLURM_ARRAY_TASK_ID gives part 6 of 4"),
        ((None, None), SLURM | {"SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID is 'x', but a number"),
    ],
)
def test_half_a_part_is_refused(given, env, says):
    with pytest.raises(ValueError, match=says):
        part_of_this_process(*given, env)


@pytest.mark.parametrize("count", [2, 3, 4, 8, 10, 16])
def test_parts_are_balanced_and_stay_as_a_list_grows(count):
    """Within 3 % up to 16 parts of 100,000: a part is a binomial draw, which spreads as the root of its size."""
    cases = [f"case_{i:06d}" for i in range(100_000)]
    parts = [[case for case in cases if Part(index, count).has(case)] for index in (0, count - 1)]
    for part in parts:
        assert abs(len(part) * count / len(cases) - 1) < 0.03
    assert not set(parts[0]) & set(parts[1])
    assert Part(0, count).has(cases[0]) == (cases[0] in parts[0])
    assert Part(0, 2).has("u\u0308") == Part(0, 2).has("\xfc")  # one case on every system


FIRST = """
import json, os, resource, sys
from aftersam.inference.work import Work
from aftersam.predict import main

def first(self, entry):
    used = resource.getrusage(resource.RUSAGE_SELF)
    status = open("/proc/self/status").read()  # ru_maxrss holds what the parent had when it forked
    peak = int(status.partition("VmHWM:")[2].split()[0])
    print(json.dumps([used.ru_utime + used.ru_stime, peak / 1024]), flush=True)
    os._exit(0)

Work.read = first
main(sys.argv[1:])
"""


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "ending", [pytest.param("txt", marks=LONG), pytest.param("csv", marks=LONG), "parquet"]
)
def test_a_list_of_a_hundred_thousand_starts_at_once_and_takes_little_memory(tmp_path, ending):
    """In processor seconds, imports and model included, and MiB at most before the first scan is read."""
    scan(tmp_path / "a.nii.gz", (24, 20, 3))
    images = [f"site{i % 100}/{i}.nii.gz" for i in range(100_000)]
    for i in range(100):
        (tmp_path / f"site{i}").mkdir()
        (tmp_path / f"site{i}" / f"{i}.nii.gz").symlink_to(tmp_path / "a.nii.gz")
    source = tmp_path / f"list.{ending}"
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"image": images}), source)
    else:
        source.write_text("\n".join((["image"] if ending == "csv" else []) + images) + "\n")
    command = [
        sys.executable,
        "-c",
        FIRST,
        "-i",
        str(source),
        "-o",
        str(tmp_path / "masks"),
        "-m",
        "headneck",
    ]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, mib = json.loads(done.stdout)
    print(f"{ending}: {seconds:.1f} processor seconds, {mib:.0f} MiB")
    assert seconds < 6  # of a machine with others on it
    assert mib < 500


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_claim_on_a_mask_that_exists_stays_while_masks_are_replaced(tmp_path, overwrite):
    masks = tmp_path / "masks"
    masks.mkdir()
    scan(tmp_path / "a.nii.gz", (24, 20, 3))
    for name in ("a.nii.gz", ".a.nii.gz.claim-0"):
        (masks / name).touch()
    (tmp_path / "list.txt").write_text("a.nii.gz\n")
    args = PredictArgs(input=tmp_path / "list.txt", output=masks, model=(), overwrite=overwrite)
    own_entries(args, cohort_of(args), Report(plain_console(), many=True, quiet=True))
    assert (masks / ".a.nii.gz.claim-0").exists() is overwrite
