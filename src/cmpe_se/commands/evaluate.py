"""The ``evaluate`` command: metrics of a finished run's network on test images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from cmpe_se.data import DataOptions, ImageData
from cmpe_se.data.imagenet import descriptions, subset_of
from cmpe_se.errors import UserError, unreadable_complaint
from cmpe_se.shipped import SHIPPED
from cmpe_se.training.metrics import among, collect_logits, test_metrics
from cmpe_se.training.real_labels import check_real, real_metrics
from cmpe_se.training.run_data import load_tested
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.files import os_errors_as, write_json
from cmpe_se.utils.plots import plot_confusion
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.tables import write_csv_file
from cmpe_se.utils.terminal import Terminal
from cmpe_se.utils.text import counted

_PRINTED_CLASSES = 20  # in the table on the screen; the files have them all


def evaluate(
    run: str = SHIPPED,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    batch_size: int = 256,
    workers: int = 2,
    output: str | None = None,
    corruptions: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    test_split: str | None = None,
    fail_fast: bool = False,
    classes: Literal["auto", "present", "all"] = "auto",
    real_labels: bool = False,
) -> dict[str, Any]:
    """Test a finished run's network: accuracy overall and by class, confusion matrix, calibration.

    Writes ``evaluation.json``, ``per_class.csv``, ``confusion.csv`` and ``confusion.png``.

    Args:
        run: run folder, or a network that comes with the package, by name; the one with folded gates if left out.
        data: data set to test on, with classes of the run's; the run's own if left out, of which those images are
            tested that it was not trained on. Of other class folders all images are tested, or those in test/ (or val/)
            if there is such a folder. Images are resized, cropped and normalised as the run's were. ImageNet's class
            folders can be named by synsets or by class indices.
        data_dir: folder of the data set.
        batch_size: number of images in a batch.
        workers: number of processes that decode images.
        output: folder for the files; RUN/evaluation if left out.
        corruptions: test on corrupted images too (contrast, brightness, noise, blur and JPEG compression, each at five
            severities), which takes 26 times as long. Writes ``corruptions.json``, ``corruptions.csv`` and
            ``corruptions.png`` into ``output``, or into RUN if that is left out.
        image_column: column of the images (Hugging Face), if not the run's or the only one.
        label_column: column of the classes (Hugging Face), if not the run's or the usual one.
        test_split: split to test on, or its folder, if not the run's or the usual one.
        fail_fast: stop at the first image that cannot be read. Otherwise the others are tested, those that cannot be
            read are listed at the end, and the exit status is 1.
        classes: which classes a prediction can be: `all` of the network's, or those `present` among the images. `auto`
            is present for the 200 classes of ImageNet-A and of ImageNet-R, as their figures are reported, and all for
            other data. ``evaluation.json`` has both accuracies.
        real_labels: report the accuracy by the ReaL labels of ImageNet's validation images too, which are found by file
            names.

    Returns:
        ``test_top1``, ``test_top5`` (percent), ``test_loss``, ``calibration_error`` (expected calibration error with
        15 bins, percent), ``images``, ``per_class`` (class to accuracy in percent, of the classes that have images),
        ``tested`` (which images these are, in words), ``classes`` (what all of these are among: ``present`` or
        ``all``), ``classes_present`` (number of classes), ``among`` (top-1, top-5 and loss for ``present`` and for
        ``all``), with ``real_labels`` what :func:`cmpe_se.training.real_labels.real_metrics` returns as ``real``, and
        ``unreadable`` (``image`` and ``error`` of each image that
        could not be read and is not counted); with ``corruptions``, what
        :func:`cmpe_se.training.robustness.corruption_metrics` returns under that name.

    Raises:
        UserError: no finished run, images of classes that the run does not have, no image that can be read, streamed
            data with ``corruptions``, or ReaL labels for other images than ImageNet's.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, should be at least 1")
    if classes not in ("auto", "present", "all"):
        raise UserError(f"classes is {classes}, should be auto, present or all")
    folder = RunFolder.open(run)
    config = folder.read_config()
    model = folder.load_model()
    options = DataOptions(image_column, label_column, None, test_split)
    dataset = load_tested(folder, data, data_dir, workers=workers, options=options, skip_unreadable=not fail_fast)
    if real_labels:
        check_real(dataset)
    device = choose_device(config.device)
    model.to(device).to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    steps = -(-dataset.test_size // batch_size)
    batches = dataset.test_batches(batch_size=batch_size, device=device)
    logits, labels = collect_logits(model, with_progress(batches, "testing", steps), channels_last=config.channels_last)
    if not len(labels):
        first = f"; the first: {dataset.unreadable[0].reason}" if dataset.unreadable else ""
        raise UserError(f"none of {dataset.tested} can be read{first}")

    if not logits.isfinite().all():
        bad = int((~logits.isfinite().all(1)).sum())
        raise UserError(
            f"{folder.path} gives no finite values for {bad} of {len(logits)} images; its weights are damaged"
        )
    present = _present(dataset, labels)
    chosen = _chosen(classes, present, dataset.classes)
    ways = {"present": among(logits, present), "all": logits}
    metrics = _all_metrics(ways[chosen], labels, dataset.classes)
    both = {way: test_metrics(values, labels) for way, values in ways.items()}
    metrics |= {"classes": chosen, "classes_present": len(present), "among": both}
    if real_labels:
        metrics["real"] = real_metrics(logits, dataset)
    metrics["tested"] = dataset.tested
    metrics["unreadable"] = [{"image": image, "error": reason} for image, reason in dataset.unreadable]
    _write(Path(output) if output else folder.outputs / "evaluation", metrics, dataset.classes)
    _print(folder.name, metrics, dataset.classes)
    for image in dataset.unreadable:
        Terminal(stderr=True).print(f"not tested: {image.reason}", soft_wrap=True)
    del metrics["confusion"]
    if corruptions:
        # Only here: torchvision's second transforms take a while to import, as torchmetrics does below.
        from cmpe_se.training.robustness import corruption_metrics, table_of_corruptions, write_corruptions

        metrics["corruptions"] = corruption_metrics(
            (lambda images: among(model(images), present)) if chosen == "present" else model,
            dataset,
            batch_size=batch_size,
            device=device,
            channels_last=config.channels_last,
            progress="testing on corrupted images",
        )
        # compare looks into the run's folder: only what is of the run's own test images belongs there.
        place = folder.outputs / "evaluation" if data or data_dir or test_split else folder.outputs
        write_corruptions(Path(output) if output else place, metrics["corruptions"], dataset)
        Terminal().print(table_of_corruptions(metrics["corruptions"]))
    return metrics


def complaint(metrics: dict[str, Any]) -> str | None:
    """What is wrong with what ``evaluate`` has returned, after all: images that cannot be read."""
    return unreadable_complaint([image["error"] for image in metrics["unreadable"]], metrics["images"])


def _present(data: ImageData, labels: Tensor) -> list[int]:
    """The classes that are tested: those of all images, of which some cannot be read, where they are known before."""
    known = labels.tolist() if data.folders is None else [label for _, label in data.folders.test]
    return sorted(set(known))


def _chosen(classes: str, present: Sequence[int], known: Sequence[str]) -> str:
    """``present`` or ``all``."""
    if classes != "auto":
        return classes
    return "present" if subset_of([known[place] for place in present], known) else "all"


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
        "per_class": {
            name: percent
            for name, percent, count in zip(classes, accuracy.tolist(), confusion.sum(1).tolist(), strict=True)
            if count
        },
        "confusion": confusion,
    }


