"""Statistics of the gates after each epoch, and a word on gates that are dead.

The network that learns is run in eval mode on a few images of the epoch's last batch. The definitions of a channel that
is closed, open or dead are those of :mod:`cmpe_se.inspecting.statistics`, which a report has too.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import Tensor, nn

from cmpe_se.inspecting.gate_values import gate_values
from cmpe_se.inspecting.inspect import BlockView, find_gates
from cmpe_se.inspecting.statistics import BlockStatistics
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.views import find_view
from cmpe_se.utils.files import write_text
from cmpe_se.utils.records import check_shape, parse_json

_STEPS_BETWEEN_LOOKS = 10  # at the gradients
_FEWEST, _MOST, _PART = 16, 256, 90  # images that are looked at: a part of those of the epoch, within bounds
NO_NUMBERS, ASLEEP, NO_GRADIENT = "not finite", "asleep", "no gradient"


class GateStatistics(TypedDict):
    """One gate after an epoch; a number is None where gates are not finite.

    ``mean`` is over images and channels; ``spread`` the standard deviation over the images, a mean over the channels;
    ``channel_spread`` the deviation of the channels' means. ``closed``, ``open`` and ``same`` are shares of the
    channels: closed or saturated for all images, the same for every image; ``sleeping`` is the share that is any of
    these. ``dead`` says why the gate is dead, or is None.
    """

    mean: float | None
    spread: float | None
    channel_spread: float | None
    closed: float | None
    open: float | None
    same: float | None
    sleeping: float | None
    dead: str | None


class GatesRecord(TypedDict):
    """A line of ``gates.jsonl``: statistics by block, over ``images`` of the epoch's last batch."""

    epoch: int
    step: int
    images: int
    gates: dict[str, GateStatistics]


def has_gates(network: nn.Module) -> bool:
    """Whether there is anything to measure."""
    return any(isinstance(module, CompetitiveSE) for module in network.modules())


