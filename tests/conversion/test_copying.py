"""Networks that Python cannot copy: a sentence that names the layer, and conversion in place."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from cmpe_se import conversion_report, convert
from cmpe_se.errors import UserError
from tests.conversion.cifar import CifarResNet
from tests.conversion.networks import randomise
from tests.conversion.test_convert import assert_same, gates, images


def build():
    torch.manual_seed(0)
    return randomise(CifarResNet(8))


def keeps_its_result(conv):
    conv.register_forward_hook(lambda layer, _, output: setattr(layer, "kept", output))


def locked(conv):
    conv.lock = threading.Lock()


CHANGES = {
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "a kept result": keeps_its_result,
    "a lock": locked,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_cannot_be_copied_is_named(change):
    model, x = build(), images(side=32)
    change(model.layer2[0].conv1)
    model(x)
    with pytest.raises(UserError) as error:
        convert(model)
    assert str(error.value).startswith("layer layer2.0.conv1 (Conv2d) cannot be copied: ")
    assert str(error.value).endswith("; convert in place (inplace=True)")
    assert "\n" not in str(error.value)
    assert not gates(model)

    model.eval()
    with torch.no_grad():
        expected = model(x)
        converted = convert(model, inplace=True)
        assert torch.equal(converted(x), expected)
    assert len(gates(converted)) == 3
    assert not conversion_report(converted).skipped
    converted(x).square().sum().backward()
    assert all(gate.fc2.weight.grad.abs().sum() > 0 for gate in gates(converted).values())
    weight = getattr(converted.layer2[0].conv1, "weight_orig", None)  # of which the weight is computed at each step
    assert weight is None or weight.grad.abs().sum() > 0


@pytest.mark.parametrize("inplace", [False, True])
def test_parametrised_layers(inplace):
    model, x = build(), images(side=32)
    for layer in list(model.modules()):
        if isinstance(layer, nn.Conv2d):
            parametrizations.weight_norm(layer)
    model(x)
    model.eval()
    converted = convert(model, inplace=inplace)
    assert len(gates(converted)) == 3
    assert_same(model, converted, x)
    converted(x).square().sum().backward()
    assert converted.layer1[0].conv1.parametrizations.weight.original1.grad.abs().sum() > 0


def test_shapes_are_found_without_running_hooks():
    model = build()
    calls = []
    for layer in model.modules():
        layer.register_forward_hook(lambda *_: calls.append(1))
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    statistics = model.bn1.running_mean.clone()
    assert len(gates(convert(model.train(), inplace=True))) == 3
    assert not calls
    assert torch.equal(model.bn1.running_mean, statistics)
