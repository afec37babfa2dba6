"""Gates for an optimizer that exists already."""

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from cmpe_se.errors import UserError
from cmpe_se.finetuning.gates import some_gates_of, trainable
from cmpe_se.utils.wrappers import unwrapped

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Keys of a group that a schedule computes learning rates from."""
_RATES_BY_GROUP = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_OTHERS_BY_GROUP = ("lr_lambdas", "base_momentums", "max_momentums")
"""Lists of PyTorch's schedulers that have a value for each group."""


def add_gates_to_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    lr: float | None = None,
    weight_decay: float | None = None,
    *,
    schedulers: Any = None,
) -> dict[str, Any] | None:
    """Let an optimizer that was made before the network had gates learn them too, in a group of their own.

    The network has to be converted in place (``convert(model, inplace=True)``), or the optimizer would hold parameters
    of the original; that is refused. Everything that is not given here is as in the group that holds most of the
    network's parameters: betas, momentum, ``lr_scale``, and what a schedule keeps there. Gates that are in the
    optimizer already are not added again, and frozen ones are added: they learn once they are unfrozen.

    To resume, add the gates before ``optimizer.load_state_dict``.

    Args:
        optimizer: of PyTorch, timm or another library, or Accelerate's wrapper of one.
        model: the network with its gates, wrapped or not.
        lr: learning rate of the gates, on the scale of the rate that the optimizer was made with (with ``OneCycleLR``
            of its ``max_lr``, with ``CyclicLR`` of its ``base_lr``). A schedule multiplies it as it does that group's.
        weight_decay: of the gates.
        schedulers: learning rate schedulers that were made for the optimizer before, one or several; PyTorch's learn of
            the new group. ``()`` where there are none, but the optimizer's state is that of a scheduled one.

    Returns:
        The new group, or None where all gates were there.

    Raises:
        UserError: no gates, all of them frozen, or a merged network; an optimizer of another network or of the original
            of this one, or that takes no second group; gates that are there with another learning rate or weight decay
            than given; a scheduler that was made before and is not given, or not of PyTorch. The optimizer is left as
            it was.
    """
    network = unwrapped(model)
    gates = trainable(some_gates_of(network))
    inner = _inside(optimizer)
    _refuse_other_groups(inner, gates)
    _refuse_other_networks(inner, network, gates)
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None and not value >= 0:
            raise UserError(f"{name} has to be a number of at least 0, got {value}")
        _refuse_other_settings(inner, gates, name, value)
    known = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    new = {name: parameter for name, parameter in gates.items() if id(parameter) not in known}
    if not new:
        return None

    index = _main_group(inner, network)
    like = inner.param_groups[index]
    found = _schedulers(inner, schedulers)
    scaled = partial(_scaled, peak=like.get("max_lr", like.get("initial_lr", like["lr"])), lr=lr)
    group = {key: scaled(value) if key in _RATES else value for key, value in like.items()}
    if lr is not None and "lr_scale" in group:
        group["lr_scale"] = 1.0
    if weight_decay is not None:
        group["weight_decay"] = weight_decay
    named = group.pop("param_names", None) is not None
    optimizer.add_param_group(group | {"params": list(new.items() if named else new.values())})
    for scheduler in found:
        for name in (*_RATES_BY_GROUP, *_OTHERS_BY_GROUP):
            if values := vars(scheduler).get(name):
                value = scaled(values[index]) if name in _RATES_BY_GROUP else values[index]
                setattr(scheduler, name, [*values, value])
    return inner.param_groups[-1]


