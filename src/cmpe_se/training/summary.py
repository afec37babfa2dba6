"""The metrics of ``result.json``, from a run's records of epochs."""

from collections.abc import Sequence
from typing import Any, TypedDict, cast

from torch import Tensor

from cmpe_se.data import ImageData
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.metrics import EvaluationMetrics
from cmpe_se.training.provenance import Provenance
from cmpe_se.training.step_sums import TrainingMetrics


class EvaluationRecord(EvaluationMetrics):
    """Metrics of a test, and the images they are over."""

    test_images: int


class EpochRecord(TrainingMetrics):
    """A line of ``metrics.jsonl``: ``step`` counts those of the run, and ``lr`` is of the last one."""

    epoch: int
    step: int
    lr: float
    seconds: float
    test_images: int | None
    test_loss: float | None
    test_top1: float | None
    test_top5: float | None


class RunMetrics(EvaluationMetrics):
    """What :func:`summarise` says of a run; ``view`` is None for a network without gates."""

    model: str
    view: str | None
    data: str
    seed: int
    epochs: int
    params: int
    macs: int
    train_images: int
    test_images: int
    train_seconds: float
    images_per_second: float


class RunResult(RunMetrics, Provenance):
    """``result.json``: metrics, how many processes trained it, its folder, and what made it."""

    processes: int
    run: str


class _LaterParts(TypedDict, total=False):
    batch_size: int
    preprocessing: Any


class CheckpointTree(_LaterParts):
    """A checkpoint: state of network, optimiser and loop; ``_LaterParts`` are missing in the first version's."""

    network: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    epoch: int
    batch: int
    sums: Tensor
    epoch_seconds: float
    history: list[EpochRecord]


class Untested(TypedDict):
    """The part of an epoch's record that a test fills in."""

    test_images: None
    test_loss: None
    test_top1: None
    test_top5: None


UNTESTED = Untested(test_images=None, test_loss=None, test_top1=None, test_top5=None)
"""What the record of an epoch without a test has in the place of :func:`test_record`."""


def test_record(sums: Tensor) -> EvaluationRecord:
    """Test metrics, accuracies in percent, from what :func:`cmpe_se.commands.evaluate.count_correct` counted."""
    images, loss, top1, top5 = sums.tolist()
    return {
        "test_images": int(images),
        "test_loss": loss / images,
        "test_top1": 100 * top1 / images,
        "test_top5": 100 * top5 / images,
    }


def summarise(
    config: TrainingConfig,
    data: ImageData,
    history: Sequence[EpochRecord],
    *,
    view: str | None,
    params: int,
    macs: int,
) -> RunMetrics:
    """The metrics of a finished run, without those on what made it.

    Args:
        config: of the run.
        data: it was trained on.
        history: records of its epochs, the last one tested.
        view: the network's own, where the configuration names none.
        params: trainable parameters.
        macs: multiply-adds of one image.
    """
    tested, seconds = cast(EvaluationRecord, history[-1]), sum(record["seconds"] for record in history)
    images = sum(record["images_per_second"] * record["seconds"] for record in history)
    return {
        "model": config.model,
        "view": config.view or config.convert or view,
        "data": config.data,
        "seed": config.seed,
        "epochs": config.epochs,
        "params": params,
        "macs": macs,
        "test_top1": tested["test_top1"],
        "test_top5": tested["test_top5"],
        "test_loss": tested["test_loss"],
        "train_images": data.train_size,
        "test_images": tested["test_images"],
        "train_seconds": seconds,
        "images_per_second": images / max(seconds, 1e-9),
    }
