"""Metrics to TensorBoard, Weights & Biases, MLflow, Trackio and others, through Accelerate's trackers.

``trackers.json`` in the run folder says which tracked run continues this one, and how many epochs it has been told of.
So a resumed run goes on there, tells what was missed, and no step twice. A service that fails never ends a training.
"""

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from cmpe_se.errors import MissingPackageError, UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.summary import EpochRecord
from cmpe_se.utils.escaping import visible
from cmpe_se.utils.files import write_json
from cmpe_se.utils.packages import is_installed
from cmpe_se.utils.records import read_json
from cmpe_se.utils.text import in_one_line, split_names

PROJECT = "cmpe-se"
_EXTRAS = ("tensorboard", "wandb", "mlflow", "trackio")  # of this package; the others are not tested here
_PATIENCE = {  # at a service that cannot be reached; the libraries' own defaults are minutes
    "WANDB_INIT_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class TrackedRun(TypedDict):
    """What a tracker calls this run (None where it cannot continue one), and the epochs that it has been told of.

    ``tested`` is the number of epochs after which it was told the test of the network that the run keeps.
    """

    id: str | None
    epochs: int
    tested: NotRequired[int]


def tracker_names(config: TrainingConfig) -> list[str]:
    """The trackers of a run's settings, each once; TensorBoard last, whose folder no failure of others shall leave."""
    names = [*split_names(config.log_to or ""), *(["tensorboard"] if config.tensorboard else [])]
    return sorted(dict.fromkeys(names), key=lambda name: name == "tensorboard")


def check_trackers(config: TrainingConfig) -> None:
    """Refuse trackers that Accelerate does not know, or whose package is missing.

    Raises:
        UserError: such a tracker.
    """
    if not (names := tracker_names(config)):
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS as KNOWN

    for name in names:
        if name not in KNOWN:
            raise UserError(f"unknown log_to '{name}'; choose one or more of {', '.join(sorted(KNOWN))}, with commas")
        if not is_installed(name) and name in _PACKAGES:
            what = f"'cmpe-se[{name}]'" if name in _EXTRAS else _PACKAGES[name]
            raise MissingPackageError(f"log_to {name} needs {_PACKAGES[name]}; pip install {what}")


_PACKAGES = {name: name for name in (*_EXTRAS, "aim", "clearml", "dvclive", "swanlab")} | {"comet_ml": "comet-ml"}
"""Tracker, which is its module, to its package; one that a user has registered is no module."""


class Trackers:
    """The trackers of one run, on its main process.

    Args:
        names: of them.
        folder: of the run.
        state: path of ``trackers.json``.
        say: prints a line.
    """

    def __init__(self, names: Sequence[str], folder: Path, state: Path, say: Callable[[str], None]):
        self._names, self._folder, self._path, self._say = names, folder, state, say
        self._open: dict[str, Any] = {}
        self._runs: dict[str, TrackedRun] = {}

    def start(self, settings: TrainingConfig, epochs: int) -> None:
        """Begin a tracked run with each tracker, or continue the one that this run has begun.

        Args:
            settings: of the run, which become its configuration there.
            epochs: that are finished; runs from before there was ``trackers.json`` have told TensorBoard of them.

        Raises:
            UserError: a tracker that does not start, such as a service that cannot be reached; none is left open.
        """
        if not self._names:
            return
        advice = "delete it, and new tracked runs begin"
        if self._path.exists():
            self._runs = read_json(self._path, dict[str, TrackedRun], advice=advice)
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        if "tensorboard" in self._names and "tensorboard" not in self._runs and (self._folder / "tensorboard").exists():
            self._runs["tensorboard"] = {"id": None, "epochs": epochs}
        for name in self._names:
            known = self._runs.get(name)
            try:
                with _apart():
                    tracker = _create(name, self._folder, known["id"] if known else None)
                    tracker.start()
                    if not known:
                        tracker.store_init_configuration(_flat(settings))
            except Exception as error:  # each library raises its own
                self.finish()
                continued = f" to continue the run {known['id']} in {self._path}" if known and known["id"] else ""
                raise UserError(
                    f"log_to {name} cannot start{continued}: {in_one_line(error, most=300)}; leave it off, or mend "
                    "what it says and give the command again"
                ) from None
            self._open[name] = tracker
            self._runs.setdefault(name, {"id": None, "epochs": 0})["id"] = _id_of(name, tracker)
        write_json(self._path, self._runs)

    def log(self, history: Sequence[EpochRecord], gates: Mapping[int, Mapping[str, float]]) -> None:
        """Tell of the epochs that the trackers do not know yet.

        Args:
            history: records of all epochs.
            gates: epoch to numbers of its gates.
        """
        for name in list(self._open):
            for record in history:
                told = self._runs[name]["epochs"]
                if record["epoch"] <= told or name not in self._open:
                    continue
                numbers = _numbers(record) | dict(gates.get(record["epoch"], {}))
                # Noted first: a kill in between leaves an epoch out there, and none twice.
                self._note(name, epochs=record["epoch"])
                if not self._tell(name, numbers, record["step"]):
                    self._note(name, epochs=told)

    def log_test(self, record: EpochRecord, last: EpochRecord) -> None:
        """Tell of the test of the network that a run with a validation split keeps, at its last step.

        Args:
            record: of the epoch that it keeps.
            last: of the last epoch.
        """
        numbers = {key: value for key, value in _numbers(record).items() if key.startswith("test_")}
        for name in list(self._open):
            if (told := self._runs[name].get("tested", 0)) != last["epoch"]:
                self._note(name, tested=last["epoch"])
                if not self._tell(name, numbers, last["step"]):
                    self._note(name, tested=told)

    def finish(self) -> None:
        """End what was started."""
        for name, tracker in self._open.items():
            try:
                with _apart():
                    tracker.finish()
            except Exception as error:
                self._say(f"log_to {name} did not end well: {in_one_line(error, most=200)}")
        self._open = {}

    def _note(self, name: str, **values: int) -> None:
        self._runs[name].update(values)  # type: ignore[typeddict-item]
        write_json(self._path, self._runs)

    def _tell(self, name: str, numbers: Mapping[str, float], step: int) -> bool:
        """Whether a tracker took numbers; after its first failure it is left alone."""
        try:
            with _apart():
                self._open[name].log(dict(numbers), step=step)
        except Exception as error:
            self._say(
                f"log_to {name} has failed and is told no more, training goes on: {in_one_line(error, most=200)}; "
                "where the run is resumed before its end, it is told what it missed"
            )
            del self._open[name]
            return False
        return True


@contextmanager
def _apart() -> Iterator[None]:
    """What a tracker prints goes to stderr: stdout has the result."""
    with redirect_stdout(sys.stderr):
        yield


def _create(name: str, folder: Path, known: str | None) -> Any:
    """Accelerate's tracker, which continues a run of an id where it can."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind, title = LOGGER_TYPE_TO_CLASS[name], visible(folder.resolve().name)
    if name == "tensorboard":
        return kind("tensorboard", logging_dir=folder)
    if name == "wandb":
        again = {"id": known, "resume": "allow"} if known else {}
        project, title = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_NAME", title)
        return kind(project, name=title, dir=str(folder), **again)
    if name == "mlflow":
        return kind(PROJECT, run_name=title, run_id=known)
    if name == "trackio":
        # It continues the newest run of a name, which another folder of that name may have begun.
        return kind(PROJECT, name=known or f"{title}-{secrets.token_hex(2)}", resume="must" if known else "never")
    return kind(PROJECT, str(folder)) if kind.requires_logging_directory else kind(PROJECT)


def _id_of(name: str, tracker: Any) -> str | None:
    if name == "wandb":
        return str(tracker.tracker.id)
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return str(tracker.tracker.name) if name == "trackio" else None


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers by name, in the order of names."""
    return {key: value for key, value in sorted(record.items()) if key not in ("epoch", "step") and value is not None}


def _flat(settings: TrainingConfig) -> dict[str, Any]:
    """Settings as all trackers take them: numbers, true or false, and text."""
    return {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in asdict(settings).items()
    }
