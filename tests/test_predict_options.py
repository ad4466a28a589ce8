"""What prediction's options cost and gain is measured on scans that the run did not train on."""

import json

import nibabel as nib
import numpy as np

from aftersam.train import main as train
from benchmarks.accuracy import predict_options


def test_options_are_measured_on_the_cases_that_the_run_did_not_train_on(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abc":
        labels = rng.integers(0, 3, (32, 30, 6)).astype(np.uint8)
        hu = (rng.integers(-200, 300, labels.shape) + 200 * labels).astype(np.int16)
        for folder, array in (("images", hu), ("labels", labels)):
            (tmp_path / "scans" / folder).mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(array, np.diag([4.0, 4.0, 5.0, 1.0]))
            nib.save(image, tmp_path / "scans" / folder / f"{name}.nii.gz")
    keys = [
        "--preset",
        "tiny",
        "--image-size",
        "32",
        "--num-blocks",
        "1",
        "--max-steps",
        "2",
        "--device",
        "cpu",
    ]
    run, output = tmp_path / "run", tmp_path / "options.json"
    assert train(["--data", str(tmp_path / "scans"), "--output", str(run), *keys, "--precision", "fp32"]) == 0
    asked = ["-m", str(run), "--data", str(tmp_path / "scans"), "--device", "cpu", "-o", str(output)]
    assert predict_options.main(asked) == 0
    facts = json.loads(output.read_text())
    assert facts["cases"] == json.loads((run / "splits_final.json").read_text())[0]["val"]
    rows = {row["option"]: row for row in facts["rows"]}
    exact = rows["none"]
    assert {"--keep 3", "--overlap average", "--tta mirror", "--roi body", "--save-probabilities"} < set(rows)
    assert exact["times"] == 1
    assert all(row["seconds"] > 0 for row in rows.values())
    for same in ("--roi body", "--save-probabilities", "--confidence"):
        assert rows[same]["dsc_of_organs"] == exact["dsc_of_organs"]
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in rows)
    assert predict_options.main([*asked, "--cases", "nobody"]) == 2
    assert "no case 'nobody'" in capsys.readouterr().err
