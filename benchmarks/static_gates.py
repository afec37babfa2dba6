"""What static gates cost in accuracy and save in time: from all gates dynamic to all static.

    python benchmarks/static_gates.py --runs runs/folded,runs/se --beside runs/plain,runs/static --output results/

Of each run in ``--runs`` the gates are frozen at their means over training images, one more at a time, in the order of
what freezing each alone changes (``cmpe-se freeze`` without a budget). Each network is tested as it is, and for some
numbers of static gates after training on with them; none among them, since training on may help by itself. The runs in
``--beside`` are shown beside them; one is of the plain network, with which all times are compared. A CSV has all of it,
and a plot shows accuracy against the time of a merged forward pass.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from cmpe_se import merge
from cmpe_se.commands.freeze.starting import write_recipe, write_start
from cmpe_se.data import ImageData, plain_training_batches, validation_split
from cmpe_se.runtimes.timing import keep_heap, paired_ratio, take_turns
from cmpe_se.static_gates import Calibration
from cmpe_se.training import train
from cmpe_se.training.metrics import collect_logits, test_metrics
from cmpe_se.training.provenance import write_results
from cmpe_se.training.run_data import load_run_data
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.plots import BLUE, GREY, ORANGE
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.text import data_name

_IMAGES, _BATCH = 2000, 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="finished runs of networks with gates, separated by commas")
    parser.add_argument("--beside", required=True, help="runs to show beside them, the plain network's among them")
    parser.add_argument("--epochs", type=int, default=3, help="to train on for with static gates")
    parser.add_argument("--trained", type=int, default=3, help="train on with every so many static gates")
    parser.add_argument("--batch-size", type=int, default=64, help="of the timed forward pass")
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV and the plot")
    options = parser.parse_args()

    networks: dict[str, nn.Module] = {}
    rows: list[dict[str, Any]] = []
    for path in options.runs.split(","):
        rows += freeze_one_by_one(RunFolder.open(path), networks, options)
    for folder in map(RunFolder.open, options.beside.split(",")):
        name, data = folder.read_result()["view"] or "plain", load_run_data(folder)
        networks[name] = folder.load_model()
        rows.append({"network": name, "static": None, "trained_on": False, "test_top1": top1_of(networks[name], data)})
    times = time_ratios({key: merge(model) for key, model in networks.items()}, data, options)
    for row in rows:
        ratio = times[row["network"] if row["static"] is None else f"{row['network']} {row['static']}"]
        row |= {"time_ratio": f"{ratio.median:.3f}", "low": f"{ratio.low:.3f}", "high": f"{ratio.high:.3f}"}
        row["test_top1"] = f"{row['test_top1']:.2f}"
        row.setdefault("last", None)
    first = RunFolder.open(options.runs.split(",")[0]).read_config()
    what = f"{first.model}, {data_name(first.data, first.data_dir)}, {first.epochs} epochs, seed {first.seed}"
    setup = f"{what}; trained on for {options.epochs}"
    timing = f"merged, batch {options.batch_size}, {options.turns} turns, {torch.get_num_threads()} thread(s)"
    options.output.mkdir(parents=True, exist_ok=True)
    path = write_results(options.output, "static-gates", rows, setup="", network=setup, timing=timing)
    plot(rows, setup, path.with_suffix(".png"))
    print(path)


def freeze_one_by_one(
    folder: RunFolder, networks: dict[str, nn.Module], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of a run's network with ever more static gates; the networks themselves go into ``networks``."""
    config, data, name = folder.read_config(), load_run_data(folder), folder.read_result()["view"]
    training = validation_split(data, config.validation)[0] if config.validation else data
    images = [batch for batch, _ in plain_training_batches(training, _IMAGES, batch_size=_BATCH)]
    calibration = Calibration(folder.load_model(), images)
    effects = calibration.effects(with_progress)
    order = sorted(effects, key=lambda block: effects[block])
    rows = []
    for number in range(len(order) + 1):
        frozen = networks[f"{name} {number}"] = calibration.frozen(order[:number])
        row = {"network": name, "static": number, "test_top1": top1_of(frozen, data)}
        rows.append(row | {"trained_on": False, "last": order[number - 1] if number else None})
        if number % options.trained == 0 or number == len(order):
            top1 = trained_on(folder, calibration, order[:number], data, options.epochs)
            rows.append(row | {"trained_on": True, "test_top1": top1})
    return rows


def top1_of(network: nn.Module, data: ImageData) -> float:
    batches = with_progress(data.test_batches(batch_size=_BATCH), "testing", -(-data.test_size // _BATCH))
    return test_metrics(*collect_logits(network.eval(), batches))["test_top1"]


def trained_on(folder: RunFolder, calibration: Calibration, static: list[str], data: ImageData, epochs: int) -> float:
    """Test accuracy after training on with some gates static."""
    config = folder.read_config()
    with tempfile.TemporaryDirectory() as place:
        target = RunFolder(Path(place) / "run")
        write_start(folder, calibration.frozen(static), static, target, data)
        recipe = write_recipe(config, target, static, epochs=epochs, lr=config.lr / 10)
        return train(recipe=recipe, output=target.path)["test_top1"]


def time_ratios(networks: dict[str, nn.Module], data: ImageData, options: argparse.Namespace) -> dict[str, Any]:
    """Of a forward pass to that of the plain network, in turns."""
    keep_heap()
    x = torch.randn(options.batch_size, data.in_chans, *data.image_size).to(memory_format=torch.channels_last)
    steps: dict[str, Callable[[], None]] = {
        name: partial(network.to(memory_format=torch.channels_last), x) for name, network in networks.items()
    }
    with torch.inference_mode():
        for step in steps.values():
            step()
        seconds = take_turns(steps, with_progress(range(options.turns), "timing"), torch.device("cpu"))
    return {name: paired_ratio(times, seconds["plain"]) for name, times in seconds.items()}


def plot(rows: list[dict[str, Any]], setup: str, path: Path) -> None:
    """Accuracy and time over the number of static gates."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    colours = iter((BLUE, ORANGE))
    for name in dict.fromkeys(row["network"] for row in rows if row["static"] is not None):
        colour = next(colours)
        for trained, style, words in ((False, "o:", "frozen"), (True, "s-", "frozen, then trained on")):
            own = [row for row in rows if row["network"] == name and row["trained_on"] == trained]
            numbers = [row["static"] for row in own]
            accuracies = [float(row["test_top1"]) for row in own]
            above.plot(numbers, accuracies, style, markersize=5, color=colour, label=f"{name}, {words}")
            if not trained:
                middle, low, high = ([float(row[key]) for row in own] for key in ("time_ratio", "low", "high"))
                below.plot(numbers, middle, "o-", markersize=5, color=colour, label=name)
                below.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
    for row, style in zip((row for row in rows if row["static"] is None), ("-", "--"), strict=False):
        label = f"{row['network']}, from the start"
        above.axhline(float(row["test_top1"]), color=GREY, linestyle=style, linewidth=1, label=label)
    below.axhline(1, color=GREY, linewidth=1)
    above.set(ylabel="test top-1, %")
    below.set(xlabel="number of static gates", ylabel="time over plain, merged\n(band: 95 % interval)")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"Static gates: {setup}", fontsize=11)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
