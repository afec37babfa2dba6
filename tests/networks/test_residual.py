"""Whole networks against the naive form, and timm's model protocol on them."""

import copy
import pickle
import re
from functools import partial

import pytest
import timm
import torch
from timm.layers import calculate_drop_path_rates
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from cmpe_se import CompetitiveSE, PreActResNet, WideResNet
from cmpe_se.networks.blocks import PreActBlock
from tests.networks.naive import SMALL_NETWORKS, SQUEEZE_VIEWS, naive_network, randomise

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
FAMILIES = pytest.mark.parametrize("family", SMALL_NETWORKS)
CHANNELS = {"bottleneck": [16, 64, 128, 256], "basic": [16, 16, 32, 64], "wide": [16, 32, 64, 128]}
CLASSES = 7


def make(family="bottleneck", *, training=False, **kwargs):
    torch.manual_seed(0)
    settings = {"view": "folded_3x3", "num_classes": CLASSES, "dtype": torch.float64} | kwargs
    return randomise(SMALL_NETWORKS[family](**settings)).train(training)


def images(size=(8, 8), channels=3, batch=3, dtype=torch.float64):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def near(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@MODES
@pytest.mark.parametrize("view", [None, *SQUEEZE_VIEWS])
@FAMILIES
def test_equals_the_naive_network(family, view, training):
    model = make(family, view=view, training=training)
    naive = copy.deepcopy(model)
    results = []
    for module, forward in ((model, model), (naive, lambda x: naive_network(naive, x))):
        x = images().requires_grad_()
        logits = forward(x)
        nn.functional.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append({"logits": logits, "x": x.grad} | gradients | dict(module.named_buffers()))
    actual, expected = results
    assert actual.keys() == expected.keys()
    assert all(value is not None for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("output_stride", [1, 2])
@pytest.mark.parametrize("view", [None, "folded_3x3"])
@FAMILIES
def test_dilated_equals_the_naive_network(family, view, output_stride):
    model = make(family, view=view, output_stride=output_stride)
    near(model(images()), naive_network(model, images()), 1e-9)
    assert model.forward_features(images()).shape[2:] == (8 // output_stride, 8 // output_stride)


@pytest.mark.parametrize("output_stride", [1, 2])
@pytest.mark.parametrize("view", [None, "static"])
@FAMILIES
def test_dilated_network_has_the_strided_one_on_its_grid(family, view, output_stride):
    """The same weights: every so many pixels, a dilated network computes what the strided one does.

    Of gates only fixed ones are the same, since the others read means over more pixels.
    """
    strided, dilated = (make(family, view=view, output_stride=stride) for stride in (4, output_stride))
    dilated.load_state_dict(strided.state_dict())
    step = 4 // output_stride
    near(dilated.forward_features(images((16, 12)))[:, :, ::step, ::step], strided.forward_features(images((16, 12))))


def test_output_stride_in_features():
    features = timm.create_model("cmpe_se_preact_resnet20", features_only=True, output_stride=2, in_chans=4)
    assert features.feature_info.reduction() == [1, 1, 2, 2]
    assert [16 // y.shape[2] for y in features(torch.randn(1, 4, 16, 16))] == [1, 1, 2, 2]
    wide = timm.create_model("wrn16_4", features_only=True, output_stride=16, device="meta")
    assert wide.feature_info.reduction() == [1, 1, 2, 4]


@pytest.mark.parametrize("output_stride", [0, 3, -2, 1.5])
def test_output_stride_that_is_none(output_stride):
    with pytest.raises(ValueError, match=r"output_stride is .*, should be a power of two"):
        make(output_stride=output_stride)


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (1, 1), (33, 17), (2, 5)], ids=str)
@pytest.mark.parametrize("view", [None, "folded_3x3"])
@FAMILIES
def test_input_sizes(family, view, size):
    for training in (True, False):
        model = make(family, view=view, training=training)
        logits = model(images(size))
        assert logits.shape == (3, CLASSES)
        near(logits, naive_network(make(family, view=view, training=training), images(size)), 1e-9)


@FAMILIES
def test_channels_last_and_meta(family):
    model = make(family, training=True)
    expected = copy.deepcopy(model)(images())
    model.to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)
    near(make(family, training=True).to(memory_format=torch.channels_last)(x), expected)
    assert make(family).to("meta")(x.to("meta")).shape == (3, CLASSES)


def note_dtypes(dtypes, excite, r, i):
    gate = excite(r, i)
    dtypes.update(tensor.dtype for tensor in (r, i, gate))
    return gate


@pytest.mark.parametrize("view", [None, *SQUEEZE_VIEWS])
@FAMILIES
def test_autocast_is_near_float32(family, view):
    results = []
    for enabled in (False, True):
        model = make(family, view=view, training=True, dtype=torch.float32)
        dtypes = set()
        for module in model.modules():
            if isinstance(module, CompetitiveSE):
                module._excite = partial(note_dtypes, dtypes, module._excite)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(images(batch=8, dtype=torch.float32))
        assert dtypes == ({torch.float32} if view else set())
        logits.float().square().sum().backward()
        results.append((logits.float().detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (expected, gradient), (actual, rounded) = results
    assert not torch.equal(actual, expected)  # or autocast did nothing
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.cosine_similarity(rounded, gradient, dim=0) > 0.98


# Settings.


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: PreActResNet(10), "PreActResNet: depth must be 9n + 2, got 10; try 11 or 20"),
        (lambda: PreActResNet(165), "PreActResNet: depth must be 9n + 2, got 165; try 164 or 173"),
        (lambda: PreActResNet(2), "PreActResNet: depth must be 9n + 2, got 2; try 11 or 20"),
        (lambda: PreActResNet(-7), "PreActResNet: depth must be 9n + 2, got -7; try 11 or 20"),
        (lambda: PreActResNet(19, block="basic"), "PreActResNet: depth must be 6n + 2, got 19; try 14 or 20"),
        (lambda: PreActResNet(20, block="wide"), "unknown block 'wide'; choose one of bottleneck, basic"),
        (lambda: WideResNet(27, 10), "WideResNet: depth must be 6n + 4, got 27; try 22 or 28"),
        (lambda: WideResNet(4, 10), "WideResNet: depth must be 6n + 4, got 4; try 10 or 16"),
        (lambda: WideResNet(28, 0), "WideResNet: width must be a whole number of at least 1, got 0"),
        (lambda: WideResNet(28, 2.5), "WideResNet: width must be a whole number of at least 1, got 2.5"),
        (lambda: PreActResNet(11, view="folded"), "unknown view 'folded'; choose one of se, double_fc"),
        (lambda: PreActResNet(11, view=""), "unknown view ''; choose one of se, double_fc"),
        (lambda: WideResNet(10, 1, view=""), "unknown view ''; choose one of se, double_fc"),
        (lambda: WideResNet(10, 1, view="se", reduction=0), "reduction must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings(build, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        build()


@pytest.mark.parametrize(
    "shape", [(2, 4, 8, 8), (2, 1, 8, 8), (0, 3, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0), (3, 8, 8), (2, 3, 8), (2, 8, 8, 3)]
)
@pytest.mark.parametrize("method", ["forward", "forward_features", "forward_intermediates"])
@FAMILIES
def test_images_that_do_not_fit(family, method, shape):
    model = make(family)
    sentence = f"{type(model).__name__} takes images of shape (N, 3, H, W) with N, H and W at least 1, got {shape}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        getattr(model, method)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("model", "sizes", "maps"),
    [
        (lambda: PreActResNet(11, view="folded_3x3", device="meta"), [(8, 16), (16, 16), (32, 16)], [1, 2, 4]),
        (lambda: WideResNet(10, 10, view="folded_3x3", device="meta"), [(20, 16), (20, 32), (20, 64)], [10, 20, 40]),
        (lambda: WideResNet(10, 8, view="folded_3x3", device="meta"), [(16, 16), (16, 32), (16, 64)], [8, 16, 32]),
        (lambda: WideResNet(10, 2, view="folded_3x3", device="meta"), [(4, 16), (4, 32), (4, 64)], [2, 4, 8]),
        (lambda: WideResNet(10, 1, view="folded_3x3", device="meta"), [(4, 8), (8, 8), (8, 16)], [1, 2, 4]),
        (
            lambda: PreActResNet(8, block="basic", view="folded_3x3", device="meta"),
            [(4, 8), (8, 8), (8, 16)],
            [1, 2, 4],
        ),
        (lambda: WideResNet(10, 3, view="pair_view_1x1", device="meta"), [(48, 2), (96, 2), (192, 2)], [3, 6, 12]),
    ],
)
def test_pictures(model, sizes, maps):
    attentions = [stage.blocks[0].attention for stage in model().stages]
    assert [attention.picture_size for attention in attentions] == sizes
    assert [attention.map_conv.out_channels for attention in attentions] == maps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@FAMILIES
def test_dtype(family, dtype):
    model = make(family, dtype=dtype)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
    assert model(images(dtype=dtype)).dtype == dtype
    model.reset_classifier(4)
    assert model.get_classifier().weight.dtype == dtype


@FAMILIES
def test_initialisation(family):
    """Normal with a standard deviation of sqrt(2 / (kernel area x output channels))."""
    torch.manual_seed(0)
    model = SMALL_NETWORKS[family](view="folded_3x3")
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 400]
    assert len(convolutions) >= 9
    for conv in convolutions:
        height, width = conv.kernel_size
        expected = (2 / (height * width * conv.out_channels)) ** 0.5
        assert abs(conv.weight.std().item() / expected - 1) < 4 / (2 * conv.weight.numel()) ** 0.5
        assert conv.weight.abs().max() > 2 * expected  # not uniform


@FAMILIES
def test_copies(family):
    model = make(family)
    expected = model(images())
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(duplicate(images()), expected)
    fresh = make(family)
    fresh.init_weights()
    assert not torch.equal(fresh(images()), expected)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images()), expected)


