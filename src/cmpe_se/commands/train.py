"""The ``train`` command: a run, and the metrics that it ends with."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmpe_se import training
from cmpe_se.training.config import DEFAULT_RECIPE
from cmpe_se.training.launching import is_main_process
from cmpe_se.training.summary import RunResult
from cmpe_se.utils.escaping import to_json
from cmpe_se.utils.terminal import Terminal

_SHOWN = ("test_top1", "test_top5", "test_loss", "train_seconds", "images_per_second", "params", "run")


def train(
    *,
    recipe: str | Path = DEFAULT_RECIPE,
    resume: str | Path | None = None,
    output: str | Path | None = None,
    **settings: Any,
) -> RunResult:
    """Train a network and write a run folder: settings, metrics, curves and weights.

    A recipe sets everything and flags win over it; the defaults below are those of the recipe that is named. Ctrl-C
    saves a checkpoint; `--resume RUN` continues from it.

    For several processes: `torchrun --nproc-per-node 2 -m cmpe_se train`, on CPUs or GPUs, or on GPUs `accelerate
    launch --num_processes 2 -m cmpe_se train`.

    Args:
        recipe: name of a recipe (cifar-fast, cifar-paper, cifar100-fast, digits, finetune, imagenet, imagenet-a2,
            imagenet-a3, imagenet-classic or svhn), or path of a YAML file.
        resume: run folder to continue, with its own settings.
        output: run folder to write; runs/MODEL-DATA-seedN if left out.
        settings: fields of :class:`cmpe_se.training.config.TrainingConfig`; they win over the recipe.

    Returns:
        What ``result.json`` says and :func:`cmpe_se.training.train` returns, which prints nothing: model, view, data,
        seed, epochs, params, macs, test_top1 and test_top5 in percent, test_loss, train_seconds, images_per_second,
        versions, commit, and the run's folder.

    Raises:
        UserError: settings, data or folders that cannot be used, a run that another process trains; a loss that is not
            finite.
        TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    # In this form jsonargparse does not follow the settings into the function, importing all of training for --help.
    result = training.train(**(settings | {"recipe": recipe, "resume": resume, "output": output}))
    if is_main_process():
        every: Mapping[str, Any] = result
        print(to_json({name: _six_digits(every[name]) for name in _SHOWN}, indent=2))
        Terminal(stderr=True).print(_next_steps(result), soft_wrap=True)
    return result


def _six_digits(value: Any) -> Any:
    """A number as a person reads it; result.json has all of its digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _next_steps(result: RunResult) -> str:
    """Commands to go on with, as they can be typed."""
    commands = {"explore": "single images in the browser", "evaluate": "accuracy by class, confusion matrix"}
    if result["view"]:  # a report is about gates
        commands = {"report": "a page on the run and the competition in its network"} | commands
    run = shlex.quote(result["run"])
    return "\n".join(f"next: cmpe-se {command} {run}  ({what})" for command, what in commands.items())
