"""The gates beside the paper's: timm's, attentional feature fusion, the constant; and the settings that all share."""

import copy

import pytest
import torch
from torch import Tensor, nn

import cmpe_se
from cmpe_se import VIEWS, CompetitiveSE, PreActResNet, merge
from cmpe_se.errors import UserError
from cmpe_se.inspecting import forced_gates
from cmpe_se.layers.views import TABLE
from cmpe_se.utils.cost import count_multiply_adds
from tests.networks.naive import MERGING_VIEWS, SMALL_NETWORKS, SQUEEZE_VIEWS, naive_flows, naive_gate, randomise
from tests.tiers import long_but

MAP_VIEWS = tuple(name for name, view in TABLE.items() if view.form == "maps")
WHOLE_VIEWS = ("static", *MAP_VIEWS)  # which take residual and identity whole
STARTS = pytest.mark.parametrize("start", ["half", "one"])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@torch.no_grad()
def spread(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters and statistics so that gates differ from their start and from each other."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            scale = 1 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * scale)
    return module


def flows(channels: int = 24, batch: int = 5, size=(6, 5)) -> Tensor:
    x = torch.randn(2, batch, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x + torch.randn(
        2, batch, channels, *[1] * len(size), generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )


# Each from its paper's equations; convolutions of one pixel are matrix products.


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    bias = 0 if layer.bias is None else layer.bias
    return x @ layer.weight.flatten(1).T + bias


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _mean(x: Tensor) -> Tensor:
    """Over all positions, (N, C, ...) to (N, C)."""
    return x.flatten(2).mean(2)


def _everywhere(a: Tensor, x: Tensor) -> Tensor:
    """(N, C) at every position of (N, C, ...)."""
    return a.view(*a.shape, *[1] * (x.ndim - 2)).expand_as(x)


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Batch norm of (N, C, ...)."""
    shape, axes = (1, -1, *[1] * (x.ndim - 2)), (0, *range(2, x.ndim))
    mean, variance = layer.running_mean.view(shape), layer.running_var.view(shape)
    if layer.training:
        mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)


def naive_timm_se(gate: nn.Module, u: Tensor, s: Tensor) -> Tensor:
    a = _sigmoid(_linear(gate.fc2, _linear(gate.fc1, _mean(u)).relu()))
    return _everywhere(a, u)


def naive_timm_eca(gate: nn.Module, u: Tensor, s: Tensor) -> Tensor:
    kernel = gate.conv.weight.flatten()
    half = len(kernel) // 2
    squeeze = nn.functional.pad(_mean(u), (half, half))
    logits = sum(k * squeeze[:, place : place + u.shape[1]] for place, k in enumerate(kernel))
    return _everywhere(_sigmoid(logits), u)


def naive_timm_ge(gate: nn.Module, u: Tensor, s: Tensor) -> Tensor:
    a = _sigmoid(_linear(gate.mlp.fc2, _linear(gate.mlp.fc1, _mean(u)).relu()))
    return _everywhere(a, u)


def naive_timm_gc(gate: nn.Module, u: Tensor, s: Tensor) -> Tensor:
    positions = u.flatten(2)  # (N, C, P)
    attention = _linear(gate.conv_attn, positions.transpose(1, 2)).softmax(1)  # (N, P, 1)
    hidden = _linear(gate.mlp_scale.fc1, (positions @ attention)[:, :, 0])
    mean, variance = hidden.mean(1, keepdim=True), hidden.var(1, correction=0, keepdim=True)
    norm = gate.mlp_scale.norm
    hidden = ((hidden - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).relu()
    return _everywhere(_sigmoid(_linear(gate.mlp_scale.fc2, hidden)), u)


def naive_timm_cbam(gate: nn.Module, u: Tensor, s: Tensor) -> Tensor:
    def excite(x: Tensor) -> Tensor:
        return _linear(gate.channel.fc2, _linear(gate.channel.fc1, x).relu())

    channels = _sigmoid(excite(_mean(u)) + excite(u.amax((2, 3))))[:, :, None, None]
    gated = channels * u
    pooled = torch.stack((gated.mean(1), gated.amax(1)), 1)
    side = gate.spatial.conv.conv.weight.shape[-1]
    logits = nn.functional.conv2d(pooled, gate.spatial.conv.conv.weight, padding=side // 2)
    return channels * _sigmoid(_norm(gate.spatial.conv.bn, logits))


def naive_aff(gate: nn.Module, u: Tensor, s: Tensor) -> Tensor:
    def context(layers: nn.Sequential, x: Tensor) -> Tensor:
        first, norm, _, second, last = layers
        x = _norm(norm, _linear(first, x.movedim(1, -1)).movedim(-1, 1)).relu()
        return _norm(last, _linear(second, x.movedim(1, -1)).movedim(-1, 1))

    total = u + s
    return _sigmoid(context(gate.local_context, total) + context(gate.global_context, _everywhere(_mean(total), total)))


def naive_static(gate: nn.Module, u: Tensor, s: Tensor) -> Tensor:
    return _everywhere(_sigmoid(gate.bias).expand(u.shape[:2]), u)


def naive_factors(gate: CompetitiveSE, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (N, C, H, W) on residual and identity."""
    inner = gate.fc2 if gate.view == "static" else gate.map_gate
    w = globals()[f"naive_{gate.view}"](inner, u, s)
    gain = {"half": 1, "one": 4 if gate.view == "timm_cbam" else 2}[gate.start]
    return gain * w, gain * (1 - w) if gate.view == "aff" else torch.ones_like(w)


def make(view: str, channels: int = 24, *, training: bool = False, **settings) -> CompetitiveSE:
    torch.manual_seed(0)
    gate = CompetitiveSE(channels, view=view, **{"reduction": 4, "dtype": torch.float64} | settings)
    return spread(gate).train(training)


@MODES
@STARTS
@pytest.mark.parametrize("view", WHOLE_VIEWS)
def test_equals_the_equations(view, start, training):
    gate, (u, s) = make(view, start=start, training=training), flows()
    of_residual, of_identity = naive_factors(copy.deepcopy(gate), u, s)
    assert of_residual.std() > 0.01
    torch.testing.assert_close(gate(u, s), of_identity * s + of_residual * u, rtol=0, atol=1e-12)


def test_every_view_is_tested():
    assert set(SQUEEZE_VIEWS) | set(WHOLE_VIEWS) == set(VIEWS)


@pytest.mark.parametrize("view", MAP_VIEWS)
def test_gates_of_their_own_have_no_number_for_each_channel(view):
    with pytest.raises(ValueError, match=f"view '{view}' rescales feature maps by itself"):
        make(view).gate(*flows())


# Settings.


@pytest.mark.parametrize("view", VIEWS)
def test_a_start_at_one_is_exact_where_the_last_layer_is_zero(view):
    torch.manual_seed(0)
    u, s = flows()
    one, half = (
        CompetitiveSE(24, view=view, start=start, reduction=4, dtype=torch.float64) for start in ("one", "half")
    )
    for gate in (one, half):
        gate.zero_last_layer()
    assert torch.equal(one(u, s), s + u)
    expected = (s + u) / 2 if TABLE[view].layers.scales_identity else s + TABLE[view].half * u
    assert torch.equal(half(u, s), expected)
    learnable = [p for p in one.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((one(u, s) * flows()[1]).sum(), learnable, allow_unused=True)
    assert sum(gradient.abs().sum() for gradient in gradients if gradient is not None) > 0


@pytest.mark.parametrize("view", VIEWS)
def test_fresh_gates_that_start_at_one_are_near_one(view):
    """With the paper's initialisation of every layer."""
    torch.manual_seed(0)
    network = PreActResNet(20, block="basic", view=view, start="one", reduction=4, bias=True)
    for seen in cmpe_se.inspect(network, torch.randn(8, 3, 16, 16)):
        assert seen.gain in (2, 4)
        assert (seen.gate - 1).abs().mean() < 0.4, seen.name
        assert (seen.gate.mean() - 1).abs() < 0.2, seen.name


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"start": "two"}, "unknown start 'two'; choose one of half, one"),
        ({"min_hidden": 0}, "min_hidden must be a whole number of at least 1, got 0"),
        ({"mask": 1.0}, "mask must be a probability of at least 0 and below 1, got 1.0"),
        ({"mask": "a"}, "mask must be a probability of at least 0 and below 1, got 'a'"),
        ({"mask": 0.1, "view": "static"}, "mask hides squeezes, and view 'static' reads none"),
        ({"mask": 0.1, "view": "timm_ge"}, "mask hides squeezes, and view 'timm_ge' reads none"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        CompetitiveSE(24, **settings)


def test_at_least_so_many_hidden_units():
    assert [CompetitiveSE(c, min_hidden=4).hidden for c in (16, 64, 256)] == [4, 4, 16]
    assert CompetitiveSE(16, view="timm_se", min_hidden=4).map_gate.fc1.out_channels == 4


@pytest.mark.parametrize("view", SQUEEZE_VIEWS)
def test_masked_squeezes(view, monkeypatch):
    gate = randomise(CompetitiveSE(240, view=view, reduction=4, mask=0.25, dtype=torch.float64))
    seen = []
    nothing = torch.zeros(50, gate.fc2.in_features, dtype=torch.float64)
    monkeypatch.setattr(gate, "_hidden", lambda r, i: seen.append((r, i)) or nothing)
    r, i = torch.rand(2, 50, 240, dtype=torch.float64) + 1
    gate.gate(r, i)
    gate.eval().gate(r, i)
    (masked_r, masked_i), (clean_r, clean_i) = seen
    assert torch.equal(clean_r, r)
    assert torch.equal(clean_i, i)
    for masked, whole in ((masked_r, r), (masked_i, i)):
        hidden = masked == 0
        assert 0.2 < hidden.double().mean() < 0.3
        torch.testing.assert_close(masked[~hidden], whole[~hidden] / 0.75)
    assert ((masked_r == 0) != (masked_i == 0)).any()  # each flow by itself


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({"view": "se"}, 2016),
        ({"view": "se", "bias": True}, 2373),  # what the SE networks whose gains METHOD.md quotes have
        ({"view": "static"}, 336),
        ({"view": "se_identity"}, 2016),
        ({"view": "se_sum"}, 2016),
        ({"view": "timm_se"}, 2373),
        ({"view": "timm_eca"}, 27),
    ],
)
def test_parameters_of_resnet20(settings, added):
    plain, gated = (sum(p.numel() for p in PreActResNet(20, block="basic", **s).parameters()) for s in ({}, settings))
    assert gated - plain == added


