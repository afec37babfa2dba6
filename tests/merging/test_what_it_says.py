"""Layers whose output is not what their parameters say: merged, the network's output stays what it was."""

import copy
import functools
import threading
import types

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, StdConv2d
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from cmpe_se import CompetitiveSE, convert, merge
from cmpe_se.errors import UserError
from cmpe_se.merging import MergedGate
from tests.networks.naive import SMALL_NETWORKS, randomise
from tests.tiers import long_but


def images(batch=3, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@functools.cache
def made(kind: str, view: str) -> nn.Module:
    torch.manual_seed(0)
    if kind in SMALL_NETWORKS:
        return randomise(SMALL_NETWORKS[kind](view=view, bias=True, dtype=torch.float64)).eval()
    model = timm.create_model("test_resnet").double()
    return randomise(convert(model, view=view, bias=True) if kind == "converted" else model).eval()


def make(kind: str, view="folded_3x3") -> nn.Module:
    """A network to alter."""
    return copy.deepcopy(made(kind, view))


@functools.cache
def norms_left(kind: str) -> list[str]:
    """The norms that are there once a network that nobody altered is merged."""
    return norms(merge(made(kind, "folded_3x3")))


def assert_same(model: nn.Module, merged: nn.Module, x=None):
    x = images() if x is None else x
    with torch.no_grad():
        expected, actual, nudged = model(x), merged(x), model(x * (1 + 1e-15))
    assert expected.isfinite().all()
    allowed = max(1e-11 * expected.abs().max(), 8 * (nudged - expected).abs().max())
    assert (actual - expected).abs().max() <= allowed
    assert allowed < 1e-6 * expected.abs().max()


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def last_convs(model: nn.Module) -> list[nn.Conv2d]:
    """The last convolution of each block."""
    blocks = [module for module in model.modules() if hasattr(module, "conv2")]
    return [getattr(block, "conv3", block.conv2) for block in blocks]


# What users do to a layer. Each alters what it puts out.


def adapter(layer):
    """As LoRA does: another map of the same input is added to what the layer puts out."""
    own, added = layer.forward, copy.deepcopy(layer)
    layer.forward = lambda x: own(x) + 0.5 * added(x)


def bound_forward(layer):
    layer.forward = types.MethodType(lambda self, x: 1.5 * type(self).forward(self, x) + 0.1, layer)


def forward_hook(layer):
    layer.register_forward_hook(lambda module, inputs, output: 1.3 * output + 0.2)


def forward_hook_with_keywords(layer):
    layer.register_forward_hook(lambda module, inputs, keywords, output: 1.3 * output, with_kwargs=True)


def forward_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, inputs: (1.3 * inputs[0] + 0.2,))


def forward_pre_hook_with_keywords(layer):
    layer.register_forward_pre_hook(lambda module, inputs, keywords: ((1.3 * inputs[0],), keywords), with_kwargs=True)


def parametrisation(layer):
    class Scale(nn.Module):
        def forward(self, values):
            return 1.5 * values

    if layer.weight is not None:
        parametrize.register_parametrization(layer, "weight", Scale())


def spectral_norm(layer):
    parametrizations.spectral_norm(layer)


def old_weight_norm(layer):
    nn.utils.weight_norm(layer)


def pruning(layer):
    if layer.weight is not None:
        prune.random_unstructured(layer, "weight", amount=0.3)


def own_class(layer):
    class Own(type(layer)):
        def forward(self, x):
            return super().forward(x).tanh()

    layer.__class__ = Own


def own_call(layer):
    class Own(type(layer)):
        def __call__(self, x):
            return 1.5 * super().__call__(x)

    layer.__class__ = Own


def computed_weight(layer):
    class Own(type(layer)):
        @property
        def weight(self):
            return 1.5 * self._parameters["weight"]

    if layer.weight is not None:
        layer.__class__ = Own


def helper_replaced(layer):
    name = "_conv_forward" if isinstance(layer, nn.Conv2d) else "forward"
    own = getattr(layer, name)
    setattr(layer, name, lambda *inputs: 1.5 * own(*inputs))


def weight_set_from_outside(layer):
    """As a hypernetwork does: the weight is a tensor that something else makes."""
    if layer.weight is not None:
        value = layer.weight.detach() * 1.5
        del layer.weight
        layer.weight = value


