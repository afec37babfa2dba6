"""``timm.utils.reparameterize_model`` merges gates: the same outputs in float64 to 1e-12, nothing at its start."""

import copy

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import cmpe_se
from cmpe_se import VIEWS, CompetitiveSE, PreActResNet, convert, merge
from cmpe_se.errors import UserError
from cmpe_se.layers.views import TABLE
from cmpe_se.merging import MergedGate
from tests.networks.naive import SMALL_NETWORKS, randomise
from tests.tiers import long_but

NARROW = {"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)}
NETWORKS = SMALL_NETWORKS | {
    name: lambda name=name, narrow=narrow, dtype=None, **settings: convert(
        timm.create_model(name, **narrow).to(dtype), **settings
    )
    for name, narrow in (("test_resnet", {}), ("resnet18", NARROW))  # bottleneck blocks, and basic ones
}
EVERY_VIEW = pytest.mark.parametrize("view", VIEWS)
MERGING = [name for name, view in TABLE.items() if view.merges]


def make(kind: str, view: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    settings = {"start": "one", "reduction": 4, "bias": True, "dtype": torch.float64} | settings
    return randomise(NETWORKS[kind](view=view, **settings)).eval()


def images(dtype=torch.float64):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gates(model: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


@EVERY_VIEW
@pytest.mark.parametrize("kind", long_but(NETWORKS, ["bottleneck", "test_resnet"]))
def test_gates_are_merged(kind, view):
    model, x = make(kind, view), images()
    before = copy.deepcopy(model.state_dict())
    fused, merged = reparameterize_model(model), merge(model)
    count = len(gates(model, CompetitiveSE))
    assert (len(gates(fused, MergedGate)), len(gates(fused, CompetitiveSE))) == (
        (count, 0) if TABLE[view].merges else (0, count)
    )
    with torch.no_grad():
        expected, nudged = model(x), model(x * (1 + 1e-15))
        # A deep network's own rounding may be above 1e-12.
        allowed = max(1e-12 * expected.abs().max(), 4 * (nudged - expected).abs().max())
        for other in (fused(x), merged(x)):
            assert (other - expected).abs().max() <= allowed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if kind in SMALL_NETWORKS:  # where merge, too, changes nothing about the gates but their form
        for ours, theirs in zip(gates(fused, MergedGate), gates(merged, MergedGate), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("view", MERGING)
def test_a_gate_alone(view):
    torch.manual_seed(0)
    gate = randomise(CompetitiveSE(48, view=view, reduction=4, maps=3, dtype=torch.float64)).eval()
    residual, identity = torch.randn(2, 3, 48, 5, 4, dtype=torch.float64)
    fused = gate.fuse()
    torch.testing.assert_close(fused(residual, identity), gate(residual, identity), rtol=0, atol=1e-13)
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(parameter.requires_grad for parameter in gate.parameters())


@EVERY_VIEW
def test_in_place_and_again(view):
    model, x = make("basic", view), images()
    fused = reparameterize_model(model, inplace=True)
    assert fused is model
    kept = dict(fused.named_modules())
    again = reparameterize_model(fused, inplace=True)
    assert dict(again.named_modules()) == kept  # what is fused is not fused again
    with torch.no_grad():
        merged = merge(fused)  # which still folds the norms
        torch.testing.assert_close(merged(x), fused(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("view", MERGING)
def test_the_mode_makes_no_difference(view):
    """As with timm's layers; neither the batch's statistics nor a mask are in it."""
    model, x = make("basic", view, mask=0.5), images()
    fused = reparameterize_model(model.train())
    assert fused.training
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(fused.eval()(x), expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    fused.train()(images()).sum().backward()  # what is left goes on learning, the gates do not
    assert fused.stem.conv.weight.grad is not None
    assert all(parameter.grad is None for gate in gates(fused, MergedGate) for parameter in gate.parameters())


def test_a_norm_without_running_statistics():
    model = make("basic", "folded_3x3")
    for gate in gates(model, CompetitiveSE):
        gate.map_norm.running_mean = gate.map_norm.running_var = None
    with pytest.raises(UserError, match="keeps no running statistics"):
        reparameterize_model(model)


@pytest.mark.parametrize("view", MERGING)
def test_inspected(view):
    model, x = make("basic", view), images()
    for before, after in zip(cmpe_se.inspect(model, x), cmpe_se.inspect(reparameterize_model(model), x), strict=True):
        assert (after.name, after.view, after.neutral) == (before.name, before.view, before.neutral)
        torch.testing.assert_close(after.gate, before.gate, rtol=0, atol=1e-11)
        torch.testing.assert_close(after.residual_squeeze, before.residual_squeeze, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_compiled_and_exported():
    model = reparameterize_model(PreActResNet(11, view="folded_3x3")).eval()
    x = images(torch.float32)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
