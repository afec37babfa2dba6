"""Structural pruning of a residual network: the widths of its blocks, whole blocks, and the residual stream at last."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cmpe_se.errors import UserError
from cmpe_se.pruning.blocks import measure_blocks, removable, with_gates
from cmpe_se.pruning.channels import Channels, find_channels
from cmpe_se.pruning.choice import Candidates, Cut, apply, by_layer, possible_counts, smallest_within
from cmpe_se.pruning.criteria import CRITERIA, Batches, BlockWorth, GateScores, block_of, importances
from cmpe_se.pruning.widths import Widths, tell_features, widths_of
from cmpe_se.utils.copying import copy_network
from cmpe_se.utils.cost import count_multiply_adds, count_parameters
from cmpe_se.utils.wrappers import unwrapped

Progress = Callable[[Iterable[int], str], Iterable[int]]
"""Shows how far a loop is, of which it gets the values and a word for them."""


@dataclass(frozen=True)
class Layer:
    """Channels that could only go together, before and after.

    Args:
        name: of the first layer that makes them.
        block: that they are in; empty outside any.
        stream: whether they are channels of the residual stream.
        before, after: their number; 0 after of a block that went as a whole.
        gate_kept, gate_lost: what the gates say of those that stayed and went, relative to the mean of all
            (:class:`cmpe_se.pruning.criteria.GateScores`), whatever the criterion; None where there are none.
    """

    name: str
    block: str
    stream: bool
    before: int
    after: int
    gate_kept: float | None
    gate_lost: float | None


@dataclass(frozen=True)
class Block:
    """A residual block before pruning: its mean gate and residual share, and whether it went as a whole."""

    name: str
    mean_gate: float
    share: float
    gone: bool


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network, and what was pruned.

    Args:
        network: in eval mode.
        widths: of its layers, where they differ from those of the network before.
        multiply_adds, parameters: before, and after each step.
        layers: in the order in which they run.
        blocks: likewise.
        left: first layer of each group of channels that was never a candidate, to the reason.
        through_stream: whether channels of the residual stream had to go.
    """

    network: nn.Module
    widths: Widths
    multiply_adds: list[int]
    parameters: list[int]
    layers: list[Layer] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    through_stream: bool = False


def _silent(values: Iterable[int], _: str) -> Iterable[int]:
    return values


def prune(
    model: nn.Module,
    target_macs: float = 0.7,
    *,
    images: Batches,
    criterion: str = "gate",
    layerwise: bool = False,
    steps: int = 1,
    round_to: int = 4,
    seed: int = 0,
    after_step: Callable[[nn.Module], None] | None = None,
    progress: Progress = _silent,
) -> Pruned:
    """A copy of a residual network with fewer channels, and maybe fewer blocks.

    The inner widths of the blocks go: identity and residual keep their channels, so pictures and gates stay as they
    are. A fifth of each layer's channels stays in any case. With ``gate`` a block whose channels would all go below
    that is taken out as a whole, where it hands on exactly what it gets. Where all that cannot be enough, channels of
    the residual stream are candidates too, and its gates are made anew for those that are left. The classifier's
    outputs stay.

    Accuracy suffers: train on afterwards, as ``cmpe-se prune`` does.

    Args:
        model: a network of cmpe_se, a converted one, or any residual network that :func:`cmpe_se.convert` takes. Not a
            merged one. It is left as it was.
        target_macs: part of the multiply-adds to keep at most, between 0 and 1.
        images: batches of images (N, C, H, W), normalised as for training, and labels (N,): some hundred. Their size is
            that for which multiply-adds are counted; labels are for ``taylor`` alone.
        criterion: ``gate`` (what a channel adds to the residual stream, through weights, norms and mean gates),
            ``taylor`` (Molchanov et al., 2019), ``l1`` (of a filter; Li et al., 2017), ``bn`` (scale of its batch norm;
            Liu et al., 2017) or ``random``.
        layerwise: take the same part of each layer, instead of the least important channels wherever they are.
        steps: in how many steps of equal multiply-adds; importances are measured anew before each.
        round_to: numbers of channels that stay are multiples of this, where any channels go.
        seed: for ``random``.
        after_step: called with the network after each step.
        progress: shows the steps.

    Returns:
        The pruned network with what was pruned.

    Raises:
        UserError: a merged network, one without residual blocks, a criterion that it has not got, or a target that
            cannot be reached; the message names the least that can.
        MissingPackageError: without torch-pruning.
    """
    _check(target_macs, criterion, steps, round_to, images)
    whole = unwrapped(model)
    network = copy_network(whole, "take a network that can be copied").eval()
    image = images[0][0][:1].to(next(network.parameters()))
    cost = partial(_cost, size=tuple(image.shape[1:]))
    probe = with_gates(network).eval()
    worth = measure_blocks(probe, images)
    channels = find_channels(network, image)
    first = _First(channels, worth, {group.name: group.channels for group in channels.groups})
    ranked = {block_of(group.name, worth) for group in channels.inner}
    may_go = [block for block in removable(probe, image) if block in ranked] if criterion == "gate" else []
    pruned = Pruned(network, {}, [cost(network)], [count_parameters(network)], left=channels.left)
    through_stream = _needs_stream(network, channels, cost, target_macs, first.widths, round_to, may_go)
    kept = {group.name: torch.arange(group.channels) for group in channels.groups}
    gone: list[str] = []
    for step in progress(range(1, steps + 1), "pruning"):
        if step > 1:
            probe = with_gates(network).eval()
            worth, channels = measure_blocks(probe, images), find_channels(network, image)
        most = pruned.multiply_adds[0] * (1 - (1 - target_macs) * step / steps)
        groups = channels.groups if through_stream else channels.inner
        values = importances(criterion, network, channels, groups, worth, images, seed=seed)
        without = [group.name for group in groups if group.name not in values]
        pruned.left.update(dict.fromkeys(without, f"it has no importance by {criterion}"))
        groups = [group for group in groups if group.name in values]
        candidates = Candidates(
            groups,
            by_layer(values) if layerwise else values,
            possible_counts(network, groups, first.widths, round_to),
            list(worth),
            [block for block in may_go if block in worth],
            first.widths,
        )
        cut, left_over = smallest_within(candidates, network, partial(_can_run, cost=cost), int(most))
        if left_over > most:
            part = left_over / pruned.multiply_adds[0]
            raise UserError(f"target_macs {target_macs:g} cannot be reached by {criterion}: {part:.3f} is the least")
        apply(network, channels.groups, cut)
        kept |= {name: kept[name][places] for name, places in cut.kept.items()}
        gone += cut.gone
        pruned.multiply_adds.append(cost(network))
        pruned.parameters.append(count_parameters(network))
        if after_step is not None:
            after_step(network)
    tell_features(network)
    widths = widths_of(network, whole)
    layers = first.layers(kept, gone)
    blocks = [Block(name, one.gate.mean().item(), one.share, name in gone) for name, one in first.worth.items()]
    narrower = any(layer.stream and layer.after < layer.before for layer in layers)
    return Pruned(network, widths, pruned.multiply_adds, pruned.parameters, layers, blocks, pruned.left, narrower)


