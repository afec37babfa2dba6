"""What all that looks at gates while images go through a network has in common."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cmpe_se.errors import UserError
from cmpe_se.layers.gate_layers import Gate
from cmpe_se.layers.merged_gate import MergedGate
from cmpe_se.layers.views import find_view


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """A network in eval mode for as long as the context lasts, then each of its modules in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False  # not by eval(), which a merged network or a frozen norm answers in its own way
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Calls of a network run eagerly, whose ``compile()`` made them run what was compiled, without new hooks."""
    compiled = model._compiled_call_impl
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


def listen_to_factors(name: str, gate: Gate | MergedGate, factors: list[Tensor]) -> list[Any]:
    """Hooks on a gate that takes whole maps, which append the factors that it puts on them to a list.

    Args:
        name: of its block, for messages.
        gate: every module called ``gate`` inside it puts out factors.
        factors: gets (N, C, 1, ...), (N, 1, ...) or (N, C, ...).

    Raises:
        UserError: no module in it is called so.
    """
    layers = find_view(gate.view).layers

    def keep_factor(_: nn.Module, __: object, output: Tensor) -> None:
        of_channels = output.ndim == 3 and getattr(layers, "takes", None) != "all"  # ECA's are (N, 1, C)
        factors.append(output.detach().transpose(1, 2) if of_channels else output.detach())

    inner = [module for path, module in gate.named_modules() if path.split(".")[-1] == "gate"]
    if not inner:
        raise UserError(
            f"{name}: the module of view '{gate.view}' has no part called 'gate' that puts out its factors, so they "
            "cannot be seen"
        )
    return [module.register_forward_hook(keep_factor) for module in inner]


def mean_factor(factors: Sequence[Tensor]) -> Any:
    """The factor on each channel, (N, C): the product of all, each averaged over the positions."""
    return math.prod(factor.flatten(2).mean(2) for factor in factors)
