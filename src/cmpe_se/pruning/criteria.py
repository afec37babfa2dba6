"""What a channel is worth: importances of the channels of each group, by several criteria.

``l1``, ``bn``, ``taylor`` and ``random`` are torch-pruning's. ``gate`` reads what the gates say: a channel is worth
what it adds to the residual stream, through the layers behind it and the gate in front of the addition.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from cmpe_se.errors import UserError
from cmpe_se.pruning.channels import ChannelGroup, Channels, Member

CRITERIA = ("gate", "taylor", "l1", "bn", "random")
"""Criteria of importance."""

Batches = Sequence[tuple[Tensor, Tensor]]
"""Batches of normalised images (N, C, H, W) and labels (N,)."""


@dataclass(frozen=True, eq=False)
class BlockWorth:
    """What a residual block adds to its identity, over images.

    Args:
        gate: mean of each channel's gate, (C,), float64; ones where the block has none.
        share: part of residual and identity that is residual, by energy, from 0 to 1.
        residual: name of the layer that makes the residual, which the gate scales; None where that is not known, and
            all that the block adds to the stream counts as scaled.
    """

    gate: Tensor
    share: float
    residual: str | None = None


def importances(
    criterion: str,
    model: nn.Module,
    channels: Channels,
    groups: Sequence[ChannelGroup],
    worth: Mapping[str, BlockWorth],
    batches: Batches,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Importance of each channel of some groups, (C,), float64, at least 0; their mean over a group is 1.

    With ``gate`` that mean is the residual share of the group's block instead, so that what adds little goes first.

    Args:
        criterion: one of :data:`CRITERIA`.
        model: the network with its gates; ``taylor`` takes its gradients.
        channels: of the network.
        groups: some of those.
        worth: of its blocks, by name.
        batches: for ``taylor``.
        seed: for ``random``.

    Returns:
        Name of each group to its importances; groups that have none by this criterion (``bn`` without a batch norm) are
        left out.

    Raises:
        UserError: none has any.
    """
    if criterion == "gate":
        scores = GateScores(channels, worth)
        return {group.name: scores.relative(group) * scores.share(group) for group in groups}
    import torch_pruning.pruner.importance as known

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if criterion == "taylor":
            _copy_gradients(model, channels.plain, batches)
        measure: Callable[[Any], Tensor | None] = {
            "taylor": known.GroupTaylorImportance,
            "l1": lambda: known.GroupMagnitudeImportance(p=1, group_reduction="first"),
            "bn": known.BNScaleImportance,
            "random": known.RandomImportance,
        }[criterion]()
        found = {group.name: measure(group.entry) for group in groups}
    channels.plain.zero_grad(set_to_none=True)
    known_ones = {name: _mean_one(values.double().cpu()) for name, values in found.items() if values is not None}
    if not known_ones:
        raise UserError(f"no batch norm scales any channels that could go; take another criterion than {criterion}")
    return known_ones


def _mean_one(values: Tensor) -> Tensor:
    mean = values.mean()
    return values / mean if mean > 0 else torch.ones_like(values)


