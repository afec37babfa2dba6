"""Which blocks of a network can be converted, and why the others cannot."""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import torch
from torch import fx, nn

from cmpe_se.conversion.additions import Addition, calls_of, find_additions, listed
from cmpe_se.conversion.calls import why_block_stays, why_inside_stays
from cmpe_se.conversion.convolutions import count_convolutions
from cmpe_se.conversion.plans import GraphPlan, Plan, SourcePlan
from cmpe_se.conversion.recording import Recording
from cmpe_se.conversion.shapes import find_shapes
from cmpe_se.conversion.source import Place
from cmpe_se.conversion.tracing import trace
from cmpe_se.conversion.unconvertible import Unconvertible
from cmpe_se.conversion.watching import PLACE, SEEN, watch_runs


def plan_conversion(model: nn.Module, recording: Recording) -> tuple[dict[str, Plan], dict[str, str]]:
    """Blocks that can be converted, and of others that have residual additions why they cannot.

    Args:
        model: the network.
        recording: of one run of it.
    """
    plans: dict[str, Plan] = {}
    skipped, called = {}, {}
    for name, block, closed in _candidates(model):
        closed = closed or why_block_stays(block)
        if why_inside_stays(block):
            skipped[name] = str(closed)
            continue
        found = _Search(block, recording)
        called[name] = found.layers
        if closed and (found.plan or found.reasons):
            skipped[name] = closed
            continue
        if found.plan:
            plans[name] = found.plan
        if found.reasons:
            skipped[name] = found.reasons
    for name, plan in list(plans.items()):
        inside = {layer for layer in plan.block.modules() if layer is not plan.block}
        callers = [
            caller or "the network itself"
            for caller, layers in called.items()
            if caller != name and model.get_submodule(caller) not in inside and not inside.isdisjoint(layers)
        ]
        if not callers and recording.call(plan.block) is None and recording.ran_inside(plan.block):
            callers = ["the network"]
        if callers or not recording.may_be_called(plan.block):
            skipped[name] = (
                f"{callers[0]} runs its layers without it" if callers else "no forward of the network calls it"
            )
            plans.pop(name)
    return plans, skipped


class _Search:
    """What there is in a block: in the graph of its forward, or else in what runs of it do.

    Args:
        block: the block.
        recording: of a run of its network.
    """

    def __init__(self, block: nn.Module, recording: Recording):
        self.plan: Plan | None = None
        self.reasons = ""
        self.layers: set[nn.Module] = set()
        """Those with convolutions that its forward runs."""
        self.block, self._recording = block, recording
        try:
            self._look_at_graph()
        except Unconvertible as reason:
            self._look_at_runs(str(reason))

    def _look_at_graph(self) -> None:
        graph, caveat = trace(self.block)
        self.layers = calls_of(self.block, graph)
        look = partial(find_shapes, self.block, graph, recording=self._recording)
        additions, reasons = find_additions(self.block, graph, look)
        if caveat and (additions or reasons):
            raise Unconvertible(caveat)
        if additions:
            self.plan = GraphPlan(self.block, additions, graph)
        self.reasons = listed(reasons)

    def _look_at_runs(self, reason: str) -> None:
        stand_in, call = self._recording.stand_in(self.block), self._recording.call(self.block)
        if call is None:
            stopped = self._recording.stopped
            self.reasons = f"{reason}; a run of the network did not come to it ({stopped})" if stopped else reason
            return
        tracker = self._recording.tracker
        try:
            graphs, failure = watch_runs(stand_in, call, tracker)
        except Unconvertible as in_eval:
            self.reasons = f"{reason}; {in_eval}"
            return
        if failure:
            reason = f"{reason}; {failure}"
        ran = {layer for graph in graphs for layer in calls_of(stand_in, graph)}
        self.layers = {layer for layer in self.block.modules() if self._recording.stand_in(layer) in ran}
        found, reasons = _at_places(stand_in, graphs)
        self.reasons = f"{reason}; {listed(reasons)}" if reasons else ""
        if found:
            note = f"its source is changed where it adds, since {reason}"
            plan = SourcePlan(self.block, list(found.values()), list(found), stand_in, call, tracker, note)
            try:
                plan.try_names()
            except Unconvertible as on_trial:
                self.reasons = f"{reason}; {on_trial}"
            else:
                self.plan = plan


def _at_places(stand_in: nn.Module, graphs: list[fx.Graph]) -> tuple[dict[Place, Addition], dict[fx.Node, str]]:
    """Residual additions by their places in the source, the same in every run that comes there; and why not others."""
    found: dict[Place, Addition] = {}
    reasons: dict[fx.Node, str] = {}
    others: set[Place] = set()
    for graph in graphs:
        seen = {node: node.meta[SEEN] for node in graph.nodes if SEEN in node.meta}
        additions, refused = find_additions(stand_in, graph, lambda _, known=seen: known)  # type: ignore[misc]
        reasons |= refused
        times = Counter(node.meta.get(PLACE) for node in graph.nodes)
        for addition in additions:
            place = addition.node.meta.get(PLACE)
            if place is None:
                reasons[addition.node] = (
                    "it is not written in the methods of its class, or this Python does not say where"
                )
            elif times[place] > 1:
                reasons[addition.node] = "its place in the source adds several times, and a gate is for one addition"
                others.add(place)
            else:
                first = found.setdefault(place, addition)
                if _facts(first) != _facts(addition):
                    others.add(place)
        residual = {addition.node for addition in additions}
        others |= {node.meta[PLACE] for node in graph.nodes if node.meta.get(PLACE) and node not in residual}
    for place in others & found.keys():
        reasons.setdefault(found.pop(place).node, "it is not the same residual addition in every run")
    return found, reasons


def _facts(addition: Addition) -> tuple[int, float, int]:
    return addition.residual_argument, addition.scale, addition.channels


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Modules whose own forward may hold a residual addition, each with a reason if something around it forbids gates.

    A module that stands at several places is there once, at a place that allows gates if there is one.
    """
    around: dict[str, str | None] = {}  # of a module, what forbids gates inside it
    places: dict[int, tuple[str, nn.Module, str | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        above = around[name.rpartition(".")[0]] if name else None
        inside = why_inside_stays(module)
        around[name] = above or (f"inside {name or 'the network itself'}: {inside}" if inside else None)
        if isinstance(module, torch.jit.ScriptModule) and above:
            continue  # parts of what is named as a whole
        known = places.get(id(module))
        if known is None or (known[2] and not above):
            places[id(module)] = (name, module, above)
    for name, module, above in places.values():
        # Sequential and the like add nothing themselves, unless their forward is another.
        plain = not why_inside_stays(module) and str(type(module).forward.__module__).startswith("torch.nn.")
        if not plain and any(True for _ in module.children()) and count_convolutions(module):
            yield name, module, above