ANY_LAYER = [
    *(adapter, bound_forward, forward_hook, forward_hook_with_keywords, forward_pre_hook, parametrisation, pruning),
    *(forward_pre_hook_with_keywords, own_class, own_call, computed_weight, helper_replaced, weight_set_from_outside),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", ["converted", "bottleneck"])
@pytest.mark.parametrize("alter", [*ANY_LAYER, spectral_norm, old_weight_norm])
def test_convolutions(kind, alter):
    model = make(kind)
    for conv in last_convs(model):
        alter(conv)
    model(images())  # weights that hooks compute are there from now on, with their graphs
    merged = merge(model)
    assert_same(model, merged)
    behind = 0 if kind == "bottleneck" else len(last_convs(model))  # our blocks have no norm there
    if alter is not own_call or kind == "bottleneck":  # torch.fx would trace that into the block, which is left alone
        assert len(norms(merged)) == len(norms_left(kind)) + behind  # all else is folded
    assert not any(isinstance(module, CompetitiveSE) for module in merged.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", ["converted", "bottleneck"])
@pytest.mark.parametrize("alter", [adapter, forward_hook, pruning, own_call, helper_replaced, old_weight_norm])
def test_convolutions_behind_static_gates(kind, alter):
    model = make(kind, "static")
    for conv in last_convs(model):
        alter(conv)
    model(images())
    assert_same(model, merge(model))


@pytest.mark.parametrize("kind", long_but(["converted", "bottleneck"], ["converted"]))
@pytest.mark.parametrize("alter", ANY_LAYER)
def test_norms(kind, alter):
    model = make(kind)
    altered = [name for name in norms(model) if name.endswith("bn2")]
    for name in altered:
        alter(model.get_submodule(name))
    model(images())
    merged = merge(model)
    assert_same(model, merged)
    if alter is not own_call:
        assert set(norms(merged)) == {*norms_left(kind), *altered}  # all else is folded


@pytest.mark.parametrize("view", long_but(["folded_3x3", "double_fc"], ["folded_3x3"]))
@pytest.mark.parametrize("alter", ANY_LAYER)
def test_layers_of_a_gate(view, alter):
    """Then the gate stays as it is."""
    for kind in ("converted", "basic"):
        model = make(kind, view)
        for gate in model.modules():
            if isinstance(gate, CompetitiveSE):
                with torch.no_grad():  # timm could not copy a pruned weight with its graph
                    alter(gate.fc1 if hasattr(gate, "fc1") else gate.fc2)
        for merged in (reparameterize_model(model), merge(model)):
            assert_same(model, merged)
            assert not any(isinstance(module, MergedGate) for module in merged.modules())


def gate_hook(gate):
    gate.register_forward_hook(lambda module, inputs, output: 1.3 * output)


def gate_pre_hook(gate):
    gate.register_forward_pre_hook(lambda module, inputs: (1.3 * inputs[0], inputs[1]))


def gate_forward(gate):
    own = gate.forward
    gate.forward = lambda residual, identity: 1.3 * own(residual, identity)


def gate_method(gate):
    own = gate.gate
    gate.gate = lambda residual, identity: 0.5 * own(residual, identity)


def gate_subclass(gate):
    class Own(CompetitiveSE):
        def gate(self, residual, identity):
            return 0.5 * super().gate(residual, identity)

    gate.__class__ = Own


@pytest.mark.parametrize("view", long_but(["folded_3x3", "double_fc", "static"], ["folded_3x3"]))
@pytest.mark.parametrize("alter", [gate_hook, gate_pre_hook, gate_forward, gate_method, gate_subclass])
def test_gates(view, alter):
    for kind in ("converted", "basic", "bottleneck"):
        model = make(kind, view)
        plain = model(images())
        for gate in model.modules():
            if isinstance(gate, CompetitiveSE):
                alter(gate)
        assert not torch.allclose(model(images()), plain)  # it has its effect, in our own blocks too
        for merged in (merge(model), reparameterize_model(model)):
            assert_same(model, merged)
            assert not any(isinstance(module, MergedGate) for module in merged.modules())


@pytest.mark.parametrize("kind", ["converted", "bottleneck", "plain"])
def test_methods_of_a_whole_class_replaced(kind, monkeypatch):
    own = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 0.8 * own(self, x) + 0.1)
    model = make(kind)
    assert_same(model, merge(model))


@pytest.mark.parametrize("kind", ["converted", "bottleneck", "plain"])
def test_hooks_of_all_modules(kind):
    def shift(module, inputs, output):
        return output + 0.1 if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) else None

    model = make(kind)
    handle = nn.modules.module.register_module_forward_hook(shift)
    try:
        assert_same(model, merge(model))
    finally:
        handle.remove()


def keeps_training(norm):
    norm.train = types.MethodType(lambda self, mode=True: self, norm)
    norm.training = True


def without_statistics(norm):
    norm.running_mean = norm.running_var = None


