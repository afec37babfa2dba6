"""The gates of a network, by names that no wrapper has part in."""

from torch import nn

from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.merging.merge import is_merged

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""Children by which torch.compile and activation checkpointing hold a part of a network."""


def own_name(name: str) -> str:
    """The name of a part of a network without what torch.compile and checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def gates_of(model: nn.Module) -> dict[str, CompetitiveSE]:
    """The gates of a network, in its order; a gate that stands at several places is there once.

    Args:
        model: the network itself, see :func:`cmpe_se.utils.wrappers.unwrapped`.

    Raises:
        UserError: it is merged, or a gate by itself.
    """
    if is_merged(model):
        raise UserError(
            f"this {type(model).__name__} is merged: its gates and norms are folded into other weights; take the "
            "network that it was merged from"
        )
    if isinstance(model, CompetitiveSE):
        raise UserError("this is a gate by itself, a layer like any other; give the network that it is in")
    return {own_name(name): module for name, module in model.named_modules() if isinstance(module, CompetitiveSE)}


def some_gates_of(model: nn.Module) -> dict[str, CompetitiveSE]:
    """:func:`gates_of`, of which there have to be some.

    Raises:
        UserError: there are none.
    """
    gates = gates_of(model)
    if not gates:
        raise UserError(f"{type(model).__name__} has no gates; cmpe_se.convert adds them")
    return gates


def scale_of(gate: CompetitiveSE) -> float:
    """Factor on the residual besides the gate, which a converted addition had (``torch.add(..., alpha=)``)."""
    return gate.gain * (gate.kind.half if gate.start == "one" else 1.0)


def trainable(gates: dict[str, CompetitiveSE]) -> dict[str, nn.Parameter]:
    """The gates' parameters by name, frozen ones among them.

    Raises:
        UserError: all are frozen.
    """
    parameters = {f"{name}.{own}": p for name, gate in gates.items() for own, p in gate.named_parameters()}
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError("all gates are frozen (requires_grad is False), so nothing would learn; unfreeze them first")
    return parameters