# Head and classifier.


@FAMILIES
def test_no_classifier(family):
    model, without = make(family), make(family, num_classes=0)
    without.load_state_dict(model.state_dict(), strict=False)
    pooled = without(images())
    assert isinstance(without.get_classifier(), nn.Identity)
    assert pooled.shape == (3, model.num_features)
    near(model.get_classifier()(pooled), model(images()))


@FAMILIES
def test_forward_features_and_head(family):
    model = make(family)
    features = model.forward_features(images((8, 12)))
    assert features.shape == (3, model.num_features, 2, 3)
    assert features.min() == 0  # after the ReLU
    pooled = model.forward_head(features, pre_logits=True)
    near(pooled, features.mean((2, 3)))
    assert pooled.shape == (3, model.head_hidden_size)
    near(model.forward_head(features), model(images((8, 12))))
    near(model.get_classifier()(pooled), model(images((8, 12))))


@FAMILIES
def test_reset_classifier(family):
    model = make(family, training=True, drop_rate=0.25).eval()
    features = model.forward_features(images())
    drop = model.head.drop.p

    model.reset_classifier(4)
    assert model.num_classes == 4
    assert model.get_classifier().out_features == 4
    near(model(images()), model.get_classifier()(features.mean((2, 3))))
    assert not model.head.training
    assert model.head.drop.p == drop

    model.reset_classifier(0)
    near(model(images()), features.mean((2, 3)))
    model.reset_classifier(0, "")
    near(model(images()), features)
    model.reset_classifier(5, "max")
    near(model(images()), model.get_classifier()(features.amax((2, 3))))
    model.train().reset_classifier(2)
    assert model.head.training
    assert model.head.global_pool.pool_type == "max"


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_global_pool(pool):
    model = make(global_pool=pool)
    features = model.forward_features(images())
    mean, largest = features.mean((2, 3)), features.amax((2, 3))
    expected = {"avg": mean, "max": largest, "avgmax": (mean + largest) / 2}[pool]
    near(model.forward_head(features, pre_logits=True), expected)


