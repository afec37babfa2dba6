"""Pruned networks: what goes, by which criterion, and that nothing else changes."""

import dataclasses

import pytest
import timm
import torch
from torch import nn

from cmpe_se import convert, inspect_gates, merge, prune
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.pruning.blocks import measure_blocks, removable, with_gates
from cmpe_se.pruning.channels import find_channels
from cmpe_se.pruning.choice import Cut, apply, by_layer
from cmpe_se.pruning.criteria import CRITERIA, GateScores, importances
from cmpe_se.utils.cost import count_multiply_adds
from tests.networks.naive import randomise
from tests.tiers import long_but

pytest.importorskip("torch_pruning")


def images(size=16, number=4, classes=10):
    torch.manual_seed(1)
    return [(torch.randn(number, 3, size, size), torch.randint(classes, (number,))) for _ in range(2)]


@pytest.fixture(scope="module")
def ours():
    return randomise(timm.create_model("cmpe_se_preact_resnet20", num_classes=10)).eval()


@pytest.fixture(scope="module")
def bottleneck():
    return randomise(timm.create_model("cmpe_se_preact_resnet20b", num_classes=10)).eval()


@pytest.fixture(scope="module")
def converted():
    return randomise(convert(timm.create_model("resnet18", num_classes=10))).eval()


