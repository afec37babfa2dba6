"""The ``evaluate`` command: metrics of a finished run's network on test images."""

import csv
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cmpe_se.data import ImageData, load_data
from cmpe_se.errors import UserError
from cmpe_se.training.metrics import collect_logits, test_metrics
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.files import os_errors_as, write_json
from cmpe_se.utils.plots import plot_confusion
from cmpe_se.utils.progress import with_progress

_PRINTED_CLASSES = 20  # in the table on the screen; the files have them all


def evaluate(
    run: str,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    batch_size: int = 256,
    workers: int = 2,
    output: str | None = None,
    corruptions: bool = False,
) -> dict[str, Any]:
    """Test a finished run's network: accuracy overall and by class, confusion matrix, calibration.

    Writes ``evaluation.json``, ``per_class.csv``, ``confusion.csv`` and ``confusion.png``.

    Args:
        run: run folder.
        data: data set to test on, with the same classes as the run's; the run's own if left out. Its images are
            resized, cropped and normalised as the run's were.
        data_dir: folder of the data set.
        batch_size: number of images in a batch.
        workers: number of processes that decode images.
        output: folder for the files; RUN/evaluation if left out.
        corruptions: test on corrupted images too (contrast, brightness, noise, blur and JPEG compression, each at five
            severities), which takes 26 times as long. Writes ``corruptions.json``, ``corruptions.csv`` and
            ``corruptions.png`` into ``output``, or into RUN if that is left out.

    Returns:
        ``test_top1``, ``test_top5`` (percent), ``test_loss``, ``calibration_error`` (expected calibration error with
        15 bins, percent), ``images``, and ``per_class`` (class to accuracy in percent); with ``corruptions``, what
        :func:`cmpe_se.training.robustness.corruption_metrics` returns under that name.

    Raises:
        UserError: no finished run, other classes than the run's, or streamed data with ``corruptions``.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, should be at least 1")
    folder = RunFolder.open(run)
    config = folder.read_config()
    model = folder.load_model()
    dataset = load_tested(folder, data, data_dir, workers=workers)
    device = choose_device(config.device)
    model.to(device).to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    steps = -(-dataset.test_size // batch_size)
    batches = dataset.test_batches(batch_size=batch_size, device=device)
    logits, labels = collect_logits(model, with_progress(batches, "testing", steps), channels_last=config.channels_last)

    if not logits.isfinite().all():
        bad = int((~logits.isfinite().all(1)).sum())
        raise UserError(
            f"{folder.path} gives no finite values for {bad} of {len(logits)} images; its weights are damaged"
        )
    metrics = _all_metrics(logits, labels, dataset.classes)
    _write(Path(output) if output else folder.path / "evaluation", metrics, dataset.classes)
    _print(folder.path, metrics)
    del metrics["confusion"]
    if corruptions:
        # Only here: torchvision's second transforms take a while to import, as torchmetrics does below.
        from cmpe_se.training.robustness import corruption_metrics, table_of_corruptions, write_corruptions

        metrics["corruptions"] = corruption_metrics(
            model,
            dataset,
            batch_size=batch_size,
            device=device,
            channels_last=config.channels_last,
            progress="testing on corrupted images",
        )
        # compare looks into the run's folder: only what is of the run's own test images belongs there.
        place = folder.path / "evaluation" if data or data_dir else folder.path
        write_corruptions(Path(output) if output else place, metrics["corruptions"], dataset)
        Console().print(table_of_corruptions(metrics["corruptions"]))
    return metrics


def load_tested(
    folder: RunFolder, data: str | None = None, data_dir: str | None = None, *, workers: int = 2
) -> ImageData:
    """The data set to test a finished run on, with the run's preprocessing, whatever size its images have.

    Args:
        folder: of the run.
        data: data set to test on; the run's own if left out.
        data_dir: folder of that data set.
        workers: processes that decode images.

    Raises:
        UserError: no such data set, or other classes than the run's.
    """
    config, preprocessing = folder.read_config(), folder.preprocessing()
    name = data or config.data
    dataset = load_data(name, data_dir or config.data_dir, preprocessing=preprocessing, workers=workers)
    if dataset.classes != preprocessing.classes:
        own, classes = dataset.classes, preprocessing.classes
        raise UserError(
            f"{name} has the classes {', '.join(own[:5])}, ... ({len(own)}), but {folder.path} was trained on "
            f"{', '.join(classes[:5])}, ... ({len(classes)}); test on the same classes"
        )
    return dataset


def _all_metrics(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    # Only here: torchmetrics takes a second to import, and `--help` does without.
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

    confusion = multiclass_confusion_matrix(logits, labels, num_classes=len(classes))  # (true, predicted)
    error = multiclass_calibration_error(logits.softmax(1), labels, num_classes=len(classes), n_bins=15, norm="l1")
    counts = confusion.sum(1).clamp(min=1)
    accuracy = 100 * confusion.diagonal() / counts
    return test_metrics(logits, labels) | {
        "calibration_error": 100 * error.item(),
        "images": len(labels),
        "per_class": dict(zip(classes, accuracy.tolist(), strict=True)),
        "confusion": confusion,
    }


def _write(folder: Path, metrics: dict[str, Any], classes: tuple[str, ...]) -> None:
    with os_errors_as(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        summary = {key: value for key, value in metrics.items() if key != "confusion"}
        write_json(folder / "evaluation.json", summary)
        with open(folder / "per_class.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["class", "images", "top1"])
            for name, count, accuracy in zip(
                classes, metrics["confusion"].sum(1).tolist(), metrics["per_class"].values(), strict=True
            ):
                rows.writerow([name, count, f"{accuracy:.2f}"])
        with open(folder / "confusion.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["true \\ predicted", *classes])
            for name, row in zip(classes, metrics["confusion"].tolist(), strict=True):
                rows.writerow([name, *row])
        plot_confusion(metrics["confusion"], classes, folder / "confusion.png")


def _print(run: Path, metrics: dict[str, Any]) -> None:
    table = Table(title=f"{run}: {metrics['images']:,} test images", title_justify="left")
    table.add_column("")
    table.add_column("%", justify="right")
    table.add_row("top-1", f"{metrics['test_top1']:.2f}")
    table.add_row("top-5", f"{metrics['test_top5']:.2f}")
    table.add_row("calibration error", f"{metrics['calibration_error']:.2f}", end_section=True)
    worst_first = sorted(metrics["per_class"].items(), key=lambda item: item[1])
    for name, accuracy in worst_first[:_PRINTED_CLASSES]:
        table.add_row(name, f"{accuracy:.2f}")
    if len(worst_first) > _PRINTED_CLASSES:
        table.add_row(f"... {len(worst_first) - _PRINTED_CLASSES} better ones in per_class.csv", "")
    Console().print(table)