class GateWatch:
    """Measures the gates of a network while it trains.

    Args:
        network: with gates, that learns.
        train_size: training images of an epoch, of which a small part is looked at.
    """

    def __init__(self, network: nn.Module, train_size: int):
        self._network = network
        self._gates = {name: gate for name, gate in find_gates(network).items() if isinstance(gate, CompetitiveSE)}
        self._parameters = [list(gate.parameters()) for gate in self._gates.values()]
        self.images = min(max(train_size // _PART, _FEWEST), _MOST)
        self._gradients: Tensor | None = None

    @torch.no_grad()
    def see_gradients(self, step: int, *, last: bool) -> None:
        """Note which gates get a gradient; at some steps, between the backward pass and the optimiser's step.

        Args:
            step: counted from 1.
            last: whether it is the epoch's last one.
        """
        if step % _STEPS_BETWEEN_LOOKS and not last:
            return
        found = [(row, local) for row, gate in enumerate(self._parameters) for local in _gradients_of(gate)]
        sums = torch.zeros(len(self._parameters), device=found[0][1].device if found else None)
        if found:
            norms = torch.stack(torch._foreach_norm([local for _, local in found])).float()
            norms = norms.nan_to_num(nan=1.0, posinf=1.0)  # of an overflow in float16, which is a gradient
            rows = torch.tensor([row for row, _ in found], device=norms.device)
            sums.index_add_(0, rows, norms)
        self._gradients = sums if self._gradients is None else self._gradients.to(sums) + sums

    def take_gradients(self, device: torch.device) -> Tensor:
        """What was noted since the last call, (gates,), and 0 for gates without a gradient; -1 for all at no look."""
        seen = self._gradients if self._gradients is not None else torch.full((len(self._parameters),), -1.0)
        self._gradients = None
        return seen.to(device)

    def measure(
        self,
        images: Tensor,
        gradients: Sequence[float],
        *,
        before: Mapping[str, GateStatistics],
        autocast: AbstractContextManager[object],
    ) -> dict[str, GateStatistics]:
        """Statistics of each gate, in the network's order.

        A gate is dead whose channels all sleep after this epoch and the one before. Those of a fresh network may sleep
        for a while: they depend on the image once they have learnt to.

        Args:
            images: of a batch, normalised, on the device.
            gradients: of :meth:`take_gradients`, summed over all processes.
            before: statistics after the epoch before, empty after the first.
            autocast: context of the training's precision.
        """
        with autocast:
            views = gate_values(self._network, images[: self.images])
        found = dict(zip(self._gates, gradients, strict=True))
        return {view.name: self._statistics(view, found[view.name], before.get(view.name)) for view in views}

    def _statistics(self, view: BlockView, gradient: float, before: GateStatistics | None) -> GateStatistics:
        values = view.gate.cpu()
        learns = any(parameter.requires_grad for parameter in self._gates[view.name].parameters())
        stuck = NO_GRADIENT if learns and gradient == 0 else None
        if not bool(values.isfinite().all()):
            return cast(GateStatistics, dict.fromkeys(GateStatistics.__annotations__) | {"dead": NO_NUMBERS})
        block = BlockStatistics(view, 1)
        block.add(view, torch.zeros(len(values), dtype=torch.int64))
        kinds = {kind: set(channels) for kind, channels in block.kinds.items()}
        shares = {kind: len(channels) / block.channels for kind, channels in kinds.items()}
        sleeping = len(set().union(*kinds.values())) / block.channels
        return {
            "mean": block.mean.mean().item(),
            "spread": block.std.mean().item(),
            "channel_spread": block.mean.std(unbiased=False).item(),
            "closed": shares["closed"],
            "open": shares["open"],
            "same": shares["dead"],
            "sleeping": sleeping,
            "dead": ASLEEP if sleeping == 1 and before and before["sleeping"] == 1 else stuck,
        }

    def range_of(self, name: str) -> tuple[float, float]:
        """Where the values of a block's gate begin, and the largest that they can have."""
        gate = self._gates[name]
        return gate.gain * find_view(gate.view).half, gate.gain


def _gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Gradients on this process: of sharded parameters, the part that is here."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]


def warning_of(block: str, statistics: GateStatistics, epoch: int) -> str | None:
    """A sentence on a gate that is dead; None for others."""
    if (reason := statistics["dead"]) is None:
        return None
    if reason == ASLEEP:
        kinds = {"closed": "closed", "open": "saturated", "same": "the same for every image"}
        shares = ((words, statistics[kind]) for kind, words in kinds.items())  # type: ignore[literal-required]
        parts = ", ".join(f"{100 * share:.0f} % {words}" for words, share in shares if share)
        what = f"all of its channels sleep ({parts})"
    else:
        what = {NO_GRADIENT: "none of its parameters gets a gradient", NO_NUMBERS: "its values are not finite"}[reason]
    return f"the gate of {block} is dead after epoch {epoch}: {what}"


def tracked_numbers(record: GatesRecord) -> dict[str, float]:
    """What a tracker is told of the gates, such as ``gates/stages.0.blocks.1/mean``."""
    return {
        f"gates/{block}/{name}": value
        for block, statistics in record["gates"].items()
        for name in ("mean", "spread", "channel_spread", "sleeping")
        if (value := statistics[name]) is not None
    }


def read_records(path: Path, epochs: int) -> list[GatesRecord]:
    """The records of a run's first epochs; none where there is no file.

    Args:
        path: of ``gates.jsonl``.
        epochs: those that the run resumes after; what was written of later ones is measured again.

    Raises:
        ValueError: a file that is damaged.
        OSError: one that cannot be read.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [check_shape(parse_json(line), GatesRecord, f"line {number}") for number, line in enumerate(lines, 1)]
    return [record for record in records if record["epoch"] <= epochs]


def write_records(path: Path, records: Sequence[GatesRecord]) -> None:
    """Write all records, one JSON object a line."""
    write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
