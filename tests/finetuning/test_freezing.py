"""A frozen backbone computes the same for as long as it is frozen, and learns again after that."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from cmpe_se import CompetitiveSE, freeze_backbone, merge, strip_gates, unfreeze_backbone
from cmpe_se.errors import UserError
from cmpe_se.finetuning.freezing import freeze_all_but
from tests.finetuning.networks import build, equal, gated, images, snapshot


def part_of_gates(name: str) -> bool:
    return ".competition." in name or ".attention." in name


def train(model: nn.Module, steps: int = 3) -> None:
    """With momentum and weight decay, which move what has a gradient of zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(steps):
        model.train()
        model(images(4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("kind", ["cifar", "layer scale", "preact"])
def test_nothing_but_gates_changes(kind):
    model = gated(kind, "pair_view_1x1")
    model.train()(images(4)).square().mean().backward()  # gradients from before
    before = snapshot(model)
    assert freeze_backbone(model) is model
    train(model)
    for name, tensor in model.state_dict().items():
        assert part_of_gates(name) or torch.equal(tensor, before[name]), name
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    gates = [name for name, _ in model.named_parameters() if part_of_gates(name)]
    assert set(gates) <= set(changed)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(gates)


def test_the_backbone_computes_the_same_in_both_modes():
    model, x = gated("cifar", "se"), images()
    expected = model(x)
    freeze_backbone(model).train()
    assert torch.equal(model(x), expected)
    assert model.training
    assert model.layer1[0].competition.training
    for norm in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        assert norm.train() is norm
        assert not norm.training


def test_the_norm_inside_a_gate_goes_on():
    model = gated("cifar", "folded_3x3")
    before = snapshot(model)
    train(freeze_backbone(model), 1)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor, before[name]) != part_of_gates(name), name


def test_all_is_as_before_after_unfreezing():
    model = gated("cifar", "se")
    model.conv1.weight.requires_grad_(False)
    model.train()
    model.layer2.eval()  # as the user wants it
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    freeze_backbone(freeze_backbone(model))
    assert unfreeze_backbone(model) is model
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learning
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    freeze_backbone(model)
    model.eval()
    model.train()
    unfreeze_backbone(unfreeze_backbone(model))
    assert all(module.training for module in model.modules())
    before = snapshot(model)
    train(model, 1)
    still = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == {"conv1.weight"}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_frozen_by_themselves(duplicate):
    model = freeze_backbone(gated("cifar", "se")).train()
    other = duplicate(model)
    unfreeze_backbone(model)
    assert model.bn1.training
    assert model.conv1.weight.requires_grad
    other.train()
    assert not other.bn1.training
    assert not other.conv1.weight.requires_grad
    unfreeze_backbone(other)
    assert other.bn1.training
    assert other.conv1.weight.requires_grad


def test_a_part_that_is_let_go():
    model = freeze_backbone(gated("bottleneck", "se"))
    model.get_classifier().requires_grad_(True)
    before = snapshot(model)
    train(model)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], model.state_dict()[name])}
    assert "fc" in changed
    freeze_backbone(model)
    assert not model.fc.weight.requires_grad
    assert unfreeze_backbone(model).fc.weight.requires_grad


def test_wrapped():
    model = gated("cifar", "se")
    compiled = torch.compile(model, backend="eager")
    expected = compiled(images())
    assert freeze_backbone(compiled) is compiled
    compiled.train()
    assert torch.equal(compiled(images()), expected)
    assert not model.bn1.training
    unfreeze_backbone(nn.Sequential(model))
    assert model.conv1.weight.requires_grad


def test_a_frozen_network_merges_and_strips():
    model, x = freeze_backbone(gated("cifar")).train().eval(), images()
    torch.testing.assert_close(merge(model)(x), model(x), rtol=1e-4, atol=1e-4)
    assert not [layer for layer in merge(model).modules() if isinstance(layer, nn.BatchNorm2d)]
    stripped = strip_gates(model)
    assert equal(stripped.state_dict(), build("cifar").state_dict())
    assert not stripped.train().bn1.training  # what is frozen stays frozen
    assert unfreeze_backbone(stripped).bn1.training


def test_what_else_keeps_running_values():
    """Spectral norm's vectors, and a module with a ``train`` of its own."""
    model = gated("cifar", "se")
    parametrizations.spectral_norm(model.layer1[0].conv1)
    model.bn1.train = train_of_its_own = lambda mode=True: model.bn1
    freeze_backbone(model)
    before = snapshot(model)
    train(model)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if "competition" not in name
    )
    unfreeze_backbone(model)
    assert model.bn1.train is train_of_its_own


def test_parts_to_train_are_told():
    model = build("cifar")
    freeze_all_but(model, [model.fc, model.layer2])
    learning = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"fc", "layer2"}
    model.train()
    assert model.layer2[0].bn1.training
    assert not model.layer1[0].bn1.training


def test_refused():
    for make, sentence in (
        (lambda: build("cifar"), "CifarResNet has no gates; cmpe_se.convert adds them"),
        (lambda: merge(gated("cifar")), "this CifarResNet is merged"),
        (lambda: CompetitiveSE(16), "this is a gate by itself"),
        (lambda: gated("cifar").requires_grad_(False), "all gates are frozen .* so nothing would learn"),
    ):
        model = make()
        attributes = [set(vars(module)) for module in model.modules()]
        with pytest.raises(UserError, match=sentence):
            freeze_backbone(model)
        assert [set(vars(module)) for module in model.modules()] == attributes
