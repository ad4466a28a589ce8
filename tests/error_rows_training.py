"""What is refused by the commands that read a data set or train: a row each, run by test_sentences."""

import json
import pickle

import nibabel as nib
import numpy as np
import torch

from error_rows import INT8, NAN, Row, a_folder, no_onnx, text, to_int8, to_nan, weights
from toy_files import nnunet, save


def data(**description):
    """An nnU-Net raw data set of two scans of a few voxels, with these keys of dataset.json in the place of its own."""

    def make(home):
        nnunet(home / "data")
        path = home / "data" / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | description))

    return make


def labels(**values):
    return data(labels={"background": 0, **values})


def folds(*stored):
    def make(home):
        nnunet(home / "data")
        (home / "data" / "splits_final.json").write_text(json.dumps(stored))

    return make


def label(value, shape=(6, 5, 4), spacing=(2.0, 2.0, 3.0), kind=np.int16):
    """The data set whose label of case a has `value` in eight voxels, on this grid."""

    def make(home):
        nnunet(home / "data")
        array = np.zeros(shape, kind)
        array[1:3, 1:3, 1:3] = value
        nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), home / "data" / "labelsTr" / "a.nii.gz")

    return make


def without(*names):
    def make(home):
        nnunet(home / "data")
        for name in names:
            (home / "data" / name).unlink()

    return make


def plain(home):
    save(home / "data" / "images" / "a.nii.gz")


def nrrd(home):
    save(home / "data" / "labels" / "a.nii.gz", value=1)
    (home / "data" / "images").mkdir()
    (home / "data" / "images" / "a.nrrd").touch()


def odd_values(home):
    nnunet(home / "data")
    array = np.random.default_rng(0).integers(0, 255, (16, 15, 14), np.int16, endpoint=True)
    for path in ((home / "data" / "imagesTr" / "a_0000.nii.gz"), (home / "data" / "labelsTr" / "a.nii.gz")):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 3, 1])), path)


def sam(state):
    def make(home):
        nnunet(home / "data")
        torch.save(state, home / "sam.pth")

    return make


def sam_text(home):
    nnunet(home / "data")
    (home / "sam.pth").write_text("no weights")


def sam_pickle(home):
    nnunet(home / "data")
    with (home / "sam.pth").open("wb") as file:
        pickle.dump({"model": print}, file, protocol=2)


def a_linked_run(home):
    nnunet(home / "data")
    (home / "run").mkdir()
    (home / "run" / "loss.png").symlink_to(home / "elsewhere")


def config(**keys):
    def make(home):
        nnunet(home / "data")
        (home / "config.json").write_text(json.dumps(keys))

    return make


def data_and_weights(change):
    return lambda home: (nnunet(home / "data"), weights(change)(home))


def torchrun(patch):
    patch.setenv("WORLD_SIZE", "2")


TRAIN = "--data HOME/data -o HOME/run --preset tiny --max-steps 1 --device cpu"
SAM = TRAIN.replace("--preset tiny", "--sam-checkpoint HOME/sam.pth")
FROM = TRAIN.replace("--preset tiny", "--config HOME/config.json")
START = TRAIN.replace("--preset tiny", "--init HOME/run").replace("-o HOME/run", "-o HOME/new")
AGAIN = "--data HOME/data -o RUN --resume --device cpu"
DATA = "HOME/data/dataset.json"
SPLITS = "HOME/data/splits_final.json"
IMAGE, LABEL = "HOME/data/imagesTr/a_0000.nii.gz", "HOME/data/labelsTr/a.nii.gz"

