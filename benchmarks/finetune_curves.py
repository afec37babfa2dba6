"""Does conversion cost a fine-tuned network anything? The original and the converted one, same budget, same seeds.

    python benchmarks/finetune_curves.py --base runs/BASE --data-dir IMAGES --output results/

The base run's network (any without gates) is fine-tuned on class folders with the recipe ``finetune``, as it is and
converted. A CSV has the test accuracy after each epoch for each seed, and a plot shows the curves.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cmpe_se.training import train
from cmpe_se.training.provenance import write_results
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.plots import BLUE, GREY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="finished run of a network without gates")
    parser.add_argument("--data-dir", required=True, help="class folders to fine-tune on")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--crop-padding", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV and the plot")
    options = parser.parse_args()

    figures = RunFolder.open(options.base).read_result()
    model = figures["model"]
    base = f"{model} on {figures['data']}, {figures['epochs']} epochs, {figures['test_top1']:.2f} %"
    contenders = {"original": None, "converted": "folded_3x3"}
    curves: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for seed in range(options.seeds):
        for name, view in contenders.items():
            with tempfile.TemporaryDirectory() as folder:
                train(
                    recipe="finetune",
                    model=model,
                    convert=view,
                    pretrained=options.base,
                    data_dir=options.data_dir,
                    epochs=options.epochs,
                    crop_padding=options.crop_padding,
                    seed=seed,
                    output=Path(folder) / "run",
                )
                records = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
            curves[name].append([json.loads(record)["test_top1"] for record in records])

    rows = [
        {"contender": name, "seed": seed} | {f"epoch_{epoch}": f"{top1:.2f}" for epoch, top1 in enumerate(run, start=1)}
        for name, runs in curves.items()
        for seed, run in enumerate(runs)
    ]
    path = write_results(options.output, "finetune-curves", rows, base=base)
    _plot(curves, f"{model}, fine-tuned: {options.seeds} seeds", path.with_suffix(".png"))
    for name, runs in curves.items():
        print(f"{name:10} mean test top-1 by epoch: {np.round(np.mean(runs, 0), 2).tolist()}")
    print(path)


def _plot(curves: dict[str, list[list[float]]], title: str, path: Path) -> None:
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, runs), colour in zip(curves.items(), (GREY, BLUE), strict=True):
        epochs = range(1, len(runs[0]) + 1)
        for run in runs:
            axes.plot(epochs, run, color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(epochs, np.mean(runs, 0), color=colour, linewidth=2, label=f"{name} (mean)")
    axes.set(xlabel="epoch", ylabel="test top-1, %", title=title, xticks=list(epochs))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
