"""The gate refuses every kind of wrong provider: no NaN, no element and no layout of memory escapes it."""

import pytest
import torch

from bench_cases import CEILING, SQUARE, square
from benchmarks import harness
from benchmarks.harness import Provider, measure

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def cubes(*inputs):
    """Three inputs, so that a wrong gradient can be the first, one between, or the last."""
    x, y, z = inputs
    return x * x + x * y + y * z * z


class Planted(torch.autograd.Function):
    """`cubes` whose gradients are changed."""

    @staticmethod
    def forward(ctx, change, *inputs):
        ctx.change = change
        ctx.save_for_backward(*inputs)
        return cubes(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, y, z = ctx.saved_tensors
        return None, *ctx.change([grad * (2 * x + y), grad * (x + z * z), grad * 2 * y * z])


def spoiled(which, value):
    """The gradients with one element of the `which`-th moved by `value`."""

    def change(grads):
        grads[which] = grads[which].clone()
        grads[which].view(-1)[7] += value
        return grads

    return lambda *inputs: Planted.apply(change, *inputs)


def element_off(*inputs):
    y = cubes(*inputs)
    return y + 4.0 * torch.nn.functional.one_hot(torch.tensor(5), y.numel()).view_as(y)


def dense(t):
    """The first elements of t's memory, as a kernel reads it that takes any tensor for a contiguous one."""
    return torch.as_strided(t, t.shape, torch.empty(t.shape).stride())


PLANTED = {
    **{f"NaN in gradient {i}": spoiled(i, float("nan")) for i in range(3)},
    **{f"one element off in gradient {i}": spoiled(i, 4.0) for i in range(3)},
    "one element off": element_off,
    "NaN in one element": lambda *inputs: element_off(*inputs).where(cubes(*inputs) != cubes(*inputs).max(), torch.nan),
    **{
        f"gradient {i} missing": lambda *inputs, i=i: cubes(*inputs[:i], inputs[i].detach(), *inputs[i + 1 :])
        for i in range(3)
    },
    "another shape": lambda *inputs: cubes(*inputs).flatten(),
    "right on contiguous input only": lambda *inputs: cubes(*map(dense, inputs)),
    "one input read as contiguous": lambda x, y, z: cubes(x, y, dense(z)),
    "gradients right on contiguous input only": lambda *inputs: Planted.apply(
        lambda grads: grads if inputs[0].is_contiguous() else [2 * g for g in grads], *inputs
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", PLANTED.values(), ids=PLANTED)
def test_a_planted_wrong_provider_is_refused(call, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(40, 100).to(dtype).requires_grad_() for _ in range(3)]
    found = {"planted": Provider(call, cubes, 8), "right": Provider(cubes, cubes, 8, role="ours")}
    planted, right = measure(SQUARE, inputs, found, budget_s=0.01)
    assert planted["status"] == "wrong", planted
    assert "ms" not in planted
    assert "wrong" in harness.line(planted, CEILING)
    assert right["status"] == "ok", right


def test_a_provider_that_refuses_strided_input_is_judged_by_what_it_takes():
    def call(x):
        if not x.is_contiguous():
            raise ValueError("give a contiguous tensor")
        return x * x

    x = torch.linspace(-1, 1, 8, requires_grad=True)
    (record,) = measure(SQUARE, [x], {"ours": Provider(call, square, 8)}, budget_s=0.01)
    assert record["status"] == "ok"