TRAINING = [
    Row("no folder", "check", "HOME/data", "HOME/data is not a folder"),
    Row("no data set", "check", "HOME/data",
        "HOME/data is no data set: there is neither imagesTr/ nor images/ nor a dataset.json nor SegTHOR's "
        "Patient_01/Patient_01.nii.gz", a_folder("data")),
    Row("no data set", "train", TRAIN,
        "HOME/data is no data set: there is neither imagesTr/ nor images/ nor a dataset.json nor SegTHOR's "
        "Patient_01/Patient_01.nii.gz", a_folder("data")),
    Row("no labels", "train", TRAIN,
        "HOME/data has neither a dataset.json with labels nor label maps in HOME/data/labels", plain),
    Row("another format", "train", TRAIN,
        "HOME/data/images/a.nrrd ends in .nrrd, which is not read; convert it to .nii.gz", nrrd),
    Row("no scan", "train", TRAIN,
        "HOME/data is laid out like nnU-Net raw, but holds no scan that ends in .nii.gz or .nii",
        without("imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz")),
    Row("a scan is missing", "train", TRAIN,
        "HOME/data/imagesTr/a.nii.gz does not exist", without("imagesTr/a_0000.nii.gz")),
    Row("a label is missing", "train", TRAIN,
        "HOME/data/imagesTr/a_0000.nii.gz has no label to train on", without("labelsTr/a.nii.gz")),
    Row("two channels", "train", TRAIN,
        "HOME/data/dataset.json has 2 channels (CT, PET); CT alone is one",
        data(channel_names={"0": "CT", "1": "PET"})),
    Row("MR", "train", TRAIN,
        "HOME/data/dataset.json has the channel 'MRI'; CT in Hounsfield units is needed",
        data(channel_names={"0": "MRI"})),
    Row("channels as a word", "train", TRAIN,
        "HOME/data/dataset.json has channel_names 'CT', but it must be an object such as {\"0\": \"CT\"}",
        data(channel_names="CT")),
    Row("labels as a list", "train", TRAIN,
        "HOME/data/dataset.json needs labels: an object of names and values", data(labels=["liver"])),
    Row("an ignore label", "train", TRAIN,
        "HOME/data/dataset.json has an ignore label, which is not supported", labels(liver=1, ignore=2)),
    Row("a region", "train", TRAIN,
        "HOME/data/dataset.json gives the label 'liver' the value [1, 2]; one integer is needed",
        labels(liver=[1, 2])),
    Row("no name", "train", TRAIN,
        "HOME/data/dataset.json gives the value 1 the name ''; a word is needed",
        data(labels={"0": "background", "1": ""})),
    Row("one value, two names", "train", TRAIN,
        "HOME/data/dataset.json gives the value 1 to both 'liver' and 'spleen'", labels(liver=1, spleen=1)),
    Row("one name, two values", "train", TRAIN,
        "HOME/data/dataset.json has the label 'liver' twice; every label needs its own name",
        data(labels={"0": "background", "1": "liver", "2": "liver"})),
    Row("background alone", "train", TRAIN, "HOME/data/dataset.json has no label besides background", labels()),
    Row("values with a gap", "train", TRAIN,
        "HOME/data/dataset.json has the label values [1, 3]; they must be 1 to 2", labels(liver=1, spleen=3)),
    Row("training is no list", "train", TRAIN,
        "HOME/data/dataset.json has training 'imagesTr', but it must be a list of images and labels",
        data(training="imagesTr")),
    Row("an entry without a label", "train", TRAIN,
        "HOME/data/dataset.json lists the training case {'image': 'imagesTr/a_0000.nii.gz'}; one image and "
        "one label are needed", data(training=[{"image": "imagesTr/a_0000.nii.gz"}])),
    Row("description is a list", "train", TRAIN,
        "HOME/data/dataset.json holds a list, but must be an object",
        lambda home: (nnunet(home / "data"), (home / "data" / "dataset.json").write_text("[]"))),
    Row("no folds", "train", TRAIN,
        "HOME/data/splits_final.json is not a list of folds with train and val", folds()),
    Row("a fold without val", "train", TRAIN,
        "HOME/data/splits_final.json has the fold {'train': ['a']}, but a fold is an object with lists train "
        "and val", folds({"train": ["a"]})),
    Row("a fold of unknown cases", "train", TRAIN,
        "HOME/data/splits_final.json names the case 'c', which the data set does not have",
        folds({"train": ["a"], "val": ["c"]})),
    Row("a case on both sides", "train", TRAIN,
        "HOME/data/splits_final.json has the case 'b' on both sides of a fold",
        folds({"train": ["a", "b"], "val": ["b"]})),
    Row("a fold without training", "train", TRAIN,
        "HOME/data/splits_final.json has a fold without a training case", folds({"train": [], "val": ["a"]})),
    Row("no such fold", "train", TRAIN + " --fold 7", "fold is 7, but HOME/data has the folds 0 to 1", data()),
    Row("labels are fractions", "train", TRAIN,
        "HOME/data/labelsTr/a.nii.gz has the value 0.5; labels must be integers", label(0.5, kind=np.float32)),
    Row("labels below 0", "train", TRAIN,
        "HOME/data/labelsTr/a.nii.gz has the value -1; labels must lie between 0 and 32767", label(-1)),
    Row("a label without a name", "train", TRAIN,
        "HOME/data/labelsTr/a.nii.gz has the label 3, but the data set has 1 liver", label(3)),
    Row("an empty label", "train", TRAIN, "HOME/data/labelsTr/a.nii.gz is empty: no voxel is labelled", label(0)),
    Row("another shape", "train", TRAIN,
        "HOME/data/labelsTr/a.nii.gz has 6 × 5 × 5 voxels, but its image HOME/data/imagesTr/a_0000.nii.gz "
        "has 6 × 5 × 4", label(1, shape=(6, 5, 5))),
    Row("another grid", "train", TRAIN,
        "HOME/data/labelsTr/a.nii.gz lies up to 2.00 mm off the grid of its image "
        "HOME/data/imagesTr/a_0000.nii.gz; both need the same affine, so resample one of them",
        label(1, spacing=(2.0, 2.5, 3.0))),
    Row("no Hounsfield units", "train", TRAIN,
        "HOME/data/imagesTr/a_0000.nii.gz is not in Hounsfield units: its values lie between 0 and 255, as "
        "if they were scaled; convert it, or use --trust-intensities", odd_values),
    Row("mirrored side without the other", "train", TRAIN + " --augmentation mirror",
        "mirroring needs both sides of every organ, but the label 'kidney_left' has no counterpart",
        labels(kidney_left=1)),
    Row("a key out of range", "train", TRAIN + " --learning-rate 0",
        "learning_rate is 0.0, but must be above 0 and at most 1e+06", data()),
    Row("image size", "train", TRAIN + " --image-size 100",
        "image_size is 100, but must be a multiple of the patch of 8", data()),
    Row("heads", "train", TRAIN + " --num-heads 5", "num_heads is 5, but must divide the 128 channels", data()),
    Row("stem", "train", TRAIN + " --stem-slices 2",
        "stem_slices is 2, but must be odd, and 1 without a stem", data()),
    Row("no stem", "train", TRAIN + " --image-encoder vit_b --image-size 64 --output-stride 4 --stem wide",
        "stem is wide, but vit_b has none at output_stride 4", data()),
    Row("output stride", "train", TRAIN + " --output-stride 3",
        "output_stride is 3, but must be one of 1, 2 for tiny", data()),
    Row("windows", "train", TRAIN + " --hu-windows 0 100 200 50",
        "hu_windows is ((0.0, 100.0), (200.0, 50.0)), but must be 1 or 3 pairs (low, high) with low below "
        "high", data()),
    Row("frozen without weights", "train", TRAIN + " --encoder frozen",
        "encoder is 'frozen', which freezes the encoder's random weights; give --sam-checkpoint or --init, "
        "or use --encoder full", data()),
    Row("set by --init", "train", TRAIN + " --token-shares 1 1",
        "--token-shares follow from the organs of --init and of the data; leave it out", data()),
    Row("embeddings of a trained encoder", "train", TRAIN + " --embeddings HOME/e",
        "--embeddings keeps what never changes, so it needs --encoder frozen (it is full) and --crops "
        "prediction (it is random)", data()),
    Row("fp16 on a CPU", "train", TRAIN + " --precision fp16",
        "precision fp16 needs a GPU to train on; use bf16 or fp32", data()),
    Row("tracker", "train", TRAIN + " --tracker wandb",
        "tracker is 'wandb', whose package is not installed; install it, or use tensorboard", data()),
    Row("shard in one process", "train", TRAIN + " --shard",
        "shard is for several processes; start them with torchrun", data()),
    Row("all folds under torchrun", "train", TRAIN + " --fold all",
        "--fold all trains in one process; under torchrun give one fold at a time", data(), 2, torchrun),
    Row("device", "train", TRAIN.replace("cpu", "gpu"),
        "device is 'gpu', but must be auto, cpu, cuda or cuda:1", data()),
    Row("unknown key", "train", FROM,
        "HOME/config.json.train has no key 'learning_rat'; did you mean 'learning_rate'?",
        config(train={"learning_rat": 1})),
    Row("key of another type", "train", FROM,
        "HOME/config.json.train.seed is 'one', but must be an integer", config(train={"seed": "one"})),
    Row("unknown choice", "train", FROM,
        "HOME/config.json.model.attention is 'bth', but must be one of both, axial, slice, none; did you "
        "mean 'both'?", config(model={"attention": "bth"})),
    Row("configuration is no object", "train", FROM,
        "HOME/config.json holds a list, but must be an object", text("config.json", "[]")),
    Row("two starts", "train", SAM + " --init RUN",
        "--sam-checkpoint and --init both give weights to begin with; leave one out", data()),
    Row("run exists", "train", "--data HOME/data -o RUN --preset tiny",
        "RUN holds a run already; go on with --resume or choose another --output", data()),
    Row("a link in the run", "train", TRAIN,
        "HOME/run/loss.png is a link or a device, and training writes into its own folder alone; remove it "
        "(--cache names a folder elsewhere)", a_linked_run),
    Row("output is input", "train", TRAIN.replace("HOME/run", "HOME/data"),
        "the output HOME/data is the input HOME/data; choose another name for the output", data()),
    Row("no run to resume", "train", TRAIN.replace("--preset tiny", "--resume"),
        "HOME/run is not a training run: it has no config.json", data()),
    Row("another choice", "train", AGAIN + " --learning-rate 0.5",
        "learning_rate is 0.5, but the run in RUN has 0.001; leave it out of --resume, or train into another "
        "--output", data()),
    Row("another fold", "train", AGAIN + " --fold 1",
        "--fold is 1, but the run in RUN is on fold 0; leave it out", data()),
    Row("another data set", "train", AGAIN,
        "RUN/splits_final.json names the case 'phantom_00000', which the data set does not have", data()),
    Row("no SAM weights", "train", SAM,
        "SAM checkpoint HOME/sam.pth does not exist; give a .pth or .safetensors file, a Hugging Face "
        "folder, or vit_b, vit_l, vit_h, vit_t", data()),
    Row("SAM weights without vit", "train", SAM.replace("HOME/sam.pth", "vit_x"),
        "SAM checkpoint vit_x does not exist; give a .pth or .safetensors file, a Hugging Face folder, or "
        "vit_b, vit_l, vit_h, vit_t; did you mean 'vit_t'?", data()),
    Row("not a checkpoint", "train", SAM, "HOME/sam.pth is not a PyTorch checkpoint; download it again", sam_text),
    Row("pickled objects", "train", SAM,
        "HOME/sam.pth holds pickled objects besides tensors (print), which could run code and are refused; "
        "give a state dict of tensors alone", sam_pickle),
    Row("not a state dict", "train", SAM,
        "HOME/sam.pth is not SAM's state dict, which maps names to tensors", sam([1, 2])),
    Row("other weights", "train", SAM,
        "HOME/sam.pth is not one of SAM's vit_b, vit_l, vit_h, vit_t; nearest is vit_b of SAM, but the file "
        "lacks image_encoder.pos_embed, image_encoder.patch_embed.proj.weight, "
        "image_encoder.patch_embed.proj.bias and 311 more and holds conv.weight",
        sam({"conv.weight": torch.zeros(3)})),
    Row("a relative of SAM", "train", SAM,
        "HOME/sam.pth holds the weights of SAM2, SAM2.1 or MedSAM2, whose image encoder is a Hiera (found "
        "image_encoder.trunk.pos_embed_window); give the weights of SAM, MedSAM, SAM-HQ or MobileSAM",
        sam({"image_encoder.trunk.pos_embed_window": torch.zeros(1)})),
    Row("another architecture", "train", TRAIN.replace("--preset tiny", "--init RUN") + " --num-blocks 4",
        "num_blocks is 4, but the weights in RUN/best.safetensors are of a model with 1; leave it out, or "
        "the --preset or --config that sets it", data()),
    Row("weights of another type", "train", START,
        f"HOME/run/best.safetensors has {INT8}", data_and_weights(to_int8)),
    Row("weights with NaN", "train", START, f"HOME/run/best.safetensors has {NAN}", data_and_weights(to_nan)),
    Row("no encoder", "encode", "--data HOME -o HOME/e",
        "give a run (-m) or SAM weights (--sam-checkpoint), one of the two"),
    Row("spacing of a training set", "encode", "--data HOME/data -o HOME/e --sam-checkpoint vit_b --preset tiny",
        "spacing_mm is median, which depends on the training set; give three lengths in mm", data()),
    Row("folder exists", "export", "-m RUN -o HOME/e",
        "HOME/e exists already; choose another --output", a_folder("e")),
    Row("no ONNX", "export", "-m RUN -o HOME/e",
        "ONNX needs the package onnxscript (pip install 'aftersam[export]'), or --format torch",
        lambda home: None, 2, no_onnx),
    Row("another preset", "ablate", "--data HOME/data -o HOME/t --table small --preset tiny",
        "table small shows what the preset small is made of, not tiny", data()),
    Row("demo exists", "demo", "-o HOME/demo --device cpu",
        "HOME/demo holds a demo already; delete it or choose another --output",
        lambda home: (home / "demo" / "run").mkdir(parents=True)),
    Row("data set exists", "phantom", "-o HOME",
        "HOME holds a data set already; choose another folder", text("dataset.json", "{}")),
    Row("no cases", "phantom", "-o HOME/scans --cases 0", "--cases is 0, but must be at least 1 and at most 1e+09"),
]  # fmt: skip