@pytest.mark.parametrize(
    ("view", "added"), [("static", 0), ("se", 2 * 16 * 4), ("timm_se", 2 * 16 * 4), ("timm_eca", 3 * 16)]
)
def test_multiply_adds(view, added):
    gate = CompetitiveSE(16, view=view, reduction=4)
    assert count_multiply_adds(gate, (16, 8, 8), (16, 8, 8)) == added


# In networks.


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("view", WHOLE_VIEWS)
@pytest.mark.parametrize("kind", SMALL_NETWORKS)
def test_blocks(kind, view, drop_path):
    torch.manual_seed(0)
    network = SMALL_NETWORKS[kind](view=view, start="one", reduction=4, dtype=torch.float64, drop_path_rate=drop_path)
    block = spread(randomise(network)).stages[1].blocks[0].train()
    x = torch.randn(40, block.bn1.num_features, 8, 8, dtype=torch.float64)
    u, s = naive_flows(copy.deepcopy(block), x)
    of_residual, of_identity = naive_factors(copy.deepcopy(block.attention), u, s)
    added = of_identity * s + of_residual * u - s
    y, squeeze = block(x)
    assert squeeze is None
    dropped = (y - s).abs().amax((1, 2, 3)) < 1e-9
    assert bool(dropped.any()) == bool(drop_path)
    rate = block.drop_path.drop_prob or 0
    torch.testing.assert_close(y[~dropped], (s + added / (1 - rate))[~dropped], rtol=0, atol=1e-10)


