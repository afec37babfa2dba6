"""Optimiser, learning rate schedule and mixup of a configuration: timm's."""

from contextlib import suppress
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from cmpe_se.data import ImageData
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.training.config import TrainingConfig


def create_optimizer(
    config: TrainingConfig, network: nn.Module, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, Scheduler]:
    """The optimiser, and the schedule that sets its learning rate at every step."""
    try:
        optimizer = _create(config, _parameters(config, network))
        schedule, _ = create_scheduler_v2(
            optimizer,
            config.schedule,
            num_epochs=config.epochs,
            decay_epochs=config.decay_epochs,
            decay_milestones=config.decay_milestones or [],
            decay_rate=config.decay_rate,
            min_lr=config.min_lr,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        if config.optimizer_args:
            _try_a_step(config, next(network.parameters()).device)
    # What an optimiser says of arguments that it cannot use, or of those that do not go together.
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"optimizer '{config.optimizer}' or schedule '{config.schedule}': {error}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"optimizer '{config.optimizer}' needs second derivatives, which are not computed; adamw is near to it"
        )
    if schedule is None:  # what "none" gives
        raise UserError(f"schedule '{config.schedule}' sets no learning rate; for an unchanged one use constant")
    return optimizer, schedule


def _create(config: TrainingConfig, parameters: Any) -> torch.optim.Optimizer:
    return create_optimizer_v2(
        parameters, config.optimizer, config.lr, config.weight_decay, config.momentum, **_arguments(config)
    )


_OWN_FIELDS = ("lr", "momentum", "weight_decay", "layer_decay")


def _arguments(config: TrainingConfig) -> dict[str, Any]:
    """The optimiser's arguments beyond those that have a field of their own."""
    arguments = config.optimizer_args or {}
    if own := [name for name in arguments if name in _OWN_FIELDS]:
        flag = own[0].replace("_", "-")
        raise UserError(f"optimizer_args holds {own[0]}, which is a setting of its own; give --{flag} instead")
    return {name: _as_python(value) for name, value in arguments.items()}


def _as_python(value: Any) -> Any:
    """Optimisers take tuples, and YAML has lists; YAML takes 1e-6, without a point, for text."""
    if isinstance(value, list):
        return tuple(map(_as_python, value))
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _try_a_step(config: TrainingConfig, device: torch.device) -> None:
    """One step on a parameter of its own: some arguments are looked at only then."""
    parameter = nn.Parameter(torch.zeros(2, 2, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = _create(config, [parameter])
    if not getattr(optimizer, "is_second_order", False):
        optimizer.step()


def ema_decay(config: TrainingConfig) -> float:
    """The decay of the moving average for each step (arXiv 2307.13813: the scaling rule, where a batch is meant)."""
    return config.ema ** (config.batch_size / config.ema_batch_size) if config.ema_batch_size else config.ema


def _parameters(config: TrainingConfig, network: nn.Module) -> nn.Module | list[dict[str, Any]]:
    """The network, or groups of its parameters whose ``lr_scale`` timm's schedules heed."""
    if config.layer_decay == config.gate_lr == 1:
        return network
    gates = {id(p) for m in network.modules() if isinstance(m, CompetitiveSE) for p in m.parameters()}
    groups = []
    for group in param_groups_layer_decay(network, config.weight_decay, layer_decay=config.layer_decay):
        own = [p for p in group["params"] if id(p) in gates]
        others = [p for p in group["params"] if id(p) not in gates]
        if others:
            groups.append(group | {"params": others})
        if own:
            groups.append(group | {"params": own, "lr_scale": group["lr_scale"] * config.gate_lr})
    return groups


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate as the schedule has it, before a group's factor."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("lr_scale", 1.0)


def create_mixup(config: TrainingConfig, data: ImageData, processes: int) -> Mixup | None:
    """Mixup and cutmix of a batch, with label smoothing; None where both are off."""
    if not (config.mixup or config.cutmix):
        return None
    images = min(config.batch_size, data.train_size)
    if images % (2 * processes):
        raise UserError(
            f"mixup and cutmix pair the images of each process, but {images} images on {processes} do not pair; make "
            f"batch_size a multiple of {2 * processes}, and no more than the {data.train_size} training images"
        )
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=len(data.classes))
