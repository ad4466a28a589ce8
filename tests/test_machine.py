"""The machine that a number was measured on is named with it."""

import re

import pytest
import torch

from benchmarks import machine

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_environment_says_what_a_number_needs():
    found = machine.environment()
    assert found["kind"] == "cpu"
    assert found["torch"] == torch.__version__
    number = torch.get_num_threads()
    assert found["device"].endswith(", 1 thread" if number == 1 else f", {number} threads")
    assert re.fullmatch(r"[0-9a-f]{12}|unknown", found["commit"])
    assert isinstance(found["dirty"], bool)


def test_an_absent_package_is_named():
    assert machine.absent("no_such_package") == "no-such-package is not installed"
    assert machine.absent("torch") == ""
