"""Shapes come from one run of the whole network: what each block really gets, of whatever size and form."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import interpolate

from cmpe_se import conversion_report, convert, merge
from cmpe_se.errors import UserError
from tests.conversion.networks import randomise
from tests.conversion.test_convert import gates, move_gates
from tests.conversion.test_forwards import Block


class ComparesSizes(Block):
    """As BagNets, whose convolutions without padding make smaller maps."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(12, 12, 3)

    def forward(self, x):
        residual = self.residual(x)
        if x.size(-1) != residual.size(-1):
            x = x[:, :, 1:-1, 1:-1]
        return residual + x


class KnowsItsSize(Block):
    """As networks with positions: of maps of another size it does not know what to add to them."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 12, 48, 32))

    def forward(self, x):
        return x + self.residual(x + self.positions)


class TakesAPair(Block):
    def forward(self, pair):
        x, scale = pair
        return x + scale * self.residual(x), scale


class TakesKeywords(Block):
    def forward(self, x, *, scale, twice):
        y = self.residual(x) * scale
        if twice:
            y = 2 * y
        return x + y


class WithoutSkip(Block):
    """As decoders, whose last block has no map of the encoder to take in."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(24, 12, 1)

    def forward(self, x, skip):
        x = interpolate(x, scale_factor=2)
        if skip is not None:
            x = self.first(torch.cat([x, skip], dim=1))
        return x + self.residual(x)


class Trains(Block):
    """Stochastic depth of its own, by which training and eval differ."""

    def forward(self, x):
        if self.training:
            if torch.rand(()) < 0.5:
                return x
            y = self.residual(x)
            y += x
            return y
        return torch.add(0.5 * self.residual(x), x)


class KeepsSizes(Block):
    """Keeps something for each size that it has seen."""

    def __init__(self):
        super().__init__()
        self.grids = {}

    def forward(self, x):
        size = tuple(x.shape[2:])
        if size not in self.grids:
            self.grids[size] = torch.ones(size, device=x.device)
        return x + self.grids[size] * self.residual(x)


class InAnotherMethod(Block):
    def forward(self, x):
        if x.shape[1] != 12:
            raise ValueError("twelve channels")
        return self._add(x, self.residual(x))

    def _add(self, identity, residual):
        return identity + residual


class InAFunctionInside(Block):
    def forward(self, x):
        def inner(y):
            return self.residual(y) + x if y.shape[1] == 12 else y

        return inner(x)


class CallsItsParent(Block):
    def __init__(self):
        super().__init__()
        self.__scale = 0.5

    def residual(self, x):
        return self.__scale * super().residual(x)

    def forward(self, x):
        return x + self.__scale * self.residual(x) if x.ndim == 4 and len(x) else super().forward(x)


CONVERTED = {
    "compares sizes": ComparesSizes,
    "knows its size": KnowsItsSize,
    "keeps sizes": KeepsSizes,
    "in another method": InAnotherMethod,
    "in a function inside": InAFunctionInside,
    "calls its parent": CallsItsParent,
}
X = torch.randn(2, 12, 48, 32, generator=torch.Generator().manual_seed(0))


def build(*blocks):
    torch.manual_seed(0)
    return randomise(nn.Sequential(*(block() for block in blocks))).eval()


@torch.no_grad()
def assert_right(original, converted, *inputs, count):
    assert len(gates(converted)) == count
    expected = original(*inputs)
    torch.testing.assert_close(converted(*inputs), expected, rtol=0, atol=0)
    move_gates(converted)
    moved = converted(*inputs)
    for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        torch.testing.assert_close(again(*inputs), moved, rtol=0, atol=0)
    torch.testing.assert_close(merge(converted)(*inputs), moved, rtol=1e-4, atol=1e-4)
    with torch.enable_grad():
        output = converted(*inputs)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
    for name, gate in gates(converted).items():
        assert gate.fc2.weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("block", CONVERTED.values(), ids=CONVERTED)
def test_blocks_that_depend_on_what_they_get(block):
    original = build(block, Block)
    converted = convert(original, example_inputs=X)
    assert_right(original, converted, X, count=2)
    assert not conversion_report(converted).skipped
    for network in (original, converted):
        torch.manual_seed(1)
        network.train()
    assert vars(original[0]).get("grids", {}).keys() <= {(48, 32)}  # of real runs alone


def test_the_gate_is_that_of_the_method_in_a_changed_source():
    """A float64 version by hand, with the operands that meet."""
    original = build(ComparesSizes).double()
    converted = move_gates(convert(original, example_inputs=X.double()))
    x = X.double()
    with torch.no_grad():
        u, s = original[0].residual(x), x[:, :, 1:-1, 1:-1]
        gate = converted[0].competition._excite(u.mean((2, 3)), s.mean((2, 3)))[:, :, None, None]
        assert 0 < gate.min() < gate.max() < 2
        torch.testing.assert_close(converted(x), s + gate * u)


