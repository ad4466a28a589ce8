"""Memory of a prediction: the logits of a deep scan are never held whole."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.prediction_memory import PIXELS, peak_mib

PEAK = """
import dataclasses, sys
import numpy as np, torch
from aftersam.config import preset
from aftersam.model.build import build_aftersam
from aftersam import PredictOptions, Scan, predict_volume

def private_mib():  # what a memory-mapped scan does not count in
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

depth, classes = int(sys.argv[2]), int(sys.argv[3])
config = dataclasses.replace(preset("tiny").model, image_size=48, num_slices=3, num_blocks=1)
model = build_aftersam(config, num_classes=classes).eval()
hu = np.memmap(sys.argv[1], np.int16, "w+", shape=(depth, 512, 512))
before, peak = private_mib(), 0
def look(done):
    global peak
    peak = max(peak, private_mib())
scan, options = Scan(hu, (200, 248, 200, 248)), PredictOptions(batch_size=4)
labels = predict_volume(model, scan, config, options, output_shape=hu.shape, progress=look).labels
print(peak - before - labels.nbytes / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of private memory")
def test_memory_does_not_grow_with_depth(tmp_path):
    """Beside the labels: 512 × 512 × 1000 voxels of 20 classes, whose logits are 20 GiB, in a few planes of them."""
    peak = {}
    for depth in (50, 1000):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "scan"), str(depth), "20"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peak[depth] = float(done.stdout)
    plane_mib = 20 * 512 * 512 * 4 / 2**20
    assert peak[1000] < 12 * plane_mib, peak
    assert peak[1000] < peak[50] + 2 * plane_mib, peak


@pytest.mark.long
@pytest.mark.parametrize("organs", [6, 117])
def test_a_command_grows_by_the_scan_and_its_mask_alone(organs):
    """2 bytes a voxel and 1; a preview, dropping small parts and writing take no array of the scan's size."""
    shallow, deep = (
        peak_mib(organs, slices, ["--statistics", "--confidence"], noise=organs == 6) for slices in (40, 140)
    )
    grown = (deep - shallow) * 2**20 / (100 * PIXELS**2)
    assert grown < 5.5, (shallow, deep)  # with the confidence one more, and what the allocator keeps
    assert deep < 2560
