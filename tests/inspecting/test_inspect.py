"""``cmpe_se.inspect``: equal to the equations written out, in float64 with nothing at its initial value; no traces."""

import copy
from typing import NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

import cmpe_se
from cmpe_se import CompetitiveSE, PreActResNet, convert, merge
from cmpe_se.errors import UserError
from tests.networks.naive import (
    KERNELS,
    SMALL_NETWORKS,
    SQUEEZE_VIEWS,
    naive_flows,
    naive_gate,
    naive_picture,
    randomise,
)
from tests.tiers import long_but

CONVERTED = {
    "resnet18": {"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)},
    "test_resnet": {},
}
"""timm's basic blocks, narrow; and bottlenecks, whose merged gates read a narrower tensor."""


class Naive(NamedTuple):
    """One block, written out."""

    name: str
    r: Tensor
    i: Tensor
    gate: Tensor
    identity: Tensor
    added: Tensor
    attention: nn.Module


def converted(name: str, view: str) -> nn.Module:
    """A converted network in float64, nothing at its initial value."""
    torch.manual_seed(0)
    model = randomise(convert(timm.create_model(name, num_classes=5, **CONVERTED[name]), view=view).double()).eval()
    for module in model.modules():  # without weights of training, deep networks of random norms grow
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1.5)
    return model


def images(side: int = 12, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def naive_ours(model: nn.Module, x: Tensor) -> list[Naive]:
    x = model.stem(x)
    found = []
    for name, block in model.named_modules():
        if isinstance(block, cmpe_se.networks.blocks.PreActBlock):
            u, s = naive_flows(block, x)
            found.append(_naive(name, block.attention, u, s))
            x = s + found[-1].added
    return found


@torch.no_grad()
def naive_converted(model: nn.Module, x: Tensor) -> list[Naive]:
    x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    found = []
    for name, block in model.named_modules():
        if hasattr(block, "competition"):
            h = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x)))))
            if hasattr(block, "conv3"):
                h = block.bn3(block.conv3(block.act2(h)))
            s = x if block.downsample is None else block.downsample(x)
            found.append(_naive(name, block.competition, h, s))
            x = torch.relu(s + found[-1].added)
    return found


def _naive(name: str, attention: CompetitiveSE, u: Tensor, s: Tensor) -> Naive:
    r, i = u.mean((2, 3)), s.mean((2, 3))
    gate = attention.gain * naive_gate(attention, r, i)
    return Naive(name, r, i, gate, s, gate[:, :, None, None] * u, attention)


def assert_seen(views: list[cmpe_se.inspecting.BlockView], expected: list[Naive], *, merged: bool) -> None:
    def close(actual: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)

    assert [view.name for view in views] == [naive.name for naive in expected]
    for view, naive in zip(views, expected, strict=True):
        assert (view.view, view.gain) == (naive.attention.view, naive.attention.gain)
        close(view.gate, naive.gate)
        close(view.residual_squeeze, naive.r)
        close(view.identity_squeeze, naive.i)
        close(view.identity_energy, naive.identity.square().mean((2, 3)))
        close(view.residual_energy, naive.added.square().mean((2, 3)))
        energies = naive.identity.square().sum((1, 2, 3)), naive.added.square().sum((1, 2, 3))
        close(view.residual_share, energies[1] / sum(energies))
        if merged or view.view not in KERNELS:
            assert view.picture is view.map is view.attentional_picture is None
            continue
        columns = naive.attention.picture_size[1]
        picture = naive_picture(naive.r, naive.i, view.view, columns)
        close(view.picture[:, 0], picture)
        close(view.attentional_picture[:, 0], naive_picture(naive.gate * naive.r, naive.i, view.view, columns))
        maps = naive.attention.map_norm(torch.conv2d(picture[:, None], naive.attention.map_conv.weight))
        close(view.map, maps.mean(1))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("view", SQUEEZE_VIEWS)
@pytest.mark.parametrize("kind", SMALL_NETWORKS)
def test_our_networks(kind, view, merged):
    torch.manual_seed(0)
    model = randomise(SMALL_NETWORKS[kind](view=view, dtype=torch.float64)).eval()
    x = images()
    assert_seen(cmpe_se.inspect(merge(model) if merged else model, x), naive_ours(model, x), merged=merged)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("view", SQUEEZE_VIEWS)
