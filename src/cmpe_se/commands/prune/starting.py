"""A pruned network as a folder to start training from, and the recipes of the trainings."""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from cmpe_se.data import ImageData
from cmpe_se.pruning.registry import NAME as PRUNED
from cmpe_se.pruning.widths import Widths
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.pretrained import saved_network
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.files import os_errors_as, write_text

START = "pruned"
"""Folder, in the new run's, of the network that training starts from."""


def arguments_with(run: RunFolder, widths: Widths) -> dict[str, Any]:
    """Keywords that make the run's network with other widths, for timm's ``cmpe_se_pruned``."""
    saved = saved_network(str(run.path))
    assert saved is not None  # a finished run has a network
    network, arguments = saved
    if network == PRUNED:  # widths of the whole network, block by block, and those of the second pruning over them
        return arguments | {"widths": arguments["widths"] | widths}
    return arguments | {"network": network, "widths": widths}


def rebuilt(run: RunFolder, network: nn.Module, widths: Widths) -> nn.Module:
    """The pruned network as timm makes it, with its weights: what everything else will load."""
    built = timm.create_model(PRUNED, **arguments_with(run, widths))
    built.load_state_dict(network.state_dict())
    return built.eval()


def write_start(run: RunFolder, network: nn.Module, widths: Widths, target: Path, data: ImageData) -> Path:
    """Write a network as :func:`rebuilt` returns it into a folder to start from.

    Args:
        run: that it was pruned from.
        network: on the CPU.
        widths: of its layers.
        target: folder of the new run.
        data: what it was trained on.

    Returns:
        The folder.
    """
    start = RunFolder(target / START)
    with os_errors_as(f"cannot make the run folder {target}"):
        start.path.mkdir(parents=True, exist_ok=True)
    start.save_model(network, model_args=arguments_with(run, widths), data=data)
    return start.path


def write_recipe(config: TrainingConfig, path: Path, widths: Widths, **settings: Any) -> Path:
    """Write the recipe of a training with given widths: the old run's settings, and a cosine of its own.

    Args:
        config: of the run that was pruned.
        path: of the file.
        widths: of the layers.
        settings: that differ besides, ``epochs`` and ``lr`` among them.
    """
    changed = config.changed(
        **{
            "widths": (dict(config.widths or {}) | widths) or None,
            "schedule": "cosine",
            "min_lr": 0.0,
            "warmup_epochs": 0,
            "freeze_epochs": 0,
            "patience": 0,
            "progressive_resizing": None,
            **settings,
        }
    )
    write_text(path, changed.to_yaml())
    return path
