"""What a training with static gates starts from: a network, and its settings."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from cmpe_se.data import ImageData
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.pretrained import saved_network
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.files import os_errors_as, write_text


def write_start(run: RunFolder, network: nn.Module, static: Sequence[str], target: RunFolder, data: ImageData) -> None:
    """Write a network with static gates into the folder ``frozen`` of the run that is to start from it.

    Args:
        run: that the network comes from.
        network: the run's, with static gates; it is moved to the CPU.
        static: names of the blocks whose gates are.
        target: the new run.
        data: what it was trained on.
    """
    _, arguments = saved_network(str(run.path)) or ("", {})
    start = RunFolder(target.path / "frozen")
    with os_errors_as(f"cannot make the run folder {target.path}"):
        start.path.mkdir(parents=True, exist_ok=True)
    start.save_model(network.cpu(), model_args=arguments | {"static": list(static)}, data=data)


def write_recipe(config: TrainingConfig, target: RunFolder, static: Sequence[str], *, epochs: int, lr: float) -> Path:
    """Write the recipe of the new run beside what it starts from: the old run's settings, and a cosine of its own."""
    changed = config.changed(
        static=list(static),
        pretrained=str(target.path / "frozen"),
        epochs=epochs,
        lr=lr,
        schedule="cosine",
        min_lr=0.0,
        warmup_epochs=0,
        freeze_epochs=0,
        patience=0,
        progressive_resizing=None,
    )
    recipe = target.path / "frozen" / "recipe.yaml"
    write_text(recipe, changed.to_yaml())
    return recipe