def _write(folder: Path, metrics: dict[str, Any], classes: tuple[str, ...]) -> None:
    with os_errors_as(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        summary = {key: value for key, value in metrics.items() if key != "confusion"}
        write_json(folder / "evaluation.json", summary)
        counts = dict(zip(classes, metrics["confusion"].sum(1).tolist(), strict=True))
        words = _words(classes)
        rows = [
            [name, counts[name], f"{top1:.2f}", *([words[name]] if words else [])]
            for name, top1 in metrics["per_class"].items()
        ]
        columns = ["class", "images", "top1", *(["words"] if words else [])]
        write_csv_file(folder / "per_class.csv", columns, rows)
        matrix = [[name, *row] for name, row in zip(classes, metrics["confusion"].tolist(), strict=True)]
        write_csv_file(folder / "confusion.csv", ["true \\ predicted", *classes], matrix)
        plot_confusion(metrics["confusion"], classes, folder / "confusion.png")


def _words(classes: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(classes, descriptions(classes) or (), strict=False))


def _print(run: str, metrics: dict[str, Any], classes: tuple[str, ...]) -> None:
    tested = f"{run}: {counted(metrics['images'], 'image')} tested, {metrics['tested']}"
    Terminal().print(tested, soft_wrap=True)
    if metrics["classes_present"] < len(classes):
        Terminal().print(_of_some_classes(metrics, len(classes)), soft_wrap=True)
    table = Table()
    table.add_column("")
    table.add_column("%", justify="right")
    table.add_row("top-1", f"{metrics['test_top1']:.2f}")
    table.add_row("top-5", f"{metrics['test_top5']:.2f}")
    if real := metrics.get("real"):
        table.add_row("ReaL top-1", f"{real['top1']:.2f}")
        table.add_row("ReaL top-5", f"{real['top5']:.2f}")
    table.add_row("calibration error", f"{metrics['calibration_error']:.2f}", end_section=True)
    worst_first, words = sorted(metrics["per_class"].items(), key=lambda item: item[1]), _words(classes)
    for name, accuracy in worst_first[:_PRINTED_CLASSES]:
        table.add_row(f"{name} {words.get(name, '')}".rstrip(), f"{accuracy:.2f}")
    if len(worst_first) > _PRINTED_CLASSES:
        table.add_row(f"... {len(worst_first) - _PRINTED_CLASSES} better ones in per_class.csv", "")
    Terminal().print(table)
    if real:
        left_out = f", {counted(real['without_labels'], 'image')} without a label left out"
        Terminal().print(f"ReaL: {counted(real['images'], 'image')} with labels{left_out}", soft_wrap=True)


def _of_some_classes(metrics: dict[str, Any], total: int) -> str:
    """Which classes a prediction could be, and the accuracy where they were the others."""
    present = f"the {metrics['classes_present']:,} classes that are present"
    ways = {"present": present, "all": f"all {total:,} classes of the network"}
    other = "all" if metrics["classes"] == "present" else "present"
    top1 = metrics["among"][other]["test_top1"]
    return f"predictions are among {ways[metrics['classes']]} (among {ways[other]}: top-1 {top1:.2f} %)"
