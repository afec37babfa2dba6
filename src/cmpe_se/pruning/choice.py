"""Which channels and blocks go, for a network of at most so many multiply-adds."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.static_twin import put_gate
from cmpe_se.pruning.channels import ChannelGroup
from cmpe_se.pruning.criteria import block_of
from cmpe_se.pruning.widths import channels_of, gate_of, narrow, remove_block

LEAST = 0.2
"""Part of a layer's channels that stays in any case."""


@dataclass(frozen=True, eq=False)
class Cut:
    """What goes.

    Args:
        kept: name of each group to the numbers of the channels that stay, ascending.
        gone: names of the blocks that go as a whole; their groups are not in ``kept``.
    """

    kept: Mapping[str, Tensor]
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Candidates:
    """Channels in the order in which they go.

    Args:
        groups: that may lose channels.
        importances: of each group's channels.
        counts: numbers of channels that each group may keep, ascending, up to all; see :func:`possible_counts`.
        blocks: names of the residual blocks.
        removable: those of them that may go as a whole, once all that is within would go below a fifth.
        whole: channels that each group had before anything was pruned.
    """

    groups: Sequence[ChannelGroup]
    importances: Mapping[str, Tensor]
    counts: Mapping[str, Sequence[int]]
    blocks: Sequence[str]
    removable: Sequence[str]
    whole: Mapping[str, int]

    @property
    def number(self) -> int:
        """Of all channels."""
        return sum(group.channels for group in self.groups)

    def without(self, number: int) -> Cut:
        """The cut that takes the ``number`` least important channels away, as far as the possible counts allow."""
        values = torch.cat([self.importances[group.name] for group in self.groups])
        rank = torch.empty(len(values), dtype=torch.long)
        rank[values.argsort(stable=True)] = torch.arange(len(values))
        kept, wanted, start = {}, {}, 0
        for group in self.groups:
            own = rank[start : start + group.channels]
            start += group.channels
            wanted[group.name] = int((own >= number).sum())
            count = next(count for count in self.counts[group.name] if count >= wanted[group.name])
            best = own.argsort(descending=True)[:count]
            kept[group.name] = best.sort().values
        gone = tuple(block for block in self.removable if self._is_spent(block, wanted))
        inside = {group.name for group in self.groups if not group.stream and block_of(group.name, gone)}
        return Cut({name: places for name, places in kept.items() if name not in inside}, gone)

    def _is_spent(self, block: str, wanted: Mapping[str, int]) -> bool:
        own = [group for group in self.groups if not group.stream and block_of(group.name, self.blocks) == block]
        return bool(own) and all(wanted[group.name] < LEAST * self.whole[group.name] for group in own)


def possible_counts(
    model: nn.Module, groups: Sequence[ChannelGroup], whole: Mapping[str, int], round_to: int
) -> dict[str, list[int]]:
    """Numbers of channels that each group may keep: all, and multiples of ``round_to`` from a fifth of the whole on.

    A number of a stream's channels has to suit the gates in it: pictures cannot fold any.

    Args:
        model: with its gates.
        groups: of it.
        whole: channels that each group had before anything was pruned.
        round_to: 1 for any number.
    """
    possible = {}
    for group in groups:
        least = max(1, round(LEAST * whole[group.name]))
        counts = [count for count in range(least, group.channels) if count % round_to == 0]
        if group.stream:
            gates = _gates_in(model, group).values()
            counts = [count for count in counts if all(_suits(gate, count) for gate in gates)]
        possible[group.name] = [*counts, group.channels]
    return possible


def _suits(gate: CompetitiveSE, channels: int) -> bool:
    try:
        with torch.device("meta"):
            CompetitiveSE(channels, view=gate.view)
    except ValueError:
        return False
    return True


def _gates_in(model: nn.Module, group: ChannelGroup) -> dict[str, CompetitiveSE]:
    """Gates, by their full names, in front of an addition to a stream."""
    gates = {name: module for name, module in model.named_modules() if isinstance(module, CompetitiveSE)}
    blocks = {name.rpartition(".")[0]: name for name in gates}
    made = {block_of(member.name, blocks) for member in group.members_that(give=True)}
    found = {name: gate for name, gate in gates.items() if name.rpartition(".")[0] in made}
    return {name: gate for name, gate in found.items() if gate.channels == group.channels}


def by_layer(importances: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Importances that take the same part of each group: each channel's rank within its own, from 0 to 1."""
    found = {}
    for name, values in importances.items():
        rank = torch.empty(len(values), dtype=torch.float64)
        rank[values.argsort(stable=True)] = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
        found[name] = rank
    return found


def apply(model: nn.Module, groups: Sequence[ChannelGroup], cut: Cut) -> None:
    """Take channels and blocks out of a network; gates whose channels go are made anew.

    Args:
        model: with or without gates, with the layers that ``groups`` names; it is changed.
        groups: of the network.
        cut: what goes.
    """
    sides: dict[tuple[str, bool], set[int]] = {}
    for group in groups:
        if group.name not in cut.kept:
            continue
        lost = set(range(group.channels)) - set(cut.kept[group.name].tolist())
        for member in group.members if lost else ():
            sides.setdefault((member.name, member.gives), set()).update(
                place for channel in lost for place in member.places[channel]
            )
    for (name, gives), lost in sides.items():
        layer = model.get_submodule(name)
        total = _width(layer, gives)
        kept = torch.tensor([place for place in range(total) if place not in lost])
        narrow(layer, outputs=kept) if gives else narrow(layer, inputs=kept)
    for block in cut.gone:
        remove_block(model, block)
    _renew_gates(model, groups, cut)


def _width(layer: nn.Module, gives: bool) -> int:
    both = channels_of(layer)
    assert both is not None  # groups have no other layers
    return both[gives]


def _renew_gates(model: nn.Module, groups: Sequence[ChannelGroup], cut: Cut) -> None:
    for group in groups:
        if group.stream and (kept := len(cut.kept.get(group.name, ()))) not in (0, group.channels):
            for gate in _gates_in(model, group).values():
                put_gate(model, gate, gate_of(gate, kept))


def smallest_within(
    candidates: Candidates, model: nn.Module, cost: Callable[[nn.Module], int], most: int
) -> tuple[Cut, int]:
    """The cut that takes the fewest channels of those that leave at most ``most`` multiply-adds; else the largest cut.

    Args:
        candidates: in the order in which they go.
        model: that they are channels of; it is left as it was.
        cost: counts a network's multiply-adds.
        most: of which there may be.

    Returns:
        The cut, and the multiply-adds with it.
    """
    shell = copy.deepcopy(model).to("meta")
    known: dict[int, tuple[Cut, int]] = {}

    def tried(number: int) -> tuple[Cut, int]:
        if number not in known:
            cut = candidates.without(number)
            network = copy.deepcopy(shell)
            apply(network, candidates.groups, cut)
            known[number] = cut, cost(network)
        return known[number]

    low, high = 0, candidates.number
    if tried(high)[1] > most:
        return tried(high)
    while low < high:
        middle = (low + high) // 2
        if tried(middle)[1] <= most:
            high = middle
        else:
            low = middle + 1
    return tried(low)