def _copy_gradients(model: nn.Module, plain: nn.Module, batches: Batches) -> None:
    """Gradients of the network with gates, summed over batches, for the same weights without."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    kept = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    like = next(model.parameters())
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        with torch.enable_grad():
            for images, labels in batches:
                cross_entropy(model(images.to(like)), labels.to(like.device)).backward()
        own = dict(model.named_parameters())
        for name, parameter in plain.named_parameters():
            gradient = own[name].grad
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(kept[name])
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True, eq=False)
class GateScores:
    """What each channel adds to the residual stream, by weights and mean gates.

    Output o of a block's last convolution is worth w(o) = (mean gate of o) x (scale of o in the norm behind it).
    Channel c of the layer before is worth s(c) sqrt(sum over o of (w(o) |W(o, c)|)^2): W is the convolution, |W(o, c)|
    the norm of its kernel from c to o, and s(c) the scale of the batch norm that made c. From there it goes on to the
    channels of the layer before that. A channel of the stream is worth what all blocks' rows together add to it.
    """

    channels: Channels
    worth: Mapping[str, BlockWorth]
    _known: dict[str, Tensor] = field(default_factory=dict)

    def relative(self, group: ChannelGroup) -> Tensor:
        """Worth of each channel, (C,), float64, relative to their mean."""
        return _mean_one(self._of(group))

    def share(self, group: ChannelGroup) -> float:
        """Residual share of the group's block; of a stream, the mean of its blocks; of the rest, the mean of all."""
        names = [member.name for member in group.members if member.gives or not group.stream]
        blocks = dict.fromkeys(block for name in names if (block := block_of(name, self.worth)))
        shares = [self.worth[block].share for block in blocks]
        shares = shares or [one.share for one in self.worth.values()] or [1.0]
        return sum(shares) / len(shares)

    def _of(self, group: ChannelGroup) -> Tensor:
        if group.name not in self._known:
            self._known[group.name] = torch.ones(group.channels, dtype=torch.float64)  # where it reads itself
            self._known[group.name] = self._added(group) if group.stream else self._passed_on(group)
        return self._known[group.name]

    def _added(self, group: ChannelGroup) -> Tensor:
        """Of a stream's channels: the norm of what the rows of all layers that make them give."""
        total = torch.zeros(group.channels, dtype=torch.float64)
        for member in group.members_that(give=True):
            if (weight := self._weight(member)) is not None:
                rows = weight.flatten(1).square().sum(1) * self._outputs(member.name, weight).square()
                total += torch.stack([rows[list(places)].sum() for places in member.places])
        return total.sqrt()

    def _passed_on(self, group: ChannelGroup) -> Tensor:
        """Of channels within a block: what the layers that read them last make of them."""
        makers = group.members_that(give=True)
        last = max(group.members.index(member) for member in makers)
        own = {member.name for member in makers}  # such as SE by a single layer, which scales what it reads
        readers = [member for member in group.members[last:] if not member.gives and member.name not in own]
        total = torch.zeros(group.channels, dtype=torch.float64)
        for reader in readers:
            if (weight := self._weight(reader)) is not None:
                scaled = weight.flatten(2).square().sum(2) if weight.ndim > 2 else weight.square()  # (out, in)
                columns = (scaled * self._outputs(reader.name, weight).square()[:, None]).sum(0)
                total += torch.stack([columns[list(places)].sum() for places in reader.places])
        norms = [member for member in makers if isinstance(self._layer(member.name), _BatchNorm)]
        scale = torch.ones(group.channels, dtype=torch.float64)
        if norms and (weight := self._layer(norms[-1].name).weight) is not None:
            scale = torch.stack([weight.detach().double().cpu().abs()[list(p)].sum() for p in norms[-1].places])
        return scale * total.sqrt()

    def _outputs(self, name: str, weight: Tensor) -> Tensor:
        """What each output of a layer is worth, (out,)."""
        group = next((one for one in self.channels.groups if _gives(one, name)), None)
        if group is not None and not group.stream:
            # Each output of the layer is a channel of a group within the block; its norm is in that group's worth.
            values = torch.zeros(len(weight), dtype=torch.float64)
            member = next(one for one in group.members if one.gives and one.name == name)
            for places, value in zip(member.places, self._of(group), strict=True):
                values[list(places)] = value
            return values
        gate, block = torch.ones(len(weight), dtype=torch.float64), block_of(name, self.worth)
        if block is not None and len(self.worth[block].gate) == len(weight) and self._is_residual(name, block):
            gate = self.worth[block].gate
        return gate * self._scale_behind(name, len(weight))

    def _is_residual(self, name: str, block: str) -> bool:
        """Whether the block's gate scales what a layer gives, by itself or through the norm behind it."""
        made = self.worth[block].residual
        norm = self.norms.get(name)
        return made in (None, name) or (norm is not None and self._layer(str(made)) is norm)

    def _scale_behind(self, name: str, outputs: int) -> Tensor:
        """Factor of the batch norm that reads a layer's outputs before they are added, as eval mode applies it."""
        ones = torch.ones(outputs, dtype=torch.float64)
        norm = self.norms.get(name)
        if norm is None or norm.running_var is None:
            return ones
        scale = ones if norm.weight is None else norm.weight.detach().double().cpu().abs()
        return scale / (norm.running_var.double().cpu() + norm.eps).sqrt()

    @cached_property
    def norms(self) -> dict[str, _BatchNorm]:
        """Layers whose outputs go into a batch norm and nowhere else, to that norm."""
        names = {module: name for name, module in self.channels.plain.named_modules()}
        found = {}
        for node in {item.dep.target for group in self.channels.groups for item in group.entry}:
            if isinstance(node.module, (_ConvNd, nn.Linear)) and len(node.outputs) == 1:
                behind = node.outputs[0].module
                if isinstance(behind, _BatchNorm):
                    found[names[node.module]] = behind
        return found

    def _layer(self, name: str) -> Any:
        return self.channels.plain.get_submodule(name)

    def _weight(self, member: Member) -> Tensor | None:
        layer = self._layer(member.name)
        if isinstance(layer, (_ConvNd, nn.Linear)):
            return layer.weight.detach().double().cpu()
        return None


def block_of(layer: str, blocks: Iterable[str]) -> str | None:
    """The block that a layer is in: the longest of the names that its own begins with."""
    inside = [block for block in blocks if layer.startswith(f"{block}.")]
    return max(inside, key=len, default=None)


def _gives(group: ChannelGroup, name: str) -> bool:
    return any(member.gives and member.name == name for member in group.members)
