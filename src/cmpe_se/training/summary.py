"""The metrics of ``result.json``, from a run's records of epochs."""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict, cast

from torch import Tensor

from cmpe_se.data import ImageData
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.metrics import EvaluationMetrics
from cmpe_se.training.provenance import Provenance
from cmpe_se.training.step_sums import TrainingMetrics


class EvaluationRecord(EvaluationMetrics):
    """Metrics of a test, and the images they are over."""

    test_images: int


class ValidationRecord(TypedDict):
    """Metrics of the validation split, accuracies in percent, and the images they are over."""

    validation_images: int
    validation_loss: float
    validation_top1: float
    validation_top5: float


class EpochRecord(TrainingMetrics):
    """A line of ``metrics.jsonl``: ``step`` counts those of the run, and ``lr`` is of the last one.

    With a validation split only the epoch that the run keeps is tested.
    """

    epoch: int
    step: int
    lr: float
    seconds: float
    test_images: int | None
    test_loss: float | None
    test_top1: float | None
    test_top5: float | None
    validation_images: NotRequired[int | None]
    validation_loss: NotRequired[float | None]
    validation_top1: NotRequired[float | None]
    validation_top5: NotRequired[float | None]


class RunMetrics(EvaluationMetrics):
    """What :func:`summarise` says of a run; ``view`` is None for a network without gates.

    ``gates`` are those of the network as it was trained, view to number, where ``view`` is of the settings.
    With a validation split ``best_epoch`` is the one that the run keeps, of ``trained_epochs``.
    """

    model: str
    view: str | None
    data: str
    seed: int
    epochs: int
    params: int
    macs: int
    gates: NotRequired[dict[str, int]]
    train_images: int
    test_images: int
    train_seconds: float
    images_per_second: float
    validation_images: NotRequired[int]
    validation_top1: NotRequired[float]
    best_epoch: NotRequired[int]
    trained_epochs: NotRequired[int]


class RunResult(RunMetrics, Provenance):
    """``result.json``: metrics, how many processes trained it, its folder, and what made it.

    ``tf32`` says whether convolutions had TF32's 10 bits in the place of float32's 23; earlier runs do not say.
    """

    processes: int
    run: str
    tf32: NotRequired[bool]


class BestState(TypedDict):
    """The best epoch so far by the validation split, its score (accuracy, loss with its sign turned) and weights."""

    epoch: int
    score: list[float]
    weights: dict[str, Tensor]


class _LaterParts(TypedDict, total=False):
    batch_size: int
    best: BestState | None
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


def validation_record(sums: Tensor) -> ValidationRecord:
    """Metrics of the validation split, as :func:`test_record` those of the test images."""
    record = test_record(sums)
    return {
        "validation_images": record["test_images"],
        "validation_loss": record["test_loss"],
        "validation_top1": record["test_top1"],
        "validation_top5": record["test_top5"],
    }


def summarise(
    config: TrainingConfig,
    data: ImageData,
    history: Sequence[EpochRecord],
    *,
    view: str | None,
    params: int,
    macs: int,
    gates: dict[str, int],
    best_epoch: int | None = None,
) -> RunMetrics:
    """The metrics of a finished run, without those on what made it.

    Args:
        config: of the run.
        data: it was trained on.
        history: records of its epochs, of which the one that the run keeps is tested.
        view: the network's own, where the configuration names none.
        params: trainable parameters.
        macs: multiply-adds of one image.
        gates: in the network, view to number.
        best_epoch: the epoch that the run keeps, counted from 1, where a validation split chose it; else the last.
    """
    kept = history[best_epoch - 1 if best_epoch else -1]
    tested, seconds = cast(EvaluationRecord, kept), sum(record["seconds"] for record in history)
    images = sum(record["images_per_second"] * record["seconds"] for record in history)
    metrics: RunMetrics = {
        "model": config.model,
        "view": config.view or config.convert or view,
        "data": config.data,
        "seed": config.seed,
        "epochs": config.epochs,
        "params": params,
        "macs": macs,
        "gates": gates,
        "test_top1": tested["test_top1"],
        "test_top5": tested["test_top5"],
        "test_loss": tested["test_loss"],
        "train_images": data.train_size,
        "test_images": tested["test_images"],
        "train_seconds": seconds,
        "images_per_second": images / max(seconds, 1e-9),
    }
    if best_epoch:
        chosen = cast(ValidationRecord, kept)
        metrics["validation_images"] = chosen["validation_images"]
        metrics["validation_top1"] = chosen["validation_top1"]
        metrics["best_epoch"], metrics["trained_epochs"] = best_epoch, len(history)
    return metrics
