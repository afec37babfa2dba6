"""Networks of signals, volumes and clips: converted, merged and looked into like those of images."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d

import cmpe_se
from cmpe_se import VIEWS, CompetitiveSE, conversion_report, convert, merge
from cmpe_se.conversion.convert import GATE_KEY
from cmpe_se.conversion.convolutions import axes_of
from cmpe_se.errors import UserError
from cmpe_se.inspecting import attribution, forced_gates
from cmpe_se.merging import MergedGate
from cmpe_se.utils.cost import count_multiply_adds
from tests.conversion.dimensions import CASES, QUICK, EcgBlock, EcgNet, X3d, build, inputs
from tests.conversion.networks import randomise
from tests.conversion.test_convert import assert_same, gates, move_gates
from tests.merging import test_merging
from tests.networks.naive import naive_gate
from tests.tiers import long_but

NAMES = long_but(CASES, QUICK)
SMALL = pytest.mark.parametrize("name", ["ecg", "x3d"])
NORMS = nn.modules.batchnorm._BatchNorm


def converted(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A converted network whose gates have moved."""
    model = convert(build(name).to(dtype), view=CASES[name].view)
    torch.manual_seed(2)
    return test_merging.move_gates(model, inputs(name, 4, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_converted(name):
    original, case, x = build(name), CASES[name], inputs(name)
    before = {key: value.clone() for key, value in original.state_dict().items()}
    model = convert(original, view=case.view)
    report = conversion_report(model)
    assert len(report.gates) == case.gates
    assert report.skipped.keys() == case.skipped.keys()
    assert all(reason in report.skipped[block] for block, reason in case.skipped.items())
    assert_same(original, model, x)

    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(GATE_KEY.search(key) for key in after.keys() - before.keys())

    model.train()(x).square().sum().backward()
    for block, gate in gates(model).items():
        assert gate.fc2.weight.grad.abs().sum() > 0, block
    model.eval()
    move_gates(model)
    for duplicate in (copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))):
        assert_same(duplicate(model), model, x)
    with torch.no_grad():  # and the gates do something
        assert not torch.equal(model(x), original(x))


@pytest.fixture(scope="module", params=NAMES)
def in_float64(request) -> tuple[str, nn.Module, nn.Module]:
    """Its name, a converted network whose gates have moved, and the merged one; nobody changes them."""
    model = converted(request.param, torch.float64)
    return request.param, model, merge(model)


def test_merged(in_float64):
    name, model, merged = in_float64
    x = inputs(name, 3, torch.float64)
    test_merging.assert_merged(model, merged, x)
    assert sum(isinstance(module, MergedGate) for module in merged.modules()) == CASES[name].gates
    followed = sum(isinstance(module, NORMS) for module in build(name).modules())  # by convolutions or additions
    assert followed == 0 or sum(isinstance(module, NORMS) for module in merged.modules()) < followed


def test_merged_in_float32(in_float64):
    """Two forms of it differ by no more than each of them from the float64 network, times a few."""
    name, model, _ = in_float64
    model, x = copy.deepcopy(model), inputs(name, 3, torch.float64)
    with torch.no_grad():
        exact = model(x)
        exact = exact[0] if isinstance(exact, (list, tuple)) else exact
        single = model.float()(x.float()).double()
        error = (merge(model)(x.float()).double() - exact).norm() / exact.norm()
        own = (single - exact).norm() / exact.norm()
    assert error <= max(1e-6, 4 * own)
    assert own < 1e-3


@pytest.mark.parametrize("merged", [False, True])
def test_inspected(in_float64, merged):
    """Against the equations, from what each block adds."""
    name, model, in_one = in_float64
    x = inputs(name, 2, torch.float64)
    flows: dict[str, tuple[Tensor, Tensor]] = {}
    for key, gate in gates(model).items():
        gate.register_forward_pre_hook(lambda _, args, key=key: flows.update({key: args[:2]}))
    with torch.no_grad():
        model(x)
    for gate in gates(model).values():
        gate._forward_pre_hooks.clear()
    views = cmpe_se.inspect_gates(in_one if merged else model, x)
    # A gate of the network itself has its own name, others that of their block.
    keys = [view.name if view.name in flows else f"{view.name}.competition" for view in views]
    assert set(keys) == flows.keys()
    for view, key in zip(views, keys, strict=True):
        gate, (u, s) = model.get_submodule(key), flows[key]
        r, i = u.flatten(2).mean(2), s.flatten(2).mean(2)
        with torch.no_grad():
            a = gate.gain * naive_gate(gate, r, i)
        added = a.view(*a.shape, *[1] * (u.ndim - 2)) * u
        expected = {
            "gate": a,
            "residual_squeeze": r,
            "identity_squeeze": i,
            "identity_energy": s.square().flatten(2).mean(2),
            "residual_energy": added.square().flatten(2).mean(2),
        }
        for field, value in expected.items():
            torch.testing.assert_close(getattr(view, field), value, rtol=1e-6, atol=1e-9)
        if not merged:
            assert view.picture.shape == (2, 1, *gate.picture_size)


