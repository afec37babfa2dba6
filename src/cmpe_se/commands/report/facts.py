"""The facts of a run, at the top of its report."""

import shlex
from collections.abc import Sequence

from torch import Tensor

from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.text import counted, data_name, duration, gate_words


def facts_of(folder: RunFolder, test_top1: float, classes: Sequence[str], labels: Tensor) -> list[tuple[str, str]]:
    """Names and values, for people.

    Args:
        folder: of a finished run.
        test_top1: of the pass that the report is made from, percent.
        classes: names.
        labels: of the images of that pass, (N,).
    """
    result, config = folder.read_result(), folder.read_config()
    hardware, versions = result.get("hardware", {}), result.get("versions", {})
    # Training may have tested in another precision, or on another device.
    trained = f" (after training {result['test_top1']:.2f} %)" if abs(result["test_top1"] - test_top1) >= 0.005 else ""
    threads = hardware.get("threads")
    cpu = hardware.get("cpu", "unknown") + (f", {counted(threads, 'thread')}" if threads else "")
    images = f"{result['train_images']:,} training and {result['test_images']:,} test images"
    epochs = counted(result["epochs"], "epoch")
    facts = [
        ("Test accuracy", f"{test_top1:.2f} %{trained}"),
        ("Chance level", _chance(classes, labels)),
        ("Network", result["model"]),
        ("View", (config.convert or result.get("view") or "the network's own") + gate_words(config.gate_settings)),
        ("Data", f"{data_name(config.data, config.data_dir)}, {images}"),
        ("Parameters", f"{result['params']:,}"),
        ("Multiply-adds of an image", f"{result['macs']:,}"),
        ("Training", f"{epochs} in {duration(result['train_seconds'])}, seed {result['seed']}"),
        ("Hardware", hardware.get("gpu") or cpu),
        (
            "Versions",
            ", ".join(f"{name} {versions[name]}" for name in ("cmpe_se", "torch", "timm") if name in versions),
        ),
        ("Repeat it", f"cmpe-se train --recipe {shlex.quote(str(folder.config))}"),
    ]
    return [(name, value) for name, value in facts if value]


def _chance(classes: Sequence[str], labels: Tensor) -> str:
    """The accuracy of one answer for all images: that of the most frequent class."""
    most = 100 * labels.bincount().max().item() / len(labels)
    return f"{most:.2f} %, the most frequent of {len(classes)} classes"
