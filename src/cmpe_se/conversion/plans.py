"""The two ways to put gates into a block: in the graph of its forward, and in the source of its methods."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, fx, nn

from cmpe_se.conversion.additions import Addition
from cmpe_se.conversion.axes import AxisTracker
from cmpe_se.conversion.blocks import replace_forward, replace_methods, with_forward, with_methods
from cmpe_se.conversion.calls import original_class
from cmpe_se.conversion.recording import BlockCall
from cmpe_se.conversion.source import Edit, Place, rewritten
from cmpe_se.conversion.unconvertible import Unconvertible
from cmpe_se.conversion.watching import watch_runs


class Plan(Protocol):
    """A block that can be converted."""

    @property
    def block(self) -> nn.Module:
        """The block, which the plan leaves as it is until :meth:`replace`."""

    @property
    def additions(self) -> list[Addition]:
        """What becomes a gate."""

    @property
    def note(self) -> str:
        """What the report says of the way in which the block is converted; empty for the usual one."""

    def put_gates(self, children: list[str]) -> None:
        """Let gates of these names, which are no children yet, take the place of the additions, in the plan alone.

        Raises:
            Exception: whatever a class raises when it gets a subclass.
        """

    def replace(self) -> None:
        """Give the block its new forward."""


@dataclass
class GraphPlan:
    """A forward that is replaced by its graph.

    Args:
        block: the block.
        additions: in the graph.
        graph: of its forward, its children as leaves.
    """

    block: nn.Module
    additions: list[Addition]
    graph: fx.Graph
    note: str = ""

    def put_gates(self, children: list[str]) -> None:
        """See :class:`Plan`."""
        for addition, child in zip(self.additions, children, strict=True):
            with self.graph.inserting_after(addition.node):
                call = self.graph.call_module(child, (addition.residual, addition.identity))
            addition.node.replace_all_uses_with(call)
            self.graph.erase_node(addition.node)
        with_forward(self.block, self.graph)

    def replace(self) -> None:
        """See :class:`Plan`."""
        replace_forward(self.block, self.graph)


@dataclass
class SourcePlan:
    """A forward whose source is changed where it adds.

    Args:
        block: the block.
        additions: of graphs of what runs of it do.
        places: of the additions in the source.
        stand_in: of the block, on the meta device.
        call: what the block gets.
        tracker: of the run that showed it.
        note: why its graph could not take its place.
    """

    block: nn.Module
    additions: list[Addition]
    places: list[Place]
    stand_in: nn.Module
    call: BlockCall
    tracker: AxisTracker
    note: str
    methods: dict[str, str] = field(default_factory=dict)

    def put_gates(self, children: list[str]) -> None:
        """See :class:`Plan`."""
        edits = [
            Edit(place, child, addition.residual_argument)
            for place, child, addition in zip(self.places, children, self.additions, strict=True)
        ]
        self.methods = rewritten(original_class(self.block), edits)
        with_methods(self.block, self.methods)

    def try_names(self) -> None:
        """Change the source for a trial on the meta device.

        Raises:
            Unconvertible: it cannot be changed, or is not what runs.
        """
        children = [f"gate_{number}_on_trial" for number in range(len(self.places))]
        try:
            self.put_gates(children)
        except Unconvertible:
            raise
        except Exception:
            return  # of a class that takes no subclass, of which putting in the gates themselves will complain
        graphs, _ = watch_runs(self._trial(children), self.call, self.tracker)
        called = [Counter(node.target for node in graph.nodes) for graph in graphs]
        for child in children:
            if max(times[child] for times in called) != 1:
                raise Unconvertible("what it runs is not what its source says")

    def replace(self) -> None:
        """See :class:`Plan`."""
        replace_methods(self.block, self.methods)

    def _trial(self, children: list[str]) -> nn.Module:
        """The stand-in with the new methods, and additions in the place of its gates."""
        kind = with_methods(self.block, self.methods)
        trial = kind.__new__(kind)
        vars(trial).update(vars(self.stand_in))
        trial._modules = {**self.stand_in._modules, **{child: _Sum() for child in children}}
        return trial


class _Sum(nn.Module):
    def forward(self, residual: Tensor, identity: Tensor) -> Tensor:
        return identity + residual
