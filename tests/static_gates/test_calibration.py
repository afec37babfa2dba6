"""Static gates against a naive form: hooks that put the mean of each gate, in float64, in the place of the gate."""

import copy
import pickle
from contextlib import ExitStack, contextmanager

import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath, LayerScale2d
from torch import Tensor, nn

import cmpe_se
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.views import TABLE
from cmpe_se.static_gates import Calibration
from tests.conversion.dimensions import EcgNet
from tests.conversion.networks import randomise

CHANNEL_VIEWS = [name for name, view in TABLE.items() if not view.by_position and view.form != "constant"]
X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(name: str = "preact_resnet20", **settings) -> nn.Module:
    """In float64 and eval mode, with other statistics in every norm, and gates that depend on the image."""
    torch.manual_seed(0)
    return moved(randomise(timm.create_model(name, **settings)))


def moved(model: nn.Module) -> nn.Module:
    for gate in gates(model).values():
        for name, weight in gate.named_parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, 0, 0.7)
            elif name.endswith("bias"):
                nn.init.normal_(weight, 0, 0.3)
    return model.double().eval()


def gates(model: nn.Module) -> dict[str, CompetitiveSE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompetitiveSE)}


@contextmanager
def hooks(model: nn.Module, make):
    """A forward hook on each gate, made from its name; our own blocks then call their gate as a module."""
    with ExitStack() as stack:
        for name, gate in gates(model).items():
            if hook := make(name):
                stack.callback(gate.register_forward_hook(hook).remove)
        yield


