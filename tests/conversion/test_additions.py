"""Which additions are converted, however they are written, and the reason for each that is not."""

import operator

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import conv2d, relu

from cmpe_se import conversion_report, convert, merge
from cmpe_se.errors import UserError
from tests.conversion.cifar import CifarResNet, OptionA, OptionALayer
from tests.conversion.networks import build, randomise
from tests.conversion.test_convert import assert_same, gates, images, move_gates


def small(join):
    torch.manual_seed(0)
    return randomise(CifarResNet(8, join=join)).eval()


def assert_gates_learn(converted):
    converted.zero_grad()
    converted(images(side=32)).square().sum().backward()
    assert all(gate.fc2.weight.grad.abs().sum() > 0 for gate in gates(converted).values())


@pytest.mark.parametrize("block", [OptionA, OptionALayer])
def test_shortcuts_that_skip_pixels_and_pad(block):
    torch.manual_seed(0)
    original = randomise(CifarResNet(56, block)).eval()
    converted = convert(original)
    report = conversion_report(converted)
    assert len(report.gates) == 27
    assert not report.skipped
    assert_same(original, converted, images(side=32))
    assert_gates_learn(converted)


def test_padded_shortcut_by_hand():
    """In float64, the naive form of the gated addition on the tensors that the block adds."""
    torch.manual_seed(0)
    original = randomise(OptionA(12, 24, 2)).double().eval()
    converted = move_gates(convert(original))
    x = torch.randn(2, 12, 16, 16, dtype=torch.float64)
    u, s = original.residual(x), original.shortcut(x)
    gate = converted.competition._excite(u.mean((2, 3)), s.mean((2, 3)))[:, :, None, None]
    assert 0 < gate.min() < gate.max() < 2
    torch.testing.assert_close(converted(x), relu(s + gate * u))


def in_place(residual, identity):
    residual += identity
    return residual


ADDITIONS = {
    "+": operator.add,
    "+=": in_place,
    "iadd": operator.iadd,
    "identity first": lambda residual, identity: identity + residual,
    "torch.add": torch.add,
    "add": lambda residual, identity: identity.add(residual),
    "add_": lambda residual, identity: residual.add_(identity),
    "keywords": lambda residual, identity: torch.add(input=identity, other=residual),
    "__add__": lambda residual, identity: residual.__add__(identity),
    "sum": lambda residual, identity: sum((residual, identity)),
    "scaled before": lambda residual, identity: identity + 0.1 * residual,
    "alpha": lambda residual, identity: torch.add(identity, residual, alpha=0.1),
    "add with alpha": lambda residual, identity: identity.add(residual, alpha=0.25),
}


@pytest.mark.parametrize("join", ADDITIONS.values(), ids=ADDITIONS)
def test_ways_to_add(join):
    original = small(join)
    converted = convert(original)
    assert list(gates(converted)) == [f"layer{stage}.0.competition" for stage in (1, 2, 3)]
    assert_same(original, converted, images(side=32))
    assert_gates_learn(converted)
    move_gates(converted.double())
    x = images(side=32).double()
    with torch.no_grad():
        torch.testing.assert_close(merge(converted)(x), converted(x))


@pytest.mark.parametrize("view", ["folded_3x3", "se", "aff"])
def test_the_factor_of_a_scaled_addition_stays_with_the_residual(view):
    block = OptionA(12, 12, 1, ADDITIONS["alpha"])
    if view == "aff":  # scales the identity as well
        with pytest.raises(UserError, match=r"scales its residual by 0\.1.*'aff'"):
            convert(block, view=view)
        return
    converted = move_gates(convert(randomise(block).double().eval(), view=view))
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    u = block.residual(x)
    gate = converted.competition.gate(u, x)[:, :, None, None]
    assert 0 < gate.min() < gate.max() < 0.2
    torch.testing.assert_close(converted(x), relu(x + gate * u))


OTHER_SUMS = {
    "scaled identity": (lambda u, s: torch.add(u, s, alpha=0.5), "scales its second operand by 0.5"),
    "number in the middle": (lambda u, s: torch.add(s, 0.5, u), "not by adding two tensors"),
    "addcmul": (lambda u, s: torch.addcmul(s, u, u), "not by adding two tensors"),
    "lerp": (lambda u, s: torch.lerp(s, u, 0.5), "not by adding two tensors"),
    "difference": (lambda u, s: s - u, "not by adding two tensors"),
    "stack": (lambda u, s: torch.stack([u, s]).sum(0), "not by adding two tensors"),
    "part": (lambda u, s: u + s.roll(1, 0)[:1], "its identity is a part of a tensor"),
    "channels": (lambda u, s: u + s[:, :1], "its identity is a part of a tensor"),
    "chunk": (lambda u, s: u + s.chunk(2, 1)[0].repeat(1, 2, 1, 1), "its identity is a part of a tensor"),
    "pixels": (lambda u, s: u + s.mean((2, 3), keepdim=True), "not two tensors (N, C, H, W) of one shape"),
}


@pytest.mark.filterwarnings("ignore:This overload of add is deprecated")
@pytest.mark.parametrize(("join", "reason"), OTHER_SUMS.values(), ids=OTHER_SUMS)
def test_other_sums_are_listed(join, reason):
    original = nn.Sequential(Plain(), OptionA(12, 12, 1, join))
    converted = convert(original.eval())
    assert list(gates(converted)) == ["0.competition"]
    assert reason in conversion_report(converted).skipped["1"]
    assert_same(original, converted, torch.randn(2, 12, 8, 8))


class Plain(OptionA):
    """A block with a residual addition."""

    def __init__(self):
        super().__init__(12, 12, 1)


