"""The facts of a run, at the top of its report."""

import shlex
from collections.abc import Sequence

from torch import Tensor

from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.summary import RunResult
from cmpe_se.utils.text import counted, data_name, duration, gate_words, pruned_word


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
    facts = [
        ("Test accuracy", f"{test_top1:.2f} %{trained}"),
        ("Chance level", _chance(classes, labels)),
        ("Network", result["model"] + pruned_word(config.widths)),
        ("View", (config.convert or result.get("view") or "the network's own") + gate_words(config.gate_settings)),
        ("Data", f"{data_name(config.data, config.data_dir)}, {_images(result)}"),
        ("Parameters", f"{result['params']:,}"),
        ("Multiply-adds of an image", f"{result['macs']:,}"),
        ("Training", f"{_epochs(result)} in {duration(result['train_seconds'])}, seed {result['seed']}"),
        ("Hardware", hardware.get("gpu") or cpu),
        (
            "Versions",
            ", ".join(f"{name} {versions[name]}" for name in ("cmpe_se", "torch", "timm") if name in versions),
        ),
        ("Repeat it", f"cmpe-se train --recipe {shlex.quote(str(folder.config))}"),
    ]
    return [(name, value) for name, value in facts if value]


def _images(result: RunResult) -> str:
    """How many images were used for what."""
    train, test = f"{result['train_images']:,} training", f"{result['test_images']:,} test images"
    if "validation_images" not in result:
        return f"{train} and {test}"
    return f"{train}, {result['validation_images']:,} validation (held out, they chose the epoch) and {test}"


def _epochs(result: RunResult) -> str:
    """How many epochs it was trained, and which of them the run keeps."""
    if "best_epoch" not in result:
        return counted(result["epochs"], "epoch")
    early = f", stopped early of {result['epochs']}," if result["trained_epochs"] < result["epochs"] else ""
    kept = f"epoch {result['best_epoch']} is kept (validation {result['validation_top1']:.2f} %)"
    return f"{counted(result['trained_epochs'], 'epoch')}{early} of which {kept},"


def _chance(classes: Sequence[str], labels: Tensor) -> str:
    """The accuracy of one answer for all images: that of the most frequent class."""
    most = 100 * labels.bincount().max().item() / len(labels)
    return f"{most:.2f} %, the most frequent of {len(classes)} classes"