@FAMILIES
def test_in_chans(family):
    for channels in (1, 4):
        model = make(family, in_chans=channels)
        assert model(images(channels=channels)).shape == (3, CLASSES)
        with pytest.raises(ValueError, match=rf"images of shape \(N, {channels}, H, W\)"):
            model(images())


# Dropout and stochastic depth.


def test_drop_rate_of_wide_networks_acts_between_the_convolutions():
    model, steady = make("wide", training=True, drop_rate=0.5), make("wide", training=True)
    blocks = [module for module in model.modules() if isinstance(module, PreActBlock)]
    assert {block.dropout.p for block in blocks} == {0.5}
    assert model.head.drop.p == 0
    inputs = []
    for network in (model, steady):
        network.stages[0].blocks[0].conv2.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
        network(images())
    dropped, whole = inputs
    alive = whole > 0
    assert 0.4 < (dropped[alive] > 0).double().mean() < 0.6
    near(dropped, torch.where(dropped > 0, 2 * whole, 0))
    near(model.eval()(images()), naive_network(model, images()))


@pytest.mark.parametrize("family", ["bottleneck", "basic"])
def test_drop_rate_of_pre_activation_networks_acts_before_the_classifier(family):
    model = make(family, training=True, drop_rate=0.5)
    assert model.head.drop.p == 0.5
    assert {module.dropout.p for module in model.modules() if isinstance(module, PreActBlock)} == {0}
    inputs = []
    model.get_classifier().register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    model(images())
    pooled = make(family, training=True).forward_features(images()).mean((2, 3))
    near(inputs[0], torch.where(inputs[0] > 0, 2 * pooled, 0))
    assert 0.3 < (inputs[0][pooled > 0] > 0).double().mean() < 0.7
    near(model.eval()(images()), naive_network(model, images()))