class WritesOverItsInput(Plain):
    def forward(self, x):
        x += self.residual(x)
        return x


class ReadsWhatIsWrittenOver(Plain):
    def forward(self, x):
        u = self.residual(x)
        y = u
        u += x
        return y.relu()


class Functional(Plain):
    def residual(self, x):
        return conv2d(x, self.conv1.weight, padding=1)


class LinearBranches(Plain):
    def forward(self, x):
        return self.conv1(x) + self.conv2(x)


LISTED = {
    WritesOverItsInput: "writes over a tensor that is read elsewhere",
    ReadsWhatIsWrittenOver: "writes over a tensor that is read elsewhere",
    LinearBranches: "both operands have 1 convolution",
}


@pytest.mark.parametrize(("block", "reason"), LISTED.items())
def test_blocks_that_are_listed(block, reason):
    original = nn.Sequential(Plain(), nn.ReLU(), block()).eval()
    converted = convert(original)
    assert list(gates(converted)) == ["0.competition"]
    assert reason in conversion_report(converted).skipped["2"]
    assert_same(original, converted, torch.randn(2, 12, 8, 8))


def test_layers_of_functions_alone():
    """Nothing says how many channels they take but a run of the network."""
    original = randomise(nn.Sequential(Plain(), nn.ReLU(), Functional())).eval()
    converted = convert(original)
    assert list(gates(converted)) == ["0.competition", "2.competition"]
    assert_same(original, converted, torch.randn(2, 12, 8, 8))


def test_in_place_operations_stay_in_place():
    """Something else may read the tensor that they write over."""

    class Halves(Plain):
        def forward(self, x):
            h = self.conv1(x)
            identity = h
            h *= 0.5
            return identity + self.conv2(relu(self.bn1(h)))

    original = randomise(Halves()).eval()
    assert_same(original, convert(original), torch.randn(2, 12, 8, 8))


class Shallow(nn.Module):
    """One convolution in each branch; only one has an activation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(12, 24, 3, padding=1)
        self.projection = nn.Sequential(nn.Conv2d(12, 24, 1), nn.BatchNorm2d(24))

    def forward(self, x):
        return self.projection(x) + relu(self.conv(x))


def test_a_projection_is_the_identity_where_branches_have_as_many_convolutions():
    original = randomise(Shallow()).double().eval()
    converted = move_gates(convert(original))
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    u, s = relu(original.conv(x)), original.projection(x)
    gate = converted.competition.gate(u, s)[:, :, None, None]
    torch.testing.assert_close(converted(x), s + gate * u)
    with torch.no_grad():
        assert not torch.allclose(converted(x), u + s)


class OptionalShortcut(Plain):
    def forward(self, x, shortcut=None, unused=None):
        if shortcut is None:
            shortcut = x
        return relu(self.residual(x) + shortcut)


class AddsWhatIsGiven(Plain):
    def forward(self, x, shortcut=None):
        return self.residual(x) if shortcut is None else self.residual(x) + shortcut


class Tree(nn.Module):
    """Calls its block with a shortcut and without."""

    def __init__(self, block):
        super().__init__()
        self.first, self.second, self.third = block(), block(), Plain()

    def forward(self, x):
        return self.third(self.second(self.first(x), shortcut=x * 2))


class Given(Plain):
    def forward(self, x, shortcut):
        return self.residual(x) + shortcut


def test_a_shortcut_that_must_be_given_is_listed():
    """It need not be the tensor that the residual is computed from."""
    original = Tree(OptionalShortcut)
    original.second = Given()
    converted = convert(randomise(original).eval())
    assert len(gates(converted)) == 2
    assert "different arguments" in conversion_report(converted).skipped["second"]


def test_shortcuts_that_may_be_given():
    original = randomise(Tree(OptionalShortcut)).eval()
    x = torch.randn(2, 12, 8, 8)
    converted = convert(original)
    assert len(gates(converted)) == 3
    assert_same(original, converted, x)
    move_gates(converted.double())
    with torch.no_grad():
        u, s = original.double().first.residual(x.double()), x.double()
        gate = converted.first.competition.gate(u, s)[:, :, None, None]
        torch.testing.assert_close(converted.first(x.double()), relu(s + gate * u))
        u, s = original.first.residual(x.double()), x.double() * 3
        gate = converted.first.competition.gate(u, s)[:, :, None, None]
        torch.testing.assert_close(converted.first(x.double(), x.double() * 3), relu(s + gate * u))
        torch.testing.assert_close(merge(converted)(x.double()), converted(x.double()))


def test_an_argument_that_changes_more_than_the_shortcut():
    """Where it is not given, nothing is added; where it is, it need not be what the residual is computed from."""
    original = randomise(Tree(AddsWhatIsGiven)).eval()
    converted = convert(original)
    report = conversion_report(converted)
    assert list(gates(converted)) == ["third.competition"]
    assert set(report.skipped) == {"second"}
    assert "without its argument shortcut" in report.skipped["second"]
    assert "different arguments" in report.skipped["second"]
    assert_same(original, converted, torch.randn(2, 12, 8, 8))


def test_deep_layer_aggregation():
    original = build("timm dla34")
    converted = convert(original)
    report = conversion_report(converted)
    assert len(report.gates) == 12
    assert not report.skipped
    assert_same(original, converted)


def test_dual_paths_are_listed():
    with torch.device("meta"):
        model = timm.create_model("dpn48b")
    with pytest.raises(UserError, match=r"features\.conv2_1: add: its identity is a part of a tensor.*and 15 more"):
        convert(model, inplace=True)