@pytest.mark.parametrize("name", long_but(["ecg", "x3d"], ["ecg"]))
@pytest.mark.parametrize("view", VIEWS)
def test_every_view(name, view):
    original, x = build(name), inputs(name)
    if view == "timm_cbam":
        with pytest.raises(UserError, match=r"block blocks\.0: view 'timm_cbam' is one of images .* timm_eca.*where="):
            convert(original, view=view)
        return
    model = convert(original, view=view)
    assert len(gates(model)) == CASES[name].gates
    assert_same(original, model, x)
    model.train()(x).sum().backward()
    for gate in gates(model).values():
        assert any(parameter.grad.abs().sum() > 0 for parameter in gate.parameters() if parameter.grad is not None)
    views = cmpe_se.inspect_gates(model, x)
    assert [seen.gate.shape for seen in views] == [(2, gate.channels) for gate in gates(model).values()]
    assert all(torch.allclose(seen.gate, torch.full_like(seen.gate, seen.neutral)) for seen in views)
    merged = merge(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)
    if view == "static":
        assert not gates(merged)


@SMALL
@pytest.mark.parametrize("view", ["timm_eca", "aff"])
def test_gates_of_whole_maps_are_inspected(name, view):
    """What was added, from the flows."""
    model, x = convert(build(name), view=view).double(), inputs(name, dtype=torch.float64)
    with torch.no_grad():
        for gate in gates(model).values():
            for parameter in gate.parameters():
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.3)
    flows = []
    for gate in gates(model).values():
        gate.register_forward_hook(lambda gate, args, output: flows.append((gate, *args, output)))
    views = cmpe_se.inspect_gates(model, x)
    for seen, (gate, u, s, y) in zip(views, flows, strict=True):
        if view == "timm_eca":
            a = seen.gate.view(*seen.gate.shape, *[1] * (u.ndim - 2))
            torch.testing.assert_close(y, s + a * u)
            kept = s
        else:
            weight = (y / gate.gain - s) / (u - s)
            torch.testing.assert_close(seen.gate, gate.gain * weight.flatten(2).mean(2), rtol=1e-5, atol=1e-5)
            kept = gate.gain * (1 - weight) * s
        torch.testing.assert_close(seen.identity_energy, kept.square().flatten(2).mean(2), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen.residual_energy, (y - kept).square().flatten(2).mean(2), rtol=1e-4, atol=1e-6)


def test_by_hand():
    """In float64, the naive form on the tensors that the block adds."""
    torch.manual_seed(0)
    original = randomise(EcgBlock(12, 24, 2)).double().eval()
    model = move_gates(convert(original))
    x = torch.randn(2, 12, 33, dtype=torch.float64)
    u, s = original.residual(x), original.shortcut(x)
    a = model.competition.gain * naive_gate(model.competition, u.mean(2), s.mean(2))
    assert 0 < a.min() < a.max() < 2
    torch.testing.assert_close(model(x), s + a[:, :, None] * u)


@SMALL
def test_gates_are_held(name):
    model, x = converted(name), inputs(name)
    with forced_gates(model, "blocks.1", 0.0):
        seen = cmpe_se.inspect_gates(model, x)[1]
    assert seen.gate.abs().max() == 0
    assert seen.residual_share.max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(["ecg", "x3d"], ["ecg"]))
def test_saved_and_compiled(name):
    torch.compiler.reset()
    model, x = converted(name), inputs(name)
    again = convert(build(name))
    again.load_state_dict(model.state_dict())
    assert_same(model, again, x)
    with torch.no_grad():
        for network in (model, merge(model)):
            compiled = torch.compile(network, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)
            exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
            more = inputs(name, 3)
            torch.testing.assert_close(exported.module()(more), network(more), rtol=1e-4, atol=1e-5)


@SMALL
def test_autocast(name):
    model, x = converted(name), inputs(name)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
    assert (y.float() - expected).norm() < 0.1 * expected.norm()