def naive_means(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of each gate: the factor by which it has scaled its residual."""
    found: dict[str, Tensor] = {}

    def make(name: str):
        def note(_, inputs, output):
            residual, identity = (tensor.flatten(2) for tensor in inputs)
            added = output.flatten(2) - identity
            found[name] = ((added * residual).sum(2) / residual.square().sum(2)).mean(0)

        return note

    with hooks(model, make), torch.no_grad():
        model(x)
    return found


def naive(model: nn.Module, x: Tensor, means: dict[str, Tensor], chosen: list[str]) -> Tensor:
    def make(name: str):
        def instead(_, inputs, output):
            residual, identity = inputs
            return identity + means[name].view(1, -1, *[1] * (residual.ndim - 2)) * residual

        return instead if name in chosen else None

    with hooks(model, make), torch.no_grad():
        return model(x)


def assert_static(model: nn.Module, x: Tensor = X) -> nn.Module:
    """All gates static, before and after merging, are what the naive form says; the model is as it was."""
    before, means = model(x).detach(), naive_means(model, x)
    expected = naive(model, x, means, list(means))
    assert not torch.allclose(expected, before, rtol=1e-4, atol=1e-6)
    static = cmpe_se.with_static_gates(model, images=x)
    torch.testing.assert_close(static(x), expected)
    merged = cmpe_se.merge(model, static="all", images=x)
    torch.testing.assert_close(merged(x), expected)
    assert torch.equal(model(x), before)
    assert {gate.view for gate in gates(static).values()} == {"static"}
    return merged


@pytest.mark.parametrize("start", ["half", "one"])
@pytest.mark.parametrize("view", CHANNEL_VIEWS)
def test_every_view_of_one_number_a_channel(view, start):
    merged = assert_static(network(view=view, start=start))
    assert not gates(merged)  # each has gone into a convolution
    assert not any(isinstance(module, cmpe_se.merging.MergedGate) for module in merged.modules())


@pytest.mark.parametrize("name", ["cmpe_se_preact_resnet20b", "cmpe_se_wrn16_4"])
def test_our_own_networks(name):
    assert not gates(assert_static(network(name)))


FAMILIES = {
    "bottlenecks": lambda: timm.create_model("test_resnet"),
    "inverted bottlenecks": lambda: timm.create_model("mobilenetv2_050"),
    "pre-activation": lambda: timm.create_model("resnetv2_18"),
    "layer scale, reshaped": lambda: timm.create_model("test_convnext2"),
    "layer scale, channels last": lambda: timm.create_model("test_convnext", conv_mlp=False),
    "layer scale, as a layer": lambda: nn.Sequential(LayerScaled(12), nn.Flatten(), nn.Linear(12 * 64 * 64, 5)),
    "layer scale, first": lambda: torchvision.models.convnext.ConvNeXt(
        [torchvision.models.convnext.CNBlockConfig(12, 24, 2), torchvision.models.convnext.CNBlockConfig(24, None, 1)],
        stochastic_depth_prob=0.3,
        layer_scale=0.7,
        num_classes=5,
    ),
}


class LayerScaled(nn.Module):
    """A residual that ends in timm's layer scale."""

    def __init__(self, channels: int):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.scale, self.drop = LayerScale2d(channels, 0.4), DropPath(0.2)

    def forward(self, x):
        x = self.stem(x)
        return x + self.drop(self.scale(self.conv(x).relu()))


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_converted_networks(make):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    assert not gates(assert_static(moved(cmpe_se.convert(randomise(make()))), x))


class Scaled(nn.Module):
    """A residual with a layer scale that something else reads too, or that is not one number a channel."""

    def __init__(self, way: str):
        super().__init__()
        self.conv, self.way = nn.Conv2d(8, 8, 3, padding=1), way
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        residual = self.conv(x).relu()
        if self.way == "twice":
            return x + residual * self.gamma.view(1, -1, 1, 1) * self.gamma.view(1, -1, 1, 1)
        if self.way == "rows":
            return x + residual * self.gamma.view(1, 1, -1, 1)
        if self.way == "columns":
            return x + residual * self.gamma
        if self.way == "also added":
            return x + (residual * self.gamma.view(1, -1, 1, 1) + 1)
        return x + residual * torch.sigmoid(self.gamma.view(1, -1, 1, 1))


class ReadsInside(nn.Module):
    """A network that reads its block's layer scale by itself."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), ScaledOnce()

    def forward(self, x):
        return self.block(self.stem(x)) * self.block.gamma.view(1, -1, 1, 1)


class ScaledOnce(Scaled):
    def __init__(self):
        super().__init__("once")

    def forward(self, x):
        return x + self.conv(x).relu() * self.gamma.view(1, -1, 1, 1)


@pytest.mark.parametrize("way", ["twice", "rows", "columns", "also added", "through a sigmoid", "read by its parent"])
def test_what_is_no_layer_scale_stays(way):
    """The gate is static, and stays where it is; the output is the same."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Scaled(way), nn.Flatten(), nn.Linear(512, 5))
    if way == "read by its parent":
        model = nn.Sequential(ReadsInside(), nn.Flatten(), nn.Linear(512, 5))
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    converted = cmpe_se.convert(model, view="double_fc", example_inputs=x.float())
    assert len(gates(assert_static(moved(converted), x))) == 1


def test_a_factor_of_the_addition():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return torch.add(x, self.norm(self.conv(x)), alpha=0.3)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Scaled(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    assert_static(moved(cmpe_se.convert(randomise(model))))


def test_signals():
    torch.manual_seed(0)
    assert_static(moved(cmpe_se.convert(randomise(EcgNet()))), torch.randn(4, 2, 256, dtype=torch.float64))


def test_a_block_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
            self.conv, self.gate = nn.Conv2d(8, 8, 3, padding=1), CompetitiveSE(8, view="double_fc")

        def forward(self, x):
            x = self.stem(x)
            for _ in range(2):
                x = self.gate(self.conv(x), x)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Twice().double().eval()
    seen = []
    handle = model.gate.register_forward_pre_hook(lambda gate, inputs: seen.append(gate.gate(*inputs)))
    model(X)
    handle.remove()
    mean = Calibration(model, X).means["gate"]
    torch.testing.assert_close(mean, torch.cat(seen).mean(0))


def test_effects_and_the_numbers_of_gates():
    """A number takes those that change the output least, each frozen alone."""
    model = network("cmpe_se_preact_resnet20")
    means, before = naive_means(model, X), model(X).detach()
    expected = {}
    for name in means:
        change = (naive(model, X, means, [name]) - before).square().sum()
        expected[name.removesuffix(".attention")] = (change / (before - before.mean(0)).square().sum()).item()
    found = Calibration(model, [X[:4], (X[4:], None)]).effects()
    assert found == pytest.approx(expected, rel=1e-6)
    least = sorted(expected.values())
    for number in (1, 4):
        static = cmpe_se.with_static_gates(model, number, images=X)
        chosen = {name.removesuffix(".attention") for name, gate in gates(static).items() if gate.view == "static"}
        assert sorted(expected[name] for name in chosen) == pytest.approx(least[:number], abs=1e-12)
        same = naive(model, X, means, [f"{name}.attention" for name in chosen])
        torch.testing.assert_close(static(X), same)
        torch.testing.assert_close(cmpe_se.merge(static)(X), same)


def test_names_and_patterns():
    model = network("cmpe_se_preact_resnet20")
    for static, number in (("stages.0.*", 3), (["stages.0.blocks.1", "stages.2*"], 4)):
        made = cmpe_se.with_static_gates(model, static, images=X)
        assert sum(gate.view == "static" for gate in gates(made).values()) == number
    again = cmpe_se.with_static_gates(made, images=X)  # those that are static already stay
    assert {gate.view for gate in gates(again).values()} == {"static"}
    assert torch.equal(again.stages[0].blocks[1].attention.fc2.bias, made.stages[0].blocks[1].attention.fc2.bias)


def test_a_static_gate_is_trained_copied_and_saved(tmp_path):
    model = network("cmpe_se_preact_resnet20").float()
    chosen = ["stages.0.blocks.0", "stages.1.blocks.2"]
    static = cmpe_se.with_static_gates(model, chosen, images=X.float())
    for other in (copy.deepcopy(static), pickle.loads(pickle.dumps(static))):
        assert torch.equal(other(X.float()), static(X.float()))
    same = timm.create_model("cmpe_se_preact_resnet20", static=chosen)
    same.load_state_dict(static.state_dict())
    assert torch.equal(same.eval()(X.float()), static(X.float()))
    timm.models.save_for_hf(same, tmp_path, model_args={"static": chosen}, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(X.float()), static(X.float()))
    same.train()(X.float()).square().sum().backward()
    assert all(weight.grad is not None for gate in gates(same).values() for weight in gate.parameters())


def test_converted_networks_are_made_with_static_gates_too():
    chosen = ["layer1.0", "layer3.0"]
    model = timm.create_model("cmpe_se_converted", base="test_resnet", view="se", static=chosen)
    views = {name.rpartition(".")[0]: gate.view for name, gate in gates(model).items()}
    assert {name for name, view in views.items() if view == "static"} == set(chosen)
    with pytest.raises(ValueError, match=r"static names no block with a gate: layer9; there are layer1\.0"):
        timm.create_model("cmpe_se_converted", base="test_resnet", static=["layer9"])
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0: view 'aff' differs from position to position"):
        timm.create_model("preact_resnet20", view="aff", static=["stages.0.blocks.0"])


def test_wrappers_and_modes():
    model = network("cmpe_se_preact_resnet20").train()
    compiled = torch.compile(model)
    static = cmpe_se.with_static_gates(compiled, images=X)
    assert not static.training
    assert model.training
    torch.testing.assert_close(static(X), naive(model.eval(), X, naive_means(model, X), list(gates(model))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gates_at_their_ends_stay_numbers(dtype):
    model = network("cmpe_se_preact_resnet20")
    nn.init.constant_(model.stages[0].blocks[0].attention.fc2.weight, 1e6)
    static = cmpe_se.with_static_gates(model.to(dtype), images=X)
    assert all(weight.isfinite().all() for weight in static.parameters())


MISTAKES = {
    "no images": (lambda model: cmpe_se.merge(model, static="all"), "there are none; give images="),
    "images alone": (lambda model: cmpe_se.merge(model, images=X), "say which, such as static='all'"),
    "one image": (lambda model: cmpe_se.merge(model, static="all", images=X[:1]), "1 calibration image"),
    "an empty list": (lambda model: cmpe_se.merge(model, static="all", images=[]), "0 calibration image"),
    "words": (lambda model: cmpe_se.merge(model, static="all", images=["a"]), "batches of them, got str"),
    "labels": (lambda model: cmpe_se.merge(model, static="all", images=torch.arange(6)), "float tensor"),
    "too many": (lambda model: cmpe_se.merge(model, static=10, images=X), "static is 10, should be from 1 to 9"),
    "none": (lambda model: cmpe_se.merge(model, static=0, images=X), "static is 0, should be from 1 to 9"),
    "True": (lambda model: cmpe_se.merge(model, static=True, images=X), "static is True"),
    "a name": (lambda model: cmpe_se.merge(model, static=["layer9"], images=X), "layer9; there are stages.0.blocks.0"),
    "merged": (lambda model: cmpe_se.merge(cmpe_se.merge(model), static=1, images=X), "is merged"),
    "a gate": (lambda model: cmpe_se.merge(CompetitiveSE(8), static=1, images=X), "no gate that depends on the image"),
    "no gate": (lambda model: cmpe_se.merge(nn.Linear(2, 2), static=1, images=X), "no gate that depends on the image"),
    "static": (
        lambda model: cmpe_se.merge(cmpe_se.merge(network(view="static"), static=1, images=X)),
        "no gate that depends on the image",
    ),
}


@pytest.mark.parametrize(("call", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        call(network("cmpe_se_preact_resnet20"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("view", [name for name, view in TABLE.items() if view.by_position])
def test_gates_that_differ_from_position_to_position(view):
    model = network(view=view, start="one")
    with pytest.raises(UserError, match=f"stages.0.blocks.0 .view '{view}'. differs from position to position"):
        cmpe_se.with_static_gates(model, images=X)
    with pytest.raises(UserError, match="static is 1, should be from 1 to 0"):
        cmpe_se.with_static_gates(model, 1, images=X)


def test_outputs_that_cannot_be_compared():
    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network("cmpe_se_preact_resnet20")

        def forward(self, x):
            return [self.network(x)[: len(x) // 2], torch.tensor(1)] if len(x) > 2 else {"none": None}

    with pytest.raises(UserError, match="cannot be compared; name the blocks"):
        cmpe_se.with_static_gates(Boxes(), 2, images=[X[:4], X[4:]])
    assert cmpe_se.with_static_gates(Boxes(), "*stages.0*", images=[X[:4], X[4:]])