@pytest.mark.parametrize(
    "build", [lambda r: PreActResNet(20, drop_path_rate=r), lambda r: WideResNet(16, 1, drop_path_rate=r)]
)
def test_drop_path_rate_grows_from_0(build):
    model = build(0.3)
    rates = [module.drop_path.drop_prob for module in model.modules() if isinstance(module, PreActBlock)]
    assert rates[0] == 0
    assert rates == pytest.approx([0.3 * i / (len(rates) - 1) for i in range(len(rates))])
    assert rates == calculate_drop_path_rates(0.3, len(rates))


@FAMILIES
def test_drop_path_rate(family):
    model = make(family, training=True, drop_path_rate=0.5)
    assert not torch.equal(model(images()), model(images()))
    near(model.eval()(images()), naive_network(model, images()))


# Features in between.


def expected_intermediates(model, x):
    features = [model.stem(x)]
    for stage in model.stages:
        features.append(stage(features[-1]))
    return features


@pytest.mark.parametrize(
    ("indices", "wanted"),
    [
        (None, [0, 1, 2, 3]),
        (1, [3]),
        (2, [2, 3]),
        ([0], [0]),
        ([1], [1]),
        ([0, 2], [0, 2]),
        ([-1], [3]),
        ([3, 1], [1, 3]),
    ],
)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", ""])
@pytest.mark.parametrize("stop_early", [True, False], ids=["stop early", ""])
@FAMILIES
def test_forward_intermediates(family, stop_early, norm, indices, wanted):
    model = make(family)
    x = images((12, 8))
    expected = expected_intermediates(model, x)
    ran = []
    for index, stage in enumerate(model.stages, start=1):
        stage.register_forward_hook(lambda *_, index=index: ran.append(index))
    settings = {"indices": indices, "norm": norm, "stop_early": stop_early}
    last, intermediates = model.forward_intermediates(x, **settings)
    assert ran == list(range(1, max(wanted) + 1 if stop_early else 4))

    if norm:
        expected[3] = torch.relu(model.norm(expected[3]))
    for actual, index in zip(intermediates, wanted, strict=True):
        near(actual, expected[index])
        reduction = model.feature_info[index]["reduction"]
        assert actual.shape == (3, CHANNELS[family][index], 12 // reduction, 8 // reduction)
    if not stop_early or max(wanted) == 3:
        near(last, model.forward_features(x))
        near(model.forward_head(last), model(x))
    alone = model.forward_intermediates(x, **settings, intermediates_only=True)
    assert len(alone) == len(wanted)
    for actual, expectation in zip(alone, intermediates, strict=True):
        assert torch.equal(actual, expectation)


def test_forward_intermediates_refuses():
    model = make()
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(images(), output_fmt="NLC")
    with pytest.raises(AssertionError, match=r"out of range|feature index"):
        model.forward_intermediates(images(), indices=[4])


@pytest.mark.parametrize("last", [0, 1, 2, 3])
@FAMILIES
def test_prune_intermediate_layers(family, last):
    model = make(family)
    expected = expected_intermediates(model, images())
    assert model.prune_intermediate_layers([0, last], prune_norm=True) == sorted({0, last}) or last == 0
    assert len(model.stages) == last
    assert isinstance(model.norm, nn.Identity)
    assert model.num_features == model.head_hidden_size == CHANNELS[family][last]
    near(model.forward_intermediates(images(), [last], intermediates_only=True)[0], expected[last])
    near(model(images()), torch.relu(expected[last]))  # no pooling, no classifier


def test_prune_nothing():
    model = make()
    expected = model(images())
    assert list(model.prune_intermediate_layers(1, prune_head=False)) == [3]
    assert torch.equal(model(images()), expected)


# Parameter groups.


@FAMILIES
def test_group_matcher(family):
    model = make(family)
    names = [name for name, _ in model.named_parameters()]
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(name for group in groups.values() for name in group) == sorted(names)
        assert len(groups) == 5  # stem, one block in each of three stages, head
        assert {name.split(".")[0] for name in groups[0]} == {"stem"}
        for stage in range(3):
            prefixes = {".".join(name.split(".")[:2]) for name in groups[stage + 1]}
            assert prefixes - {"norm.weight", "norm.bias"} == {f"stages.{stage}"}
        assert {"head.fc.weight", "head.fc.bias"} <= set(groups[4])
        assert {"norm.weight", "norm.bias"} <= set(groups[4 if coarse else 3])  # fine: with the last block
    deeper = WideResNet(16, 1)
    assert len(group_parameters(deeper, deeper.group_matcher())) == 2 + 6
    assert len(group_parameters(deeper, deeper.group_matcher(coarse=True))) == 2 + 3


@FAMILIES
def test_layer_decay(family):
    model = make(family)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert scale.keys() == {id(p) for p in named.values()}
    stages = [scale[id(named[f"stages.{stage}.blocks.0.attention.fc2.weight"])] for stage in range(3)]
    assert [scale[id(named["stem.conv.weight"])], *stages, scale[id(named["head.fc.weight"])]] == [
        1 / 16, 1 / 8, 1 / 4, 1 / 2, 1,
    ]  # fmt: skip
    assert create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=5e-4, layer_decay=0.5).param_groups


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_chans": 0}, "in_chans 0 should be at least 1"),
        ({"num_classes": -1}, "num_classes -1 at least 0"),
        ({"drop_path_rate": 1.5}, "drop_path_rate is 1.5, should be at least 0 and below 1"),
        ({"drop_rate": -0.1}, "drop_rate is -0.1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        PreActResNet(8, block="basic", **settings)
    with pytest.raises(ValueError, match=message):
        WideResNet(10, 1, **settings)


def test_depth_is_a_whole_number():
    with pytest.raises(ValueError, match="depth must be a whole number"):
        PreActResNet(20.0)
