"""Which blocks of a network can be converted, and why the others cannot."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx, nn

from cmpe_se.conversion.additions import Addition, calls_of, find_additions
from cmpe_se.conversion.calls import why_block_stays, why_inside_stays
from cmpe_se.conversion.convolutions import count_convolutions
from cmpe_se.conversion.tracing import trace
from cmpe_se.conversion.unconvertible import Unconvertible


class Plan(NamedTuple):
    """A block that can be converted: its forward, and what in it becomes a gate."""

    block: nn.Module
    graph: fx.Graph
    additions: list[Addition]


def plan_conversion(model: nn.Module) -> tuple[dict[str, Plan], dict[str, str]]:
    """Blocks that can be converted, and of others that have residual additions why they cannot."""
    plans, skipped, called = {}, {}, {}
    for name, block, closed in _candidates(model):
        closed = closed or why_block_stays(block)
        if why_inside_stays(block):
            skipped[name] = str(closed)
            continue
        try:
            graph, caveat = trace(block)
            called[name] = calls_of(block, graph)
            additions, reasons = find_additions(block, graph)
        except Unconvertible as reason:
            additions, reasons, caveat = [], [str(reason)], None
        if (closed := closed or caveat) and (additions or reasons):
            additions, reasons = [], [closed]
        if additions:
            plans[name] = Plan(block, graph, additions)
        if reasons:
            skipped[name] = "; ".join(reasons)
    for name, plan in list(plans.items()):
        inside = {layer for layer in plan.block.modules() if layer is not plan.block}
        for caller, layers in called.items():
            if caller != name and model.get_submodule(caller) not in inside and not inside.isdisjoint(layers):
                skipped[name] = f"{caller or 'the network itself'} runs its layers without it"
                plans.pop(name, None)
    return plans, skipped


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