def test_gates_read_the_smaller_tensor():
    """Through a stride in space alone: the projection reads every second row and column of every frame."""
    first = merge(converted("x3d")).blocks[2]
    assert first.competition.read.in_features == 24 + 12  # what c and the projection read


def test_costs():
    model, case = build("ecg"), CASES["ecg"]
    plain = count_multiply_adds(model, case.size)
    by_hand = 2 * 12 * 16 * 50  # the stem
    for block, length, shorter in zip(model.blocks, (50, 50, 25, 25), (50, 25, 25, 13), strict=True):
        by_hand += block.conv1.weight.numel() * length + block.conv2.weight.numel() * shorter
    assert plain == by_hand + 24 * 5
    gated = convert(model)
    assert count_multiply_adds(gated, case.size) == plain + conversion_report(gated).macs
    clip = CASES["x3d"].size
    gated = convert(build("x3d"))
    assert count_multiply_adds(gated, clip) == count_multiply_adds(build("x3d"), clip) + conversion_report(gated).macs


@pytest.mark.parametrize(("name", "size"), [("ecg", (50,)), ("x3d", (3, 18, 20))])
def test_attributions(name, size):
    """Integrated gradients add up to what the class's logit gained over the mean input."""
    pytest.importorskip("captum")
    model, x = converted(name, torch.float64), inputs(name, dtype=torch.float64)
    found = attribution.attribute(model, x, [1, 2], ["blocks.0"])
    for index, (one, target) in enumerate(zip(found, (1, 2), strict=True)):
        assert one.pixels.shape == size
        assert one.blocks["blocks.0"].ndim == len(size)
        with torch.no_grad():
            gained = model(x)[index, target] - model(torch.zeros_like(x))[index, target]
        assert (one.pixels.sum() - gained).abs() < 0.1 * gained.abs() + 0.05


@SMALL
def test_what_is_no_batch_of_signals_or_clips(name):
    model, x = converted(name), inputs(name)
    sizes = {"ecg": r"\(N, channels, L\)", "x3d": r"\(N, channels, D, H, W\)"}[name]
    for wrong in (x[0], x.long(), x[:0], None):
        with pytest.raises(UserError, match=f"have to be a float tensor {sizes} of at least one"):
            cmpe_se.inspect_gates(model, wrong)


# What is no addition of a residual and an identity.


class TokenBlock(nn.Module):
    """Tokens (N, L, C) whose branch has a convolution over their positions, as in PVT and SegFormer.

    Their shape is that of C signals of length L as well, where L and C are the length that shapes are found with.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(channels), nn.Linear(channels, channels)
        self.conv = nn.Conv1d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x):
        return x + self.fc(self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2))


class TokensAsTheyAre(TokenBlock):
    """Without a linear map behind the convolution."""

    def forward(self, x):
        return x + self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)


class ChannelsLast(nn.Module):
    """(N, H, W, C), as many networks of today keep their images."""

    def __init__(self, channels: int = 64):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(channels), nn.Linear(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.fc(self.norm(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class OverChannels(nn.Module):
    """An ECA-like block of signals or images, which adds what it convolves: the channels themselves, as a signal."""

    def __init__(self, layer: type[nn.Module], channels: int):
        super().__init__()
        self.first = layer(channels, channels, 3, padding=1)
        self.conv, self.ones = nn.Conv1d(1, 1, 3, padding=1), [1] * len(self.first.kernel_size)

    def forward(self, x):
        x = self.first(x)
        y = x.flatten(2).mean(2, keepdim=True).transpose(1, 2)  # (N, 1, C)
        a = (y + self.conv(y)).sigmoid().transpose(1, 2)
        return x * a.unflatten(2, self.ones)


class Mixer(nn.Module):
    """A residual convolution over the channels of tokens (N, L, C), laid out as C signals."""

    def __init__(self, channels: int, tokens: int):
        super().__init__()
        self.embed, self.conv = nn.Linear(channels, channels), nn.Conv1d(tokens, tokens, 3, padding=1)

    def forward(self, x):
        x = self.embed(x)
        return x + self.conv(x)


FALSE = {
    "tokens": (lambda: TokenBlock(1024), (1024, 1024), "their channels are not the second axis alone"),
    "tokens without a map": (
        lambda: TokensAsTheyAre(1024),
        (1024, 1024),
        "their channels are not the second axis alone",
    ),
    "channels last": (ChannelsLast, (64, 64, 64), "their channels are not the second axis alone"),
    "over channels of signals": (lambda: OverChannels(nn.Conv1d, 12), (12, 20), "attention maps"),
    "over channels of images": (lambda: OverChannels(nn.Conv2d, 12), (12, 8, 8), "attention maps"),
    "over channels of volumes": (lambda: OverChannels(nn.Conv3d, 12), (12, 4, 4, 4), "attention maps"),
    "mixer": (lambda: Mixer(1024, 16), (16, 1024), "their channels are not the second axis alone"),
}


@pytest.mark.parametrize(("make", "size", "reason"), FALSE.values(), ids=FALSE)
def test_what_is_not_of_channels_and_positions_is_listed(make, size, reason):
    false, x = make().eval(), torch.randn(2, *size)
    with torch.no_grad():
        false(x)
    with pytest.raises(UserError, match=f"no residual addition.*{reason}"):
        convert(false, view="se", example_inputs=x)


class GroupedSum(nn.Module):
    """Two channels for each of several groups: an addition of attention maps that are not of one channel."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(12, 12, 3, padding=1)
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        y = x.mean(2).view(-1, 3, 4)  # channels as positions
        return x * (y + self.conv(y)).sigmoid().view(-1, 12, 1)


