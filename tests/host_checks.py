"""What is checked of every lifted host, and the table of docs/how-to/lift.md that is written from it.

PYTHONPATH=.:kernels python tests/host_checks.py    writes the table again"""

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from axial_fusion import (
    adapter_state_dict,
    lift,
    load_adapter_state_dict,
    set_num_slices,
    unlift,
)
from axial_fusion.across_slices import AcrossSlices
from axial_fusion.lift import LiftTable
from host_models import HOSTS, Host

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "lift.md"
B, N = 2, 3


@cache
def _host(name: str) -> nn.Module:
    return HOSTS[name].make()


def made(name: str) -> tuple[Host, nn.Module, Tensor]:
    """A host, its model, and an input of B groups of N slices."""
    host = HOSTS[name]
    torch.manual_seed(1)
    return host, copy.deepcopy(_host(name)), torch.randn(B * N, *host.shape)


def lifted(name: str, **options) -> tuple[Host, nn.Module, Tensor, LiftTable]:
    host, model, x = made(name)
    return host, model, x, lift(model, num_slices=N, **options)


@torch.no_grad()
def set_free(model: nn.Module) -> None:
    """What training does to the projections that start at zero."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(
            ("axial.inter.out.weight", "lora_b", "lora_q_b", "lora_v_b", "lora_out_b")
        ):
            nn.init.normal_(parameter, std=0.1)


def halves(model: nn.Module) -> dict[str, AcrossSlices]:
    return {name: m for name, m in model.named_modules() if isinstance(m, AcrossSlices)}


def loss(host: Host, model: nn.Module, x: Tensor) -> Tensor:
    y = host.call(model, x)
    torch.manual_seed(3)
    return (y - torch.randn(y.shape, dtype=y.dtype)).square().mean()


def step_0(name: str) -> str:
    """Equal to the host to the bit, and to the host on each slice by itself, and undone by unlift."""
    host, model, x = made(name)
    types, names = [type(m) for m in model.modules()], list(model.state_dict())
    with torch.no_grad():
        expected = host.call(model, x)
        alone = expected if host.video else torch.cat([host.call(model, x[i : i + 1]) for i in range(B * N)])
    lift(model, num_slices=N)
    with torch.no_grad():
        got = host.call(model, x)
        assert torch.equal(got, expected)
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
        unlift(model)
        assert torch.equal(host.call(model, x), expected)
    assert types == [type(m) for m in model.modules()]
    assert names == list(model.state_dict())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return "yes"


def formula(name: str) -> str:
    """x + FC(Attn_N(LN(x))), then the block: written out on the 2D host, in fp64."""
    host, plain, x = made(name)
    model = copy.deepcopy(plain)
    lift(model, num_slices=N)
    set_free(model)
    plain, model, x = plain.double(), model.double(), x.double()
    for path, half in halves(model).items():
        block = plain.get_submodule(path.rpartition(".")[0])
        block.register_forward_pre_hook(_written_out(half, host.tokens), with_kwargs=True)
    with torch.no_grad():
        got, expected = host.call(model, x), host.call(plain, x)
        assert (got - expected).norm() <= 1e-6 * expected.norm()
        assert (got - host.call(_host(name).double(), x)).norm() > 1e-3 * expected.norm()
        _host(name).float()
    return "yes"


def _written_out(half: AcrossSlices, rows: str) -> Callable:
    w, heads = half.inter, half.num_heads

    def across(tokens: Tensor) -> Tensor:
        t = tokens if rows == "slices" else tokens.transpose(0, 1)
        t = t.flatten(1, -2).unflatten(0, (-1, N))  # (B, N, P, C)
        z = F.layer_norm(t, t.shape[-1:], w.norm.weight, w.norm.bias, half.eps)
        q, k, v = (z @ w.qkv.weight.T + w.qkv.bias).unflatten(-1, (3, heads, -1)).unbind(3)
        scores = torch.einsum("bnpmd,bkpmd->bpmnk", q, k) / q.shape[-1] ** 0.5
        o = torch.einsum("bpmnk,bkpmd->bnpmd", scores.softmax(-1), v).flatten(3)
        t = t + o @ w.out.weight.T + w.out.bias
        return t.flatten(0, 1).view(tokens.shape) if rows == "slices" else t.flatten(0, 1).transpose(0, 1)

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (across(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: across(kwargs[first])}

    return hook


def training(name: str) -> str:
    """Gradients reach every block and every half; after one step a slice depends on its neighbours, and on no other."""
    host, model, x, table = lifted(name)
    other = x.clone()
    other[1] = 3 * torch.randn_like(x[1])  # the neighbour of slice 0
    with torch.no_grad():
        assert host.video or torch.equal(host.call(model, x)[0], host.call(model, other)[0])
    loss(host, model, x).backward()
    for block, _, _ in table:
        module = model.get_submodule(block)
        assert module.axial.inter.out.weight.grad.abs().sum() > 0, block
        assert any(
            p.grad is not None and p.grad.any() for n, p in module.named_parameters() if "axial" not in n
        )
    torch.optim.Adam(model.parameters(), lr=1e-2).step()
    with torch.no_grad():
        before, after = host.call(model, x), host.call(model, other)
    assert before.isfinite().all()
    assert (before[0] - after[0]).abs().max() > 1e-5 * before[0].abs().max()
    torch.testing.assert_close(before[N:], after[N:], rtol=1e-4, atol=1e-5)
    return "yes"


def half_precision(name: str) -> str:
    """bf16 and fp16 weights, and autocast: equal to the host to the bit, then near to fp32, with gradients."""
    host, plain, x = made(name)
    model = copy.deepcopy(plain)
    lift(model, num_slices=N)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.backends.mha.set_fastpath_enabled(
            False
        )  # torch's encoder layers leave it where they have hooks
        assert torch.equal(host.call(model, x), host.call(plain, x))
        torch.backends.mha.set_fastpath_enabled(True)
    done = []
    for dtype in (torch.bfloat16, torch.float16):
        half_plain, half_x = copy.deepcopy(plain).to(dtype), x.to(dtype)
        try:
            expected = host.call(half_plain, half_x)
        except RuntimeError:
            continue  # an operator of the host that torch's CPU build does not have in this dtype
        low = copy.deepcopy(model).to(dtype)
        assert torch.equal(host.call(low, half_x), expected)
        wide = copy.deepcopy(low).float()  # the same rounded weights
        for m in (low, wide):
            set_free(m)
        wide.load_state_dict(low.float().state_dict())
        low = low.to(dtype)
        got, want = host.call(low, half_x), host.call(wide, half_x.float())
        host_error = _relative(expected, host.call(half_plain.float(), half_x.float()))
        assert _relative(got, want) <= 3 * host_error + 10 * torch.finfo(dtype).eps
        got.float().square().mean().backward()
        assert all(h.inter.out.weight.grad.isfinite().all() for h in halves(low).values())
        done.append({torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype])
    return ", ".join(done)


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def compiled(name: str) -> str:
    """One graph, without a break, that gives what eager gives."""
    host, model, x, _ = lifted(name)
    set_free(model)
    with torch.no_grad():
        expected = host.call(model, x)
        torch._dynamo.reset()
        part = torch.compile(model.get_submodule(host.compiled), backend="eager", fullgraph=True)
        if host.compiled:
            setattr(model, host.compiled, part)
        else:
            model = part
        torch.testing.assert_close(host.call(model, x), expected, rtol=1e-4, atol=1e-5)
    return f"its {host.compiled}" if host.compiled else "yes"


def states(name: str) -> str:
    """State dict there and back, 2D weights by their own names, deepcopy that shares nothing."""
    host, model, x, _ = lifted(name)
    set_free(model)
    loading = model.load_state_dict(_host(name).state_dict(), strict=False)
    assert not loading.unexpected_keys
    assert all("axial." in key for key in loading.missing_keys)
    _, other, _, _ = lifted(name)
    twin = copy.deepcopy(other)
    with torch.no_grad():
        expected, start = host.call(model, x), host.call(other, x)
        other.load_state_dict(model.state_dict())
        assert torch.equal(host.call(other, x), expected)
        assert torch.equal(host.call(twin, x), start)
        assert not torch.equal(start, expected)
        set_num_slices(twin, 1)
        assert torch.equal(host.call(other, x), expected)
        unlift(twin)
        assert torch.equal(host.call(twin, x), start)
    return "yes"


def lora(name: str) -> str:
    """LoRA on q and v: starts equal to the bit, trains alone, equals merged weights; the adapter travels by itself."""
    host, plain, x = made(name)
    model = copy.deepcopy(plain)
    table = lift(model, num_slices=N, rank=2)
    with torch.no_grad():
        assert torch.equal(host.call(model, x), host.call(plain, x))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    state = {key: value for key, value in adapter_state_dict(model).items() if not key.endswith("lora_alpha")}
    assert trained == set(state)
    assert sum(t.numel() for t in state.values()) == sum(row.parameters for row in table)
    loss(host, model, x).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in trained and n.endswith("_b"))
    set_free(model)
    _, other, _, _ = lifted(name, rank=2)
    load_adapter_state_dict(other, adapter_state_dict(model))
    with torch.no_grad():
        assert torch.equal(host.call(other, x), host.call(model, x))
        _, merged, _, _ = lifted(name)
        _merge(model, merged)
        torch.testing.assert_close(host.call(merged, x), host.call(model, x), rtol=1e-3, atol=1e-4)
    unlift(model)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    with torch.no_grad():
        assert torch.equal(host.call(model, x), host.call(plain, x))
    return "yes"


def _merge(model: nn.Module, into: nn.Module) -> None:
    """The weights of a model with LoRA of scaling 1, merged by the formula: q in the first rows, v in the last."""
    weights, state = dict(into.named_parameters()), dict(model.named_parameters())
    for name, weight in weights.items():
        weight.copy_(state[name])
    for name in state:
        if found := re.fullmatch(r"(.*)lora_(?:(q|v|out)_)?a", name):
            stem, part = found.groups()
            update = state[f"{name[:-1]}b"] @ state[name]
            layer = ("out." if part == "out" else "qkv.") if stem.endswith("axial.inter.") else ""
            key = f"{stem}{layer}weight"
            weight = weights[key if key in weights else f"{stem}in_proj_weight"]
            rows = {"q": slice(len(update)), "v": slice(-len(update), None)}.get(part, slice(None))
            weight[rows] += update


def recomputed(name: str) -> str:
    """The host's own activation checkpointing gives the gradients that it gives without."""
    host, model, x, _ = lifted(name)
    set_free(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
            module.eval()
    names = ("set_grad_checkpointing", "activation_checkpointing_enable")
    switch = next((name for name in names if hasattr(model, name)), None)
    if switch is None or not getattr(model, "supports_gradient_checkpointing", True):
        return "none"
    gradients = []
    for _ in range(2):
        model.zero_grad()
        loss(host, model, x).backward()
        gradients.append([h.inter.qkv.weight.grad.clone() for h in halves(model).values()])
        getattr(model, switch)()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    return "yes"


def parallel(name: str) -> str:
    """DistributedDataParallel over gloo: the gradients of the model by itself."""
    host, model, x, _ = lifted(name)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    for m in (model, wrapped):
        loss(host, m, x).backward()
    for (key, one), other in zip(model.named_parameters(), wrapped.parameters(), strict=True):
        if one.grad is not None and one.grad.any():
            torch.testing.assert_close(other.grad, one.grad, msg=key)
    return "yes"


def volumes(name: str) -> str:
    """(B, N, C, H, W) in and (B, N, ...) out, for models of images."""
    host, model, x, _ = lifted(name)
    if len(host.shape) != 3 or host.video:
        return "tokens" if len(host.shape) == 2 else "frames"
    set_free(model)
    with torch.no_grad():
        expected = host.call(model, x)
        assert torch.equal(host.call(model, x.unflatten(0, (B, N))), expected.unflatten(0, (B, N)))
    return "yes"


CHECKS: dict[str, Callable[[str], str]] = {
    "step 0": step_0,
    "formula": formula,
    "training": training,
    "half precision": half_precision,
    "one graph": compiled,
    "states": states,
    "LoRA": lora,
    "checkpointing": recomputed,
    "DDP": parallel,
    "(B, N, ...)": volumes,
}


def row(name: str) -> dict[str, str]:
    """A line of the table: the host, its version, its blocks, and what each check found."""
    host, _, _, table = lifted(name)
    kinds = sorted({entry.kind.split(":")[0] for entry in table})
    found = {"host": name, "version": host.version, "block": ", ".join(kinds)}
    return found | {check: run(name) for check, run in CHECKS.items()}


def rows_of_the_page() -> dict[str, dict[str, str]]:
    """Host -> column -> cell, as docs/how-to/lift.md has them."""
    lines = [line.strip("| ").split(" | ") for line in _table(PAGE.read_text(encoding="utf-8")).splitlines()]
    return {cells[0]: dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]}


def _table(text: str) -> str:
    return text.partition("<!-- hosts:begin -->\n\n")[2].partition("\n\n<!-- hosts:end -->")[0]


def write_page() -> None:
    """Run every check of every host, and put the table on its page."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    found = [row(name) for name in HOSTS]
    distributed.destroy_process_group()
    lines = [list(found[0]), ["---"] * len(found[0]), *(list(cells.values()) for cells in found)]
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    PAGE.write_text(text.replace(_table(text), table), encoding="utf-8")


if __name__ == "__main__":
    write_page()
