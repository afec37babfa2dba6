"""A network's accuracy on corrupted test images, with its files and its table."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypedDict, cast

import torch
from rich.table import Table
from torch import Tensor, nn

from cmpe_se.data import ImageData
from cmpe_se.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from cmpe_se.errors import UserError
from cmpe_se.training.provenance import Provenance, provenance, write_table
from cmpe_se.utils.files import os_errors_as, write_json
from cmpe_se.utils.plots import plot_corruptions
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.records import read_json

_CLEAN = ("clean", 0)
Key = tuple[str, int]
"""Corruption and severity."""


class CorruptionMetrics(TypedDict):
    """Accuracies in percent: without corruption, the mean over all corrupted images, and five for each corruption."""

    clean: float
    mean: float
    contrast: list[float]
    brightness: list[float]
    noise: list[float]
    blur: list[float]
    jpeg: list[float]


class CorruptionRecord(CorruptionMetrics, Provenance):
    """``corruptions.json``: with the name and number of the images, the corruptions' parameters, and what made it."""

    data: str
    images: int
    parameters: dict[str, tuple[float, ...]]


def by_corruption(metrics: CorruptionMetrics) -> dict[str, list[float]]:
    """The five accuracies of each corruption, severity 1 first."""
    return {name: metrics[cast(Literal["contrast"], name)] for name in CORRUPTIONS}


@torch.no_grad()
def corruption_metrics(
    network: nn.Module | Callable[[Tensor], Tensor],
    data: ImageData,
    *,
    corrupted: Iterable[tuple[str, int, Tensor]] | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    progress: str | None = None,
) -> CorruptionMetrics:
    """Top-1 accuracy of a network on the test images as they are, and corrupted in five ways and five severities.

    Args:
        network: module in eval mode, or a function of normalised images (B, C, H, W) to logits (B, classes), on
            ``device``.
        data: with the test images; those that are large are decoded once, and corrupted a batch at a time.
        corrupted: the list of ``cmpe_se.data.corruptions.corrupted_test_sets(data)``, where it is made once for many
            networks; made here if left out.
        batch_size: images that go through the network at a time; it does not change the corrupted images.
        device: of the network.
        channels_last: bring images to that memory format.
        progress: text of a progress bar on stderr, where that is a terminal; no bar if left out.

    Returns:
        All in percent of the test images: ``clean``; for each of ``CORRUPTIONS`` a list of five, severity 1 first; and
        ``mean``, the mean corruption accuracy, over all 25 of them without the clean one.

    Raises:
        UserError: data that are streamed.
        ValueError: the network is in training mode, where batch norms would follow the corrupted images.
    """
    if getattr(network, "training", False):
        raise ValueError("the network is in training mode; call eval() on it")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    correct: dict[Key, Tensor | int] = dict.fromkeys([_CLEAN, *_keys()], 0)
    batches = _batches(data, batch_size) if corrupted is None else _cached_batches(data, corrupted, batch_size)
    steps = len(correct) * -(-data.test_size // batch_size)
    for key, pixels, labels in with_progress(batches, progress, steps):
        images = data.preprocessing.normalise(pixels.to(device, non_blocking=True)).to(memory_format=layout)
        correct[key] += (network(images).argmax(1) == labels.to(device, non_blocking=True)).sum()
    percent = {key: 100 * int(count) / data.test_size for key, count in correct.items()}
    each = {name: [percent[name, severity] for severity in SEVERITIES] for name in CORRUPTIONS}
    metrics = {"clean": percent[_CLEAN], "mean": fmean(percent[key] for key in _keys()), **each}
    return cast(CorruptionMetrics, metrics)


def _keys() -> list[Key]:
    return [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]


def _batches(data: ImageData, batch_size: int) -> Iterator[tuple[Key, Tensor, Tensor]]:
    """Each batch of test images as it is and in all its corruptions, one after the other."""
    first = 0
    for pixels, labels in data.test_pixels(batch_size=batch_size):
        yield _CLEAN, pixels, labels
        for key in _keys():
            yield key, corrupt(pixels, *key, first=first), labels
        first += len(labels)


def _cached_batches(
    data: ImageData, corrupted: Iterable[tuple[str, int, Tensor]], batch_size: int
) -> Iterator[tuple[Key, Tensor, Tensor]]:
    images, labels = next(data.test_pixels(batch_size=data.test_size))
    for name, severity, pixels in [(*_CLEAN, images), *corrupted]:
        for part, own_labels in zip(pixels.split(batch_size), labels.split(batch_size), strict=True):
            yield (name, severity), part, own_labels


def corruption_rows(metrics: CorruptionMetrics) -> list[dict[str, Any]]:
    """The rows of ``corruptions.csv``: ``corruption``, ``severity`` (0 is clean), ``parameter`` and ``top1``."""
    accuracies = by_corruption(metrics)
    clean = {"corruption": "clean", "severity": 0, "parameter": None, "top1": round(metrics["clean"], 4)}
    return [clean] + [
        {"corruption": name, "severity": severity, "parameter": parameter, "top1": round(accuracy, 4)}
        for name, parameters in CORRUPTIONS.items()
        for severity, parameter, accuracy in zip(SEVERITIES, parameters, accuracies[name], strict=True)
    ]


def write_corruptions(folder: Path, metrics: CorruptionMetrics, data: ImageData) -> None:
    """Write ``corruptions.csv``, ``corruptions.png`` and, last, ``corruptions.json``, each replaced as a whole.

    Args:
        folder: where to; made if need be.
        metrics: of ``corruption_metrics``.
        data: that they are of.

    Raises:
        UserError: the folder cannot be written to.
    """
    with os_errors_as(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / "corruptions.csv", corruption_rows(metrics))
        plot_corruptions(metrics, data.name, folder / "corruptions.png")
    write_corruption_record(folder, metrics, data, provenance())


def write_corruption_record(folder: Path, metrics: CorruptionMetrics, data: ImageData, source: Provenance) -> None:
    """Write ``corruptions.json`` alone, into a folder that is there; ``source`` is what ``provenance`` says."""
    record: CorruptionRecord = {
        **metrics,
        "data": data.name,
        "images": data.test_size,
        "parameters": CORRUPTIONS,
        **source,
    }
    write_json(folder / "corruptions.json", record)


def read_corruptions(folder: Path, data_name: str) -> CorruptionRecord | None:
    """What ``write_corruptions`` left in a folder; None where it left nothing, or for other data or parameters."""
    try:
        found = read_json(folder / "corruptions.json", CorruptionRecord, advice="")
    except UserError:  # missing, or damaged: it is measured again
        return None
    parameters = {name: tuple(values) for name, values in found["parameters"].items()}
    whole = all(len(values) == len(SEVERITIES) for values in by_corruption(found).values())
    return found if whole and parameters == CORRUPTIONS and found["data"] == data_name else None


def table_of_corruptions(metrics: CorruptionMetrics) -> Table:
    """A row for each corruption with its five accuracies and their mean, for the screen."""
    table = Table()
    table.add_column("top-1, % at severity")
    for column in (*map(str, SEVERITIES), "mean"):
        table.add_column(column, justify="right")
    rows = by_corruption(metrics)
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in (*values, fmean(values))))
    table.add_section()
    means = [fmean(values) for values in zip(*rows.values(), strict=True)]
    table.add_row("mean", *(f"{value:.2f}" for value in (*means, metrics["mean"])))
    table.add_row("clean", *[""] * len(means), f"{metrics['clean']:.2f}")
    return table
