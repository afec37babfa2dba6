"""What a checkpoint holds, put back into a run's network and optimiser if it fits them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cmpe_se.errors import UserError
from cmpe_se.training.summary import CheckpointTree
from cmpe_se.utils.sharding import part_like
from cmpe_se.utils.tensor_files import load_exactly
from cmpe_se.utils.text import in_one_line


def check_place(tree: CheckpointTree, batch_size: int, steps_per_epoch: int, path: Path) -> None:
    """Refuse a checkpoint from a place that a run with these batches does not have.

    Raises:
        UserError: batches of another size, or a place outside the run; the message names ``path``.
    """
    if tree["batch"] and tree.get("batch_size", batch_size) != batch_size:
        raise UserError(
            f"{path} is {tree['batch']} batches of {tree['batch_size']} images into an epoch, and batch_size "
            f"{batch_size} would divide it differently; resume with {tree['batch_size']}, and change it at the end of "
            "an epoch"
        )
    if tree["epoch"] != len(tree["history"]) or not 0 <= tree["batch"] <= steps_per_epoch:
        raise UserError(
            f"{path} does not fit these settings: it is {tree['batch']} batches into epoch {tree['epoch'] + 1}, with "
            f"records of {len(tree['history'])} epochs of {steps_per_epoch} batches"
        )


def restore(
    weights: Sequence[tuple[nn.Module, dict[str, Tensor]]],
    optimizer: torch.optim.Optimizer,
    optimizer_state: dict,
    path: Path,
) -> None:
    """Load weights and the optimiser's state; its arguments, such as weight decay, stay what they are.

    Args:
        weights: networks with their state dicts.
        optimizer: of their parameters.
        optimizer_state: its state dict.
        path: of the checkpoint, for messages.

    Raises:
        UserError: they do not fit, or hold values that are not finite.
    """
    # What the optimiser was made with is as the settings have it by now; PyTorch puts back what it was.
    made_with = [{name: group[name] for name in optimizer.defaults if name != "lr"} for group in optimizer.param_groups]
    try:
        for module, state in weights:
            load_exactly(module, state)
        optimizer.load_state_dict(optimizer_state)
    # Another optimiser's state, or a tree of another shape: PyTorch looks at neither.
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = in_one_line(error, most=200)
        raise UserError(f"{path} does not fit these settings: {reason}") from None
    for group, own in zip(optimizer.param_groups, made_with, strict=True):
        group.update(own)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, saved in optimizer_state["state"].items():
        parameter = parameters[number]
        for name, value in saved.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # The parameter's memory format, for speed, and the type that was saved, which PyTorch makes the
                # parameter's own; where it is shared out, this process's part.
                like = torch.empty_like(parameter, dtype=value.dtype)
                optimizer.state[parameter][name] = like.copy_(part_like(value, parameter))