def test_training_takes_its_own_way():
    original = build(Trains)
    converted = convert(original)
    ways = set()
    for seed in range(8):
        outputs = []
        for network in (original, converted):
            torch.manual_seed(seed)
            outputs.append(network.train()(X))
        torch.testing.assert_close(*outputs)
        ways.add(torch.equal(outputs[0], X))
    assert ways == {True, False}
    assert list(gates(converted)) == ["0.competition", "0.competition_2"]  # one for each addition in its source
    with torch.no_grad():
        assert torch.equal(original.eval()(X), converted.eval()(X))
    for network in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        learnt = set()
        for seed in range(8):  # each gate learns in the mode and the runs that come to it
            for training in (False, True):
                torch.manual_seed(seed)
                network.zero_grad()
                network.train(training)(X.clone().requires_grad_()).square().sum().backward()
                learnt |= {
                    (name, training) for name, gate in gates(network).items() if gate.fc2.weight.grad is not None
                }
        assert learnt == {("0.competition", False), ("0.competition_2", True)}
    move_gates(converted)
    with torch.no_grad():
        moved = converted.eval()(X)
        assert not torch.equal(moved, original.eval()(X))
        torch.testing.assert_close(merge(converted)(X), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_found_does_not_depend_on_what_was_drawn_before(seed):
    original = build(Trains)
    torch.manual_seed(seed)
    assert len(gates(convert(original))) == 2


def test_a_forward_that_fails_in_training_is_looked_at_in_eval_mode():
    class NeedsTargets(Block):
        def forward(self, x, targets=None, weights=None):
            if self.training:
                return (x + self.residual(x) - targets).square().mean()
            return x + self.residual(x)

    original = build(Block, NeedsTargets)
    converted = convert(original)
    report = conversion_report(converted)
    assert [gate.block for gate in report.gates] == ["0", "1"]
    assert "its forward fails in training mode" in report.notes["1"]
    with torch.no_grad():
        assert torch.equal(original(X), converted(X))


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = TakesAPair(), TakesKeywords(), WithoutSkip()
        self.fourth = WithoutSkip()

    def forward(self, x, factor):
        y, scale = self.first((x, factor))
        y = self.second(y, scale=scale, twice=True)
        return self.fourth(self.third(y, torch.cat([y, y], 2).repeat(1, 1, 1, 2)), None)


def test_several_inputs_and_keywords():
    torch.manual_seed(0)
    original = randomise(Pairs()).eval()
    factor = torch.rand(2, 12, 1, 1)
    for inputs in ((X, factor), {"x": X, "factor": factor}):
        converted = convert(original, example_inputs=inputs)
        assert_right(original, converted, X, factor, count=4)
    with pytest.raises(UserError, match=r"Pairs cannot take example_inputs: .*factor"):
        convert(original, example_inputs=X)


def test_example_inputs_are_left_alone():
    x = X.clone().requires_grad_()
    network = build(Block)
    convert(network, example_inputs=x)
    assert torch.equal(x, X)
    assert x.grad is None
    with pytest.raises(UserError, match="Sequential cannot take example_inputs: "):
        convert(network, example_inputs=torch.zeros(1, 3, 32, 32))


@pytest.mark.slow
def test_a_network_knows_its_own_size():
    """Positions of maps of 224 pixels fit no other ones."""
    with torch.device("meta"):
        network = timm.create_model("coatnet_0_rw_224", num_classes=0)
    report = conversion_report(convert(network, inplace=True))
    assert (
        len(report.gates) == 5 + 2 * 9
    )  # convolutional blocks, and transformer blocks of maps with two additions each
    assert not report.skipped


class ChannelsLast(nn.Module):
    """As MambaOut: convolutions of the second axis, between maps whose channels are the last one."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.mlp = nn.LayerNorm(12), nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 12)

    def forward(self, x):
        y = self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(y)


class LastAround(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ChannelsLast()

    def forward(self, x):
        return self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OneChannel(nn.Module):
    """As attention to positions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(12, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        y = self.conv1(x)
        return x * (y + self.conv2(y)).sigmoid()


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (LastAround, "their channels are not the second axis alone"),
        (OneChannel, "of one channel, as attention maps are"),
    ],
)
def test_sums_that_are_no_residual_additions_of_maps(part, reason):
    original = build(Block, part)
    x = torch.randn(2, 12, 12, 12)  # as many rows as channels
    converted = convert(original, example_inputs=x)
    assert_right(original, converted, x, count=1)
    (words,) = conversion_report(converted).skipped.values()
    assert reason in words


class Attends(Block):
    """As concurrent spatial and channel squeeze-and-excitation: two scaled copies of one tensor."""

    def forward(self, x):
        return x * self.conv1(x).sigmoid() + x * self.residual(x).sigmoid()


