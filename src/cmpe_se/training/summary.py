"""What a run's records of epochs say in the end: the figures of ``result.json``."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cmpe_se.data import ImageData
from cmpe_se.training.config import TrainingConfig

UNTESTED = dict.fromkeys(("test_images", "test_loss", "test_top1", "test_top5"))
"""What the record of an epoch without a test has in the place of :func:`test_record`."""


def test_record(sums: Tensor) -> dict[str, Any]:
    """Test figures, accuracies in percent, from what :func:`cmpe_se.commands.evaluate.count_correct` counted."""
    images, loss, top1, top5 = sums.tolist()
    figures = (int(images), loss / images, 100 * top1 / images, 100 * top5 / images)
    return dict(zip(UNTESTED, figures, strict=True))


def summarise(
    config: TrainingConfig,
    data: ImageData,
    history: Sequence[dict[str, Any]],
    *,
    view: str | None,
    params: int,
    macs: int,
) -> dict[str, Any]:
    """The figures of a finished run, without those on what made it.

    Args:
        config: of the run.
        data: it was trained on.
        history: records of its epochs, the last one tested.
        view: the network's own, where the configuration names none.
        params: trainable parameters.
        macs: multiply-adds of one image.
    """
    last, seconds = history[-1], sum(record["seconds"] for record in history)
    images = sum(record["images_per_second"] * record["seconds"] for record in history)
    return {
        "model": config.model,
        "view": config.view or config.convert or view,
        "data": config.data,
        "seed": config.seed,
        "epochs": config.epochs,
        "params": params,
        "macs": macs,
        "test_top1": last["test_top1"],
        "test_top5": last["test_top5"],
        "test_loss": last["test_loss"],
        "train_images": data.train_size,
        "test_images": last["test_images"],
        "train_seconds": seconds,
        "images_per_second": images / max(seconds, 1e-9),
    }
