"""Competition for any residual network: each residual addition becomes ``CompetitiveSE``, and nothing else changes.

A block's forward is traced by torch.fx with its children as leaves, its residual additions are found and replaced, and
the block takes the new forward. It keeps its class, its children and their names, so checkpoints, hooks, feature
extraction and parameter groups work as before. A block is converted only where every call of it runs the new forward;
the others are left as they are, and the report names each with the reason.

At the start every gate is exactly 1: the last layer is zero, so the logistic gives 1/2, and a fixed factor of 2 undoes
it (fact 4 of ``docs/method.md``). The converted network computes what the original did, bit for bit.
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import count
from typing import Any

from torch import nn

from cmpe_se.conversion.additions import Addition
from cmpe_se.conversion.calls import shared_with_original
from cmpe_se.conversion.planning import plan_conversion
from cmpe_se.conversion.plans import Plan
from cmpe_se.conversion.recording import ExampleInputs, Recording
from cmpe_se.conversion.report import remember
from cmpe_se.conversion.shapes import tensor_like
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.views import STARTS, TABLE, check_dimensions
from cmpe_se.utils.copying import copy_network
from cmpe_se.utils.text import in_one_line

CHILD = "competition"
"""Name of the gate among the children of a converted block; a second one is ``competition_2``, and so on."""
GATE_NAME = re.compile(rf"{CHILD}(_\d+)?")
"""What such children are called."""
GATE_KEY = re.compile(rf"(^|\.){GATE_NAME.pattern}\.")
"""What the keys of gates have in a state dict."""
FALLBACKS = ("pair_view_1x1", "refuse")
"""What can be done with channels that a view cannot fold: a picture of their pairs can be drawn of any number."""
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
    fallback: str = "pair_view_1x1",
    example_inputs: ExampleInputs | None = None,
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
        fallback: the view of blocks whose channels ``view`` cannot fold, which the report names; ``refuse`` to refuse
            the network for the sake of one of them.
        example_inputs: what the network's forward takes: one tensor, a tuple of its arguments, or a dictionary of them
            by name. Shapes and dtypes alone are used, in one run on the meta device. If left out, the network's own
            input size (timm's, transformers'), or a usual one.
        inplace: change ``model`` itself instead of a copy, for example because it cannot be copied.

    Returns:
        The converted network. :func:`conversion_report` says what was converted and what was not.

    Raises:
        UserError: no residual addition that can be converted, nothing at ``where``, a network that has gates already
            or has a layer that cannot be copied, example inputs that it cannot take, a view that cannot fold the
            channels of some block where ``fallback`` is ``refuse``. The model is left as it was.
    """
    choices = (("view", view, tuple(TABLE)), ("start", start, STARTS), ("fallback", fallback, FALLBACKS))
    for name, value, known in choices:
        if value not in known:
            raise UserError(f"unknown {name} '{value}'; choose one of {', '.join(known)}")
    settings = {"view": view, "start": start, "reduction": reduction, "bias": bias, "mask": mask}
    settings["min_hidden"] = max(2, min_hidden) if isinstance(min_hidden, int) else min_hidden
    if gated := [name for name, module in model.named_modules() if isinstance(module, CompetitiveSE)]:
        raise UserError(f"{type(model).__name__} has competition already, at {gated[0]}; convert the original network")
    original = model
    if not inplace:
        model = copy_network(model, "convert in place (inplace=True)")

    plans, skipped = plan_conversion(model, Recording(model, example_inputs))
    if not plans:
        what = "that can be converted" if skipped else "of convolutional branches"
        raise UserError(
            f"{type(model).__name__} has no residual addition {what}{_because(skipped)}; "
            "competition needs blocks that compute identity + residual"
        )
    chosen = {name: plan for name, plan in plans.items() if where is None or _matches(where, name, plan.block)}
    if not chosen:
        raise UserError(f"where={where!r} matches no block of {type(model).__name__}; there are {_listed(list(plans))}")
    skipped |= {name: "not in where" for name in plans if name not in chosen}

    # All gates and classes are made before anything changes, so that a refusal leaves the model as it was.
    notes = {name: plan.note for name, plan in chosen.items() if plan.note}
    gates = {}
    for name, plan in chosen.items():
        views = [_view_for(name, addition, view, fallback) for addition in plan.additions]
        gates[name] = _new_gates(name, plan, [{**settings, "view": own} for own in views])
        if other := [addition.channels for addition, own in zip(plan.additions, views, strict=True) if own != view]:
            numbers = " and ".join(map(str, dict.fromkeys(other)))
            words = f"{view} cannot fold {numbers} channels, so that {fallback} reads them"
            notes[name] = f"{notes[name]}; {words}" if name in notes else words
        _try_forward(name, plan, list(gates[name]))
    for name, plan in chosen.items():
        for child, gate in gates[name].items():
            plan.block.add_module(child, gate)
        plan.replace()
    for name, reason in shared_with_original(model, original):
        skipped[name] = f"{skipped[name]}; {reason}" if name in skipped else reason
    remember(model, skipped, notes)
    return model


def _matches(where: Where, name: str, block: nn.Module) -> bool:
    if callable(where):
        return where(name, block)
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def _view_for(name: str, addition: Addition, view: str, fallback: str) -> str:
    """The view of a gate: the one that was asked for, unless it cannot fold the channels."""
    try:
        TABLE[view].layers.picture_size(addition.channels, None)
    except ValueError as error:
        if fallback == "refuse":
            raise UserError(
                f"block {name}: {error}; or leave the block out with where=, or take fallback='{FALLBACKS[0]}'"
            ) from None
        return fallback
    return view


def _new_gates(name: str, plan: Plan, settings: list[dict[str, Any]]) -> dict[str, CompetitiveSE]:
    """A gate for each addition of a block, by the name that it gets among the block's children."""
    names = (CHILD if number == 1 else f"{CHILD}_{number}" for number in count(1))
    free = (child for child in names if not hasattr(plan.block, child))
    pairs = zip(plan.additions, settings, strict=True)
    return {next(free): _new_gate(name, addition, plan.block, own) for addition, own in pairs}


def _new_gate(name: str, addition: Addition, block: nn.Module, settings: dict[str, Any]) -> CompetitiveSE:
    """A gate that is the same for every input, and learns from its first step."""
    like = tensor_like(block)
    try:
        gate = CompetitiveSE(addition.channels, **settings, device=like.device, dtype=like.dtype)
        check_dimensions(gate.view, addition.axes)
    except ValueError as error:
        raise UserError(f"block {name}: {error}; or leave the block out with where=") from None
    if addition.scale != 1 and getattr(gate.kind.layers, "scales_identity", False):
        raise UserError(
            f"block {name}: {addition.node.name} scales its residual by {addition.scale:g}, and view '{gate.view}' "
            f"scales both flows; write identity + {addition.scale:g} * residual, or leave the block out with where="
        )
    gate.zero_last_layer()
    gate.gain *= addition.scale  # identity + scale * residual, in the one step that the addition took
    return gate.train(block.training)


def _try_forward(name: str, plan: Plan, children: list[str]) -> None:
    try:
        plan.put_gates(children)
    except Exception as error:  # whatever a class does when it gets a subclass
        kind = type(plan.block).__name__
        raise UserError(
            f"block {name}: {kind} cannot have a subclass ({in_one_line(error)}); leave the block out with where="
        ) from None


def _because(skipped: dict[str, str]) -> str:
    if not skipped:
        return ""
    name, reason = next(iter(skipped.items()))
    more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    return f" ({name or 'the network itself'}: {reason}{more})"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