class Recurs(Block):
    """As a convolutional gated recurrent unit."""

    def forward(self, x):
        z = self.conv1(x).sigmoid()
        return (1 - z) * x + z * self.residual(x).tanh()


class Parallel(Block):
    """As blocks that are merged into one layer when they have learnt."""

    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv2d(12, 12, 1)

    def forward(self, x):
        y = self.bn1(x) + self.conv1(x)
        y += self.conv2(x)
        y += self.conv3(x)
        return y


class JoinsLists(Block):
    def forward(self, x):
        features = [x] + [self.residual(x)]  # noqa: RUF005
        return torch.cat(features, 1)[:, :12]


def test_sums_inside_attention_and_of_parallel_branches():
    original = build(Block, Attends, Recurs, Parallel, JoinsLists)
    converted = convert(original)
    assert_right(original, converted, X, count=2)
    report = conversion_report(converted)
    assert [gate.block for gate in report.gates] == ["0", "3"]
    reasons = {
        "1": "its identity is scaled by what",
        "2": "its identity is scaled by what",
        "3": "both operands have 1 convolution",
    }
    assert report.skipped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.skipped[name]
    assert "both operands are linear in one tensor" in report.skipped["3"]


def test_blocks_that_no_forward_calls():
    """They would have gates that never learn. What is called in training alone learns."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.never, self.training_alone = Block(), Block(), Block()

        def forward(self, x):
            x = self.first(x)
            return (x, self.training_alone(x)) if self.training else x

    report = conversion_report(convert(Auxiliary()))
    assert [gate.block for gate in report.gates] == ["first", "training_alone"]
    assert report.skipped == {"never": "no forward of the network calls it"}


class Loop(Block):
    """Adds twice at one place of its source."""

    def forward(self, x):
        if x.ndim == 4:
            for conv in (self.conv1, self.conv2):
                x = x + conv(x)
        return x


def add_elsewhere(x, y):
    return x + y


class Elsewhere(Block):
    def forward(self, x):
        return add_elsewhere(x, self.residual(x)) if len(x) else x


class OfItsParent(InAnotherMethod):
    def _add(self, identity, residual):
        return super()._add(identity, residual)


LISTED = {
    Loop: "its place in the source adds several times",
    Elsewhere: "it is not written in the methods of its class",
    OfItsParent: "it is not written in the methods of its class",
}


@pytest.mark.parametrize(("block", "reason"), LISTED.items())
def test_additions_that_no_way_reaches_are_listed(block, reason):
    original = build(Block, block)
    converted = convert(original)
    assert_right(original, converted, X, count=1)
    assert reason in conversion_report(converted).skipped["1"]


def test_a_source_that_is_not_what_runs_is_found_out():
    names = {"Block": Block, "nn": nn}
    exec(
        "class Generated(Block):\n    def forward(self, x):\n        return x + self.residual(x) if len(x) else x",
        names,
    )
    original = build(Block, names["Generated"])
    report = conversion_report(convert(original))
    assert [gate.block for gate in report.gates] == ["0"]
    assert "there is no source of its forward" in report.skipped["1"]


def test_a_block_that_the_run_did_not_reach():
    """Part of what detectors do depends on numbers, which there are none of on the meta device."""

    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.behind = Block(), ComparesSizes()

        def forward(self, x):
            x = self.before(x)
            return self.behind(x) if x.sum().item() else x

    original = randomise(Stops()).eval()
    report = conversion_report(convert(original))
    assert [gate.block for gate in report.gates] == ["before"]
    assert "a run of the network did not come to it" in report.skipped["behind"]


class RunsLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        x = self.first(x)
        return self.second.conv1(x) if len(x) else x


def test_layers_run_from_a_forward_that_cannot_be_traced():
    original = randomise(RunsLayers()).eval()
    converted = convert(original)
    assert_right(original, converted, X, count=1)
    assert "runs its layers without it" in conversion_report(converted).skipped["second"]


class Logits(nn.Module):
    """As attention in windows: what it adds to its logits (N, groups, positions, positions) are no maps."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)
        self.position = nn.Linear(3, 16)

    def forward(self, x):
        q, k = (conv(x).reshape(2, 4, 3, 16).transpose(2, 3) for conv in (self.query, self.key))
        logits = q @ k.transpose(2, 3) + self.position(q)
        return (logits.softmax(-1) @ k).transpose(2, 3).reshape(x.shape)


def test_logits_of_attention_are_no_maps():
    original = build(Block, Logits)
    x = torch.randn(2, 12, 4, 4)
    converted = convert(original, example_inputs=x)
    assert_right(original, converted, x, count=1)
    (words,) = conversion_report(converted).skipped.values()
    assert "channels" in words
