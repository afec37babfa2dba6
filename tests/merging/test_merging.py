"""Merging: the same function in float64 to 1e-12, with nothing at its initial value; ours, converted and others."""

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from cmpe_se import CompetitiveSE, convert, merge
from cmpe_se.errors import UserError
from cmpe_se.layers.views import TABLE
from cmpe_se.merging import MergedGate
from tests.conversion.networks import FAMILIES, NAMES, build, shorten
from tests.conversion.networks import randomise as randomise_norms
from tests.networks.naive import MERGING_VIEWS, SMALL_NETWORKS, naive_gate, randomise
from tests.tiers import long_but


def images(batch=3, side=64, dtype=torch.float64):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def move_gates(model: nn.Module, x=None) -> nn.Module:
    """Gates as training might leave them, and norms whose statistics are near those of some images, but not theirs.

    Statistics from nowhere let a deep network's activations grow until it rounds differently in another memory layout
    already, and two forms of it cannot be compared.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for gate in model.modules():
        if isinstance(gate, CompetitiveSE):
            gate.fc2.weight.normal_(0, gate.fc2.in_features**-0.5)
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images(dtype=next(model.parameters()).dtype) if x is None else x)
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_var)
        norm.running_var *= 0.7 + 0.6 * torch.rand_like(norm.running_var)
    return model.eval()


def assert_merged(model: nn.Module, merged: nn.Module, x=None):
    """The same outputs to 1e-12; or, for a network that is worse conditioned, to what its own rounding does to them."""
    x = images() if x is None else x
    with torch.no_grad():
        expected, actual, nudged = model.eval()(x), merged(x), model(x * (1 + 1e-15))
    error, own = ((y - expected).abs().max() / expected.abs().max() for y in (actual, nudged))
    assert error <= max(1e-12, 4 * own), (error, own)
    assert own < 1e-7
    assert CompetitiveSE not in {type(module) for module in merged.modules()}


@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize("view", MERGING_VIEWS)
def test_every_view_is_one_affine_map(view, gain):
    torch.manual_seed(0)
    attention = randomise(
        CompetitiveSE(24, view=view, reduction=4, maps=3, start="one" if gain == 2 else "half", dtype=torch.float64)
    ).eval()
    merged = merge(attention)
    residual, identity = torch.randn(2, 5, 24, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(merged(residual, identity), attention(residual, identity), rtol=0, atol=1e-13)
    r, i = residual.mean((2, 3)), identity.mean((2, 3))
    torch.testing.assert_close(merged.gate(r, i), gain * naive_gate(attention, r, i), rtol=0, atol=1e-13)
    assert merged.competitive == ("identity" in TABLE[view].reads)


@pytest.mark.parametrize("view", [None, *MERGING_VIEWS])
@pytest.mark.parametrize("kind", SMALL_NETWORKS)
def test_our_networks(kind, view):
    torch.manual_seed(0)
    model = randomise(SMALL_NETWORKS[kind](view=view, dtype=torch.float64))
    before = copy.deepcopy(model.state_dict())
    merged = merge(model)
    assert model.training  # and otherwise untouched
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_merged(model, merged, images(side=12))
    norms = [name for name, module in merged.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(name.endswith(("bn1", "input_norm", "norm")) for name in norms)  # those without a convolution before
    assert ("stem.norm" in norms) is False
    assert sum(isinstance(module, MergedGate) for module in merged.modules()) == (3 if view else 0)


@pytest.mark.parametrize("name", NAMES)
def test_converted_networks(name):
    """Whole in the default tier; each block once in the slow one."""
    original = build(name) if name in FAMILIES else shorten(build(name))
    model = move_gates(convert(original.double()))
    merged = merge(model)
    assert_merged(model, merged)
    pairs = zip(model.named_modules(), dict(merged.named_modules()).items(), strict=False)
    assert type(next(pairs)[0][1]) is type(model)
    before, after = (sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) for network in (model, merged))
    if "resnetv2" in name:  # pre-activation: a third of its norms follow an addition
        assert 0 < after < before / 2
    else:
        assert after == 0


@pytest.mark.parametrize(
    "name",
    long_but(
        ["timm resnet50", "timm seresnet50", "timm tf_efficientnet_b0", "timm mobilenetv3_small_050"],
        ["timm mobilenetv3_small_050"],
    ),
)
def test_networks_without_competition(name):
    model = move_gates(shorten(build(name)).double())
    merged = merge(model)
    assert_merged(model, merged)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    assert sum(m is not None for m in merged.parameters()) > 0


@pytest.mark.slow
def test_gates_read_the_smaller_tensor():
    merged = merge(move_gates(convert(build("timm resnet50", layers=(1, 2, 1, 1)))))
    first, second = merged.layer2[0], merged.layer2[1]
    # The residual's squeeze from 128 channels before conv3, and the identity's from 256 before the projection.
    assert first.competition.read.in_features == 128 + 256
    assert second.competition.read.in_features == 128 + 512
    code = type(second).forward.__code__
    assert code.co_varnames.index("squeeze_1") < code.co_varnames.index("conv1")  # x is read while it is in the cache
    narrowing = merge(move_gates(convert(build("timm mobilenetv2_100")))).blocks[1][1]
    assert narrowing.competition.read.in_features == 2 * narrowing.conv_pwl.out_channels


def test_backbone_of_a_detector_with_frozen_norms():
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)  # which has them by itself
    frozen = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert frozen
    for module in frozen:
        module.running_mean.normal_(0, 0.2)
        module.running_var.uniform_(0.7, 1.3)
    model = move_gates(convert(backbone.double()).eval(), images(4, 128))
    merged = merge(model)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in merged.modules())
    with torch.no_grad():
        first, second = (network(images(1, 128)) for network in (model, merged))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-10, atol=1e-11)


def test_idempotent():
    merged = merge(move_gates(convert(build("timm resnet18").double())))
    again = merge(merged)
    with torch.no_grad():
        assert torch.equal(again(images()), merged(images()))
    assert str(again) == str(merged)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate):
    merged = merge(move_gates(convert(build("timm test_resnet").double())))
    again = duplicate(merged)
    with torch.no_grad():
        assert torch.equal(again(images()), merged(images()))
    with pytest.raises(UserError, match="cannot be trained"):
        again.train()
    assert again.eval() is again


def test_state_dict():
    merged = merge(move_gates(convert(build("timm resnet18"))))
    file = io.BytesIO()
    torch.save(merged.state_dict(), file)
    file.seek(0)
    other = merge(convert(build("timm resnet18")))
    other.load_state_dict(torch.load(file))
    with torch.no_grad():
        assert torch.equal(other(images(dtype=torch.float32)), merged(images(dtype=torch.float32)))


def test_training_is_refused():
    merged = merge(timm.create_model("cmpe_se_preact_resnet20"))
    with pytest.raises(UserError, match=r"merged PreActResNet cannot be trained.*merge again"):
        merged.train()
    with pytest.raises(UserError, match="cannot be trained"):
        nn.Sequential(merged).train()
    with pytest.raises(RuntimeError, match="does not require grad"):
        merged(images(side=32, dtype=torch.float32)).sum().backward()


def test_the_gate_stays_precise_in_a_bfloat16_network():
    model = move_gates(convert(build("timm resnet18")))
    merged = merge(model).bfloat16()
    assert merged.conv1.weight.dtype == torch.bfloat16
    assert merged.layer1[0].competition.read.weight.dtype == torch.float32
    assert torch.equal(merged.layer1[0].competition.excite.weight, model.layer1[0].competition.fc2.weight)
    x = images(dtype=torch.float32)
    with torch.no_grad():
        expected, actual = model(x), merged(x.bfloat16()).float()
    assert (actual - expected).norm() < 0.05 * expected.norm()
    assert merge(model).double().layer1[0].competition.read.weight.dtype == torch.float64


class Shared(nn.Module):
    """Norms that only seem to follow a convolution alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.twice, self.both = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.seen, self.watched = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.conv(x)
        y = self.norm(y) + y  # the convolution's output has a second reader
        y = self.both(self.twice(self.twice(y)))  # the convolution runs twice
        return self.watched(self.seen(y))


