"""The networks by their names in timm: parameters as in the paper's tables, features, saving and loading."""

import logging

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

from cmpe_se import VIEWS, CompetitiveSE, PreActResNet, WideResNet
from cmpe_se.conversion.registry import BASES
from cmpe_se.networks.registry import PLAIN_NETWORKS, PREFIXES, default_cfgs
from cmpe_se.shipped import shipped_names
from tests.networks.naive import randomise
from tests.tiers import long_but

NAMES = [prefix + base for base in PLAIN_NETWORKS for prefix in PREFIXES]
SHALLOW = [name for name in NAMES if not name.endswith(("110", "164"))]
SMALL = ["preact_resnet20", "se_preact_resnet20", "cmpe_se_preact_resnet20", "cmpe_se_wrn16_4"]
COLUMNS = [None, "se", "double_fc", "pair_view_2x1", "pair_view_1x1", "folded_3x3"]
PARAMETERS = {  # METHOD.md's table
    "preact_resnet164": [1_703_258, 1_896_794, 2_090_330, 1_897_298, 1_993_940, 1_956_644],
    "wrn16_8": [10_961_402, 11_047_418, 11_133_434, 11_047_866, 11_090_762, 11_077_770],
    "wrn22_10": [26_797_946, 26_999_546, 27_201_146, 27_000_386, 27_100_976, 27_074_936],
    "wrn28_10": [36_479_226, 36_748_026, 37_016_826, 36_749_146, 36_883_266, 36_848_546],
}
CHANNELS = {
    "preact_resnet20b": [16, 64, 128, 256],
    "preact_resnet56b": [16, 64, 128, 256],
    "preact_resnet164": [16, 64, 128, 256],
    "wrn16_4": [16, 64, 128, 256],
    "wrn16_8": [16, 128, 256, 512],
} | {f"preact_resnet{depth}": [16, 16, 32, 64] for depth in (20, 56, 110)}
CHANNELS |= {name: [16, 160, 320, 640] for name in ("wrn22_10", "wrn28_10")}


def views_in(model) -> set[str]:
    return {module.view for module in model.modules() if isinstance(module, CompetitiveSE)}


def images(batch=2, channels=3, size=16):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def create(name, **kwargs):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs)).eval()


def test_all_names_are_registered():
    assert len(NAMES) == len(set(NAMES)) == 30
    assert set(NAMES) <= set(timm.list_models())
    converted = {"cmpe_se_converted", "cmpe_se_pruned", *(f"cmpe_se_{base}" for base in BASES)}
    assert set(timm.list_models("cmpe_se_*")) == converted | {name for name in NAMES if name.startswith("cmpe_se_")}
    with_weights = {name for name in timm.list_models(pretrained=True) if name.split(".")[0] in NAMES}
    assert with_weights == set(shipped_names())


@pytest.mark.parametrize("view", COLUMNS)
@pytest.mark.parametrize("base", PARAMETERS)
def test_parameters(base, view):
    model = timm.create_model(base, device="meta", **({"view": view} if view else {}))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[base][COLUMNS.index(view)]


@pytest.mark.parametrize("name", long_but(NAMES, SHALLOW))
def test_every_name(name):
    base = name.removeprefix("cmpe_").removeprefix("se_")
    prefix = name.removesuffix(base)
    model = timm.create_model(name, device="meta")
    network, kwargs = PLAIN_NETWORKS[base]
    assert type(model) is network is (WideResNet if base.startswith("wrn") else PreActResNet)
    assert {key: getattr(model, key) for key in kwargs} == kwargs
    assert model.view == PREFIXES[prefix] == {"": None, "se_": "se", "cmpe_se_": "folded_3x3"}[prefix]
    assert views_in(model) == ({model.view} if model.view else set())
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    assert [info["num_chs"] for info in model.feature_info] == CHANNELS[base]
    layers = {"bottleneck": 3, "basic": 2}[kwargs.get("block", "basic")]
    blocks = sum(len(stage.blocks) for stage in model.stages)
    assert layers * blocks + 2 + 2 * base.startswith("wrn") == kwargs["depth"]


@pytest.mark.parametrize(("index", "name"), enumerate(NAMES))
def test_view_on_every_name(index, name):
    view = VIEWS[index % len(VIEWS)]  # so that every prefix, and every family, meets every view
    model = timm.create_model(name, view=view, device="meta")
    assert model.view == view
    assert views_in(model) == {view}


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_run(name):
    assert create(name)(images()).shape == (2, 10)
    assert create(name, num_classes=100)(images()).shape == (2, 100)
    assert create(name, num_classes=0)(images()).shape == (2, 256 if "wrn" in name else 64)
    assert create(name, num_classes=0, global_pool="")(images()).shape[2:] == (4, 4)
    assert create(name, in_chans=1)(images(channels=1)).shape == (2, 10)
    assert create(name, view="double_fc", drop_rate=0.1, drop_path_rate=0.1)(images()).shape == (2, 10)