def test_our_networks_leave_the_drawing_of_timms_gates_to_timm():
    torch.manual_seed(0)
    network = PreActResNet(20, block="basic", view="timm_se", reduction=4)
    weight = network.stages[2].blocks[0].attention.map_gate.fc2.weight
    assert weight.abs().max() <= weight.shape[1] ** -0.5  # uniform, as a convolution draws itself


@pytest.mark.parametrize("bias", long_but([False, True], [True]))
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", SMALL_NETWORKS)
def test_merged(kind, view, bias):
    torch.manual_seed(0)
    settings = {"view": view, "bias": bias, "start": "one", "reduction": 4, "dtype": torch.float64}
    network = spread(randomise(SMALL_NETWORKS[kind](**settings))).eval()
    merged, x = merge(network), torch.randn(3, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
        assert (merged(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    left = [module for module in merged.modules() if isinstance(module, CompetitiveSE)]
    assert len(left) == (0 if view in ("static", *MERGING_VIEWS) else 3)
    if view == "static":  # which costs nothing then: the plain network's layers
        assert not any(block.attention for stage in merged.stages for block in stage.blocks)


@pytest.mark.parametrize("name", long_but(["resnet18", "resnet50", "mobilenetv2_050", "resnetv2_50"], ["resnet18"]))
def test_static_gates_of_converted_networks_cost_nothing(name):
    import timm

    torch.manual_seed(0)
    short = {"layers": (1, 2, 1, 1)} if name.startswith("resnet") else {}
    network = spread(cmpe_se.convert(timm.create_model(name, **short).double(), view="static")).eval()
    merged, x = merge(network), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, nudged = network(x), network(x * (1 + 1e-15))
        own = (nudged - expected).abs().max()
        assert (merged(x) - expected).abs().max() <= max(1e-12 * expected.abs().max(), 4 * own)
    assert not any(isinstance(module, CompetitiveSE) for module in merged.modules())
    plain = merge(timm.create_model(name, **short))
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in plain.parameters())


def test_a_static_gate_whose_residual_has_another_reader_stays():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.gate = CompetitiveSE(8, view="static")

        def forward(self, x):
            u = self.conv(x)
            return self.gate(u, x) + u.relu()

    torch.manual_seed(0)
    network = spread(nn.Sequential(Block()).double()).eval()
    merged, x = merge(network), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(merged(x), network(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("view", WHOLE_VIEWS)
def test_inspected(view, merged):
    if merged and view == "static":
        pytest.skip("a merged static gate is part of a convolution, and not to be seen")
    torch.manual_seed(0)
    network = PreActResNet(11, view=view, start="one", reduction=4, dtype=torch.float64)
    spread(randomise(network)).eval()
    x, expected = torch.randn(4, 3, 12, 12, dtype=torch.float64), []
    with torch.no_grad():
        y = network.stem(x)
        for stage in network.stages:
            u, s = naive_flows(stage.blocks[0], y)
            expected.append((u, s, *naive_factors(stage.blocks[0].attention, u, s)))
            y = stage(y)
    views = cmpe_se.inspect(merge(network) if merged else network, x)
    assert [seen.name for seen in views] == [f"stages.{index}.blocks.0" for index in range(3)]
    for seen, (u, s, of_residual, of_identity) in zip(views, expected, strict=True):
        for actual, wanted in (
            (seen.gate, of_residual.mean((2, 3))),
            (seen.residual_squeeze, _mean(u)),
            (seen.identity_squeeze, s.mean((2, 3))),
            (seen.residual_energy, (of_residual * u).square().mean((2, 3))),
            (seen.identity_energy, (of_identity * s).square().mean((2, 3))),
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)
        assert seen.picture is None


def test_forced():
    torch.manual_seed(0)
    static, other = (PreActResNet(11, view=view, start="one") for view in ("static", "timm_ge"))
    x = torch.randn(2, 3, 12, 12)
    with forced_gates(static, "stages.1.blocks.0", 0.5):
        gates = [seen.gate for seen in cmpe_se.inspect(static, x)]
    assert [gate.unique().tolist() for gate in gates] == [[1], [0.5], [1]]
    sentence = r"the gates of stages.1.blocks.0 \(view timm_ge\) rescale whole feature maps by themselves, and cannot"
    with pytest.raises(UserError, match=sentence), forced_gates(other, "stages.1.blocks.0", 0):
        pass


def test_biases_are_the_static_part():
    """SE with biases and W1 at zero is the static gate of W2's bias."""
    se, static = (CompetitiveSE(24, view=view, bias=True, dtype=torch.float64) for view in ("se", "static"))
    with torch.no_grad():
        se.fc2.weight.zero_()
        static.fc2.bias.copy_(se.fc2.bias.normal_())
    u, s = flows()
    assert torch.equal(se(u, s), static(u, s))
    torch.testing.assert_close(se.gate(u, s), naive_gate(static, *flows().mean((3, 4))), rtol=0, atol=1e-15)