@pytest.mark.slow
@pytest.mark.parametrize("criterion", long_but(CRITERIA, ["gate", "bn"]))
@pytest.mark.parametrize("network", ["ours", "converted"])
def test_at_most_so_many_multiply_adds(network, criterion, request):
    model = request.getfixturevalue(network)
    size = (3, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune(model, 0.6, images=images(32), criterion=criterion)
    assert pruned.multiply_adds == [count_multiply_adds(model, size), count_multiply_adds(pruned.network, size)]
    assert 0.5 < pruned.multiply_adds[1] / pruned.multiply_adds[0] <= 0.6
    assert pruned.network(torch.randn(2, *size)).shape == (2, 10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not pruned.through_stream
    # Identity and residual keep their channels, and gates their weights.
    own = pruned.network.state_dict()
    gates = [key for key in before if ".attention." in key or ".competition." in key]
    assert [key for key in gates if key in own]
    for key in gates:
        assert key not in own or torch.equal(own[key], before[key])


def test_what_stays_are_the_channels_of_before(ours):
    """A block whose other channels are made silent computes what the pruned block does."""
    pruned = prune(ours, 0.8, images=images(), criterion="l1").network
    silent = timm.create_model("cmpe_se_preact_resnet20", num_classes=10).eval()
    silent.load_state_dict(ours.state_dict())
    for name, layer in pruned.named_modules():
        if not name.endswith(".conv2"):
            continue
        whole = silent.get_submodule(name)
        norm = silent.get_submodule(name.replace("conv2", "bn2"))
        kept = [
            next(c for c in range(whole.in_channels) if torch.equal(whole.weight[:, c], layer.weight[:, k]))
            for k in range(layer.in_channels)
        ]
        gone = [c for c in range(whole.in_channels) if c not in kept]
        with torch.no_grad():
            norm.weight[gone] = norm.bias[gone] = 0
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pruned(x), silent(x), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_layerwise_takes_the_same_part_of_each(converted):
    pruned = prune(converted, 0.6, images=images(32), criterion="random", layerwise=True, round_to=1)
    parts = [layer.after / layer.before for layer in pruned.layers if not layer.stream]
    assert max(parts) - min(parts) < 0.03


@pytest.mark.long
def test_multiples(converted):
    pruned = prune(converted, 0.6, images=images(32), criterion="l1", round_to=8)
    assert any(layer.after < layer.before for layer in pruned.layers)
    assert all(layer.after % 8 == 0 for layer in pruned.layers)


@pytest.mark.long
def test_steps_measure_anew(ours):
    seen = []
    pruned = prune(ours, 0.6, images=images(), criterion="l1", steps=3, after_step=lambda model: seen.append(model))
    assert len(seen) == 3
    assert len(pruned.multiply_adds) == len(pruned.parameters) == 4
    parts = [macs / pruned.multiply_adds[0] for macs in pruned.multiply_adds]
    assert all(part <= 1 - 0.4 * step / 3 for step, part in enumerate(parts[1:], start=1))
    assert sorted(parts, reverse=True) == parts


@pytest.mark.long
def test_the_stream_goes_last_and_its_gates_begin_anew(ours):
    pruned = prune(ours, 0.2, images=images(), criterion="l1")
    assert pruned.through_stream
    channels = {name: m.channels for name, m in pruned.network.named_modules() if isinstance(m, CompetitiveSE)}
    narrower = {name for name, number in channels.items() if number != ours.get_submodule(name).channels}
    assert narrower
    for name in narrower:
        gate, old = pruned.network.get_submodule(name), ours.get_submodule(name)
        block = pruned.network.get_submodule(name.removesuffix(".attention"))
        assert gate.channels == block.last_conv.out_channels
        assert (gate.view, gate.start, gate.reduction) == (old.view, old.start, old.reduction)
    assert len(inspect_gates(pruned.network, images()[0][0])) == len(channels)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(merge(pruned.network)(x), pruned.network(x), rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_a_target_that_cannot_be_reached_names_the_least(ours):
    with pytest.raises(UserError, match=r"target_macs 0.01 cannot be reached: .* give at least 0\.") as raised:
        prune(ours, 0.01, images=images())
    least = float(str(raised.value).partition("give at least ")[2].split()[0])
    assert prune(ours, least, images=images()).multiply_adds[1] > 0
    with pytest.raises(UserError, match="cannot be reached"):
        prune(ours, least - 0.01, images=images())


@pytest.mark.long
def test_a_block_that_adds_nothing_goes_as_a_whole(ours):
    model = timm.create_model("cmpe_se_preact_resnet20", num_classes=10).eval()
    model.load_state_dict(ours.state_dict())
    quiet = "stages.1.blocks.1"
    with torch.no_grad():
        model.get_submodule(quiet).conv2.weight.mul_(1e-3)
    pruned = prune(model, 0.85, images=images())
    assert quiet in [block.name for block in pruned.blocks if block.gone]
    assert pruned.widths[quiet] == [0, 0]
    x = torch.randn(4, 3, 16, 16)
    alone = timm.create_model(
        "cmpe_se_pruned", network="cmpe_se_preact_resnet20", widths={quiet: [0, 0]}, num_classes=10
    )
    alone.load_state_dict({key: value for key, value in model.state_dict().items() if f"{quiet}." not in key})
    torch.testing.assert_close(alone.eval()(x), model(x), rtol=1e-2, atol=1e-2)


def test_removable_blocks_hand_on_what_they_get(ours, converted):
    x = torch.randn(1, 3, 32, 32)
    projecting = ("stages.1.blocks.0", "stages.2.blocks.0")
    blocks = [f"stages.{stage}.blocks.{block}" for stage in range(3) for block in range(3)]
    assert removable(ours, x) == [block for block in blocks if block not in projecting]
    assert removable(converted, x) == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]


def naive_basic(model, worth, block):
    """Worth of the inner channels of a basic block, channel by channel, as the definition has it."""
    conv, norm = block.conv2, block.bn2
    values = []
    for c in range(conv.in_channels):
        total = 0.0
        for o in range(conv.out_channels):
            kernel = conv.weight[o, c].double()
            total += (worth.gate[o].item() * kernel.square().sum().sqrt().item()) ** 2
        values.append(abs(norm.weight[c].item()) * total**0.5)
    return torch.tensor(values, dtype=torch.float64)


def test_gate_scores_of_a_basic_block_are_the_definition(ours):
    worth = measure_blocks(with_gates(ours), images())
    scores = GateScores(find_channels(ours, images()[0][0][:1]), worth)
    for group in scores.channels.inner:
        name = group.name.removesuffix(".conv1")
        expected = naive_basic(ours, worth[name], ours.get_submodule(name))
        torch.testing.assert_close(scores.relative(group), expected / expected.mean(), rtol=1e-9, atol=0)
        assert scores.share(group) == worth[name].share


def test_gate_scores_go_back_from_layer_to_layer(bottleneck):
    worth = measure_blocks(with_gates(bottleneck), images())
    scores = GateScores(find_channels(bottleneck, images()[0][0][:1]), worth)
    groups = {group.name: group for group in scores.channels.inner}
    name = "stages.1.blocks.1"
    block, gate = bottleneck.get_submodule(name), worth[name].gate
    w3 = block.conv3.weight.double()[:, :, 0, 0]
    second = block.bn3.weight.double().abs() * ((gate[:, None] * w3).square().sum(0)).sqrt()
    kernels = block.conv2.weight.double().square().sum((2, 3)).sqrt()  # (out, in)
    first = block.bn2.weight.double().abs() * ((second[:, None] * kernels).square().sum(0)).sqrt()
    for layer, expected in (("conv2", second), ("conv1", first)):
        found = scores.relative(groups[f"{name}.{layer}"])
        torch.testing.assert_close(found, expected.detach() / expected.mean().detach(), rtol=1e-9, atol=0)


def test_gate_scores_know_the_norm_in_front_of_the_addition(converted):
    worth = measure_blocks(with_gates(converted), images(32))
    scores = GateScores(find_channels(converted, images(32)[0][0][:1]), worth)
    block, gate = converted.layer2[1], worth["layer2.1"].gate
    scale = block.bn2.weight.double().abs() / (block.bn2.running_var.double() + block.bn2.eps).sqrt()
    kernels = block.conv2.weight.double().square().sum((2, 3)).sqrt()
    expected = block.bn1.weight.double().abs() * (((gate * scale)[:, None] * kernels).square().sum(0)).sqrt()
    group = next(group for group in scores.channels.inner if group.name == "layer2.1.conv1")
    torch.testing.assert_close(scores.relative(group), (expected / expected.mean()).detach(), rtol=1e-9, atol=0)


def test_taylor_is_of_the_network_with_its_gates(ours):
    """Gradients of the gated loss: those without the gates would be others."""
    channels = find_channels(ours, images()[0][0][:1])
    batches = images()
    found = importances("taylor", ours, channels, channels.groups, {}, batches)
    model = timm.create_model("cmpe_se_preact_resnet20", num_classes=10).eval()
    model.load_state_dict(ours.state_dict())
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y).backward()
    block = model.stages[2].blocks[1]
    products = [  # torch-pruning leaves batch norms out
        (block.conv1.weight * block.conv1.weight.grad).abs().flatten(1).sum(1),
        (block.conv2.weight * block.conv2.weight.grad).abs().transpose(0, 1).flatten(1).sum(1),
    ]
    expected = torch.stack(products).mean(0).double().detach()
    torch.testing.assert_close(found["stages.2.blocks.1.conv1"], expected / expected.mean(), rtol=1e-4, atol=1e-6)


def test_random_follows_its_seed(ours):
    channels = find_channels(ours, images()[0][0][:1])
    state = torch.get_rng_state()
    first, again, other = (
        importances("random", ours, channels, channels.groups, {}, [], seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_ranks_by_layer():
    ranks = by_layer({"a": torch.tensor([5.0, 1.0, 3.0, 2.0])})["a"]
    assert ranks.tolist() == [0.875, 0.125, 0.625, 0.375]


def test_apply_agrees_with_torch_pruning(converted):
    """The same channels out of the same network, by torch-pruning's own functions."""
    channels = find_channels(converted, images(32)[0][0][:1])
    own = timm.create_model("resnet18", num_classes=10).eval()
    own.load_state_dict(channels.plain.state_dict())
    cut = Cut({group.name: torch.arange(0, group.channels, 2) for group in channels.groups})
    apply(own, channels.groups, cut)
    for group in channels.groups:
        entry = group.entry
        root = entry[0].dep
        graph = entry._DG
        graph.get_pruning_group(root.target.module, root.handler, list(range(1, group.channels, 2))).prune()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(own(x), channels.plain(x), rtol=0, atol=0)


@pytest.mark.long
def test_other_networks():
    """Depthwise convolutions, SE within blocks, layer norms; what stays whole (layer scale, groups) is named."""
    for name in ("mobilenetv3_small_050", "convnext_atto", "regnetx_002"):
        model = timm.create_model(name, num_classes=10).eval()
        pruned = prune(model, 0.8, images=images(64), criterion="gate")
        assert pruned.multiply_adds[1] <= 0.8 * pruned.multiply_adds[0]
        assert pruned.network(torch.randn(2, 3, 64, 64)).shape == (2, 10)
        again = timm.create_model("cmpe_se_pruned", network=name, widths=pruned.widths, num_classes=10)
        again.load_state_dict(pruned.network.state_dict())
        assert bool(pruned.left) is (name != "mobilenetv3_small_050")


@pytest.mark.long
def test_layers_without_a_batch_norm_stay_by_that_criterion():
    model = timm.create_model("mobilenetv3_small_050", num_classes=10).eval()
    pruned = prune(model, 0.8, images=images(64), criterion="bn")
    assert pruned.multiply_adds[1] <= 0.8 * pruned.multiply_adds[0]
    assert pruned.left
    assert set(pruned.left.values()) == {"it has no importance by bn"}
    whole = {layer.name for layer in pruned.layers if layer.before == layer.after}
    assert whole >= pruned.left.keys()


class Block(nn.Module):
    """A basic block of another author's, maybe with SE by a single layer."""

    def __init__(self, channels, inner, squeeze=False, grouped=False):
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.squeeze = nn.Conv2d(inner, inner, 1) if squeeze else None
        self.second, self.inner = nn.Conv2d(inner, channels, 3, padding=1), inner if grouped else None

    def forward(self, x):
        h = self.norm(self.first(x)).relu()
        if self.squeeze is not None:
            h = h * self.squeeze(h.mean((2, 3), keepdim=True)).sigmoid()
        if self.inner:
            h = h.reshape(len(h), self.inner, *h.shape[2:])
        return x + self.second(h)


class Foreign(nn.Module):
    """Its classifier is a convolution, and it has no method of timm's."""

    def __init__(self, number=4, **settings):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.Sequential(*(Block(16, 16, **settings) for _ in range(number)))
        self.last = nn.Conv2d(16, 10, 1)

    def forward(self, x):
        return self.last(self.layers(self.stem(x))).mean((2, 3))


def test_outputs_stay_whatever_makes_them():
    pruned = prune(randomise(Foreign()).eval(), 0.4, images=images(8), criterion="l1")
    assert pruned.network(torch.randn(4, 3, 8, 8)).shape == (4, 10)


@pytest.mark.parametrize("criterion", ["gate", "l1"])
def test_a_layer_that_scales_what_it_reads(criterion):
    pruned = prune(randomise(Foreign(squeeze=True)).eval(), 0.6, images=images(8), criterion=criterion)
    assert pruned.network(torch.randn(4, 3, 8, 8)).shape == (4, 10)


def test_code_that_counts_on_numbers_of_channels():
    with pytest.raises(UserError, match="Foreign cannot be pruned: its code counts on numbers of channels"):
        prune(Foreign(grouped=True).eval(), 0.6, images=images(8), criterion="l1")


def test_blocks_go_before_the_stream():
    model = randomise(Foreign(6)).eval()
    with torch.no_grad():
        for block in model.layers[1:]:
            block.second.weight.mul_(1e-3)
    pruned = prune(model, 0.3, images=images(8))
    assert not pruned.through_stream
    assert sum(block.gone for block in pruned.blocks) >= 3


def test_rounding_lets_no_block_go_that_has_more_than_a_fifth(ours):
    pruned = prune(ours, 0.9, images=images(), criterion="gate", round_to=16)
    for block in pruned.blocks:
        if block.gone:
            assert block.share < max(one.share for one in pruned.blocks)
    with pytest.raises(UserError, match=r"in multiples of 64, 1.000 of the multiply-adds are left; .* or a smaller"):
        prune(ours, 0.9, images=images(), criterion="l1", round_to=64)


def test_a_gate_scales_the_residual_and_not_the_shortcut(converted):
    worth = measure_blocks(with_gates(converted), images(32))
    assert worth["layer2.0"].residual == "layer2.0.bn2"
    silent = {name: dataclasses.replace(one, gate=0 * one.gate) for name, one in worth.items()}
    channels = find_channels(converted, images(32)[0][0][:1])
    group = next(group for group in channels.groups if group.stream and "layer2.0.conv2" in str(group.members))
    conv, norm = converted.layer2[0].downsample[0], converted.layer2[0].downsample[1]
    scale = norm.weight.double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    expected = (scale * conv.weight.double().flatten(1).norm(dim=1)).detach()
    found = GateScores(channels, silent).relative(group)
    torch.testing.assert_close(found, expected / expected.mean(), rtol=1e-9, atol=0)


@pytest.mark.long
def test_what_has_no_importance_is_named_after_several_steps_too():
    model = timm.create_model("mobilenetv3_small_050", num_classes=10).eval()
    one, two = (prune(model, 0.8, images=images(64), criterion="bn", steps=steps).left for steps in (1, 2))
    assert one == two


def test_a_network_s_own_notes_of_its_width():
    pruned = prune(timm.create_model("resnet18", num_classes=10).eval(), 0.15, images=images(32), criterion="l1")
    assert pruned.through_stream
    assert pruned.network.num_features == pruned.network.fc.in_features < 512


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: merge(timm.create_model("cmpe_se_preact_resnet20")), {}, "merged"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(1024, 2)), {}, "residual blocks"),
        (None, {"target_macs": 1.0}, "target_macs is 1, should be a part"),
        (None, {"target_macs": 0.0}, "target_macs is 0, should be a part"),
        (None, {"criterion": "l2"}, "criterion is 'l2', should be one of gate, taylor, l1, bn, random"),
        (None, {"steps": 0}, "steps 0 and round_to 4 should be at least 1"),
        (None, {"images": []}, "pruning needs images"),
        (None, {"images": [torch.randn(1, 3, 16, 16)]}, "pruning needs images"),
    ],
)
def test_mistakes(ours, make, settings, message):
    with pytest.raises(UserError, match=message):
        prune(make() if make else ours, **{"images": images()} | settings)
