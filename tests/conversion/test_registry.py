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
from tests.tiers import long_but

DEEP = ("resnet101", "resnet152", "wide_resnet50_2")  # seconds each

save = partial(timm.models.save_for_hf, safe_serialization=True)


@pytest.mark.parametrize("base", long_but(BASES, [base for base in BASES if base not in DEEP]))
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


@pytest.mark.slow
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


FEATURES = (
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "convnext_atto",
    "dla34",
    "repvgg_a0",
    "regnetx_002",
    "xception41",
)
"""Families whose features timm takes in different ways, by lists, hooks, classes of their own, other first indices."""


@pytest.mark.parametrize("base", long_but(FEATURES, ("mobilenetv3_small_100", "convnext_atto", "repvgg_a0")))
def test_features_are_those_of_the_base(base):
    settings = {"features_only": True, "out_indices": (1, 2, 3)}
    plain = randomise(timm.create_model(base, **settings)).eval()
    features = timm.create_model("cmpe_se_converted", base=base, **settings).eval()
    assert gates(features)
    weights = plain.state_dict()
    with torch.no_grad():
        for key, value in features.state_dict().items():
            if ".competition." not in key:
                value.copy_(weights[key.removeprefix("model.")])
        for actual, expected in zip(features(images()), plain(images()), strict=True):
            assert torch.equal(actual, expected)
    for what in ("channels", "reduction"):
        assert getattr(features.feature_info, what)() == getattr(plain.feature_info, what)()


@pytest.mark.parametrize("base", long_but(FEATURES, ("mobilenetv2_100", "dla34")))
def test_all_features_have_the_scales_of_the_base(base):
    with torch.device("meta"):
        plain, features = (
            timm.create_model(name, features_only=True, **settings)
            for name, settings in ((base, {}), ("cmpe_se_converted", {"base": base}))
        )
        shapes = [[tuple(y.shape) for y in network(torch.empty(1, 3, 64, 64))] for network in (plain, features)]
    assert shapes[0] == shapes[1]
    assert plain.feature_info.reduction() == features.feature_info.reduction()


def test_base_as_a_tag(tmp_path):
    model = timm.create_model("cmpe_se_converted.resnet10t", num_classes=3, view="double_fc").eval()
    assert model.pretrained_cfg["tag"] == timm.get_pretrained_cfg("resnet10t").tag
    save(model, tmp_path)
    assert_same(model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval())
    tagged = timm.create_model("cmpe_se_converted.resnet50.tv_in1k", device="meta")
    assert tagged.pretrained_cfg["tag"] == "tv_in1k"
    assert len(conversion_report(tagged).gates) == 16


@pytest.mark.parametrize("name", ["cmpe_se_converted", "cmpe_se_converted.no_network"])
def test_no_base(name):
    with pytest.raises(ValueError, match="is no network of timm's own; name one by base="):
        timm.create_model(name)


def test_features_with_saved_gates(tmp_path):
    """Weights and gates of a saved converted network arrive in its features."""
    model = move_gates(randomise(timm.create_model("cmpe_se_converted", base="mobilenetv3_small_100"))).eval()
    save(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        for actual, expected in zip(loaded(images()), model.forward_intermediates(images())[1], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.slow
def test_weights_of_a_base_whose_blocks_have_two_gates(tmp_path):
    plain = randomise(timm.create_model("test_coatnet")).eval()
    torch.save(plain.state_dict(), tmp_path / "base.pth")
    overlay = {"file": str(tmp_path / "base.pth")}
    model = timm.create_model("cmpe_se_converted", base="test_coatnet", pretrained=True, pretrained_cfg_overlay=overlay)
    assert any(".competition_2." in key for key in model.state_dict())
    x = torch.randn(1, 3, *plain.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain(x))
