"""A run, from its settings to its folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from cmpe_se.data import validation_split
from cmpe_se.errors import UserError
from cmpe_se.layers.precision import emulation_warning
from cmpe_se.training.config import DEFAULT_RECIPE, TrainingConfig, read_recipe
from cmpe_se.training.data_settings import without_foreign_augmentation
from cmpe_se.training.interruption import Interruption
from cmpe_se.training.launching import is_started_again, lost
from cmpe_se.training.meeting import meet
from cmpe_se.training.network import create_network
from cmpe_se.training.parallel import create_accelerator
from cmpe_se.training.run_data import load_configured
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.run_images import warn_of_copies, write_listing
from cmpe_se.training.seeding import seed_everything
from cmpe_se.training.sharing import one_first, refuse_other_images, send_weights, told_by_main
from cmpe_se.training.starting import Job, plan
from cmpe_se.training.summary import RunResult
from cmpe_se.training.trainer import Trainer
from cmpe_se.training.watching import check_trackers
from cmpe_se.utils.devices import choose_device

_log = logging.getLogger(__name__)


def train(
    *,
    recipe: str | Path = DEFAULT_RECIPE,
    resume: str | Path | None = None,
    output: str | Path | None = None,
    **settings: Any,
) -> RunResult:
    """Train a network, and write a run folder.

    Args:
        recipe: name of a recipe, or path of a YAML file.
        resume: run folder to resume, with its own settings (and those given here).
        output: run folder to make; runs/MODEL-DATA-seedN if left out.
        settings: fields of :class:`cmpe_se.training.config.TrainingConfig`; they win over the recipe.

    Returns:
        What ``result.json`` says: model, view, data, seed, epochs, params, macs, test_top1 and test_top5 in percent,
        test_loss, train_seconds, images_per_second, versions, commit, and where the run is.

    Raises:
        UserError: settings, data or folders that cannot be used, a run that another process trains; a loss that is not
            finite.
        TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    arguments = {"recipe": recipe, "resume": resume, "output": output, **settings}
    # The processes meet before anything is decided, and they need to know on what.
    cpu = choose_device("cpu" if _device(recipe, resume, settings) == "cpu" else "auto").type == "cpu"
    meet(cpu=cpu)
    PartialState(cpu=cpu)
    job = Job(arguments)
    start = told_by_main(partial(plan, job, recipe, resume, output, settings))
    if start.result is not None:
        return start.result
    config, run = start.config, RunFolder(start.path)
    if (choose_device(config.device).type == "cpu") != cpu:
        raise UserError(f"the run is set to --device {config.device}; give it on every machine")

    check_trackers(config)
    # Accelerate keeps its settings for the life of the process; a second run may have others.
    AcceleratorState._reset_state()
    if cpu and config.precision == "float16":
        raise UserError("precision float16 needs an accelerator; on a CPU take bfloat16 or float32")
    accelerator = create_accelerator(config, cpu=cpu, processes=PartialState().num_processes)
    if (warning := emulation_warning(config.precision, accelerator.device.type)) and accelerator.is_main_process:
        _log.warning(warning)
    with one_first(accelerator):  # it downloads and fills the cache
        whole = load_configured(config, download=config.download, **start.images)
    refuse_other_images(accelerator, whole)
    data, validation = validation_split(whole, config.validation) if config.validation else (whole, None)
    if start.recipe is not None:
        config = without_foreign_augmentation(config, start.recipe, data)
    seed_everything(config.seed)
    # A checkpoint has the weights already, and what the run started from may be gone; the main process sends its own.
    has_weights = start.has_checkpoint or not accelerator.is_main_process
    model, model_args = create_network(config.changed(pretrained=None) if has_weights else config, data)
    send_weights(accelerator, model)
    if start.before is None:
        told_by_main(lambda: RunFolder.new(run.path).path)
    with Interruption() as interruption, _failures_in_words(run):
        trainer = Trainer(config, data, validation, model, model_args, run, accelerator, interruption)
        # Only now: locking makes the run's folder, which wrong settings shall not leave.
        with run.locked() if accelerator.is_main_process else nullcontext():
            if accelerator.is_main_process:
                _check_again(run, start.before)
                job.begin(run)
                if start.before is None:
                    write_listing(run, whole, warn_of_copies(whole))
            return trainer.fit()


@contextmanager
def _failures_in_words(run: RunFolder) -> Iterator[None]:
    """What a run fails of through no fault of ours, as a sentence.

    It is found while stop signals are only noted: a launcher sends one to the others as soon as a process has ended.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory; try a smaller --batch-size, or --accumulate 2: {error}") from None
    except RuntimeError as error:
        if (reason := lost(error)) is None:
            raise
        raise UserError(f"{reason}; {_advice(run)}") from None


def _device(recipe: str | Path, resume: str | Path | None, settings: dict[str, Any]) -> str:
    """The device of a run, as far as this process can tell: another machine may have the recipe or the run's folder."""
    if (given := settings.get("device")) is not None:
        return str(given)
    try:
        return RunFolder.open(resume).read_config().device if resume else str(read_recipe(recipe).get("device", "auto"))
    except UserError:
        return "auto"


def _advice(run: RunFolder) -> str:
    """What to do after the end of another process."""
    if is_started_again():
        return "torchrun starts all of them again, and training continues from the last checkpoint"
    return f"resume with: cmpe-se train --resume {run.path}" if run.checkpoints.exist() else "nothing is saved yet"


def _check_again(run: RunFolder, before: TrainingConfig | None) -> None:
    """Refuse a folder that another command has changed since this one has looked at it; no other can any more."""
    if before is None:
        RunFolder.new(run.path)
    elif run.read_config() != before:
        raise UserError(f"{run.path} has got other settings meanwhile, by another command; give this one again")
