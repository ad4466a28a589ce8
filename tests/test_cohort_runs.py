"""Cohorts from end to end: archives and buckets in and out, the manifest, retries, exit codes, parts, info."""

import csv
import json
import os
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aftersam import __version__
from aftersam.__main__ import main as aftersam
from aftersam.inference.info import InfoArgs, info
from aftersam.inference.manifest import ManifestArgs, manifest
from aftersam.inference.work import Work
from aftersam.predict import main
from toy_scans import scan


@pytest.fixture(scope="module")
def predict(run):
    """`aftersam predict -i SOURCE -o OUTPUT ...` with a model of this test's own."""
    fixed = ["-m", str(run), "--device", "cpu", "--no-preview"]
    return lambda source, output, *options: main(
        ["-i", str(source), "-o", str(output), *fixed, *map(str, options)]
    )


@pytest.fixture(scope="module")
def scans(tmp_path_factory, predict):
    """A tree of three scans, a list of them, and the masks that each gives alone."""
    home = tmp_path_factory.mktemp("scans")
    for name in ("a", "x/a", "x/b"):
        (home / name).parent.mkdir(exist_ok=True)
        scan(home / f"{name}.nii.gz", (24, 20, 3))
    (home / "list.csv").write_text("image,age\na.nii.gz,=1+1\nx/a.nii.gz,51\nx/b.nii.gz,52\n")
    alone = home / "alone"
    for name in ("a", "x/a", "x/b"):
        assert predict(home / f"{name}.nii.gz", alone / f"{name}.nii.gz") == 0
    return home


