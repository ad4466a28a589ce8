"""A call of axial attention that was made before is launched at once; anything that may differ is looked at again."""

import pytest
import torch

from axial_fusion import axial_attention, reference
from axial_fusion.gpu import axial_attention as launchers
from axial_fusion.gpu import common
from axial_fusion.ops import axial_attention as op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Compiled:
    """Stands for what Triton compiled."""

    launch_metadata = None

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *args: self.log.append(("compiled", grid, args))


class Kernel:
    """Stands for a kernel (x, y, scale, N, CAUSAL)."""

    arg_names = ("x", "y", "scale", "N", "CAUSAL")

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.log.append(("jit", grid, args, constants))
            return Compiled(self.log)

        return launch


@pytest.fixture
def no_launches(monkeypatch):
    monkeypatch.setattr(common, "_STARTED", {})
    monkeypatch.setattr(op, "_CHOSEN", {})


def test_what_was_compiled_for_a_key_is_launched_with_the_same_arguments(no_launches):
    log = []
    kernel, constants = Kernel(log), {"CAUSAL": True, "N": 9, "num_warps": 4}
    common.started(kernel, 5, (1, 2, 0.5), constants, "key")
    common.started(kernel, 5, (3, 4, 0.7), constants, "key")
    common.started(kernel, 6, (3, 4, 0.7), constants, "other")
    common.started(kernel, 5, (3, 4, 0.7), constants, None)
    assert [entry[0] for entry in log] == ["jit", "compiled", "jit", "jit"]
    assert log[1] == ("compiled", (5, 1, 1), (3, 4, 0.7, 9, True))  # constants in the kernel's own order


def keys(monkeypatch, *calls):
    """What each forward and backward launch of `calls` is known by."""
    found = []
    monkeypatch.setattr(
        launchers, "started", lambda kernel, programs, args, constants, key: found.append(key)
    )
    for q, k, v, lengths, causal in calls:
        launchers.launch_forward(q, k, v, lengths, 0.2, causal)
        launchers.launch_backward(q, q, k, v, lengths, 0.2, causal)
    return found


def test_a_key_holds_all_that_triton_compiles_for(monkeypatch):
    q = torch.randn(2, 9, 7, 2, 32, device=DEVICE)
    packed = torch.randn(2, 9, 7, 3, 2, 32, device=DEVICE).unbind(3)
    half, wide = q.half(), torch.randn(2, 12, 7, 2, 32, device=DEVICE)
    odd = torch.randn(2 * 9 * 7 * 2 * 32 + 1, device=DEVICE)[1:].view(
        q.shape
    )  # 4 bytes behind a wide load's place
    lengths = torch.tensor([3, 9], device=DEVICE)
    found = keys(
        monkeypatch, (q, q, q, None, False), (q, q, q, None, True), (*packed, None, False),
        (half, half, half, None, False), (q, wide, wide, None, False), (q[:1], q[:1], q[:1], None, False),
        (q, odd, q, None, False), (q, q, q, lengths, False),
    )  # fmt: skip
    assert found[-4:] == 4 * [None]
    assert len(set(found[:-4])) == len(found) - 4
    assert keys(monkeypatch, (q.clone(), q, q, None, False)) == found[:2]


def test_a_known_call_is_right_and_what_is_wrong_is_still_refused(no_launches):
    q, k, v = (torch.randn(2, 9, 5, 2, 32, device=DEVICE) for _ in range(3))
    for _ in range(2):
        torch.testing.assert_close(
            axial_attention(q, k, v), reference.axial_attention(q, k, v), rtol=1e-4, atol=1e-5
        )
    assert len(op._CHOSEN) == 1
    for wrong in (k[:, :, :4], k.double(), k.to_sparse(), k[0]):
        with pytest.raises(ValueError, match="axial_attention"):
            axial_attention(q, wrong, v)
    with pytest.raises(ValueError, match="scale must be a number"):
        axial_attention(q, k, v, scale=torch.ones(()))
    with pytest.raises(ValueError, match="backend"):
        axial_attention(q, k, v, backend="cuda")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert axial_attention(q, k, v).dtype == torch.bfloat16
    assert axial_attention(q, k, v).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_gradients_derivatives_and_transforms_are_those_of_a_first_call(no_launches):
    q, k, v = (torch.randn(1, 9, 5, 2, 32, device=DEVICE, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(reference.axial_attention(q, k, v).square().sum(), (q, k, v))
    for _ in range(2):
        assert not axial_attention(q.detach(), k.detach(), v.detach()).requires_grad
        found = torch.autograd.grad(axial_attention(q, k, v).square().sum(), (q, k, v))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        _, tangent = torch.func.jvp(lambda t: axial_attention(t, t, t), (q.detach(),), (k.detach(),))
        _, exact = torch.func.jvp(lambda t: reference.axial_attention(t, t, t), (q.detach(),), (k.detach(),))
        torch.testing.assert_close(tangent, exact, rtol=1e-3, atol=1e-4)
