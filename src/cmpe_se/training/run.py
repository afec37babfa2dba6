"""A run, from its settings to its folder."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list

from cmpe_se.data import validation_split
from cmpe_se.errors import UserError
from cmpe_se.layers.precision import emulation_warning
from cmpe_se.training.config import DEFAULT_RECIPE, TrainingConfig
from cmpe_se.training.data_settings import refuse_idle_folder, with_whole_paths, without_foreign_augmentation
from cmpe_se.training.gate_settings import with_pretrained_gates, without_foreign_gates
from cmpe_se.training.interruption import Interruption
from cmpe_se.training.launching import lost
from cmpe_se.training.network import create_network
from cmpe_se.training.run_data import image_options, load_configured
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.run_images import read_listing, warn_of_copies, write_listing
from cmpe_se.training.seeding import seed_everything
from cmpe_se.training.summary import RunResult
from cmpe_se.training.trainer import Trainer
from cmpe_se.training.watching import check_trackers
from cmpe_se.utils.devices import choose_device

_log = logging.getLogger(__name__)
_MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


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
    before: TrainingConfig | None = None
    if resume is not None:
        if output is not None:
            raise UserError(f"a resumed run stays in its folder {resume}; leave --output {output} out")
        run = RunFolder.open(resume)
        before = run.read_config(as_written=True)
        config = before.changed(**settings)
        if config.data == before.data and config.validation != before.validation:
            raise UserError(
                f"{resume} was trained with --validation {before.validation:g}: another share would validate images "
                "that it has been trained on; begin a new run for that"
            )
        if run.result.exists() and config.epochs <= run.read_result()["epochs"] and not _waits_longer(config, before):
            if config != before:
                raise UserError(f"{resume} has finished its {before.epochs} epochs; continue it with a larger --epochs")
            return run.read_result()
        run.check_continues()
        images = image_options(config, run, before) | {"listing": read_listing(run)}
    else:
        run, config = None, TrainingConfig.from_recipe(recipe, **settings)
        config = with_pretrained_gates(without_foreign_gates(with_whole_paths(config), recipe, settings), settings)
        images = {"image_size": config.image_size}
        if config.freeze_epochs and not config.pretrained:
            raise UserError(
                "freeze_epochs freezes what pretrained weights are loaded into, and there are none; give --pretrained, "
                "or --freeze-epochs 0"
            )
        refuse_idle_folder(config.data, config.data_dir)

    check_trackers(config)
    # Accelerate keeps its settings for the life of the process; a second run may have others.
    AcceleratorState._reset_state()
    # Without an accelerator it joins processes only if told that the CPU is meant.
    cpu = choose_device(config.device).type == "cpu"
    if cpu and config.precision == "float16":
        raise UserError("precision float16 needs an accelerator; on a CPU take bfloat16 or float32")
    # Frozen parameters get no gradient for the other processes to wait for.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if config.freeze_epochs else None
    accelerator = Accelerator(cpu=cpu, mixed_precision=_MIXED_PRECISION[config.precision], kwargs_handlers=handlers)
    if (warning := emulation_warning(config.precision, accelerator.device.type)) and accelerator.is_main_process:
        _log.warning(warning)
    with accelerator.main_process_first():  # the first one downloads and fills the cache
        whole = load_configured(config, download=config.download, **images)
    data, validation = validation_split(whole, config.validation) if config.validation else (whole, None)
    if run is None:
        config = without_foreign_augmentation(config, TrainingConfig.from_recipe(recipe), data)
    seed_everything(config.seed)
    # A checkpoint has the weights already, and what the run started from may be gone.
    started = run is not None and run.checkpoints.exist()
    model, model_args = create_network(config.changed(pretrained=None) if started else config, data)
    if run is None:
        run = _new_run(output, config, accelerator)
    try:
        with Interruption() as interruption:
            trainer = Trainer(config, data, validation, model, model_args, run, accelerator, interruption)
            # Only now: locking makes the run's folder, which wrong settings shall not leave.
            with run.locked() if accelerator.is_main_process else nullcontext():
                if accelerator.is_main_process:
                    _check_again(run, before)
                    if before is None:
                        write_listing(run, whole, warn_of_copies(whole))
                return trainer.fit()
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory; try a smaller --batch-size, or --accumulate 2: {error}") from None
    except RuntimeError as error:
        if (reason := lost(error)) is None:
            raise
        advice = (
            f"resume with: cmpe-se train --resume {run.path}" if run.checkpoints.exist() else "nothing is saved yet"
        )
        raise UserError(f"{reason}; {advice}") from None


def _check_again(run: RunFolder, before: TrainingConfig | None) -> None:
    """Refuse a folder that another command has changed since this one has looked at it; no other can any more."""
    if before is None:
        RunFolder.new(run.path)
    elif run.read_config() != before:
        raise UserError(f"{run.path} has got other settings meanwhile, by another command; give this one again")


def _waits_longer(config: TrainingConfig, before: TrainingConfig) -> bool:
    """Whether a run that may have stopped early is to go on: with more patience, or with none."""
    return bool(before.patience) and (config.patience == 0 or config.patience > before.patience)


def _new_run(output: str | Path | None, config: TrainingConfig, accelerator: Accelerator) -> RunFolder:
    """The run folder to make; without a name, the main process chooses one and the others learn it."""
    if output is not None:
        return RunFolder.new(output)
    view = f"-{config.view or config.convert}" if config.view or config.convert else ""
    name = f"{config.model}{view}-{config.data}-seed{config.seed}".replace("/", "_")
    path = [str(_unused(Path("runs") / name))]
    if accelerator.num_processes > 1:
        broadcast_object_list(path)
    return RunFolder.new(path[0])


def _unused(base: Path) -> Path:
    """The folder, or the first of base-2, base-3, ... that does not exist."""
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path
