"""The command report: a page that stands alone."""

import nibabel as nib
import numpy as np
import pytest

from aftersam.evaluation.scoring import score_folder
from aftersam.files import write_json
from aftersam.report import main
from toy_files import AFFINE, organs, scored_folders


@pytest.fixture
def folders(tmp_path):
    return scored_folders(tmp_path)


def test_the_report_is_one_page_with_pictures(folders, tmp_path, capsys):
    masks, labels = folders
    images = tmp_path / "set" / "imagesTr"
    for name in "abc":
        array = (organs().astype(np.int16) * 60 - 20).astype(np.int16)
        images.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, AFFINE), images / f"{name}_0000.nii.gz")
    write_json(tmp_path / "metrics.json", score_folder(masks, labels, quiet=True))
    page = tmp_path / "report.html"
    arguments = ["-m", str(tmp_path / "metrics.json"), "-o", str(page), "--images", str(images)]
    assert main([*arguments, "--predictions", str(masks), "--labels", str(labels)]) == 0
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 4  # box plot; best, median and worst case
    assert 'src="http' not in text
    assert "href=" not in text
    assert "spleen" in text
    (tmp_path / "metrics.json").write_text("{}")
    assert main(arguments[:4]) == 2
    assert "mean_dsc" in capsys.readouterr().err