def test_positions_that_were_channels_are_none():
    with pytest.raises(UserError, match=r"no residual addition.*their channels are not the second axis alone"):
        convert(GroupedSum().eval(), view="se")


class Functional(EcgBlock):
    """Its second convolution is a function; the first one tells the dimension."""

    def residual(self, x):
        return conv1d(self.conv1(self.bn1(x)).relu(), self.conv2.weight, stride=self.conv2.stride, padding=7)


class Upsampling(nn.Module):
    """A decoder's block, with transposed convolutions in both branches."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose3d(12, 6, 2, 2)
        self.branch = nn.Sequential(nn.ConvTranspose3d(12, 6, 2, 2), nn.ReLU(), nn.Conv3d(6, 6, 3, padding=1))

    def forward(self, x):
        return self.up(x) + self.branch(x)


class Projected(nn.Module):
    """One convolution in each branch, of which the projection is pointwise."""

    def __init__(self, axes: int):
        super().__init__()
        layer, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv3d, nn.BatchNorm3d))[axes == 3]
        self.conv, self.projection = layer(12, 24, 3, padding=1), nn.Sequential(layer(12, 24, 1), norm(24))

    def forward(self, x):
        return self.projection(x) + self.conv(x).relu()


OTHERS = {
    "function": (lambda: Functional(12, 12, 1), (12, 20)),
    "transposed": (Upsampling, (12, 2, 3, 4)),
    "projected signal": (lambda: Projected(1), (12, 7)),
    "projected volume": (lambda: Projected(3), (12, 3, 2, 4)),
}


@pytest.mark.parametrize(("make", "size"), OTHERS.values(), ids=OTHERS)
def test_other_ways_to_write_a_block(make, size):
    torch.manual_seed(0)
    original = randomise(make()).eval()
    model = convert(original, view="pair_view_1x1")
    assert list(gates(model)) == ["competition"]
    assert_same(original, model, torch.randn(2, *size))


def test_layers_that_convolve():
    class Standardised(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel_size, self.weight = (3,), nn.Parameter(torch.zeros(4, 4, 3))

    layers = [nn.Conv1d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1), Standardised(), nn.Bilinear(2, 2, 2), nn.Linear(2, 2)]
    assert [axes_of(layer) for layer in layers] == [1, 3, 1, None, None]


@pytest.mark.parametrize("network", [EcgNet, X3d])
def test_norms_are_folded(network):
    """All that follow a convolution; those of the ECG network's blocks follow additions."""
    merged = merge(randomise(network()).eval())
    left = [name for name, module in merged.named_modules() if isinstance(module, NORMS)]
    assert left == ([] if network is X3d else [*(f"blocks.{number}.bn1" for number in range(4)), "norm"])


def test_norms_of_another_axis_are_not_folded():
    """Maps (C, H, W) without a batch are a batch of signals to a norm of signals."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm1d(5))).eval()
    x = torch.randn(3, 5, 5)
    with torch.no_grad():
        assert torch.equal(merge(model)(x), model(x))


def test_a_gate_as_a_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.add = nn.Conv1d(12, 12, 3, padding=1), CompetitiveSE(12)

        def forward(self, x):
            return self.add(self.conv(x), x)

    assert cmpe_se.inspect_gates(nn.Sequential(Block()), torch.randn(2, 12, 9))[0].gate.shape == (2, 12)