def contents(folder):
    """Masks by name, as bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.nii.gz"))}


def test_a_list_gives_the_masks_and_a_table_of_them(run, predict, scans, tmp_path, capsys):
    masks = tmp_path / "masks"
    assert predict(scans / "list.csv", masks, "--confidence", "--timings") == 0
    found = {name: data for name, data in contents(masks).items() if ".confidence." not in name}
    assert found == contents(scans / "alone")
    capsys.readouterr()
    assert aftersam(["manifest", str(masks)]) == 0
    assert "3 scans: 3 done" in capsys.readouterr().out
    with (masks / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case_id"], row["mask"], row["status"]) for row in rows] == [
        (name, f"{name}.nii.gz", "done") for name in ("a", "x/a", "x/b")
    ]
    assert [row["age"] for row in rows] == ["'=1+1", "51", "52"]  # no formula to a spreadsheet
    known = info(InfoArgs(run)).facts
    for row in rows:
        labels = np.asarray(nib.load(masks / row["mask"]).dataobj)
        for value, organ in known["labels"].items():
            voxels = int((labels == int(value)).sum())
            assert int(row[f"voxels_{organ}"]) == voxels
            assert float(row[f"ml_{organ}"]) == pytest.approx(voxels * 4 * 4 * 5 / 1000)
        assert row["model"] == known["checkpoints"]["best"]["model"]
        assert row["version"] == __version__
        assert len(row["sha256"]) == 64
        assert float(row["seconds_total"]) > float(row["seconds_encode"]) > 0
        assert labels.any()
        assert 0 <= float(row["confidence"]) <= 1
    from pyarrow import parquet

    table = parquet.read_table(masks / "manifest.parquet").to_pylist()
    assert [row["mask"] for row in table] == [row["mask"] for row in rows]
    assert all(isinstance(row["seconds_total"], float) for row in table)
    assert predict(masks / "manifest.parquet", tmp_path / "again") == 0  # what a table says can be done again
    assert (masks / "manifest").is_dir()


def test_what_a_mask_and_a_model_are(run, scans, capsys):
    assert aftersam(["info", str(run), "--json"]) == 0
    model = json.loads(capsys.readouterr().out)
    assert (model["kind"], model["num_slices"]) == ("model", 3)
    mask = scans / "alone" / "a.nii.gz"
    assert aftersam(["info", str(mask), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    labels = np.asarray(nib.load(mask).dataobj)
    assert facts["model"] == model["checkpoints"]["best"]["model"]
    assert facts["shape_dhw"] == [3, 20, 24]
    assert {o: v["voxels"] for o, v in facts["organs"].items()} == {
        name: int((labels == int(value)).sum()) for value, name in model["labels"].items()
    }
    assert aftersam(["info", str(mask)]) == 0
    assert "kind: mask" in capsys.readouterr().out
    assert aftersam(["info", "nothing"]) == 2
    assert "is neither a training run, nor a mask, nor one of headneck" in capsys.readouterr().err


def test_a_scan_that_fails_once_is_tried_again_and_one_that_fails_twice_is_listed(
    predict, scans, tmp_path, capsys, monkeypatch
):
    read, tries = Work._read, []

    def failing(self, entry):
        tries.append(entry.case)
        if entry.case == "x/a" or (tries.count("a") == 1 and entry.case == "a"):
            raise OSError(5, "Input/output error", entry.image)
        return read(self, entry)

    monkeypatch.setattr(Work, "_read", failing)
    assert predict(scans / "list.csv", tmp_path / "masks") == 1
    assert sorted(tries) == ["a", "a", "x/a", "x/a", "x/b"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aftersam.predict: ")]
    assert len(said) == 1
    assert f"{scans}/x/a.nii.gz: Input/output error" in said[0]
    merged = manifest(ManifestArgs(tmp_path / "masks"))
    assert [row["status"] for row in merged.rows] == ["done", "failed", "done"]
    assert merged.rows[1]["reason"] == f"{scans}/x/a.nii.gz: Input/output error"
    assert aftersam(["manifest", str(tmp_path / "masks")]) == 1
    monkeypatch.setattr(Work, "_read", read)
    assert predict(scans / "list.csv", tmp_path / "masks") == 0
    assert manifest(ManifestArgs(tmp_path / "masks")).counts == {"done": 3}


def test_the_exit_code_says_that_nothing_was_done(predict, scans, tmp_path):
    (tmp_path / "list.txt").write_text("missing.nii.gz\nmissing too.nii.gz\n")
    assert predict(tmp_path / "list.txt", tmp_path / "masks") == 3
    assert aftersam(["manifest", str(tmp_path / "masks")]) == 3
    assert manifest(ManifestArgs(tmp_path / "masks")).counts == {"failed": 2}


def test_a_torn_row_and_a_row_without_its_mask_are_no_rows(predict, scans, tmp_path):
    masks = tmp_path / "masks"
    assert predict(scans / "list.csv", masks) == 0
    (file,) = (masks / "manifest").iterdir()
    lines = file.read_text().splitlines()
    (masks / "manifest" / "killed-0.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    (masks / "x" / "b.nii.gz").unlink()
    merged = manifest(ManifestArgs(masks))
    assert [row["case_id"] for row in merged.rows] == ["a", "x/a"]
    assert merged.unfinished == 1
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no rows of a prediction"):
        manifest(ManifestArgs(tmp_path / "none"))


@pytest.mark.parametrize(
    "env",
    [
        lambda i: {
            "SLURM_ARRAY_TASK_ID": f"{i + 1}",
            "SLURM_ARRAY_TASK_MIN": "1",
            "SLURM_ARRAY_TASK_COUNT": "2",
        },
        lambda i: {"AWS_BATCH_JOB_ARRAY_INDEX": f"{i}", "AWS_BATCH_JOB_ARRAY_SIZE": "2"},
    ],
    ids=["SLURM", "AWS Batch"],
)
def test_parts_do_each_scan_once(predict, scans, tmp_path, monkeypatch, env):
    for index in range(2):
        with monkeypatch.context() as patch:
            for name, value in env(index).items():
                patch.setenv(name, value)
            assert predict(scans / "list.csv", tmp_path / "masks") == 0
    assert contents(tmp_path / "masks") == contents(scans / "alone")
    merged = manifest(ManifestArgs(tmp_path / "masks"))
    assert merged.counts == {"done": 3}
    rows = [file.read_text().splitlines() for file in (tmp_path / "masks" / "manifest").iterdir()]
    assert sum(map(len, rows)) == 3


def test_an_archive_in_and_an_archive_out(predict, scans, tmp_path, capsys):
    source, output = tmp_path / "scans.zip", tmp_path / "masks.zip"
    with zipfile.ZipFile(source, "w") as packed:
        for name in ("a", "x/a", "x/b"):
            packed.write(scans / f"{name}.nii.gz", f"{name}.nii.gz")
        packed.writestr("bad.nii.gz", b"no scan")
    assert predict(source, output, "--recursive") == 1
    assert f"zip://bad.nii.gz::{source}" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks.zip", "scans.zip"]
    with zipfile.ZipFile(output) as packed:
        found = {name: packed.read(name) for name in packed.namelist() if name.endswith(".nii.gz")}
        assert "manifest.csv" in packed.namelist()
    assert found == contents(scans / "alone")
    before = output.read_bytes()
    with zipfile.ZipFile(source, "a") as packed:
        packed.write(scans / "a.nii.gz", "new.nii.gz")
    assert predict(source, output, "--recursive") == 1  # what is packed is kept
    assert "3 of 5 masks exist and are kept" in capsys.readouterr().err
    with zipfile.ZipFile(output) as packed:
        again = {name: packed.read(name) for name in packed.namelist() if name.endswith(".nii.gz")}
    assert again == {**found, "new.nii.gz": found["a.nii.gz"]}
    assert output.read_bytes() != before
    assert predict(source, output, "--recursive", "--num-parts", 2, "--part-id", 0) == 2
    assert "can be written by one process only, but there are 2 parts" in capsys.readouterr().err


@pytest.fixture(scope="module")
def bucket():
    """s3://bucket on a server of this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        import fsspec

        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        yield fs
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the server's sockets
def test_a_bucket_in_and_a_bucket_out(predict, bucket, scans, tmp_path, capsys):
    for name in ("a", "x/a", "x/b"):
        bucket.put_file(str(scans / f"{name}.nii.gz"), f"bucket/scans/{name}.nii.gz")
    bucket.pipe_file("bucket/scans/bad.nii.gz", b"no scan")
    source, output = "s3://bucket/scans", "s3://bucket/masks"
    assert predict(source, output, "--recursive", "--timings") == 1
    said = capsys.readouterr().err
    assert "s3://bucket/scans/bad.nii.gz is truncated or damaged" in said
    assert str(Path(os.path.realpath("/tmp"))) + "/.aftersam" not in said  # of the copy that was read
    names = {name.removeprefix("bucket/masks/") for name in bucket.find("bucket/masks")}
    found = {name: bucket.cat_file(f"bucket/masks/{name}") for name in names if name.endswith(".nii.gz")}
    assert found == contents(scans / "alone")
    assert {f"{n}{e}" for n in ("a", "x/a", "x/b") for e in (".json", ".timings.json")} < names
    assert not [name for name in names if name.rpartition("/")[2].startswith(".")]  # no lease is left
    assert predict(source, output, "--recursive") == 1
    assert "3 of 4 masks exist and are kept" in capsys.readouterr().err
    assert aftersam(["manifest", output]) == 1
    text = bucket.cat_file("bucket/masks/manifest.csv").decode()
    assert [row["status"] for row in csv.DictReader(text.splitlines())] == ["done", "failed", "done", "done"]
    alone = "s3://bucket/one/new.nii.gz"
    assert predict("s3://bucket/scans/a.nii.gz", alone) == 0
    assert bucket.cat_file("bucket/one/new.nii.gz") == found["a.nii.gz"]
    assert predict(scans / "a.nii.gz", alone) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert predict("s3://bucket/none", tmp_path) == 2
    assert "s3://bucket/none does not exist" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_of_several_gets_a_scan_in_a_bucket(bucket):
    from aftersam.inference.claims import Claims
    from aftersam.inference.storage import Store

    first, second = (Claims(Store("s3://bucket/claims")) for _ in range(2))
    assert [one.take("a.nii.gz") for one in (first, second)] == [True, False]
    first.release_all()
    assert second.take("a.nii.gz")
    second.release_all()
    assert bucket.find("bucket/claims") == []
