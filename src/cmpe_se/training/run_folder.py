"""The run folder: all that a training run leaves, readable by people and programs.

``config.yaml`` repeats the run, ``metrics.jsonl`` has a record per epoch, ``result.json`` the final metrics,
``curves.png`` shows them, ``progress.html`` while the run goes on, ``gates.jsonl`` has statistics of the gates per
epoch, ``model/`` loads with ``timm.create_model("local-dir:...")``, ``state/`` is for resuming. The networks that come
with the package have ``tested.safetensors`` besides: their predictions for the test images, and statistics of their
gates (``cmpe_se.inspecting.tested``).
"""

import errno
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

import timm
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor, nn

from cmpe_se.data import ImageData, Preprocessing, is_fixed_size
from cmpe_se.data.preprocessing import KEY, RESIZE
from cmpe_se.errors import UserError
from cmpe_se.shipped import shipped_folder, shipped_names
from cmpe_se.training.checkpoint import Checkpoints
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.summary import CheckpointTree, EpochRecord, RunResult
from cmpe_se.utils.files import os_errors_as, refuse_other_encodings, write_json, write_text, written_whole
from cmpe_se.utils.records import check_shape, parse_json, read_json
from cmpe_se.utils.tensor_files import UnreadableFileError, load_exactly, load_tensors, not_finite, save_tensors
from cmpe_se.utils.text import in_one_line

_log = logging.getLogger(__name__)
_REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
)  # no file can be made there
_ORPHANED = "checkpoints in state/, but no config.yaml with their settings; put config.yaml back, or"


class _ModelArguments(TypedDict, total=False):
    num_classes: int
    in_chans: int


class _Classes(TypedDict, total=False):
    label_names: list[str]


class _Constructed(TypedDict, total=False):
    model_args: _ModelArguments