def test_configuration():
    assert set(default_cfgs) == set(NAMES)
    model = timm.create_model("wrn16_4", device="meta")
    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.4914, 0.4822, 0.4465)
    assert config["std"] == (0.2470, 0.2435, 0.2616)
    assert model.pretrained_cfg["classifier"] == "head.fc"
    assert model.get_submodule("head.fc") is model.get_classifier()
    # With it, timm < 1.0.31 draws the stem of a saved network with four channels anew as it loads.
    assert not model.pretrained_cfg.get("first_conv")


def test_unknown_setting_and_pretrained_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        timm.create_model("preact_resnet20", width=2)
    with pytest.raises(ValueError, match="unknown view 'fold'"):
        timm.create_model("preact_resnet20", view="fold")
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("preact_resnet56", pretrained=True)


@pytest.mark.parametrize("name", SHALLOW)
def test_features_of_every_kind(name):
    model = timm.create_model(name, features_only=True, device="meta")
    features = model(torch.empty(2, 3, 32, 48, device="meta"))
    assert len(features) == 4
    for feature, channels, reduction in zip(
        features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (2, channels, 32 // reduction, 48 // reduction)
    assert model.feature_info.module_name() == ["stem", "stages.0", "stages.1", "stages.2"]


@pytest.mark.parametrize(
    ("out_indices", "wanted"),
    [((0,), [0]), ((1,), [1]), ((0, 2), [0, 2]), ((2, 3), [2, 3]), ((-1,), [3]), ((-2, -1), [2, 3]), ((3,), [3])],
)
@pytest.mark.parametrize("name", SMALL)
def test_features_at(name, out_indices, wanted):
    model = create(name)
    features_only = create(name, features_only=True, out_indices=out_indices)
    missing = features_only.model.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    assert not any(key.startswith(("head.fc", "norm.")) for key in features_only.model.state_dict())
    assert len(features_only.model.stages) == max(wanted)
    _, expected = model.forward_intermediates(images())
    features = features_only(images())
    assert [x.shape[1] for x in features] == features_only.feature_info.channels()
    assert [16 // x.shape[2] for x in features] == features_only.feature_info.reduction()
    for feature, index in zip(features, wanted, strict=True):
        assert torch.equal(feature, expected[index])


SAVED = {
    "as it is": {},
    "view": {"view": "pair_view_1x1"},
    "one channel": {"in_chans": 1},
    "four channels": {"in_chans": 4},
    "100 classes": {"num_classes": 100},
    "no classifier": {"num_classes": 0},
    "all of them": {"view": "double_fc", "in_chans": 5, "num_classes": 3, "reduction": 4},
}


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("name", ["cmpe_se_preact_resnet20", "wrn16_4"])
def test_save_and_load(name, case, tmp_path, caplog):
    kwargs = SAVED[case]
    model = create(name, **kwargs)
    x = images(channels=kwargs.get("in_chans", 3))
    expected = model(x)

    # Settings kept in the folder, or given anew: both ways of timm.
    save_for_hf(model, tmp_path / "kept", model_args=kwargs or None, safe_serialization=True)
    save_for_hf(model, tmp_path / "given", safe_serialization=True)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"config.json", "model.safetensors"}
    for folder, given in (("kept", {}), ("given", kwargs)):
        with caplog.at_level(logging.WARNING, "timm"):
            loaded = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True, **given).eval()
        assert torch.equal(loaded(x), expected)
        assert loaded.view == model.view
    assert "random init" not in caplog.text


def test_load_with_another_classifier(tmp_path):
    model = create("cmpe_se_preact_resnet20")
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7).eval()
    assert loaded(images()).shape == (2, 7)
    assert torch.equal(loaded.forward_features(images()), model.forward_features(images()))


def test_load_with_other_channels_is_refused(tmp_path):
    save_for_hf(create("preact_resnet20"), tmp_path, safe_serialization=True)
    with pytest.raises(RuntimeError, match=r"stem\.conv\.weight"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)


def test_load_features_only(tmp_path):
    model = create("cmpe_se_preact_resnet20")
    save_for_hf(model, tmp_path, safe_serialization=True)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(1, 3))
    _, expected = model.forward_intermediates(images(), [1, 3])
    for actual, expectation in zip(features.eval()(images()), expected, strict=True):
        assert torch.equal(actual, expectation)
