"""The ``train`` command: a run, and the metrics that it ends with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmpe_se import training
from cmpe_se.training.config import DEFAULT_RECIPE
from cmpe_se.training.launching import is_main_process
from cmpe_se.training.summary import RunResult

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
        recipe: name of a recipe (cifar-fast, cifar-paper, digits, finetune or imagenet), or path of a YAML file.
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
        print(json.dumps({name: every[name] for name in _SHOWN}, indent=2))
    return result
