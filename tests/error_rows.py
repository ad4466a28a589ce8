"""What is refused by the commands that read a trained model or masks: a row each, run by test_sentences."""

import errno
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from aftersam.model.run_folder import bundled_runs
from toy_files import AFFINE, organs, save_mask, scored_folders
from toy_scans import scan
from toy_series import random_scan, save_series, series_files


class Row(NamedTuple):
    """A command that is refused, or that a scan is lost in, and the line that it says."""

    id: str
    command: str
    argv: str
    """Split at spaces; HOME is the test's folder, RUN a trained run."""
    says: str
    """After the command's name; HOME as in `argv`, * for what differs between machines and versions."""
    make: Callable[[Path], object] = lambda home: None
    """Writes what the command finds."""
    code: int = 2
    patch: Callable[[pytest.MonkeyPatch], object] = lambda patch: None


def a_scan(home):
    scan(home / "scan.nii.gz", (24, 20, 3))


def two_scans(home):
    (home / "scans").mkdir()
    for name in ("a", "b"):
        scan(home / "scans" / f"{name}.nii.gz", (24, 20, 3))


def a_bad_scan_of_two(home):
    two_scans(home)
    whole = (home / "scans" / "b.nii.gz").read_bytes()
    (home / "scans" / "b.nii.gz").write_bytes(whole[: len(whole) // 2])


def a_scan_and_its_mask(home):
    a_scan(home)
    (home / "mask.nii.gz").touch()


def a_scan_and_a_file(home):
    a_scan(home)
    (home / "file").touch()


def masks(home):
    scored_folders(home)


def masks_and_an_empty_folder(home):
    scored_folders(home)
    (home / "empty").mkdir()


def masks_of_a_label_without_a_name(home):
    scored_folders(home)
    save_mask(home / "masks" / "a.nii.gz", organs() * 7)


def masks_on_another_grid(home):
    scored_folders(home)
    for path in (home / "masks").iterdir():
        nib.save(nib.Nifti1Image(organs()[:9], AFFINE), path)


def masks_and_others(home):
    scored_folders(home)
    save_mask(home / "others" / "a.nii.gz", organs())


def metrics_and_masks(home):
    scored_folders(home)
    (home / "metrics.json").touch()


def text(name, content):
    return lambda home: (home / name).write_text(content)


def a_folder(name):
    return lambda home: (home / name).mkdir()


def full_disk(call):
    """`call` finds the disk full."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda patch: patch.setattr(call, refuse)


def no_onnx(patch):
    patch.setattr("aftersam.export.find_spec", lambda name: None)


def no_memory(patch):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    patch.setattr("aftersam.inference.sliding.encode", refuse)


def a_grid(shape=(24, 20, 3), affine=(4.0, 4.0, 5.0), kind=np.int16):
    """A scan of zeros on this grid; `affine` is its diagonal, or all of it."""

    def make(home):
        matrix = np.array(affine) if np.ndim(affine) == 2 else np.diag([*affine, 1.0])
        nib.save(nib.Nifti1Image(np.zeros(shape, kind), matrix), home / "scan.nii.gz")

    return make


def a_spacing(*millimetres):
    """A scan whose header has this spacing, whatever nibabel would write."""

    def make(home):
        image = nib.Nifti1Image(np.zeros((4, 4, 3), np.int16), np.eye(4))
        content = bytearray(image.to_bytes())
        content[80:92] = np.array(millimetres, "<f4").tobytes()  # pixdim[1:4]
        (home / "scan.nii").write_bytes(content)

    return make


def an_mr(home):
    array = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.int16, endpoint=True)
    nib.save(nib.Nifti1Image(array, np.diag([4.0, 4, 5, 1])), home / "scan.nii.gz")


def a_run(**files):
    """A scan, and a folder `run` with these files; their names end in .json."""

    def make(home):
        a_scan(home)
        (home / "run").mkdir()
        for name, content in files.items():
            (home / "run" / f"{name}.json").write_text(json.dumps(content))

    return make


def weights(change):
    """A scan, and the folder `run` of the model that comes along, with a class bias that `change` makes."""

    def make(home):
        a_scan(home)
        shutil.copytree(
            bundled_runs()["headneck"], home / "run", ignore=shutil.ignore_patterns("*Tr", "*.md", "*.txt")
        )
        path = home / "run" / "best.safetensors"
        tensors = load_file(path)
        tensors["decoder.class_bias"] = change(tensors["decoder.class_bias"])
        save_file(tensors, path, metadata={"aftersam": "{}"})

    return make


def to_int8(bias):
    return bias.to(torch.int8)


def to_nan(bias):
    return bias.index_fill(0, torch.tensor([2]), torch.nan)


def two_series(home):
    save_series(home / "series", series_files(random_scan()))
    for path in (home / "series").iterdir():
        path.rename(path.with_name(f"a{path.name}"))
    save_series(home / "series", series_files(random_scan()))


def a_gap(home):
    files = series_files(random_scan((6, 8, 7)))
    save_series(home / "series", files[:3] + files[4:])


def slices(**attributes):
    """A series of which every file has these attributes; None leaves one out."""

    def make(home):
        files = series_files(random_scan())
        for file, (name, value) in product(files, attributes.items()):
            if value is None:
                del file[name]
            else:
                setattr(file, name, value)
        save_series(home / "series", files)

    return make


def a_cut_slice(home):
    save_series(home / "series", series_files(random_scan()))
    whole = (home / "series" / "2.dcm").read_bytes()
    (home / "series" / "2.dcm").write_bytes(whole[:-40])


ONE = "-i HOME/scan.nii.gz -o HOME/mask.nii.gz -m RUN --device cpu --no-preview"
SERIES = ONE.replace("scan.nii.gz", "series")
ALL = "-i HOME/scans -o HOME/masks -m RUN --device cpu --no-preview"
SCORE = "-p HOME/masks -l HOME/set/labelsTr -o HOME/metrics.json"
PAGE = "-m HOME/metrics.json -o HOME/report.html"
INT8 = "decoder.class_bias as I8, but weights are float16, bfloat16, float32 or float64"
NAN = "NaN or infinity in decoder.class_bias; use other weights of the run, or train it again"
FULL = "could not be written: No space left on device"

READING = [
    Row("no input", "predict", ONE, "HOME/scan.nii.gz does not exist"),
    Row("prompts without need", "predict", f"{ONE} --prompt-labels HOME/scan.nii.gz",
        "RUN was trained without prompts, so leave out --prompt-labels HOME/scan.nii.gz", a_scan),
    Row("mask exists", "predict", ONE, "HOME/mask.nii.gz exists; --overwrite replaces it", a_scan_and_its_mask),
    Row("mask into a file", "predict", ONE.replace("mask.nii.gz", "scan.nii.gz/mask.nii.gz"),
        "HOME/scan.nii.gz/mask.nii.gz cannot be written, since HOME/scan.nii.gz is not a folder", a_scan),
    Row("folder into a file", "predict", ALL.replace("masks", "masks.nii.gz"),
        "HOME/scans is a folder of 2 scans, so --output must be a folder", two_scans),
    Row("output is input", "predict", ONE.replace("mask.nii.gz", "scan.nii.gz") + " --overwrite",
        "the output HOME/scan.nii.gz is the input HOME/scan.nii.gz; choose another name for the output", a_scan),
    Row("no run", "predict", ONE.replace("RUN", "HOME"),
        "HOME is not a training run: it has no config.json", a_scan),
    Row("unknown organ", "predict", ONE + " --labels hart",
        "the model has no label 'hart'; did you mean 'heart'? It has *", a_scan),
    Row("unlike any organ", "predict", ONE + " --labels xyz", "the model has no label 'xyz'; it has *", a_scan),
    Row("keep", "predict", ONE + " --keep 99",
        "--keep is 99, but must be 1 to 3, the number of slices in the model's groups", a_scan),
    Row("not NIfTI", "predict", ONE, "HOME/scan.nii.gz is truncated or damaged: *", text("scan.nii.gz", "no scan")),
    Row("not NIfTI by name", "predict", ONE.replace("scan.nii.gz", "scan.jpg"),
        "HOME/scan.jpg is not a NIfTI file (.nii or .nii.gz)", text("scan.jpg", "no scan")),
    Row("2D", "predict", ONE, "HOME/scan.nii.gz is 2D (24 × 20); a volume needs three axes", a_grid((24, 20))),
    Row("several volumes", "predict", ONE,
        "HOME/scan.nii.gz is 4D (24 × 20 × 3 × 2); give a file of one volume", a_grid((24, 20, 3, 2))),
    Row("no voxels", "predict", ONE, "HOME/scan.nii.gz has no voxels (24 × 20 × 0)", a_grid((24, 20, 0))),
    Row("complex voxels", "predict", ONE,
        "HOME/scan.nii.gz stores complex64 voxels, but integers or floats are needed", a_grid(kind=np.complex64)),
    Row("no spacing", "predict", ONE.replace("scan.nii.gz", "scan.nii"),
        "HOME/scan.nii has a voxel spacing of 1 × 0 × 1 mm; every one must be above 0", a_spacing(1, 0, 1)),
    Row("flat grid", "predict", ONE,
        "HOME/scan.nii.gz has a singular affine: two of its axes point the same way",
        a_grid(affine=[[4, 4, 0, 0], [4, 4, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]])),
    Row("grid of metres", "predict", ONE,
        "HOME/scan.nii.gz is 96 m long by its voxel spacing of 4000 × 4000 × 5000 mm; an axis may have 3 m",
        a_grid(affine=(4000.0, 4000, 5000))),
    Row("no Hounsfield units", "predict", ONE,
        "HOME/scan.nii.gz is not in Hounsfield units: its values lie between 0 and 255, as if they were "
        "scaled; convert it, or use --trust-intensities", an_mr),
    Row("two series", "predict", SERIES,
        "HOME/series holds slices of 2 DICOM series; put each into a folder of its own, or give the folder with "
        "--recursive", two_series),
    Row("a missing slice", "predict", SERIES,
        "HOME/series has a missing or misplaced slice: 1.dcm and 2.dcm lie 8 mm apart, the others 4 mm", a_gap),
    Row("MR slices", "predict", SERIES,
        "HOME/series/0.dcm has the Modality MR; only CT can be read", slices(Modality="MR")),
    Row("no position", "predict", SERIES,
        "HOME/series/0.dcm has no ImagePositionPatient; 3 numbers are needed", slices(ImagePositionPatient=None)),
    Row("colour slices", "predict", SERIES,
        "HOME/series/0.dcm is a colour image (RGB, 3 samples a pixel), not a CT slice",
        slices(PhotometricInterpretation="RGB", SamplesPerPixel=3)),
    Row("no rescale slope", "predict", SERIES,
        "HOME/series/0.dcm has the RescaleSlope 0; a slope other than 0 is needed", slices(RescaleSlope=0)),
    Row("densities", "predict", SERIES,
        "HOME/series/0.dcm has the RescaleType OD; the type HU is needed", slices(RescaleType="OD")),
    Row("no pixel spacing", "predict", SERIES,
        "HOME/series/0.dcm has the PixelSpacing [0.0, 2.0]; both must be above 0", slices(PixelSpacing=[0, 2])),
    Row("crooked slices", "predict", SERIES,
        "HOME/series/0.dcm has the ImageOrientationPatient [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]; two unit vectors "
        "at a right angle are needed", slices(ImageOrientationPatient=[1, 0, 0, 1, 1, 0])),
    Row("no pixels", "predict", SERIES, "HOME/series/*.dcm is truncated or damaged: *", slices(PixelData=None)),
    Row("a cut slice", "predict", SERIES, "HOME/series/2.dcm is truncated or damaged: *", a_cut_slice),
    Row("an empty folder", "predict", ONE.replace("scan.nii.gz", "e"),
        "HOME/e holds no scan: neither NIfTI files nor slices of a DICOM series", a_folder("e")),
    Row("another format", "predict", ONE.replace("mask.nii.gz", "mask.nrrd"),
        "--output HOME/mask.nrrd ends in .nrrd, but a mask is written as .nii.gz, .nii or, for a DICOM "
        "series, .dcm; if it is meant to be a folder, create it first", a_scan),
    Row("DICOM of a NIfTI scan", "predict", ONE.replace("mask.nii.gz", "mask.dcm"),
        "HOME/mask.dcm would be a DICOM segmentation, but HOME/scan.nii.gz is not a folder of a DICOM series", a_scan),
    Row("no model", "predict", ONE.replace("-m RUN", ""),
        "no model is given: -m * is the folder of a training run, * -m NAME a model that comes along: headneck (*)",
        a_scan),
    Row("unknown model", "predict", ONE.replace("RUN", "hedneck"),
        "hedneck is not a training run: it has no config.json; of models that come along there is headneck; "
        "did you mean 'headneck'?", a_scan),
    Row("no facts", "predict", ONE.replace("RUN", "HOME/run"),
        "HOME/run/run.json does not exist", a_run(config={})),
    Row("unknown key", "predict", ONE.replace("RUN", "HOME/run"),
        "HOME/run/config.json.model has no key 'rank'; did you mean 'lora_rank'?",
        a_run(config={"model": {"rank": 4}})),
    Row("facts without labels", "predict", ONE.replace("RUN", "HOME/run"),
        "HOME/run/run.json has the labels [], but they must be 1 to their number",
        a_run(config={}, run={"labels": {}, "spacing_mm": None})),
    Row("no weights", "predict", ONE.replace("RUN", "HOME/run"),
        "HOME/run/best.safetensors does not exist; train writes best.safetensors and last.safetensors",
        a_run(config={}, run={"labels": {"1": "a"}, "spacing_mm": None})),
    Row("weights of another type", "predict", ONE.replace("RUN", "HOME/run"),
        f"HOME/run/best.safetensors has {INT8}", weights(to_int8)),
    Row("weights with NaN", "predict", ONE.replace("RUN", "HOME/run"),
        f"HOME/run/best.safetensors has {NAN}", weights(to_nan)),
    Row("runs of other organs", "predict", ONE.replace("RUN", "RUN headneck"),
        "*headneck has Brainstem as label 1, but RUN has esophagus; runs that are averaged need the same "
        "labels in the same order", a_scan),
    Row("device", "predict", ONE.replace("cpu", "gpu"),
        "device is 'gpu', but must be auto, cpu, cuda or cuda:1", a_scan),
    Row("review of one scan", "predict", ONE + " --review",
        "--review lists the scans of a folder, but HOME/scan.nii.gz is one scan", a_scan),
    Row("batch size", "predict", ONE + " --batch-size 0",
        "--batch-size is 0, but must be at least 1 and at most 1e+09", a_scan),
    Row("truncated", "predict", ALL, "HOME/scans/b.nii.gz is truncated or damaged: *", a_bad_scan_of_two, 1),
    Row("no place", "predict", ONE.replace("HOME/mask", "HOME/file/mask"), "*HOME/file*", a_scan_and_a_file),
    Row("disk full, mask", "predict", ONE, f"HOME/mask.nii.gz {FULL}", a_scan, 2,
        full_disk("nibabel.Nifti1Image.to_filename")),
    Row("disk full, probabilities", "predict", ONE + " --save-probabilities", f"HOME/mask.probabilities.npy {FULL}",
        a_scan, 2, full_disk("os.posix_fallocate")),
    Row("disk full, embeddings", "predict", ONE + " --embeddings HOME/e", f"HOME/e/* {FULL}", a_scan, 2,
        full_disk("numpy.lib.format.write_array_header_1_0")),
    Row("disk full, preview", "predict", ONE.replace("--no-preview", "--preview"), f"HOME/mask.png {FULL}", a_scan, 2,
        full_disk("pathlib.Path.write_bytes")),
    Row("disk full, rename", "predict", ONE, f"HOME/mask.json {FULL}", a_scan, 2, full_disk("os.replace")),
    Row("no memory", "predict", ONE,
        "HOME/scan.nii.gz: memory ran out; a --batch-size below 8 needs less (DefaultCPUAllocator: *)", a_scan, 2,
        no_memory),
    Row("half a part", "predict", ALL + " --part-id 1", "--part-id is 1, but --num-parts is not given", two_scans),
    Row("no such part", "predict", ALL + " --num-parts 2 --part-id 2", "--part-id gives part 2 of 2, but *", two_scans),
    Row("no column", "predict", ALL.replace("scans", "list.csv"),
        "HOME/list.csv has the columns a, b, but the column image is needed", text("list.csv", "a,b\n1,2\n")),
    Row("two of one case", "predict", ALL.replace("scans", "list.txt"),
        "HOME/a.nii and HOME/a.nii.gz are both the case 'a' and would give the same mask; rename one, or give each a "
        "case_id of its own in a .csv", text("list.txt", "a.nii\na.nii.gz\n")),
    Row("no protocol", "predict", ALL.replace("HOME/scans", "what://a/b"),
        "what://a/b cannot be reached: Protocol not known: what"),
    Row("archive in parts", "predict", ALL.replace("HOME/masks", "HOME/m.zip") + " --num-parts 2 --part-id 0",
        "--output HOME/m.zip can be written by one process only, but there are 2 parts; give a folder or a URL",
        two_scans),
    Row("one scan on Ray", "predict", ONE + " --engine ray",
        "--engine ray is for several scans, but HOME/scan.nii.gz is one scan", a_scan),
    Row("no rows", "inference.manifest", "HOME",
        "HOME has no rows of a prediction in manifest/; predict --manifest on leaves them"),
    Row("no model", "inference.info", "HOME/x", "HOME/x is neither a training run, nor a mask, nor one of headneck"),
    Row("truncated, encode", "encode", "--data HOME/scans --output HOME/e -m RUN --device cpu",
        "HOME/scans/b.nii.gz is truncated or damaged: *", a_bad_scan_of_two, 1),
    Row("disk full, encode", "encode", "--data HOME/scan.nii.gz --output HOME/e -m RUN --device cpu",
        f"HOME/scan.nii.gz could not be encoded: HOME/e/* {FULL}", a_scan, 1,
        full_disk("numpy.lib.format.write_array_header_1_0")),
    Row("no masks folder", "evaluate", SCORE, "HOME/masks is not a folder"),
    Row("no mask in the folder", "evaluate", SCORE.replace("/set/labelsTr", "/empty"),
        "HOME/empty holds no mask that ends in .nii.gz or .nii", masks_and_an_empty_folder),
    Row("tolerance", "evaluate", SCORE + " --nsd-tolerance-mm 0",
        "nsd_tolerance_mm is 0.0, but must be above 0 and at most 1000", masks),
    Row("label names", "evaluate", SCORE + " --label-names HOME/names.json",
        "HOME/names.json does not exist", masks),
    Row("a case without a mask", "evaluate", SCORE + " --against HOME/others",
        "HOME/others has no mask for the case c", masks_and_others, 1),
    Row("scores into a folder", "evaluate", SCORE.replace("metrics.json", "masks"),
        "the output HOME/masks exists, but is not a file; choose another name", masks),
    Row("foreign label", "evaluate", SCORE,
        "HOME/masks/a.nii.gz has the label 7, but the label names are 1 liver, 2 spleen",
        masks_of_a_label_without_a_name, 1),
    Row("nothing scored", "evaluate", SCORE,
        "no case of HOME/set/labelsTr could be scored with the masks in HOME/masks", masks_on_another_grid),
    Row("disk full, metrics", "evaluate", SCORE, f"HOME/metrics.json {FULL}", masks, 2, full_disk("os.fsync")),
    Row("page over a mask", "report", PAGE.replace("report.html", "masks/a.nii.gz --predictions HOME/masks"),
        "the output HOME/masks/a.nii.gz is the input HOME/masks/a.nii.gz; choose another name for the output",
        metrics_and_masks),
    Row("page into a file", "report", PAGE.replace("report.html", "metrics.json/report.html"),
        "HOME/metrics.json/report.html cannot be written, since HOME/metrics.json is not a folder",
        metrics_and_masks),
    Row("no run", "report", PAGE + " --run HOME/run", "--run HOME/run is not a folder"),
    Row("labels without scans", "report", PAGE + " --labels HOME/set/labelsTr --predictions HOME/masks",
        "cases are drawn from --images, --predictions and --labels; give all three", masks),
    Row("no metrics", "report", PAGE, "HOME/metrics.json does not exist"),
    Row("no JSON", "report", PAGE, "HOME/metrics.json is not valid JSON: *", text("metrics.json", "{")),
    Row("other JSON", "report", PAGE, "HOME/metrics.json was not written by aftersam.evaluate: it has no mean_dsc",
        text("metrics.json", json.dumps([]))),
    Row("metrics cut short", "report", PAGE, "HOME/metrics.json lacks 'mean_dsc_interval'",
        text("metrics.json", json.dumps({"mean_dsc": 1, "organs": {}, "cases": {}}))),
    Row("metrics of another type", "report", PAGE, "HOME/metrics.json.mean_dsc is '<b>', but must be *",
        text("metrics.json", json.dumps(
            {"mean_dsc": "<b>", "mean_dsc_interval": None, "interval_reliable": True, "num_cases": 1, "problems": {},
             "convention": "nnunet", "nsd_tolerance_mm": 3, "organs": {}, "cases": {}}))),
]  # fmt: skip
