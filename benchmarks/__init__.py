"""Speed and accuracy, measured.

speed/ has one file a subject, accuracy/ the table of systems, results/ the raw JSON. harness.py checks and times a
subject's providers; gate.py compares them with fp64, clock.py times them, machine.py describes the machine.
__main__.py runs every subject, targets.py compares a result with the aims, compare.py compares two results.
figure.py writes the measured pages of docs/explanation and README's table with tables.py. first_contact.py runs all of
it on new hardware, line by line (journal.py); contact_tests.py plugs into pytest, contact_summary.py sums up."""

import importlib.util
import sys
from pathlib import Path

import torch

if (
    _hosts := Path(sys.prefix, "hosts")
).is_dir():  # timm and torchvision, which `make` keeps out of site-packages
    sys.path.append(str(_hosts))
if torch.version.cuda is None and (_torchvision := importlib.util.find_spec("torchvision")):
    # torchvision's wheel is built against torch's CUDA build. Beside the CPU build its operators do not load, and its
    # import stops at these two names; timm, transformers, PEFT and torchvision's models need the names alone.
    try:
        torch.ops.load_library(Path(str(_torchvision.origin)).with_name("_C.so"))
    except OSError:
        for _name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
