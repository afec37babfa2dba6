"""The networks that a benchmark compares: one plain network, and that network with each kind of attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cmpe_se.conversion import convert
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.views import PAPER_VIEWS, TABLE
from cmpe_se.networks.blocks import PreActBlock
from cmpe_se.networks.registry import PLAIN_NETWORKS

PLAIN = "plain"
NAIVE = "_naive"


def contenders() -> tuple[str, ...]:
    """The plain network, and every view; ``_naive`` is the paper's plain form of its own."""
    return (PLAIN, *TABLE, *(view + NAIVE for view in PAPER_VIEWS))


def check_contenders(names: list[str]) -> None:
    """Refuse names that are none of :func:`contenders`."""
    if unknown := [name for name in names if name not in contenders()]:
        raise UserError(f"unknown contender '{unknown[0]}'; choose of {', '.join(contenders())}")


def build(model: str, contender: str, **gates: Any) -> nn.Module:
    """A contender with random weights, the same seed for all.

    Args:
        model: name of the plain network, of cmpe_se or of timm.
        contender: one of :func:`contenders`.
        gates: start, reduction, min_hidden, bias and mask of its gates.

    Raises:
        UserError: unknown network, one without residual additions, or one whose channels the view cannot fold.
    """
    torch.manual_seed(0)
    if contender == PLAIN:
        return _create(model)
    view = contender.removesuffix(NAIVE)
    if model not in PLAIN_NETWORKS:
        network = convert(_create(model), view=view, **gates)
        return _replace_gates(network, _NaiveGate) if contender.endswith(NAIVE) else network
    network = _create(model, view=view, **gates)
    if contender.endswith(NAIVE):
        for block in network.modules():
            if isinstance(block, PreActBlock) and isinstance(block.attention, CompetitiveSE):
                setattr(block, "attention", _NaiveGate(block.attention))  # noqa: B010 (of another type)
                setattr(block, "forward", partial(_naive_forward, block))  # noqa: B010 (of this one block)
    return network


def _create(model: str, **settings: Any) -> nn.Module:
    try:
        return timm.create_model(model, **settings)
    except RuntimeError as error:  # timm's for a name that it does not know
        raise UserError(f"no network '{model}': {error}; `cmpe-se models` lists those of cmpe_se") from None


class _NaiveGate(nn.Module):
    """A gate as the paper writes it: every squeeze reads its tensor, and scaling and addition are a pass each."""

    def __init__(self, gate: CompetitiveSE):
        super().__init__()
        self.gate = gate

    def forward(self, residual: Tensor, identity: Tensor) -> Tensor:
        gate, r, i = self.gate, residual.mean((2, 3)), identity.mean((2, 3))
        if gate.view == "se":
            hidden = gate.fc1(r).relu()
        elif gate.view == "double_fc":
            hidden = torch.cat((gate.fc_residual(r).relu(), gate.fc_identity(i).relu()), dim=1)
        else:
            maps = gate.map_norm(gate.map_conv(gate.picture(r, i)))
            hidden = gate.fc1(maps.mean(1).flatten(1)).relu()
        scale = gate.gain * gate.fc2(hidden).sigmoid()
        return identity + scale[:, :, None, None] * residual


def _naive_forward(block: PreActBlock, x: Tensor, _: Tensor | None = None) -> tuple[Tensor, None]:
    h = torch.relu(block.bn1(x))
    shortcut = x if block.shortcut is None else block.shortcut(h)
    gate = block.get_submodule("attention")
    return gate(block.last_conv(block.branch(h)), shortcut), None


def _replace_gates(network: nn.Module, replacement: Callable[[CompetitiveSE], nn.Module]) -> nn.Module:
    for block in list(network.modules()):
        for name, child in list(block.named_children()):
            if isinstance(child, CompetitiveSE):
                setattr(block, name, replacement(child))
    return network