def _inside(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper, which shares its groups."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _refuse_other_groups(optimizer: torch.optim.Optimizer, gates: dict[str, nn.Parameter]) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("LBFGS takes one group of parameters; make the optimizer after the network has its gates")
    if type(optimizer) is torch.optim.Muon and (name := next((key for key, p in gates.items() if p.ndim != 2), None)):
        raise UserError(f"Muon takes matrices, and {name} is none; give the gates an optimizer of their own")


def _refuse_other_networks(
    optimizer: torch.optim.Optimizer, network: nn.Module, gates: dict[str, nn.Parameter]
) -> None:
    """Refuse an optimizer that trains something else, above all the network that a converted one was copied from."""
    own = {id(parameter) for parameter in network.parameters()}
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    foreign = [parameter for key, parameter in held.items() if key not in own]
    absent = [parameter for name, parameter in network.named_parameters() if id(parameter) not in held]
    absent = [parameter for parameter in absent if not any(parameter is gate for gate in gates.values())]
    learning = [parameter for parameter in absent if parameter.requires_grad]
    kind = type(network).__name__
    # A copy has parameters of the same shapes. Other networks may share an optimizer, for example two in turns.
    wanted = Counter(tuple(parameter.shape) for parameter in learning or absent)
    if wanted and not wanted - Counter(tuple(parameter.shape) for parameter in foreign):
        raise UserError(
            f"the optimizer holds parameters like those of this {kind}, but others, such as those of the network that "
            "it was copied from; convert with inplace=True, or make the optimizer of the converted network's parameters"
        )
    if learning and own.isdisjoint(held):
        raise UserError(
            f"the optimizer holds none of the parameters of this {kind}; make it of the network's parameters"
        )


def _refuse_other_settings(
    optimizer: torch.optim.Optimizer, gates: dict[str, nn.Parameter], setting: str, value: float | None
) -> None:
    """Refuse a value for gates that are in the optimizer with another one."""
    names = {id(parameter): name for name, parameter in gates.items()}
    for number, group in enumerate(optimizer.param_groups):
        there = [group.get(key) for key in (_RATES if setting == "lr" else (setting,))]
        inside = [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]
        if value is not None and inside and value not in [float(one) for one in there if one is not None]:
            raise UserError(
                f"{inside[0]} is in group {number} of the optimizer already, with {setting} {there[0]} and not "
                f"{value}; make the optimizer without the gates, or set optimizer.param_groups[{number}]['{setting}']"
            )


def _main_group(optimizer: torch.optim.Optimizer, network: nn.Module) -> int:
    """Number of the group that holds most of a network's parameters; the first where none does."""
    own = {id(parameter) for parameter in network.parameters()}
    sizes = [
        sum(parameter.numel() for parameter in group["params"] if id(parameter) in own)
        for group in optimizer.param_groups
    ]
    return sizes.index(max(sizes))


def _scaled(value: Any, peak: Any, lr: float | None) -> Any:
    """A learning rate of the group that the gates' is modelled on, as the gates' own; a tensor becomes another."""
    if lr is None or value is None:
        return value.clone() if isinstance(value, Tensor) else value if lr is None else lr
    if value == peak:
        return torch.full_like(value, lr) if isinstance(value, Tensor) else lr
    return value * (lr / float(peak))


def _schedulers(optimizer: torch.optim.Optimizer, given: Any) -> list[Any]:
    """The schedulers that have to learn of a new group, those inside others among them.

    Raises:
        UserError: there is one that is not given, or that has no known place for a new group.
    """
    after = "make it after the gates are in the optimizer"
    if given is None:
        if hasattr(optimizer.step, "_wrapped_by_lr_sched") or "initial_lr" in optimizer.param_groups[0]:
            raise UserError(
                f"a learning rate scheduler was made for this optimizer, and would leave the gates out; {after}, or "
                "give it as schedulers= (schedulers=() where there is none)"
            )
        return []
    found = []
    waiting = list(given) if isinstance(given, (list, tuple)) else [given]
    while waiting:
        scheduler = waiting.pop(0)
        scheduler = getattr(scheduler, "scheduler", scheduler)  # inside Accelerate's
        if type(scheduler).__module__ != lr_scheduler.__name__:
            raise UserError(f"{type(scheduler).__name__} is no scheduler of torch.optim.lr_scheduler; {after}")
        if _inside(scheduler.optimizer) is not optimizer:
            raise UserError(f"{type(scheduler).__name__} was made for another optimizer; give this one's")
        found.append(scheduler)
        waiting += getattr(scheduler, "_schedulers", ())
    return found
