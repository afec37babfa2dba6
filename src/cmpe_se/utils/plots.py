"""Plots of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from cmpe_se.utils.figures import save_figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # distinguishable without colour vision (Okabe and Ito)
_LINE_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9")


def plot_curves(history: Sequence[Mapping[str, Any]], title: str, path: Path, *, loss: str = "cross-entropy") -> None:
    """Write :func:`draw_curves` as PNG."""
    save_figure(draw_curves(history, title, loss=loss), path, dpi=150)


def draw_curves(history: Sequence[Mapping[str, Any]], title: str, *, loss: str = "cross-entropy") -> Figure:
    """Loss and accuracy over the epochs.

    Args:
        history: the records of ``metrics.jsonl``.
        title: of the whole plot.
        loss: what the losses are.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    for axes, kind, label in ((losses, "loss", loss.replace(", ", ",\n")), (accuracy, "top1", "top-1 accuracy, %")):
        for part, colour in (("train", GREY), ("validation", ORANGE), ("test", BLUE)):
            values = {record["epoch"]: record.get(f"{part}_{kind}") for record in history}
            known = {epoch: value for epoch, value in values.items() if value is not None}
            if not known:
                continue  # with mixup there is no training accuracy
            marker = "o" if len(known) == 1 else None
            # A marker on the edge, such as that of an accuracy of 100 %, is drawn whole.
            whole = {"marker": marker, "clip_on": False, "in_layout": False}
            axes.plot(list(known), list(known.values()), color=colour, label=part, **whole)
        axes.set(ylabel=label)
        epoch_axis(axes, [record["epoch"] for record in history])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    highest = max((max(line.get_ydata()) for line in losses.lines), default=1.0)  # nothing clips the curves
    losses.set_ylim(0, 1.05 * (highest or 1.0))
    percent_axis(accuracy)
    figure.suptitle(title)
    return figure


def epoch_axis(axes: Axes, epochs: Sequence[int]) -> None:
    """Whole epochs on the x axis, also where there are one or two of them."""
    first, last = min(epochs, default=1), max(epochs, default=1)
    axes.set(xlabel="epoch")
    if last - first < 6:
        axes.set_xticks(range(first, last + 1))
        axes.set_xlim(first - 0.5, last + 0.5)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def percent_axis(axes: Axes) -> None:
    """No accuracies on the y axis that cannot be: it ends at 0 and 100 %."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100))


def plot_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Write :func:`draw_confusion` as PNG."""
    save_figure(draw_confusion(confusion, classes), path, dpi=120)


def draw_confusion(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """Confusion matrix: a row for each true class, in percent of it.

    Args:
        confusion: counts (true, predicted).
        classes: class names.
    """
    counts = confusion.numpy()
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(16, max(4.5, 0.5 * len(classes) + 2))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title=f"Top-1 {100 * counts.trace() / max(counts.sum(), 1):.2f} %")
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                share = percent[row, column]
                shown = "<1" if share < 1 else ">99" if 99 < share < 100 else f"{share:.0f}"
                colour = "white" if share > 55 else "black"
                axes.text(column, row, shown, ha="center", va="center", fontsize=8, color=colour)
    return figure


def plot_corruptions(metrics: Mapping[str, Any], title: str, path: Path) -> None:
    """Write :func:`draw_corruptions` as PNG."""
    save_figure(draw_corruptions(metrics, title), path, dpi=150)


def draw_corruptions(metrics: Mapping[str, Any], title: str) -> Figure:
    """Accuracy over the severity, a line for each corruption, and the clean accuracy as reference.

    Args:
        metrics: of ``cmpe_se.training.robustness.corruption_metrics``.
        title: name of the data.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(metrics["clean"], color=GREY, linewidth=1, linestyle="--")
    axes.annotate(
        f"clean {metrics['clean']:.2f} %", (0.01, metrics["clean"]), xycoords=("axes fraction", "data"),
        xytext=(0, 4), textcoords="offset points", fontsize=8, color=GREY,
    )  # fmt: skip
    lines = {name: values for name, values in metrics.items() if isinstance(values, list)}
    for (name, values), colour, marker in zip(lines.items(), _LINE_COLOURS, "os^Dv", strict=True):
        axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, markersize=5, label=name)
    axes.set(
        xlabel="severity", ylabel="test top-1, %", title=f"{title}: mean corruption accuracy {metrics['mean']:.2f} %"
    )
    axes.set_xticks(range(1, 6))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right center")
    return figure
