"""Layers of AxialFusionAttention that are more than their weights are called, and the result is the fused op's."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from axial_fusion import AxialFusionAttention, LoRALinear

LAYERS = ["inter", "inter.norm", "inter.qkv", "inter.out", "intra", "intra.norm", "intra.qkv", "intra.out"]
OPTIONS = [
    {},
    {"rank": 2, "alpha": 3},
    {"rank": 2, "norm": False, "residual": False},
    {"rank": 2, "attention": "axial", "residual": False},
    {"rank": 2, "attention": "slice"},
]


def module(**options):
    torch.manual_seed(0)
    made = AxialFusionAttention(16, 2, **options)
    for name, parameter in made.named_parameters():
        if name.endswith("_b") or "norm" in name:
            nn.init.normal_(parameter)
    return made


def hooked(made, *names):
    """A copy with hooks that do nothing, and the names of the layers that were called."""
    made, called = copy.deepcopy(made), []
    for name in names:
        layer = made.get_submodule(name)
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    return made, called


def result(made, x, **options):
    y = made(x, **options)
    made.zero_grad()
    y.float().square().sum().backward()
    return y, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LAYERS)
def test_a_hook_on_any_layer_runs_once_a_call(name):
    made, x = module(rank=2), torch.randn(1, 3, 8, 16)
    twin, called = hooked(made, name)
    torch.testing.assert_close(twin(x), made(x))
    assert called == [name]


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_a_hook_for_all_modules_meets_each_layer_once_a_call(kind):
    made, x, called = module(rank=2), torch.randn(1, 3, 8, 16, requires_grad=True), []
    expected = made(x)
    with getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda layer, *_: called.append(layer)):
        y = made(x)
        y.sum().backward()
    torch.testing.assert_close(y, expected)
    for name in LAYERS:
        assert called.count(made.get_submodule(name)) == 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("index", [None, [2], [2, 0]], ids=str)
def test_calling_the_layers_is_the_fused_op(options, merged, index):
    """Output and gradients, on tokens and on grids, in fp32, bf16 and under autocast."""
    made = module(**options)
    for half in made.halves():
        half.merge() if merged else None
        for name, parameter in half.named_parameters():
            parameter.requires_grad_(not (merged and "lora" in name))
    twin, called = hooked(made, "inter.out" if made.inter is not None else "intra.out")
    for shape, dtype, autocast in (
        ((2, 3, 8, 16), torch.float32, False),
        ((1, 3, 2, 4, 16), torch.bfloat16, False),
        ((1, 3, 2, 4, 16), torch.float32, True),
    ):
        x = torch.randn(shape).to(dtype)
        tol = 1e-4 if dtype == torch.float32 and not autocast else 5e-2
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = [result(m.to(dtype), x, query_index=index) for m in (twin, made)]
        (y, grads), (expected, truths) = found
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
        assert grads.keys() == truths.keys()
        for mine, truth in ((y, expected), *((grads[n], truths[n]) for n in truths)):
            assert (mine - truth).float().norm() <= tol * (1 + truth.float().norm())
    assert len(called) == 3


def test_the_lora_dropout_drops_in_training_alone():
    twin, _ = hooked(module(rank=2, dropout=0.5), "inter.qkv")
    x = torch.randn(1, 3, 8, 16)
    assert not torch.equal(twin(x), twin(x))
    twin.eval()
    assert torch.equal(twin(x), twin(x))


def test_a_bad_index_is_refused_as_by_the_op():
    twin, _ = hooked(module(), "inter.qkv")
    with pytest.raises(ValueError, match="query_index"):
        twin(torch.randn(1, 3, 8, 16), query_index=[-1])


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it deprecates
def test_layers_that_other_libraries_make_compute():
    """A weight that a hook makes, a pruned, a quantised, a parametrised, and a replaced layer."""
    x = torch.randn(1, 3, 8, 16)
    normed = module(rank=2)
    before = normed(x)
    nn.utils.weight_norm(normed.inter.qkv)
    torch.testing.assert_close(normed(x), before)
    with torch.no_grad():
        normed.inter.qkv.weight_g.mul_(3)
    assert (normed(x) - before).norm() > 1e-2

    pruned, plain = module(), module()
    prune.l1_unstructured(pruned.intra.out, "weight", 0.5)
    plain.intra.out.weight.data.copy_(pruned.intra.out.weight)
    torch.testing.assert_close(pruned(x), plain(x))

    quantised = torch.ao.quantization.quantize_dynamic(module().eval(), {nn.Linear})
    assert (quantised(x) - module()(x)).norm() < 0.05 * module()(x).norm()

    adapted, plain = module(rank=2), module(rank=2)
    adapted.intra.out = LoRALinear.from_linear(adapted.intra.out, rank=2)
    nn.init.normal_(adapted.intra.out.lora_b)
    lora = adapted.intra.out
    with torch.no_grad():
        plain.intra.out.weight.add_(lora.scaling * lora.lora_b @ lora.lora_a)
    torch.testing.assert_close(adapted(x), plain(x), rtol=1e-4, atol=1e-5)


def test_pefts_adapter_is_used_and_merged():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["qkv", "out"], init_lora_weights=False)
    base, x = module(), torch.randn(1, 3, 8, 16)
    plain = base(x)
    adapted = peft.get_peft_model(base, config).eval()
    y = adapted(x)
    assert (y - plain).norm() > 1e-2
    y.sum().backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora" in n)
    torch.testing.assert_close(adapted.merge_and_unload()(x), y, rtol=1e-4, atol=1e-4)


def test_weights_offloaded_layer_by_layer_come_back_for_the_call():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    made, x = module(rank=2).eval(), torch.randn(1, 3, 8, 16)
    with torch.no_grad():
        expected = made(x)
        offloaded = accelerate.cpu_offload(made, torch.device("cpu"))
        assert offloaded.inter.lora_q_a.device.type == "meta"
        torch.testing.assert_close(offloaded(x), expected)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # F.linear's result is a view
@pytest.mark.parametrize("sharded", [nn.Linear, nn.LayerNorm, type(module().inter)], ids=lambda t: t.__name__)
def test_sharding_layer_by_layer(sharded, mesh):
    made, x = module(rank=2), torch.randn(1, 3, 8, 16)
    expected, truths = result(made, x)
    for layer in list(made.modules()):
        if isinstance(layer, sharded):
            fully_shard(layer, mesh=mesh)
    y, grads = result(fully_shard(made, mesh=mesh), x)
    torch.testing.assert_close(y, expected)
    for name, truth in truths.items():
        torch.testing.assert_close(grads[name].full_tensor(), truth, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected)
