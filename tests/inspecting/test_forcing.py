"""``forced_gates``: the network computes with the given gates, is seen to, and is left as it was."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cmpe_se import PreActResNet, inspect, merge
from cmpe_se.errors import UserError
from cmpe_se.inspecting import find_gates, forced_gates, gated_blocks, held_one_by_one
from tests.inspecting.test_inspect import CONVERTED, converted, images, state_of
from tests.networks.naive import SMALL_NETWORKS, SQUEEZE_VIEWS, randomise


@torch.no_grad()
def with_gate(model: nn.Module, block: str, gate: Tensor, x: Tensor) -> Tensor:
    """The output with a gate replaced in Python, whatever it would have computed."""
    model = copy.deepcopy(model)
    attention = find_gates(model)[block]
    attention.gate = lambda residual, _=None: gate.expand(len(residual), -1).clone()
    attention.forward = lambda residual, identity: identity + gate[:, None, None] * residual
    return model(x)


def values(gain: float, channels: int) -> list[Tensor]:
    some = torch.rand(channels, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * gain
    return [torch.zeros(channels).double(), torch.full((channels,), gain).double(), some]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("view", SQUEEZE_VIEWS)
@pytest.mark.parametrize("kind", SMALL_NETWORKS)
def test_our_networks(kind, view, merged):
    torch.manual_seed(0)
    model = randomise(SMALL_NETWORKS[kind](view=view, dtype=torch.float64)).eval()
    held, x = merge(model) if merged else model, images()
    with torch.no_grad():
        before = held(x)
    for number, block in enumerate(gated_blocks(model)):
        gates = values(1.0, find_gates(model)[block].channels)
        for gate in gates if number == 1 else gates[-1:]:
            with forced_gates(held, block, gate), torch.no_grad():
                torch.testing.assert_close(held(x), with_gate(model, block, gate, x), rtol=1e-9, atol=1e-9)
                view_of = {view.name: view for view in inspect(held, x)}
            torch.testing.assert_close(view_of[block].gate, gate.expand(len(x), -1), rtol=0, atol=1e-15)
            assert view_of[block].residual_squeeze.isfinite().all()  # also where a closed gate hides the residual
    with torch.no_grad():
        assert torch.equal(held(x), before)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", SMALL_NETWORKS)
def test_one_block_after_another_in_one_pass(kind, merged):
    torch.manual_seed(0)
    model = randomise(SMALL_NETWORKS[kind](view="folded_3x3", dtype=torch.float64)).eval()
    model, x = merge(model) if merged else model, images()[:1]
    channels = {view.name: view.gate.shape[1] for view in inspect(model, x)}
    gates = {block: values(1.0, number)[2] for block, number in channels.items()}
    before = model(x)
    together = held_one_by_one(model, x[0], gates)
    for row, (block, gate) in zip(together, gates.items(), strict=True):
        with forced_gates(model, block, gate), torch.no_grad():
            torch.testing.assert_close(row, model(x)[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("view", SQUEEZE_VIEWS)
@pytest.mark.parametrize("name", CONVERTED)
def test_converted_networks(name, view):
    model = converted(name, view)
    x, block = images(side=40), gated_blocks(model)[1]
    for gate in values(2.0, find_gates(model)[block].channels):
        with forced_gates(model, block, gate), torch.no_grad():
            torch.testing.assert_close(model(x), with_gate(model, block, gate, x), rtol=1e-9, atol=1e-9)


def test_one_value_for_all_channels_and_the_ends_are_exact():
    model = randomise(PreActResNet(11, view="folded_3x3")).eval()
    block, x = gated_blocks(model)[0], images().float()
    for value in (0, 1):
        with forced_gates(model, block, value):
            gate = inspect(model, x)[0].gate
        assert torch.equal(gate, torch.full_like(gate, value))


def test_leaves_no_trace_also_after_an_error():
    model = randomise(PreActResNet(11, view="folded_3x3"))
    state = state_of(model)
    with pytest.raises(RuntimeError, match="within"), forced_gates(model, gated_blocks(model)[0], 0.5):
        raise RuntimeError("within")
    assert state_of(model) == state


@pytest.mark.parametrize(
    ("block", "gates", "message"),
    [
        ("stages.9", 0.5, r"called 'stages\.9'; there are stages\.0\.blocks\.0"),
        ("stages.0.blocks.0", 1.5, "from 0 to 1; 1.5 is outside"),
        ("stages.0.blocks.0", float("nan"), "from 0 to 1; nan is outside"),
        ("stages.0.blocks.0", torch.zeros(3), "channels; give one gate or one each, not 3"),
    ],
)
def test_mistakes(block, gates, message):
    with pytest.raises(UserError, match=message), forced_gates(PreActResNet(11, view="se"), block, gates):
        pass


def test_a_network_without_gates():
    with pytest.raises(UserError, match="no gates"), forced_gates(PreActResNet(11), "stages.0.blocks.0", 0):
        pass