class ModelConfig(_Constructed):
    """``model/config.json`` as timm writes it, with ours of the preprocessing under its own key."""

    architecture: str
    pretrained_cfg: _Classes


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.result, self.curves = self.path / "result.json", self.path / "curves.png"
        self.model, self.logs = self.path / "model", self.path / "tensorboard"
        self.corruptions = self.path / "corruptions.json"
        self.gates, self.progress = self.path / "gates.jsonl", self.path / "progress.html"
        self.trackers, self.trace = self.path / "trackers.json", self.path / "trace.json.gz"
        self.tested, self.lock = self.path / "tested.safetensors", self.path / ".lock"
        self.name = str(path)
        """What users call it."""
        self.outputs = self.path
        """Where commands write what they make of it, unless they are told where."""
        self.checkpoints = Checkpoints(self.path / "state", CheckpointTree)

    @classmethod
    def new(cls, path: str | Path) -> "RunFolder":
        """A run folder yet to be written; refuse one that holds a run already, or what is left of one."""
        refuse_other_encodings(path)
        run = cls(path)
        if run.config.exists():
            raise UserError(f"{path} holds a run already; resume it with --resume {path}, or name another --output")
        if run.checkpoints.exist():  # training would resume from them, with other settings than theirs
            raise UserError(f"{path} holds {_ORPHANED} name another --output")
        traces = (
            *(run.metrics, run.result, run.model, run.curves, run.corruptions),
            *(run.logs, run.gates, run.trackers, run.trace),
        )
        if left := [trace.name for trace in traces if trace.exists()]:  # they would be taken for the new run's
            raise UserError(
                f"{path} holds what is left of another run ({', '.join(left)}); delete that, or name another --output"
            )
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing run folder, or a network that comes with the package, by its name."""
        run = cls(path)
        if not run.config.is_file() and not run.checkpoints.exist() and (shipped := shipped_folder(run.name)):
            run = cls(shipped)
            run.name, run.outputs = shipped.name, Path("runs") / shipped.name  # the package may be read-only
            return run
        if not run.config.is_file() and run.checkpoints.exist():
            raise UserError(f"{path} holds {_ORPHANED} train again with another --output")
        if not run.config.is_file():
            known = ", ".join(shipped_names())
            raise UserError(
                f"{path} is no run folder: it has no config.yaml; `cmpe-se train` makes one under runs/, and the "
                f"package brings {known}"
            )
        return run

    def check_continues(self) -> None:
        """Refuse to resume a run that has finished epochs and has no checkpoint: it would begin at the first again.

        Raises:
            UserError: such a run.
        """
        if not self.checkpoints.exist() and (self.metrics.exists() or self.result.exists()):
            start = f" (--pretrained {self.path} starts from its network)" if self.model.exists() else ""
            raise UserError(
                f"{self.path} has finished epochs but no checkpoint in state/ to continue from; put state/ back, or "
                f"train again with another --output{start}"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this lasts, no other process trains the run; a killed one's lock goes with it.

        Raises:
            UserError: another process trains it.
        """
        with os_errors_as(f"cannot make the run folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.lock, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"{self.path} is being trained by another process; wait for it, or end that one") from None
        except (OSError, NotImplementedError) as error:  # as on some network file systems
            if isinstance(error, OSError) and error.errno in _REFUSED:
                raise UserError(f"cannot write to {self.path}: {error.strerror}") from None
            _log.warning(f"{self.path} cannot be locked ({error}); take care that only one process trains it")
        try:
            yield
        finally:
            lock.release()

    def read_config(self, *, as_written: bool = False) -> TrainingConfig:
        """The settings that the run was started with, or last resumed with.

        Args:
            as_written: refuse settings that were changed since, by hand or by damage: no run goes on with them.

        Raises:
            UserError: a file that cannot be read, or one that is not complete.
        """
        return TrainingConfig.of_run(self.config, as_written=as_written)

    def write_config(self, config: TrainingConfig) -> None:
        """Write the settings; makes the folder."""
        with os_errors_as(f"cannot make the run folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, config.to_yaml())

    def read_result(self) -> RunResult:
        """The final metrics of a finished run."""
        if not self.result.is_file():
            raise UserError(f"{self.path} has not finished; resume it with `cmpe-se train --resume {self.path}`")
        return read_json(self.result, RunResult, advice=self._written_again(self.result))

    def read_metrics(self) -> list[EpochRecord]:
        """The epochs' records, from the first one on."""
        records = []
        try:
            for number, line in enumerate(self.metrics.read_text(encoding="utf-8").splitlines(), start=1):
                record = check_shape(parse_json(line), EpochRecord, f"line {number}")
                if record["epoch"] != number:
                    raise ValueError(f"line {number} is of epoch {record['epoch']}")
                records.append(record)
            if self.result.is_file():
                result = self.read_result()
                epochs = result.get("trained_epochs", result["epochs"])
                if len(records) < epochs:
                    raise ValueError(f"it ends after {len(records)} of {epochs} epochs")
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.metrics} cannot be read: {in_one_line(error)}; {self._written_again(self.result)}"
            ) from None
        return records

    def write_metrics(self, history: Sequence[EpochRecord]) -> None:
        """Write the epochs' records, one JSON object a line."""
        write_text(self.metrics, "".join(json.dumps(record, allow_nan=False) + "\n" for record in history))

    def write_result(self, result: RunResult) -> None:
        """Write the final metrics; what the file says of a pruning before stays."""
        kept: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # none yet, or a torn one
            before = parse_json(self.result.read_text(encoding="utf-8"))
            kept = {"pruning": before["pruning"]} if isinstance(before, dict) and "pruning" in before else {}
        write_json(self.result, {**kept, **result})

    def _written_again(self, path: Path) -> str:
        """What brings back what a finished run leaves at its end; its checkpoint has all that is needed."""
        return f"delete {path}, and `cmpe-se train --resume {self.path}` writes it again"

    def save_model(self, model: nn.Module, *, model_args: dict[str, Any], data: ImageData) -> None:
        """Write the network in timm's format: config.json and model.safetensors.

        Both are written beside those of an earlier save, and replace them once they are whole.

        Args:
            model: made by ``timm.create_model``.
            model_args: keywords that it was made with.
            data: what it was trained on, for its preprocessing.

        Raises:
            UserError: weights that are not finite, or a folder that cannot be written to.
        """
        if name := not_finite(model.state_dict()):
            raise UserError(f"cannot save {self.model}: {name} holds values that are not finite; try a smaller --lr")
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
                with written_whole(self.model / file.name) as temporary:
                    if file.suffix == ".safetensors":  # again, with a checksum
                        save_tensors(model.state_dict(), temporary, {"format": "pt"})
                    else:
                        shutil.copyfile(file, temporary)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {self.model}: {error}; make room and resume") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def load_model(self) -> nn.Module:
        """The trained network, in eval mode, from config.json and safetensors.

        Raises:
            UserError: no network, one that is damaged, or weights that are not those of the network in config.json.
        """
        tensors, config = self.read_weights(), self._read_model_config()
        try:
            if not timm.is_model(config["architecture"]):
                raise UserError(f"there is no network {config['architecture']}")
            model = timm.create_model(f"local-dir:{self.model}", pretrained=False)
            load_exactly(model, tensors)
            return model.eval()
        except Exception as error:  # timm raises many kinds
            advice = self._written_again(self.result)
            raise UserError(f"cannot load {self.model}: {in_one_line(error)}; {advice}") from None

    @property
    def lasting_name(self) -> str:
        """For records: its path from the root, or its name if it comes with the package, which may move."""
        return str(self.path.resolve()) if self.outputs == self.path else self.name

    @property
    def has_lost_its_images(self) -> bool:
        """Whether the folder of its images is not there any more."""
        place = self.read_config().data_dir
        return place is not None and not Path(place).expanduser().exists()

    def read_weights(self) -> dict[str, Tensor]:
        """The trained network's weights, on the CPU.

        Raises:
            UserError: none there, a damaged file, or values that are not finite.
        """
        path = self.model / "model.safetensors"
        if not path.is_file():
            raise UserError(f"{self.path} holds no trained model; finish it: `cmpe-se train --resume {self.path}`")
        try:
            tensors, _ = load_tensors(path)
            if name := not_finite(tensors):
                raise UnreadableFileError(f"{name} holds values that are not finite")
        except UnreadableFileError as error:
            raise UserError(f"cannot load {path}: {error}; {self._written_again(self.result)}") from None
        return tensors

    def _read_model_config(self) -> dict[str, Any]:
        path = self.model / "config.json"
        config = read_json(path, ModelConfig, advice=self._written_again(self.result))
        labels, arguments = config["pretrained_cfg"].get("label_names"), config.get("model_args", {})
        if labels is not None and arguments.get("num_classes", len(labels)) != len(labels):
            raise UserError(
                f"{path} names {len(labels)} classes for a network with {arguments['num_classes']}; "
                + self._written_again(self.result)
            )
        return config

    def model_config(self) -> dict[str, Any]:
        """What ``model/config.json`` says: timm's pretrained_cfg, ``architecture``, and ours of the preprocessing."""
        config = self._read_model_config()
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
