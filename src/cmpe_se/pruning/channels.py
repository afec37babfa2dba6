"""Channels that can only go together, read off torch-pruning's dependency graph of the network without its gates.

Gates lay channels out as pictures, of which no dependency graph knows. Without them a residual network is one that it
understands, with the same layers under the same names. What it finds there is pruned in the network with gates: the
inner channels of a block concern no gate, and where channels of the residual stream go, the gates are made anew.
"""

import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmpe_se.errors import UserError
from cmpe_se.finetuning.gates import gates_of
from cmpe_se.finetuning.stripping import strip_gates
from cmpe_se.pruning.widths import channels_of, is_grouped
from cmpe_se.utils.copying import copy_network
from cmpe_se.utils.packages import require
from cmpe_se.utils.text import in_one_line


@dataclass(frozen=True, eq=False)
class Member:
    """One side of a layer whose channels go with those of a group.

    Args:
        name: of the layer.
        gives: whether the channels are those that it gives; those that it takes if not. A norm, or a depthwise
            convolution, gives what it takes.
        places: for each channel of the group, its places among the layer's channels (several behind a flattening).
    """

    name: str
    gives: bool
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of several layers of which the one cannot go without the others.

    Args:
        name: of the first layer that makes them.
        members: all that make, carry or read them, in the order in which they run.
        stream: whether they are channels of a residual stream: something is added to them.
        entry: torch-pruning's own group, whose layers are those of the network without gates.
    """

    name: str
    members: tuple[Member, ...]
    stream: bool
    entry: Any

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.members[0].places)

    def members_that(self, *, give: bool) -> list[Member]:
        """Members whose channels are those that they give, or those that they take."""
        return [member for member in self.members if member.gives == give]


@dataclass(frozen=True, eq=False)
class Channels:
    """What can be pruned in a network.

    Args:
        plain: copy of the network without its gates, whose weights the criteria look at.
        groups: in the order in which they run; the classifier's outputs are none of them.
        left: name of the first layer of each group that stays whole, to the reason.
    """

    plain: nn.Module
    groups: list[ChannelGroup]
    left: dict[str, str]

    @property
    def inner(self) -> list[ChannelGroup]:
        """Groups within blocks."""
        return [group for group in self.groups if not group.stream]


def find_channels(model: nn.Module, image: Tensor) -> Channels:
    """Groups of channels that go together.

    Args:
        model: the network; it is left as it was.
        image: (1, C, H, W), one that it takes.

    Raises:
        MissingPackageError: without torch-pruning.
        UserError: a merged network, one whose gates are part of its own code, or one that cannot be traced.
    """
    require(("torch_pruning",), "pruning", extra="prune")
    import torch_pruning

    plain = strip_gates(model) if gates_of(model) else copy_network(model, "take a network that can be copied")
    plain.eval().requires_grad_(True)
    names = {module: name for name, module in plain.named_modules()}
    order: dict[nn.Module, int] = {}

    def note(layer: nn.Module, _: object) -> None:
        order.setdefault(layer, len(order))

    handles = [layer.register_forward_pre_hook(note) for layer in names if channels_of(layer) is not None]
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(plain, image)
    except Exception as error:  # a graph of a network that does something unheard of
        raise UserError(
            f"the channels of {type(plain).__name__} cannot be followed from layer to layer: {in_one_line(error)}"
        ) from None
    finally:
        for handle in handles:
            handle.remove()

    groups, left = [], {}
    for entry in graph.get_all_groups(ignored_layers=_outputs(graph, names)):
        group = _group(entry, names, order, graph)
        if reason := _why_not(entry, names, group):
            left[group.name if group else names[entry[0].dep.target.module]] = reason
        elif group:
            groups.append(group)
    groups.sort(key=lambda group: order[plain.get_submodule(group.name)])
    return Channels(plain, groups, left)


def _outputs(graph: Any, names: dict[nn.Module, str]) -> list[nn.Module]:
    """Layers whose channels are the network's outputs: no other layer reads them."""
    return [layer for layer, node in graph.module2node.items() if layer in names and not _is_read(node, names)]


def _is_read(node: Any, names: dict[nn.Module, str]) -> bool:
    ahead, seen = list(node.outputs), {node}
    while ahead:
        other = ahead.pop()
        if other.module in names:
            return True
        if other not in seen:
            seen.add(other)
            ahead += other.outputs
    return False


def _group(entry: Any, names: dict[nn.Module, str], order: dict[nn.Module, int], graph: Any) -> ChannelGroup | None:
    """torch-pruning's group in our words; None where a layer is none that we know."""
    places: dict[tuple[nn.Module, bool], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    stream = False
    for item in entry:
        layer = item.dep.target.module
        if layer not in names:
            stream |= "AddBackward" in str(item.dep.target.name)
            continue
        if layer not in order:
            return None
        gives = graph.is_out_channel_pruning_fn(item.dep.handler)
        for root, place in zip(item.root_idxs, item.idxs, strict=True):
            places[layer, gives][root].append(place)
    channels = len(entry[0].idxs)
    members = [
        Member(names[layer], gives, tuple(tuple(found[root]) for root in range(channels)))
        for (layer, gives), found in sorted(places.items(), key=lambda one: order[one[0][0]])
    ]
    makers = [member for member in members if member.gives]
    return ChannelGroup(makers[0].name, tuple(members), stream, entry) if makers else None


def _why_not(entry: Any, names: dict[nn.Module, str], group: ChannelGroup | None) -> str | None:
    for item in entry:
        layer = item.dep.target.module
        if isinstance(layer, nn.Parameter):
            return "a parameter outside any layer has as many channels"
        if layer in names and channels_of(layer) is None:
            return f"{names[layer]} ({type(layer).__name__}) is no layer whose channels can go one by one"
        if layer in names and is_grouped(layer):
            return f"{names[layer]} is a convolution in groups"
    return None if group else "it makes no channels of its own"
