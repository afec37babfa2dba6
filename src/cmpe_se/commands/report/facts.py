"""The facts of a run, at the top of its report."""

from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.text import duration, gate_words


def facts_of(folder: RunFolder, test_top1: float) -> list[tuple[str, str]]:
    """Names and values, for people.

    Args:
        folder: of a finished run.
        test_top1: of the pass that the report is made from, percent.
    """
    result, config = folder.read_result(), folder.read_config()
    hardware, versions = result.get("hardware", {}), result.get("versions", {})
    # Training may have tested in another precision, or on another device.
    trained = f" (after training {result['test_top1']:.2f} %)" if abs(result["test_top1"] - test_top1) >= 0.005 else ""
    threads = hardware.get("threads")
    cpu = f"{hardware.get('cpu', 'unknown')}{f', {threads} thread(s)' if threads else ''}"
    facts = [
        ("Test accuracy", f"{test_top1:.2f} %{trained}"),
        ("Network", result["model"]),
        ("View", (config.convert or result.get("view") or "the network's own") + gate_words(config.gate_settings)),
        ("Data", f"{config.data}, {result['train_images']:,} training and {result['test_images']:,} test images"),
        ("Parameters", f"{result['params']:,}"),
        ("Multiply-adds of an image", f"{result['macs']:,}"),
        ("Training", f"{result['epochs']} epochs in {duration(result['train_seconds'])}, seed {result['seed']}"),
        ("Hardware", hardware.get("gpu") or cpu),
        (
            "Versions",
            ", ".join(f"{name} {versions[name]}" for name in ("cmpe_se", "torch", "timm") if name in versions),
        ),
        ("Repeat it", f"cmpe-se train --recipe {folder.config}"),
    ]
    return [(name, value) for name, value in facts if value]
