"""Converted networks by name, in torchvision and transformers."""

import subprocess
import sys

import pytest
import torch
import torchvision
from torchvision.models import get_model, get_model_weights, list_models

from cmpe_se import CompetitiveSE, strip_gates
from cmpe_se.conversion.registry import BASES


def gates(model) -> list[CompetitiveSE]:
    return [module for module in model.modules() if isinstance(module, CompetitiveSE)]


def test_names_of_torchvision():
    assert set(list_models(include="cmpe_se_*")) == {f"cmpe_se_{base}" for base in BASES}
    assert get_model_weights("cmpe_se_resnet50") is torchvision.models.ResNet50_Weights
    assert not list_models(torchvision.models, include="cmpe_se_*")  # lists of torchvision's own stay what they are


def test_a_network_of_torchvision():
    torch.manual_seed(0)
    model = get_model("cmpe_se_resnet18", num_classes=3, view="se", min_hidden=5, where="layer4").eval()
    assert [(gate.view, gate.hidden, gate.channels) for gate in gates(model)] == [("se", 32, 512)] * 2
    torch.manual_seed(0)
    plain = get_model("resnet18", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert type(strip_gates(model)) is torchvision.models.ResNet


def test_weights_of_torchvision_are_asked_for(monkeypatch):
    asked = []
    state = get_model("resnet18").state_dict()
    enum = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **_: asked.append(self) or state)
    model = get_model("cmpe_se_resnet18", weights="DEFAULT")
    assert asked == [enum.DEFAULT]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_backbone_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.TimmBackboneConfig(
        backbone="cmpe_se_resnet18", num_channels=4, out_indices=(1, 2, 3, 4), use_pretrained_backbone=False
    )
    backbone = transformers.TimmBackbone(config).eval()
    assert len(gates(backbone)) == 8
    with torch.no_grad():
        maps = backbone(torch.randn(1, 4, 64, 64)).feature_maps
    assert [tuple(x.shape) for x in maps] == [(1, 64 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]
    plain = transformers.TimmBackbone(transformers.TimmBackboneConfig(**config.to_dict() | {"backbone": "resnet18"}))
    missing = plain.load_state_dict(backbone.state_dict(), strict=False)
    assert all(".competition." in key for key in missing.unexpected_keys)
    assert not missing.missing_keys


@pytest.mark.slow
def test_transformers_is_not_imported():
    code = "import sys, cmpe_se; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout == "False\n", done.stderr
