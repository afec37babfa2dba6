"""What a run begins with: decided by its main process, from the command and the run folder."""

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.data_settings import refuse_idle_folder, with_whole_paths, without_foreign_test_size
from cmpe_se.training.gate_settings import with_pretrained_gates, with_weights_by_name, without_foreign_gates
from cmpe_se.training.launching import remember, remembered
from cmpe_se.training.run_data import image_options
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.run_images import read_listing
from cmpe_se.training.summary import RunResult

_calls = itertools.count(1)


class Start(NamedTuple):
    """What all processes of a run begin with; a machine of its own disk needs nothing of the run folder for it."""

    path: Path
    """The run folder."""
    config: TrainingConfig
    recipe: TrainingConfig | None
    """What the recipe alone says; None for a run that is resumed."""
    before: TrainingConfig | None
    """The settings of a resumed run so far."""
    images: dict[str, Any]
    """What ``load_data`` needs to know of the run's images."""
    has_checkpoint: bool
    result: RunResult | None
    """Of a run that has finished already."""


class Job:
    """The run that one call of ``train`` makes, by which a later start of the same job finds it.

    torchrun starts all processes again when one has failed (``--max-restarts``), with the same command. Its store
    outlives them. The main process keeps the run's folder there, under a name that is made of the call's arguments and
    of which call it is: so no other run is taken for this one.

    Args:
        arguments: of the call.
    """

    def __init__(self, arguments: Mapping[str, Any]):
        words = json.dumps([next(_calls), {name: str(value) for name, value in arguments.items()}], sort_keys=True)
        self._name = f"run/{hashlib.sha256(words.encode()).hexdigest()[:16]}"

    def begun(self) -> RunFolder | None:
        """The folder in which an earlier start of the job has begun the run.

        Raises:
            UserError: it is not on this machine.
        """
        if (path := remembered(self._name)) is None:
            return None
        if not Path(path).is_dir():
            raise UserError(
                f"this job has begun its run in {path}, which is not there any more, or is on another machine; keep "
                "run folders on a disk that all machines share, or start the job again where the folder is"
            )
        return RunFolder(path)

    def begin(self, run: RunFolder) -> None:
        """Keep the folder of the run for later starts."""
        remember(self._name, str(run.path.absolute()))


def plan(
    job: Job, recipe: str | Path, resume: str | Path | None, output: str | Path | None, settings: dict[str, Any]
) -> Start:
    """Decide what a run begins with; for the main process. The arguments are those of ``train``.

    Raises:
        UserError: settings or a folder that cannot be used.
    """
    if resume is not None:
        if output is not None:
            raise UserError(f"a resumed run stays in its folder {resume}; leave --output {output} out")
        run = RunFolder.open(resume)
        if run.outputs != run.path:
            raise UserError(f"{run.name} comes with the package; --pretrained {run.name} starts from it")
        return _resumed(run, settings)
    begun = job.begun()
    if begun is not None and begun.config.exists():
        return _resumed(begun, {})  # the command's settings are the run's
    config = with_weights_by_name(TrainingConfig.from_recipe(recipe, **settings))
    config = with_pretrained_gates(without_foreign_gates(with_whole_paths(config), recipe, settings), settings)
    config = without_foreign_test_size(config, settings)
    if config.freeze_epochs and not config.pretrained:
        raise UserError(
            "freeze_epochs freezes what pretrained weights are loaded into, and there are none; give --pretrained, "
            "or --freeze-epochs 0"
        )
    refuse_idle_folder(config.data, config.data_dir)
    images = {"image_size": config.image_size}
    folder = Path(output) if output is not None else begun.path if begun else _chosen(config)
    return Start(folder, config, TrainingConfig.from_recipe(recipe), None, images, False, None)


def _resumed(run: RunFolder, settings: dict[str, Any]) -> Start:
    before = run.read_config(as_written=True)
    config = before.changed(**settings)
    if config.data == before.data and config.validation != before.validation:
        raise UserError(
            f"{run.path} was trained with --validation {before.validation:g}: another share would validate images "
            "that it has been trained on; begin a new run for that"
        )
    if run.result.exists() and config.epochs <= run.read_result()["epochs"] and not _waits_longer(config, before):
        if config != before:
            raise UserError(f"{run.path} has finished its {before.epochs} epochs; continue it with a larger --epochs")
        return Start(run.path, config, None, before, {}, True, run.read_result())
    run.check_continues()
    images = image_options(config, run, before) | {"listing": read_listing(run)}
    return Start(run.path, config, None, before, images, run.checkpoints.exist(), None)


def _waits_longer(config: TrainingConfig, before: TrainingConfig) -> bool:
    """Whether a run that may have stopped early is to go on: with more patience, or with none."""
    return bool(before.patience) and (config.patience == 0 or config.patience > before.patience)


def _chosen(config: TrainingConfig) -> Path:
    """A new folder under runs/, named after what is trained."""
    view = f"-{config.view or config.convert}" if config.view or config.convert else ""
    name = f"{config.model}{view}-{config.data}-seed{config.seed}".replace("/", "_")
    base = Path("runs") / name
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path