@pytest.mark.parametrize("name", long_but(CONVERTED, ["test_resnet"]))
def test_converted_networks(name, view, merged):
    model = converted(name, view)
    x = images(side=40)
    expected = naive_converted(model, x)
    assert any(naive.attention.gain == 2 and naive.gate.std() > 0.01 for naive in expected)
    assert_seen(cmpe_se.inspect(merge(model) if merged else model, x), expected, merged=merged)


def test_gates_as_layers_and_several_in_a_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(12, 12, 3, padding=1)
            self.first, self.second = CompetitiveSE(12), CompetitiveSE(12, view="se")

        def forward(self, x):
            x = self.second(self.conv(x), self.first(self.conv(x), x))
            return self.first(self.conv(x), x)

    block = Block()
    views = cmpe_se.inspect(nn.Sequential(nn.Conv2d(3, 12, 1), block), images().float())
    assert [view.name for view in views] == ["1.first", "1.second", "1.first"]
    assert not torch.equal(views[0].residual_squeeze, views[2].residual_squeeze)
    assert views[1].identity_squeeze.shape == (3, 12)


def state_of(model: nn.Module) -> dict:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: (module.training, sorted(vars(module)), [list(getattr(module, kind).values()) for kind in hooks])
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_leaves_no_trace(training, merged):
    model = randomise(PreActResNet(11, view="folded_3x3"))
    model = merge(model) if merged else model
    heard = []
    model.stages[0].blocks[0].shortcut.register_forward_hook(lambda *_: heard.append(1))
    if not merged:
        model.train(training)
        model.stages[1].eval()  # as somebody who freezes norms does
    weights, state, random = copy.deepcopy(model.state_dict()), state_of(model), torch.get_rng_state()
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    views = cmpe_se.inspect(model, images())  # float64 images for a float32 network
    assert state_of(model) == state
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert heard == [1]
    assert not any(view.gate.requires_grad for view in views)
    with pytest.raises(ValueError, match="takes images"):
        cmpe_se.inspect(model, torch.randn(1, 4, 8, 8))
    assert state_of(model) == state


def test_training_mode_looks_in_eval_mode():
    model = randomise(PreActResNet(11, view="pair_view_1x1", drop_path_rate=0.9)).train()
    one, two = cmpe_se.inspect(model, images()), cmpe_se.inspect(model.eval(), images())
    assert all(torch.equal(first.gate, second.gate) for first, second in zip(one, two, strict=True))


def test_the_output_is_the_network_s():
    model = randomise(PreActResNet(11, view="folded_3x3")).eval()
    x = images().float()
    with torch.no_grad():
        assert torch.equal(cmpe_se.inspecting.look(model, x)[0], model(x))


def test_compiled_network():
    model = randomise(PreActResNet(11, view="se")).eval()
    compiled = torch.compile(model, backend="eager")
    compiled(images().float())
    assert torch.equal(cmpe_se.inspect(compiled, images())[0].gate, cmpe_se.inspect(model, images())[0].gate)


MISTAKES = {
    "plain": (lambda: cmpe_se.inspect(PreActResNet(11), images()), "no gates.*convert"),
    "gate": (lambda: cmpe_se.inspect(CompetitiveSE(12), images()), "a gate by itself"),
    "no network": (lambda: cmpe_se.inspect("runs/x", images()), r"torch.nn.Module.*got str"),
    "bytes": (lambda: cmpe_se.inspect(PreActResNet(11, view="se"), images().byte()), "float tensor.*uint8"),
    "one image": (lambda: cmpe_se.inspect(PreActResNet(11, view="se"), images()[0]), r"float tensor.*\(3, 12, 12\)"),
    "none": (lambda: cmpe_se.inspect(PreActResNet(11, view="se"), images()[:0]), "at least one image"),
    "a list": (lambda: cmpe_se.inspect(PreActResNet(11, view="se"), ["a.png"]), "got list"),
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message):
        call()
