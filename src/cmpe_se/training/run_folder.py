"""The run folder: all that a training run leaves, readable by people and programs.

``config.yaml`` repeats the run, ``metrics.jsonl`` has a record per epoch, ``result.json`` the final metrics,
``curves.png`` shows them, ``model/`` loads with ``timm.create_model("local-dir:...")``, ``state/`` is for resuming.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import timm
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

from cmpe_se.data import ImageData, Preprocessing, is_fixed_size
from cmpe_se.data.preprocessing import KEY, RESIZE
from cmpe_se.errors import UserError
from cmpe_se.training.checkpoint import Checkpoints
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.summary import EpochRecord, RunResult
from cmpe_se.utils.escaping import to_json
from cmpe_se.utils.files import os_errors_as, refuse_other_encodings
from cmpe_se.utils.text import in_one_line

_log = logging.getLogger(__name__)
_ORPHANED = "checkpoints in state/, but no config.yaml with their settings; put config.yaml back, or"


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.result, self.curves = self.path / "result.json", self.path / "curves.png"
        self.model, self.logs = self.path / "model", self.path / "tensorboard"
        self.corruptions = self.path / "corruptions.json"
        self.lock = self.path / ".lock"
        self.checkpoints = Checkpoints(self.path / "state")

    @classmethod
    def new(cls, path: str | Path) -> "RunFolder":
        """A run folder yet to be written; refuse one that holds a run already, or what is left of one."""
        refuse_other_encodings(path)
        run = cls(path)
        if run.config.exists():
            raise UserError(f"{path} holds a run already; resume it with --resume {path}, or name another --output")
        if run.checkpoints.exist():  # training would resume from them, with other settings than theirs
            raise UserError(f"{path} holds {_ORPHANED} name another --output")
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing run folder."""
        run = cls(path)
        if not run.config.is_file() and run.checkpoints.exist():
            raise UserError(f"{path} holds {_ORPHANED} train again with another --output")
        if not run.config.is_file():
            raise UserError(f"{path} is no run folder: it has no config.yaml; `cmpe-se train` makes one under runs/")
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this lasts, no other process trains the run; a killed one's lock goes with it.

        Raises:
            UserError: another process trains it.
        """
        lock = FileLock(self.lock, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"{self.path} is being trained by another process; wait for it, or end that one") from None
        except (OSError, NotImplementedError) as error:  # as on some network file systems
            _log.warning(f"{self.path} cannot be locked ({error}); take care that only one process trains it")
        try:
            yield
        finally:
            lock.release()

    def read_config(self) -> TrainingConfig:
        """The settings that the run was started with, or last resumed with."""
        return TrainingConfig.from_recipe(self.config)

    def write_config(self, config: TrainingConfig) -> None:
        """Write the settings; makes the folder."""
        with os_errors_as(f"cannot make the run folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, config.to_yaml())

    def read_result(self) -> RunResult:
        """The final metrics of a finished run."""
        if not self.result.is_file():
            raise UserError(f"{self.path} has not finished; resume it with `cmpe-se train --resume {self.path}`")
        return cast(RunResult, _read_json(self.result))

    def read_metrics(self) -> list[EpochRecord]:
        """The epochs' records."""
        try:
            return [json.loads(line) for line in self.metrics.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.metrics} cannot be read: {error}") from None

    def write_metrics(self, history: Sequence[EpochRecord]) -> None:
        """Write the epochs' records, one JSON object a line."""
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in history))

    def write_result(self, result: RunResult) -> None:
        """Write the final metrics."""
        write_text(self.result, to_json(result, indent=2) + "\n")

    def save_model(self, model: nn.Module, *, model_args: dict[str, Any], data: ImageData) -> None:
        """Write the network in timm's format: config.json and model.safetensors.

        Both are written beside those of an earlier save, and replace them once they are whole.

        Args:
            model: made by ``timm.create_model``.
            model_args: keywords that it was made with.
            data: what it was trained on, for its preprocessing.
        """
        words = data.preprocessing.to_timm()
        labels = {"num_classes": len(data.classes), "label_names": list(data.classes)}
        unfinished = self.model.with_name("model.partial")
        try:
            timm.models.save_for_hf(
                model,
                str(unfinished),
                model_config={"pretrained_cfg": words | labels, KEY: data.preprocessing.to_dict()},
                model_args=model_args,
                data_config=words,  # or mean and deviation would be stretched to three channels on loading
                safe_serialization=True,
            )
            self.model.mkdir(exist_ok=True)
            for file in unfinished.iterdir():
                os.replace(file, self.model / file.name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {self.model}: {error}; make room and resume") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def load_model(self) -> nn.Module:
        """The trained network, in eval mode, from config.json and safetensors."""
        if not (self.model / "model.safetensors").is_file():
            raise UserError(f"{self.path} holds no trained model; finish it: `cmpe-se train --resume {self.path}`")
        try:
            return timm.create_model(f"local-dir:{self.model}", pretrained=True).eval()
        except Exception as error:  # timm and safetensors raise many kinds
            raise UserError(f"cannot load {self.model}: {in_one_line(error)}") from None

    def model_config(self) -> dict[str, Any]:
        """What ``model/config.json`` says: timm's pretrained_cfg, ``architecture``, and ours of the preprocessing."""
        config = _read_json(self.model / "config.json")
        return config["pretrained_cfg"] | {key: config[key] for key in ("architecture", KEY) if key in config}

    def preprocessing(self) -> Preprocessing:
        """What the network takes images as, and its classes.

        A run from before ``Preprocessing`` says it in timm's words alone; what its class folders were resized by, its
        settings tell.

        Raises:
            UserError: nothing of it is there, or it cannot be used.
        """
        config, where = self.model_config(), str(self.model / "config.json")
        if KEY in config:
            return Preprocessing.from_dict(config[KEY], where)
        in_memory = config.get("crop_pct") == 1
        return Preprocessing.from_timm(config, where, self.resize_before_preprocessing() if in_memory else RESIZE)

    def resize_before_preprocessing(self) -> str:
        """What ``Preprocessing`` calls ``resize``, of a run whose images were held in memory before there was one."""
        config = self.read_config()
        return "fit" if config.image_size is not None and not is_fixed_size(config.data) else RESIZE


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it, and `cmpe-se train --resume` writes it") from None


def write_text(path: Path, text: str) -> None:
    """Replace a file's text as a whole: a reader, or a kill, never meets half of it."""
    temporary = path.with_name(path.name + ".partial")
    with os_errors_as(f"cannot write {path}"):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