def test_what_must_not_be_folded():
    model, seen = randomise_norms(Shared()).double().eval(), []
    model.seen.register_forward_hook(lambda _, __, output: seen.append(output))
    merged = merge(model)
    assert_merged(model, merged)
    assert torch.equal(*seen[:2])  # a hook still sees what it saw
    assert sum(isinstance(module, nn.BatchNorm2d) for module in merged.modules()) == 3


class Odd(nn.Module):
    """Gates that are called twice, behind a list, or on a tensor that is overwritten meanwhile."""

    def __init__(self):
        super().__init__()
        self.widen, self.back = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.twice, self.once = CompetitiveSE(16), CompetitiveSE(16)
        self.listed = nn.ModuleList([CompetitiveSE(16, view="pair_view_1x1")])

    def forward(self, x):
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 5))
        u = self.widen(x)
        y = self.twice(self.twice(u, u.flip(1)), self.widen(x + 1))
        y = self.listed[0](y, u)
        h = self.back(y)
        residual = self.widen(h)
        h.mul_(3)
        return self.once(residual, y) + h.mean()


def test_gates_in_odd_places():
    torch.manual_seed(0)
    model = move_gates(Odd().double())
    merged = merge(model)
    assert_merged(model, merged)
    assert merged.once.read.in_features == 32  # h is overwritten before the gate runs, so u itself is read


class ActiveNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Walked(nn.Module):
    """Its parent walks through a sequence, and keeps what each layer gives."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x):
        outputs = []
        for layer in self.features:
            x = layer(x)
            outputs.append(x)
        return outputs[0] + outputs[2]


class Renamed(nn.Module):
    """A block whose identity has another name, under which it is overwritten."""

    def __init__(self):
        super().__init__()
        self.skip, self.relu = nn.Identity(), nn.ReLU(inplace=True)
        self.branch, self.gate = nn.Conv2d(12, 12, 3, padding=1), CompetitiveSE(12)

    def forward(self, x):
        identity = self.skip(x)
        return self.gate(self.branch(self.relu(x)), identity)


@pytest.mark.parametrize(
    "build_model",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), ActiveNorm(6)),
        lambda: timm.layers.convert_sync_batchnorm(timm.create_model("mobilenetv2_035")),
        Walked,
        lambda: nn.Sequential(nn.Conv2d(3, 12, 1), Renamed()),
    ],
)
def test_what_is_not_as_it_seems(build_model):
    torch.manual_seed(0)
    model = randomise_norms(build_model()).double().eval()
    assert_merged(model, merge(model))


def test_gradients_of_images_through_a_merged_network():
    model = move_gates(convert(build("timm resnet18").double()))
    gradients = []
    for network in (model, merge(model)):
        x = images().requires_grad_()
        network(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


@pytest.mark.long
def test_compile_and_export():
    merged = merge(move_gates(convert(build("timm test_resnet"))))
    torch.compiler.reset()
    x = images(dtype=torch.float32)
    with torch.no_grad():
        expected = merged(x)
        torch.testing.assert_close(torch.compile(merged, fullgraph=True, backend="aot_eager")(x), expected)
        exported = torch.export.export(merged, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        torch.testing.assert_close(exported.module()(x), expected)
    ours = merge(timm.create_model("cmpe_se_preact_resnet20"))
    x = images(side=32, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))