def _cost(network: nn.Module, size: tuple[int, ...]) -> int:
    return count_multiply_adds(network, size)


def _can_run(network: nn.Module, cost: Callable[[nn.Module], int]) -> int:
    """Multiply-adds of a network with fewer channels, whose code may count on those that it had.

    Raises:
        UserError: it does.
    """
    try:
        return cost(network)
    except UserError as error:
        raise UserError(
            f"{type(network).__name__} cannot be pruned: its code counts on numbers of channels that it was made with "
            f"({error})"
        ) from None


def _check(target: float, criterion: str, steps: int, round_to: int, images: Sequence[Any]) -> None:
    if not 0 < target < 1:
        raise UserError(f"target_macs is {target:g}, should be a part of the multiply-adds, between 0 and 1")
    if criterion not in CRITERIA:
        raise UserError(f"criterion is '{criterion}', should be one of {', '.join(CRITERIA)}")
    if steps < 1 or round_to < 1:
        raise UserError(f"steps {steps} and round_to {round_to} should be at least 1")
    if not images or not all(isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in images):
        raise UserError("pruning needs images: batches of images (N, C, H, W) and labels (N,), one at least")


def _needs_stream(
    network: nn.Module,
    channels: Channels,
    cost: Callable[[nn.Module], int],
    target: float,
    whole: Mapping[str, int],
    round_to: int,
    may_go: Sequence[str],
) -> bool:
    """Whether the blocks, their inner widths and those that may go as a whole, are not enough.

    Raises:
        UserError: the stream is not enough either.
    """
    most = target * cost(network)
    least = []
    for through_stream, groups in enumerate((channels.inner, channels.groups)):
        shell = copy.deepcopy(network).to("meta")
        counts = possible_counts(shell, groups, whole, round_to)
        inside = {group.name for group in groups if not group.stream and block_of(group.name, may_go)}
        kept = {name: torch.arange(own[0]) for name, own in counts.items() if name not in inside}
        apply(shell, groups, Cut(kept, tuple(may_go)))
        least.append(_can_run(shell, cost))
        if least[-1] <= most:
            return bool(through_stream)
    part = min(least) / cost(network)
    rounded = f", in multiples of {round_to}," if round_to > 1 else ""
    smaller = " or a smaller round_to" if round_to > 1 else ""
    raise UserError(
        f"target_macs {target:g} cannot be reached: with a fifth of each layer's channels{rounded} {part:.3f} of the "
        f"multiply-adds are left; give at least {part + 5e-4:.3f}{smaller}"
    )


@dataclass(frozen=True, eq=False)
class _First:
    """The network before the first step."""

    channels: Channels
    worth: Mapping[str, BlockWorth]
    widths: Mapping[str, int]

    def layers(self, kept: Mapping[str, Tensor], gone: Sequence[str]) -> list[Layer]:
        """What became of each group."""
        scores = GateScores(self.channels, self.worth)
        found = []
        for group in self.channels.groups:
            block = block_of(group.name, self.worth) or ""
            stays = torch.zeros(group.channels, dtype=torch.bool)
            if group.stream or block not in gone:
                stays[kept[group.name]] = True
            values = scores.relative(group)
            found.append(
                Layer(
                    group.name,
                    "" if group.stream else block,
                    group.stream,
                    group.channels,
                    int(stays.sum()),
                    _mean(values[stays]),
                    _mean(values[~stays]),
                )
            )
        return found


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
