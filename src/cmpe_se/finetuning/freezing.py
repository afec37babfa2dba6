"""A backbone that is frozen while the new parts of a network learn, and that computes the same for as long.

A frozen weight is half of it. Batch norms in training mode normalise by the batch and change their running statistics,
whatever becomes of their weights. So a frozen layer that keeps such values stays in eval mode, whatever calls
``train()`` on the network around it.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from cmpe_se.finetuning.gates import some_gates_of, trainable
from cmpe_se.utils.wrappers import unwrapped

_FROZEN = "_cmpe_se_frozen"
"""Attribute of a frozen module: names of its own parameters that took gradients before."""


def freeze_backbone(model: nn.Module) -> nn.Module:
    """Let the gates of a network learn, and nothing else.

    All other parameters take no gradients any more. Layers outside the gates that keep running values (batch norms,
    spectral norms) stay in eval mode, also after ``model.train()``, so that the backbone goes on computing what it did;
    dropout and stochastic depth follow ``train()`` as before. A part that is to learn too, such as a new classifier, is
    let go after that: ``model.get_classifier().requires_grad_(True)``.

    Copies and pickles of the network are frozen as it is. Freezing again freezes what was added or let go since.

    Args:
        model: network with gates, changed in place; of a wrapped one (``torch.compile``, a moving average) the network
            inside. ``DistributedDataParallel`` is put around a network that is frozen already.

    Returns:
        The model that was given.

    Raises:
        UserError: a network without gates, a merged one, or one whose gates are all frozen.
    """
    network = unwrapped(model)
    gates = some_gates_of(network)
    trainable(gates)
    freeze_all_but(network, gates.values())
    return model


def unfreeze_backbone(model: nn.Module) -> nn.Module:
    """Undo :func:`freeze_backbone`.

    What took gradients before takes them again, and what stayed in eval mode gets the mode that it was last asked for.

    Args:
        model: the network, or one that has it inside; changed in place.

    Returns:
        The model that was given. Where nothing is frozen, nothing changes.
    """
    unfreeze(unwrapped(model))
    return model


def freeze_all_but(network: nn.Module, trained: Iterable[nn.Module]) -> None:
    """Freeze what is not inside some modules.

    Args:
        network: changed in place.
        trained: modules that go on learning, with all inside them.
    """
    inside = {module for part in trained for module in part.modules()}
    kept = {id(parameter) for module in inside for parameter in module.parameters(recurse=False)}
    for module in network.modules():
        if module in inside:
            continue
        own = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad and id(p) not in kept}
        for parameter in own.values():
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer would go on with it
        known = vars(module).get(_FROZEN, ())
        setattr(module, _FROZEN, (*known, *(name for name in own if name not in known)))
        running = any(buffer.is_floating_point() for buffer in module.buffers(recurse=False))
        if running and not isinstance(vars(module).get("train"), _StaysInEval):
            module.train = _StaysInEval(module)  # type: ignore[method-assign]  # of this one module


def unfreeze(network: nn.Module) -> None:
    """Undo :func:`freeze_all_but`, for all that is frozen in a network."""
    for module in network.modules():
        for name in vars(module).pop(_FROZEN, ()):
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(True)
        if isinstance(held := vars(module).get("train"), _StaysInEval):
            held.let_go()


class _StaysInEval:
    """Takes the place of a module's ``train``: its children follow, itself does not."""

    def __init__(self, module: nn.Module):
        self.module, self.mode = module, module.training
        self.before: Callable[..., Any] | None = vars(module).get("train")
        module.training = False

    def __call__(self, mode: bool = True) -> nn.Module:
        self.mode = mode
        if self.before is None:
            type(self.module).train(self.module, mode)
        else:
            self.before(mode)
        self.module.training = False
        return self.module

    def let_go(self) -> None:
        """Give the module its own ``train`` back, and the mode that it was last asked for."""
        del self.module.train
        if self.before is not None:
            self.module.train = self.before  # type: ignore[method-assign]
        self.module.training = self.mode
