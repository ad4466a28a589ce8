"""Speed and accuracy, measured. speed/ has one file a subject, accuracy/ the table of systems, results/ what was found.

harness.py checks and times a subject's providers by clock.py on the machine that machine.py describes, __main__.py
runs every subject, targets.py holds a result to the aims, compare.py holds two results against each other, figure.py
writes the pages of docs/ and the README's tables, first_contact.py runs all of it on new hardware, line by line
(journal.py), with contact_tests.py for pytest and contact_summary.py for what the lines say."""

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
