"""What trained gates have learnt: how static they are, block by block, and what each is worth to the accuracy.

    python benchmarks/learnt_gates.py --runs runs/se,runs/folded --output results/

A row for each block of each run, over all its test images. Spreads are standard deviations as parts of a gate's largest
value: over the block's channels (of their means over the images), and over the images (root mean square over the
channels). ``alone`` is the test accuracy with this block's gates at their means over training images and all others as
trained, as ``cmpe_se.merge(model, static=...)`` would put them; the row of the block ``all`` has every gate there, and
``most static half`` those blocks whose freezing changes the output least. A block sleeps where its gates spread over
the images by less than 0.001.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmpe_se.data import ImageData, plain_training_batches
from cmpe_se.inspecting.gathering import gather
from cmpe_se.inspecting.statistics import BlockStatistics
from cmpe_se.static_gates import Calibration
from cmpe_se.training.metrics import collect_logits, test_metrics
from cmpe_se.training.provenance import write_results
from cmpe_se.training.run_data import load_run_data
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.text import data_name

_IMAGES, _BATCH = 2000, 250
_SLEEPS = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="finished runs of networks with gates, separated by commas")
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV")
    options = parser.parse_args()
    folders = [RunFolder.open(path) for path in options.runs.split(",")]
    rows = [row for folder in folders for row in rows_of(folder)]
    config = folders[0].read_config()
    setup = f"{data_name(config.data, config.data_dir)}, {config.epochs} epochs, seed {config.seed}"
    options.output.mkdir(parents=True, exist_ok=True)
    print(write_results(options.output, "learnt-gates", rows, networks=setup))


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    """A row for each block, and two for several of them."""
    model, data = folder.load_model(), load_run_data(folder)
    steps = -(-data.test_size // _BATCH)
    tested = gather(model, with_progress(data.test_batches(batch_size=_BATCH), "testing", steps), len(data.classes))
    config = folder.read_config()
    common = {
        "network": Path(folder.path).name,
        "start": config.start,
        "reduction": config.reduction,
        "min_hidden": config.min_hidden,
        "as_trained": f"{tested.top1:.2f}",
    }
    accuracies: dict[str, float] = {}
    several: list[dict[str, Any]] = []
    if not all(block.constant for block in tested.blocks):
        images = [batch for batch, _ in plain_training_batches(data, _IMAGES, batch_size=_BATCH)]
        calibration = Calibration(model, images)
        effects = calibration.effects(with_progress)
        order = sorted(effects, key=lambda block: effects[block])
        accuracies = {block: top1_of(calibration.frozen([block]), data) for block in order}
        for name, blocks in (("most static half", order[: len(order) // 2]), ("all", order)):
            several.append({**common, "block": name, "alone": f"{top1_of(calibration.frozen(blocks), data):.2f}"})
    rows = [common | row_of(block, accuracies.get(block.name)) for block in tested.blocks]
    return rows + [dict.fromkeys(rows[0]) | each for each in several]


def row_of(block: BlockStatistics, alone: float | None) -> dict[str, Any]:
    over_channels = (block.mean.std(correction=0) / block.gain).item()
    over_images = (block.std.square().mean().sqrt() / block.gain).item()
    low, high = block.quantiles(0.05, 0.95)
    return {
        "block": block.name,
        "view": block.view,
        "channels": block.channels,
        "mean_gate": f"{block.mean.mean().item():.3f}",
        "gate_5_percent": f"{low:.3f}",
        "gate_95_percent": f"{high:.3f}",
        "spread_over_channels": f"{over_channels:.4f}",
        "spread_over_images": f"{over_images:.4f}",
        "explained_by_class": f"{block.explained:.3f}",
        "sleeps": "yes" if over_images < _SLEEPS and not block.constant else "no",
        "alone": None if alone is None else f"{alone:.2f}",
    }


def top1_of(network: nn.Module, data: ImageData) -> float:
    with torch.inference_mode():
        return test_metrics(*collect_logits(network.eval(), data.test_batches(batch_size=_BATCH)))["test_top1"]


if __name__ == "__main__":
    main()
