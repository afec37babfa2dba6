"""Competition for any residual network: each residual addition becomes ``CompetitiveSE``, and nothing else changes.

A block's forward is traced by torch.fx with its children as leaves, its residual additions are found and replaced, and
the block takes the new forward. It keeps its class, its children and their names, so checkpoints, hooks, feature
extraction and parameter groups work as before.

At the start every gate is exactly 1: the last layer is zero, so the logistic gives 1/2, and a fixed factor of 2 undoes
it (fact 4 of ``docs/method.md``). The converted network computes what the original did, bit for bit.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from cmpe_se.conversion.additions import Addition, Unconvertible, count_convolutions, find_additions, trace
from cmpe_se.conversion.blocks import replace_forward
from cmpe_se.conversion.report import remember_skipped
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.views import STARTS, TABLE

CHILD = "competition"
"""Name of the gate among the children of a converted block."""
Where = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""Which blocks: names and stages (``layer4``), patterns (``layer*.0``), or a function of name and block."""


def convert(
    model: nn.Module,
    *,
    view: str = "folded_3x3",
    start: str = "one",
    reduction: int = 16,
    min_hidden: int = 1,
    bias: bool = False,
    mask: float = 0.0,
    where: Where | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Put competition into a residual network: ``identity + residual`` becomes ``identity + gate * residual``.

    The output stays the same bit for bit (eval mode, float32) until training moves the gates. Every key of the state
    dict stays; the gates' parameters come under ``<block>.competition``.

    Args:
        model: any network with residual additions of convolutional branches, alone or as the backbone of another.
        view: how the gates read the squeezes, one of :data:`cmpe_se.VIEWS`.
        start: ``one`` keeps the output as it is; ``half`` halves every residual at first.
        reduction: channels divided by the width of a gate's hidden layer.
        min_hidden: least units of that layer; it has two in any case, one of which is awake.
        bias: biases in the gates' linear maps.
        mask: probability with which a squeeze is hidden from the gate in training.
        where: the blocks to convert; all if left out. A name stands for everything inside it too.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The converted network. :func:`conversion_report` says what was converted and what was not.

    Raises:
        UserError: no residual addition, nothing at ``where``, a network that has gates already, a view that cannot fold
            the channels of some block. The model is left as it was.
    """
    for name, value, known in (("view", view, tuple(TABLE)), ("start", start, STARTS)):
        if value not in known:
            raise UserError(f"unknown {name} '{value}'; choose one of {', '.join(known)}")
    settings = {"view": view, "start": start, "reduction": reduction, "bias": bias, "mask": mask}
    settings["min_hidden"] = max(2, min_hidden) if isinstance(min_hidden, int) else min_hidden
    if gated := [name for name, module in model.named_modules() if isinstance(module, CompetitiveSE)]:
        raise UserError(f"{type(model).__name__} has competition already, at {gated[0]}; convert the original network")
    if not inplace:
        model = copy.deepcopy(model)

    plans, skipped = {}, {}
    for name, block in _candidates(model):
        try:
            graph = trace(block)
            additions, reasons = find_additions(block, graph)
        except Unconvertible as reason:
            additions, reasons = [], [str(reason)]
        if additions:
            plans[name] = (block, graph, additions)
        if reasons:
            skipped[name] = "; ".join(reasons)
    if not plans:
        raise UserError(
            f"{type(model).__name__} has no residual addition of convolutional branches{_because(skipped)}; "
            "competition needs blocks that compute identity + residual"
        )
    chosen = {name for name, (block, *_) in plans.items() if where is None or _matches(where, name, block)}
    if not chosen:
        raise UserError(f"where={where!r} matches no block of {type(model).__name__}; there are {_listed(list(plans))}")
    skipped |= {name: "not in where" for name in plans if name not in chosen}

    # All gates are made before anything changes, so that a refusal leaves the model as it was.
    gates = {
        name: [_new_gate(name, addition, plans[name][0], settings) for addition in plans[name][2]]
        for name in plans
        if name in chosen
    }
    for name, block_gates in gates.items():
        block, graph, additions = plans[name]
        for addition, gate in zip(additions, block_gates, strict=True):
            _replace(block, graph, addition, gate)
        replace_forward(block, graph)
    remember_skipped(model, skipped)
    return model


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose own forward may hold a residual addition."""
    for name, module in model.named_modules():
        plain = type(module).__module__.startswith("torch.nn.")  # Sequential and the like add nothing themselves
        if not plain and any(True for _ in module.children()) and count_convolutions(module):
            yield name, module


def _matches(where: Where, name: str, block: nn.Module) -> bool:
    if callable(where):
        return where(name, block)
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def _new_gate(name: str, addition: Addition, block: nn.Module, settings: dict[str, Any]) -> CompetitiveSE:
    """A gate that is the same for every input, and learns from its first step."""
    like = next(block.parameters())
    try:
        gate = CompetitiveSE(addition.channels, **settings, device=like.device, dtype=like.dtype)
    except ValueError as error:
        raise UserError(f"block {name}: {error}; or leave the block out with where=") from None
    gate.zero_last_layer()
    return gate.train(block.training)


def _replace(block: nn.Module, graph: fx.Graph, addition: Addition, gate: CompetitiveSE) -> None:
    """Let the gate take the addition's place, as a child of the block."""
    number, child = 1, CHILD
    while hasattr(block, child):
        number += 1
        child = f"{CHILD}_{number}"
    block.add_module(child, gate)
    with graph.inserting_after(addition.node):
        call = graph.call_module(child, (addition.residual, addition.identity))
    addition.node.replace_all_uses_with(call)
    graph.erase_node(addition.node)


def _because(skipped: dict[str, str]) -> str:
    if not skipped:
        return ""
    name, reason = next(iter(skipped.items()))
    more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    return f" ({name or 'the network itself'}: {reason}{more})"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
