"""Converted networks by name, saved and loaded in timm's format."""

import json
from functools import partial

import pytest
import timm
import torch

from cmpe_se import conversion_report
from cmpe_se.conversion.registry import BASES
from tests.conversion.networks import randomise
from tests.conversion.test_convert import assert_same, gates, images, move_gates

save = partial(timm.models.save_for_hf, safe_serialization=True)


@pytest.mark.parametrize("base", BASES)
def test_names(base):
    model = timm.create_model(f"cmpe_se_{base}", device="meta", num_classes=7, view="pair_view_1x1")
    plain = timm.create_model(base, device="meta", num_classes=7)
    assert model.pretrained_cfg["hf_hub_id"] == plain.pretrained_cfg["hf_hub_id"]
    report = conversion_report(model)
    assert {gate.view for gate in report.gates} == {"pair_view_1x1"}
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == report.params


def test_every_set_of_weights_has_a_name():
    tags = {name.partition(".")[2] for name in timm.list_models("resnet50.*", pretrained=True)}
    assert {name.partition(".")[2] for name in timm.list_models("cmpe_se_resnet50.*", pretrained=True)} == tags
    assert timm.get_pretrained_cfg("cmpe_se_resnet50.tv_in1k").hf_hub_id == "timm/resnet50.tv_in1k"


def test_weights_of_the_base_network(tmp_path):
    base = randomise(timm.create_model("resnet18", num_classes=5)).eval()
    save(base, tmp_path)
    weights = {"file": str(tmp_path / "model.safetensors"), "source": "file", "num_classes": 5}
    model = timm.create_model("cmpe_se_resnet18", pretrained=True, num_classes=5, pretrained_cfg_overlay=weights)
    assert_same(base, model.eval())
    other = timm.create_model("cmpe_se_resnet18", pretrained=True, num_classes=3, pretrained_cfg_overlay=weights)
    assert torch.equal(other.layer4[1].conv2.weight, base.layer4[1].conv2.weight)
    assert other.fc.out_features == 3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cmpe_se_resnet18", {"view": "double_fc", "num_classes": 5}),
        ("cmpe_se_converted", {"base": "mobilenetv2_100", "num_classes": 3, "where": ["blocks.2"], "in_chans": 1}),
    ],
)
def test_saved_and_loaded(name, settings, tmp_path):
    model = move_gates(randomise(timm.create_model(name, **settings))).eval()
    save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images()[:, : settings.get("in_chans", 3)]
    assert_same(model, loaded, x)
    assert conversion_report(loaded).gates == conversion_report(model).gates


def test_features():
    features = timm.create_model("cmpe_se_resnet18", features_only=True, out_indices=(1, 3))
    assert [tuple(y.shape) for y in features(images())] == [(2, 64, 16, 16), (2, 256, 4, 4)]
    assert features.feature_info.channels() == [64, 256]
    assert len(gates(features)) == 6  # layer4 is not needed