@pytest.mark.parametrize("kind", ["converted", "basic", "plain"])
@pytest.mark.parametrize("alter", [keeps_training, without_statistics])
def test_norms_that_use_the_batch(kind, alter):
    model = make(kind)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            alter(norm)
    merged = merge(model)
    kept = copy.deepcopy(model)  # what follows would move running statistics
    assert_same(kept, merged)
    assert len(norms(merged)) == len(norms(model))


@pytest.mark.parametrize("layer", [nn.Identity, nn.Dropout])
@pytest.mark.parametrize("view", ["folded_3x3", "static"])
def test_layers_that_seemed_to_do_nothing(layer, view):
    for kind in ("converted", "basic"):
        model = make(kind, view)
        for module in model.modules():
            if isinstance(module, layer):
                module.forward = lambda x: 1.1 * x + 0.1
        assert_same(model, merge(model))


class TwoPlaces(nn.Module):
    """A convolution and a norm that take part elsewhere too, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Named()
        if way == "same module":
            self.block.norm = self.body[1]
        elif way == "same parameters":
            self.block.conv.weight, self.block.norm.weight = self.body[0].weight, self.body[1].weight

    def forward(self, x):
        y = self.block(self.body(x))
        if self.way == "norm called from outside":
            return y + self.block.norm(y)
        if self.way == "convolution called from outside":
            return y + self.block.conv(x)
        if self.way == "weight read":
            return y + functional.conv2d(x, self.block.conv.weight, padding=1)
        if self.way == "buffer read":
            return y + self.block.norm.running_var[None, :, None, None]
        if self.way == "walked":
            if x.shape[1] != 3:  # torch.fx cannot trace this
                raise ValueError
            seen = []
            for layer in self.body:
                x = layer(x)
                seen.append(x)
            return seen[0] + y
        return y


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x[:, :3]))


@pytest.mark.parametrize(
    "way",
    [
        *("same module", "same parameters", "norm called from outside", "convolution called from outside"),
        *("weight read", "buffer read", "walked", "nothing"),
    ],
)
def test_layers_in_two_places(way):
    torch.manual_seed(0)
    model = randomise(TwoPlaces(way).double()).eval()
    merged = merge(model)
    assert_same(model, merged)
    assert len(norms(merged)) == (0 if way in ("nothing", "same parameters") else 1)


@pytest.mark.parametrize("view", ["folded_3x3", "static"])
@pytest.mark.parametrize("part", ["gate", "last", "block"])
def test_shared_between_blocks(view, part):
    torch.manual_seed(0)
    model = convert(timm.create_model("resnet18"), view=view, bias=True)
    first, second = model.layer1
    if part == "gate":
        second.competition = first.competition
    elif part == "last":
        second.conv2, second.bn2 = first.conv2, first.bn2
    else:
        model.layer1[1] = first
    model = randomise(model.double()).eval()
    assert_same(model, merge(model))


class Rescaled(nn.Module):
    """A class of its own around the usual pair, and an activation in the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = StdConv2d(3, 8, 3), BatchNormAct2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 1), BatchNormAct2d(8)
        self.last.drop = nn.Softmax(1)

    def forward(self, x):
        return self.last(self.second(self.norm(self.conv(x))))


def test_classes_of_timm():
    torch.manual_seed(0)
    model = randomise(Rescaled().double()).eval()
    merged = merge(model)
    assert_same(model, merged)
    assert norms(merged) == ["norm", "last"]


class LowRank(nn.Module):
    """As peft wraps a layer: what it is called by is no convolution any more."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False).double()
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False).double()

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("wrap", [LowRank, torch.jit.script, lambda layer: torch.compile(layer, backend="eager")])
@pytest.mark.parametrize("view", ["folded_3x3", "static"])
def test_wrapped_layers(wrap, view):
    model = make("converted", view)
    for block in [module for module in model.modules() if hasattr(module, "conv2")]:
        block.conv2 = wrap(block.conv2)
    assert_same(model, merge(model))


def test_a_block_with_a_forward_of_its_own():
    """What torch.fx would trace is not what runs."""
    for kind in ("converted", "basic"):
        model = make(kind)
        for block in [module for module in model.modules() if hasattr(module, "conv2")]:
            own = block.forward
            if kind == "converted":
                block.forward = lambda x, own=own, block=block: own(x) + block.conv1(x).mean()
            else:
                branch = block.branch
                block.branch = lambda h, branch=branch, block=block: branch(h) + block.conv1(h).mean()
        assert_same(model, merge(model))


def test_what_cannot_be_copied():
    model = make("converted")
    model.layer2[0].conv2.lock = threading.Lock()
    with pytest.raises(UserError, match=r"^layer layer2\.0\.conv2 \(Conv2d\) cannot be copied.*lock.*; merge"):
        merge(model)
