"""Seconds add up by stage, and both forms of the summary say so."""

import time

import pytest

from aftersam.inference.timings import STAGES, Timings


def test_stages_add_up():
    timings = Timings()
    timings.slices = 4
    for _ in range(2):
        with timings.stage("encode"):
            time.sleep(0.01)
    with pytest.raises(OSError, match="full"), timings.stage("write"):
        raise OSError("full")
    facts = timings.summary()
    assert tuple(facts["seconds"]) == STAGES
    assert facts["seconds"]["encode"] >= 0.02
    assert facts["seconds"]["decode"] == 0
    assert facts["total_seconds"] == pytest.approx(sum(facts["seconds"].values()), abs=1e-3)
    assert facts["slices_per_second"] == pytest.approx(4 / facts["total_seconds"], rel=0.02)
    assert facts["peak_host_mib"] > 10
    assert facts["peak_gpu_mib"] is None
    assert "encode 0.0" in timings.line()
    with pytest.raises(KeyError, match="sleep"), timings.stage("sleep"):
        pass
