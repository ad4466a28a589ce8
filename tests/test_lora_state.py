"""The state of a module with LoRA: initialised, merged, saved, loaded and trained, in each of the three modules."""

import copy
import gc
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from aftersam.model.lora import LoRAOptions, LoRAQKV
from axial_fusion import AxialFusionAttention, LoRALinear
from axial_fusion.lora import LoRAUpdates

MAKE = {
    "LoRALinear": lambda: LoRALinear(8, 8, rank=2, alpha=3),
    "AxialFusionAttention": lambda: AxialFusionAttention(8, 2, rank=2, alpha=3),
    "LoRAQKV": lambda: LoRAQKV(nn.Linear(8, 24), LoRAOptions(2, 3.0)),
    "LoRAQKV by head": lambda: LoRAQKV(nn.Linear(8, 24), LoRAOptions(2, 3.0), heads=2),
    "within a model": lambda: nn.Sequential(
        nn.Linear(8, 8), nn.ModuleDict({"a": LoRALinear(8, 8, rank=2)})["a"]
    ),
}
KINDS = pytest.mark.parametrize("kind", MAKE)


def made(kind, merged=False):
    """A module whose updates are not zero."""
    module = MAKE[kind]()
    for name, parameter in module.named_parameters():
        if name.endswith("_b"):
            nn.init.normal_(parameter)
    return switched(module, merged)


def switched(module, merged):
    for part in module.modules():
        if isinstance(part, LoRAUpdates):
            part.merge() if merged else part.unmerge()
    return module


def run(module):
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 8).cos().view(2, 3, 4, 8)
    return module(x)


def gradients(module):
    module.zero_grad()
    run(module).square().sum().backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@KINDS
@pytest.mark.parametrize(("of_file", "of_module"), [*itertools.product([False, True], repeat=2)])
def test_a_file_loads_into_a_module_whichever_of_them_is_merged(kind, of_file, of_module):
    torch.manual_seed(0)
    saved, module = made(kind, of_file), made(kind, of_module)
    expected = run(saved)
    file = copy.deepcopy(saved.state_dict())
    assert any("lora_merged" in name for name in file) == of_file
    for target in (module, copy.deepcopy(module)):
        target.load_state_dict(file)
        torch.testing.assert_close(run(target), expected, rtol=1e-4, atol=1e-5)
        original = gradients(switched(saved, False))
        for name, gradient in gradients(target).items():
            torch.testing.assert_close(gradient, original[name], rtol=1e-3, atol=1e-4)
        again = made(kind, not of_module)
        again.load_state_dict(target.state_dict())
        torch.testing.assert_close(run(again), expected, rtol=1e-4, atol=1e-5)


@KINDS
def test_the_keys_of_an_unmerged_module_are_its_parameters(kind):
    module = made(kind)
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("kind", ["LoRALinear", "LoRAQKV"])
def test_an_adapter_brings_alpha_and_loads_into_a_merged_module_and_from_old_files(kind):
    torch.manual_seed(0)
    one, other = made(kind), made(kind, merged=True)
    base = {name: value for name, value in other.state_dict().items() if "lora" not in name}
    plain = {n: p.clone() for n, p in copy.deepcopy(other).state_dict().items()}
    one.scaling = 0.25
    adapter = one.lora_state_dict()
    assert adapter["lora_alpha"] == 0.5
    assert base.keys() <= plain.keys()
    assert not other.load_state_dict(adapter, strict=False).unexpected_keys
    assert other.scaling == 0.25
    switched(one, False)
    with torch.no_grad():
        one.weight.copy_(other.weight)
        if one.bias is not None:
            one.bias.copy_(other.bias)
    torch.testing.assert_close(run(other), run(one))
    del adapter["lora_alpha"]
    other.load_state_dict(adapter, strict=False)
    assert other.scaling == 0.25


def test_a_merged_file_without_its_update_is_refused():
    file = made("LoRALinear", merged=True).state_dict()
    del file["lora_b"]
    with pytest.raises(RuntimeError, match="lora_merged needs lora_b beside it"):
        made("LoRALinear").load_state_dict(file, strict=False)


@KINDS
def test_a_merged_update_is_not_trained_in_silence(kind):
    module = made(kind, merged=True)
    message = "a merged LoRA update gets no gradient; call unmerge"
    with pytest.raises(RuntimeError, match=message):
        run(module).sum().backward()
    parameters = dict(module.named_parameters())
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda p: torch.func.functional_call(module, p, torch.ones(1, 3, 4, 8)).sum())(
            parameters
        )
    x = torch.randn(1, 3, 4, 8, requires_grad=True)
    torch.autograd.grad(module(x).sum(), x)  # the gradient of the input alone is right
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora" not in name)
    run(module).sum().backward()


