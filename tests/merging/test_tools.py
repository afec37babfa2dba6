"""Converted and merged networks, and our own, in the tools of PyTorch, torchvision and timm."""

import copy

import pytest
import timm
import torch
from timm.models._features_fx import FeatureGraphNet
from torch import fx, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from cmpe_se import CompetitiveSE, convert, merge
from cmpe_se.errors import UserError
from cmpe_se.merging import MergedGate
from tests.networks.naive import SMALL_NETWORKS, randomise

GATES = (CompetitiveSE, MergedGate)


def images(batch=2):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def build(name: str) -> nn.Module:
    """Such as ``merged converted folded_3x3``, in eval mode, with nothing at its initial value."""
    torch.manual_seed(0)
    *merged, kind, view = name.split()
    if kind == "converted":
        model = convert(timm.create_model("test_resnet"), view=view, bias=True)
    else:
        model = SMALL_NETWORKS[kind](view=view, bias=True)
    model = randomise(model).eval()
    return merge(model) if merged else model


NETWORKS = [
    *("converted folded_3x3", "converted timm_cbam", "bottleneck folded_3x3", "basic static"),
    *("merged converted folded_3x3", "merged converted se", "merged converted aff", "merged bottleneck folded_3x3"),
]


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> nn.Module:
    return build(request.param)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_traced_by_torch_fx(network):
    graph = fx.symbolic_trace(network)
    assert_close(graph(images()), network(images()))
    assert_close(fx.symbolic_trace(graph)(images(3)), network(images(3)))  # and again
    assert_close(copy.deepcopy(graph)(images()), network(images()))
    gates = [name for name, module in network.named_modules() if isinstance(module, GATES)]
    assert gates == [node.target for node in graph.graph.nodes if node.op == "call_module" and node.target in gates]


@torch.no_grad()
def test_features_of_torchvision(network):
    names = get_graph_node_names(network)[1]
    gates = [name for name, module in network.named_modules() if isinstance(module, GATES)]
    assert set(gates) <= set(names)
    convs = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d) and name in names]
    wanted = {convs[-1]: "conv", gates[-1]: "gate", names[-1]: "output"}
    features = create_feature_extractor(network, wanted)(images())
    seen = {}
    hooked = copy.deepcopy(network)
    for name in (convs[-1], gates[-1]):
        hooked.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: seen.update({wanted[name]: y + 0}))
    assert_close(features["output"], hooked(images()))
    assert_close(features["conv"], seen["conv"])
    activated = seen["gate"].relu()  # an activation behind the gate may write over what it put out
    assert any(torch.allclose(features["gate"], value, atol=1e-4) for value in (seen["gate"], activated))


@torch.no_grad()
def test_features_of_timm(network):
    kept = FeatureGraphNet(network, out_indices=(1, 2))(images())
    assert [y.shape[0] for y in kept] == [2, 2]
    assert not any(y.isnan().any() for y in kept)


@torch.no_grad()
def test_features_only():
    model = timm.create_model("cmpe_se_resnet18", features_only=True, feature_cls="fx", out_indices=(1, 2)).eval()
    assert [y.shape[1] for y in model(images())] == [64, 128]


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_quantised_after_tracing():
    """Gates stay as they are."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    for name in ("converted folded_3x3", "merged converted folded_3x3"):
        network = build(name)
        prepared = prepare_fx(copy.deepcopy(network), get_default_qconfig_mapping("x86"), (images(),))
        assert_close(prepared(images()), network(images()))
        quantised = convert_fx(prepared)
        gate = next(module for module in quantised.modules() if isinstance(module, GATES))
        assert all(parameter.dtype == torch.float32 for parameter in gate.parameters())
        expected = network(images())
        assert (quantised(images()) - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("gradients", [False, True])
def test_vmap(network, gradients):
    with torch.set_grad_enabled(gradients):
        mapped = torch.func.vmap(lambda image: network(image[None])[0])(images())
        assert_close(mapped, network(images()))


def test_forward_mode(network):
    with torch.no_grad():
        output, tangent = torch.func.jvp(network, (images(),), (torch.ones(2, 3, 64, 64),))
    x = images().requires_grad_()
    sums = torch.autograd.grad(network(x).sum(), x)[0].sum()
    assert_close(output, network(images()))
    torch.testing.assert_close(tangent.sum(), sums, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_gates(network, register):
    hooked, seen = copy.deepcopy(network), []
    gates = [module for module in hooked.modules() if isinstance(module, GATES)]
    for gate in gates:
        getattr(gate, register)(lambda module, *gradients: seen.append(module))
    x, y = images().requires_grad_(), images().requires_grad_()
    hooked(x).sum().backward()
    network(y).sum().backward()
    assert_close(x.grad, y.grad)
    assert seen == gates[::-1]


def test_forward_hooks_of_gates(network):
    hooked, seen = copy.deepcopy(network), []
    gates = [module for module in hooked.modules() if isinstance(module, GATES)]
    for gate in gates:
        gate.register_forward_pre_hook(lambda module, inputs: seen.append(module))
        gate.register_forward_hook(lambda module, inputs, output: seen.append(module))
    with torch.no_grad():
        assert_close(hooked(images()), network(images()))
    assert seen == [gate for gate in gates for _ in "12"]


def test_hooks_put_on_a_merged_network_keep_what_they_saw():
    merged, kept = build("merged converted folded_3x3"), {}
    for name, module in merged.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, y, name=name: kept.update({name: (y, y.clone())}))
    with torch.no_grad():
        merged(images())
    last = [name for name in kept if name.endswith("conv3")]
    assert last
    assert all(torch.equal(*kept[name]) for name in last)  # no sum was written over them


def test_recomputed_and_counted(network):
    x, y = images().requires_grad_(), images().requires_grad_()
    checkpoint(network, x, use_reentrant=False).sum().backward()
    network(y).sum().backward()
    assert_close(x.grad, y.grad)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images())
    assert counter.get_total_flops() > 0


@pytest.mark.filterwarnings("ignore")
def test_torchscript(network):
    with torch.no_grad():
        assert_close(torch.jit.trace(network, images())(images(5)), network(images(5)))
    with pytest.raises(UserError, match=r"torch\.jit\.script cannot compile .*torch\.jit\.trace, torch\.export and"):
        torch.jit.script(network)
