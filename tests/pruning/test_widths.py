"""Layers with fewer channels: against torch-pruning's own functions, and networks of given widths built again."""

import pytest
import timm
import torch
from torch import nn

from cmpe_se import convert, prune
from cmpe_se.pruning.registry import cmpe_se_pruned
from cmpe_se.pruning.widths import channels_of, is_depthwise, narrow, resize, widths_of
from tests.networks.naive import randomise

torch_pruning = pytest.importorskip("torch_pruning")

LAYERS = {
    "convolution": lambda: nn.Conv2d(6, 8, 3),
    "without bias": lambda: nn.Conv2d(6, 8, 1, bias=False),
    "signal": lambda: nn.Conv1d(6, 8, 3),
    "volume": lambda: nn.Conv3d(6, 8, 1),
    "linear": lambda: nn.Linear(6, 8),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_keeps_what_torch_pruning_keeps(make):
    torch.manual_seed(0)
    own, theirs = make(), make()
    theirs.load_state_dict(own.state_dict())
    pruner = torch_pruning.PrunerBox[
        torch_pruning.ops.OPTYPE.LINEAR if isinstance(own, nn.Linear) else torch_pruning.ops.OPTYPE.CONV
    ]
    pruner.prune_out_channels(theirs, [1, 5])
    pruner.prune_in_channels(theirs, [0])
    narrow(own, inputs=torch.tensor([1, 2, 3, 4, 5]), outputs=torch.tensor([0, 2, 3, 4, 6, 7]))
    assert channels_of(own) == channels_of(theirs) == [5, 6]
    assert own.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in own.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(6), nn.BatchNorm1d(6, affine=False), nn.LayerNorm(6), nn.Conv2d(6, 6, 3, groups=6)]
)
def test_a_layer_that_gives_what_it_takes(layer):
    torch.manual_seed(0)
    for tensor in [*layer.parameters(), *layer.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    x = torch.randn(2, 6, *((5, 5) if not isinstance(layer, (nn.BatchNorm1d, nn.LayerNorm)) else ()))
    depthwise, whole = is_depthwise(layer), layer.eval()(x)
    kept = torch.tensor([0, 2, 5])
    narrow(layer, inputs=kept)
    assert channels_of(layer) == [3, 3]
    assert is_depthwise(layer) is depthwise
    if not isinstance(layer, nn.LayerNorm):  # whose mean is over the channels
        torch.testing.assert_close(layer(x[:, kept]), whole[:, kept])


def test_widths_build_a_network_again():
    whole = timm.create_model("cmpe_se_preact_resnet20", num_classes=10)
    widths = {
        "stages.0.blocks.0.conv1": [16, 8],
        "stages.0.blocks.0.bn2": [8, 8],
        "stages.0.blocks.0.conv2": [8, 16],
        "stages.1.blocks.2": [0, 0],
    }
    own = timm.create_model("cmpe_se_preact_resnet20", num_classes=10)
    resize(own, widths)
    assert widths_of(own, whole) == widths
    other = timm.create_model("cmpe_se_pruned", network="cmpe_se_preact_resnet20", widths=widths, num_classes=10)
    other.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other.eval()(x), own.eval()(x), rtol=0, atol=0)


def test_a_block_that_is_gone_adds_nothing():
    model = randomise(timm.create_model("preact_resnet20", num_classes=10)).eval()
    x = torch.randn(2, 3, 16, 16)
    silent = timm.create_model("preact_resnet20", num_classes=10).eval()
    silent.load_state_dict(model.state_dict())
    nn.init.zeros_(silent.stages[1].blocks[1].conv2.weight)
    resize(model, {"stages.1.blocks.1": [0, 0]})
    torch.testing.assert_close(model(x), silent(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"layer9": [1, 1]}, "widths names no layer of this ResNet: 'layer9'"),
        ({"": [0, 0]}, "widths names no layer of this ResNet: ''"),
        ({"conv1": [3]}, r"widths of conv1 are \[3\], should be two numbers"),
        ({"conv1": [3, True]}, "should be two numbers"),
        ({"conv1": [3, 65]}, r"widths of conv1 are \[3, 65\], should be from 1 to \[3, 64\]"),
        ({"conv1": [3, 0]}, r"should be from 1 to \[3, 64\]"),
        ({"layer1.0": [4, 4]}, r"widths names a layer that has none: layer1.0 \(BasicBlock\)"),
    ],
)
def test_widths_that_cannot_be(widths, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("cmpe_se_pruned", network="resnet18", widths=widths)


@pytest.mark.parametrize("network", [None, "no_such", "hf-hub:x/y", "cmpe_se_pruned"])
def test_networks_that_cannot_be(network):
    with pytest.raises(ValueError, match="no network of timm's own"):
        timm.create_model("cmpe_se_pruned", network=network)


def test_no_file_of_weights_from_a_stranger():
    with pytest.raises(ValueError, match="checkpoint_path 'x' cannot be a setting"):
        cmpe_se_pruned(network="resnet18", checkpoint_path="x")


PRUNED = {"fc": [256, 10], "layer4.1.conv1": [512, 100], "layer4.1.bn1": [100, 100], "layer4.1.conv2": [100, 256]}
PRUNED |= {"conv1": [3, 64], "layer4.1.bn2": [256, 256], "layer4.0.conv2": [512, 256], "layer4.0.bn2": [256, 256]}
PRUNED |= {"layer4.0.downsample.0": [256, 256], "layer4.0.downsample.1": [256, 256], "layer4.1.conv1": [256, 100]}


@pytest.mark.parametrize("settings", [{"num_classes": 20}, {"num_classes": 5}, {"num_classes": 0}, {"in_chans": 1}])
def test_classes_and_channels_of_images_are_the_network_s_own(settings):
    model = timm.create_model("cmpe_se_pruned", network="resnet18", widths=PRUNED, **settings).eval()
    outputs = model(torch.randn(2, settings.get("in_chans", 3), 64, 64)).shape[1]
    assert outputs == (settings.get("num_classes", 1000) or 256)
    assert model.num_features == 256
    model.reset_classifier(7)
    assert model(torch.randn(2, settings.get("in_chans", 3), 64, 64)).shape == (2, 7)


def test_widths_of_another_network():
    """Those of a plain network's stream, for one whose gates have as many channels as before."""
    with pytest.raises(ValueError, match="these widths are not those of cmpe_se_converted"):
        timm.create_model("cmpe_se_pruned", network="cmpe_se_converted", base="resnet18", widths=PRUNED)


def test_feature_maps_of_ours():
    features = timm.create_model("cmpe_se_pruned", network="preact_resnet20", features_only=True)
    assert [one.shape[1] for one in features(torch.randn(1, 3, 16, 16))] == [16, 16, 32, 64]


@pytest.mark.long
def test_feature_maps_of_a_pruned_network():
    whole = convert(timm.create_model("resnet18", num_classes=4))
    pruned = prune(whole, 0.15, images=[(torch.randn(2, 3, 64, 64), torch.zeros(2).long())], criterion="l1")
    assert pruned.through_stream
    features = timm.create_model(
        "cmpe_se_pruned", network="cmpe_se_converted", base="resnet18", widths=pruned.widths, features_only=True
    )
    maps = features(torch.randn(1, 3, 64, 64))
    assert [one.shape[1] for one in maps] == features.feature_info.channels()