@KINDS
def test_memory_that_is_made_late_is_initialised_as_by_the_constructor(kind):
    torch.manual_seed(0)
    made_here = MAKE[kind]()
    late = copy.deepcopy(switched(made_here, False)).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in late.parameters():
            parameter.fill_(torch.nan)
    for part in late.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for (name, parameter), here in zip(late.named_parameters(), made_here.parameters(), strict=True):
        assert not parameter.isnan().any(), name
        if name.endswith("_b") or "norm" in name:
            assert torch.equal(parameter, here)
        else:  # uniform in ± 1 / sqrt(in) or LoRA's bound
            assert 0.5 < parameter.abs().max() / here.abs().max() < 2
            assert not torch.equal(parameter, here)
    assert not any(getattr(part, "merged", False) for part in late.modules())


def test_a_shared_weight_is_named_and_a_computed_one_refused(monkeypatch):
    embedding, head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
    head.weight = embedding.weight
    layer = LoRALinear.from_linear(head, rank=2)
    with pytest.warns(UserWarning, match="LoRALinear: the weight is shared with Embedding"):
        layer.merge()
    layer.unmerge()
    alone = LoRALinear.from_linear(nn.Linear(8, 8), rank=2)
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("nobody else has it, so nobody is looked for"))
    alone.merge()
    normed = nn.utils.parametrizations.weight_norm(LoRALinear(8, 8, rank=2))
    with pytest.raises(ValueError, match="only a plain parameter can be merged"):
        normed.merge()


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Bilinear(2, 2, 2), "is torch.nn.modules.linear.Bilinear"),
        (LoRALinear(8, 8, rank=1), "is axial_fusion.lora.LoRALinear"),
        (nn.MultiheadAttention(8, 2).out_proj, "is the out_proj of nn.MultiheadAttention"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "is .*ParametrizedLinear"),
        (prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5), "has hooks"),
    ],
    ids=str,
)
def test_from_linear_takes_nothing_but_a_plain_layer(layer, found):
    with pytest.raises(ValueError, match=f"from_linear takes a plain nn.Linear, but linear {found}"):
        LoRALinear.from_linear(layer, rank=2)


def test_torchs_attention_refuses_the_layer_where_it_would_not_call_it():
    class Calling(nn.MultiheadAttention):
        def forward(self, x):
            return self.out_proj(x)

    attention, layer = nn.MultiheadAttention(8, 2), LoRALinear(8, 8, rank=2)
    with pytest.raises(ValueError, match="never calls it, so LoRALinear's update would be lost"):
        attention.out_proj = layer
    assert type(attention.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    calling = Calling(8, 2)
    calling.out_proj = layer
    assert calling(torch.randn(3, 8)).shape == (3, 8)


def test_torchs_encoder_layer_calls_the_layer_in_evaluation_too():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder.linear1 = LoRALinear.from_linear(encoder.linear1, rank=2)
    nn.init.normal_(encoder.linear1.lora_b)
    x = torch.randn(2, 5, 8)
    expected = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), expected)


def test_a_peft_checkpoint_comes_and_goes():
    peft = pytest.importorskip("peft", reason="peft is not installed")

    class Projections(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.q(x) * self.v(x)

    torch.manual_seed(0)
    base = Projections()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"]))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    state = peft.get_peft_model_state_dict(theirs)

    ours = Projections()
    ours.load_state_dict(weights)
    for name in ("q", "v"):
        setattr(ours, name, LoRALinear.from_linear(getattr(ours, name), rank=4, alpha=8))
        prefix = f"base_model.model.{name}"
        adapter = {f"lora_{x.lower()}": state[f"{prefix}.lora_{x}.weight"] for x in "AB"}
        missing = getattr(ours, name).load_state_dict(adapter, strict=False)
        assert not missing.unexpected_keys
    x = torch.randn(5, 24)
    torch.testing.assert_close(ours(x), theirs(x))

    back = {
        f"base_model.model.{name}.lora_{key[-1].upper()}.weight": value
        for name in ("q", "v") for key, value in getattr(ours, name).lora_state_dict().items()
        if key != "lora_alpha"
    }  # fmt: skip
    for parameter in theirs.parameters():
        parameter.data.zero_() if parameter.requires_grad else None
    peft.set_peft_model_state_dict(theirs, back)
    torch.testing.assert_close(theirs(x), ours(x))
