"""Plots of a comparison: accuracy against latency, learning curves, and paired differences."""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmpe_se.commands.compare.differences import USUAL, Question, paired_differences
from cmpe_se.commands.compare.outcomes import Outcome
from cmpe_se.commands.compare.presenting import p_value
from cmpe_se.commands.compare.statistics import Summary, summarise
from cmpe_se.utils.figures import save_figure
from cmpe_se.utils.plots import BLUE, GREY, ORANGE, epoch_axis, percent_axis
from cmpe_se.utils.text import in_points, shortened

# Okabe and Ito's colours, and a marker each: distinguishable without colour vision and in grey. The two lists have
# lengths without a common divisor, so that no pair comes twice in a grid of a dozen networks.
_COLOURS = (GREY, ORANGE, BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "p")
_DPI = 150
_FAINT = "#999999"


def plot_pareto(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Accuracy against the latency of a forward pass, or against multiply-adds where not all were timed, as PNG.

    Bars are 95 % intervals; the line joins the networks that no other one beats in both.
    """
    timed = all(outcome.latency for outcome in outcomes)
    figure, axes = _panel((9.5, max(4.6, 0.3 * len(outcomes) + 1.6)))
    places = []
    for outcome, colour, marker in _styled(outcomes):
        summary = summarise(list(outcome.seeds.values()))
        x, spread = outcome.macs / 1e6, None
        if timed and (latency := outcome.latency):
            x, spread = latency.ratio, [[latency.ratio - latency.low], [latency.high - latency.ratio]]
        axes.errorbar(
            x, summary.mean, xerr=spread, yerr=_half(summary), fmt="none", color=colour, capsize=2, elinewidth=0.9,
            alpha=0.9,
        )  # fmt: skip
        axes.plot(x, summary.mean, marker, color=colour, markersize=7, alpha=0.9, clip_on=False, in_layout=False)
        places.append((x, summary.mean))
    front = _pareto_front(places)
    axes.plot(*zip(*front, strict=True), color=_FAINT, linewidth=1.2, zorder=0, drawstyle="steps-post")
    if len(front) > 1:
        _explain(figure, "bars: 95 % intervals; grey line: no other network is both cheaper and better on average")
    cost = "multiply-adds of an image, millions"
    if timed:
        cost = f"time of a forward pass, ratio to {shortened(outcomes[0].label, 60)}"
    axes.margins(0.08)
    limits, cut = _cut(axes.get_ylim(), [accuracy for outcome in outcomes for accuracy in outcome.seeds.values()])
    axes.set_ylim(limits)
    percent_axis(axes)
    axes.set(xlabel=cost, ylabel="test top-1, %", title=f"Accuracy and cost, {_seeds(outcomes)}{cut}\n{title}")
    _name_beside(axes, outcomes, places)
    save_figure(figure, path, dpi=_DPI, tight=True)


def plot_learning_curves(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Test accuracy over the epochs as PNG: mean over the seeds, and a band from the lowest seed to the highest.

    A 95 % interval of two seeds would be wider than all accuracies that there are.

    The panel on the right has the last third of the epochs again, where networks that learn alike come apart. Where no
    network was tested at two epochs there is no curve, and no file (``--test-interval``).
    """
    curves = [(_tested_curves(outcome), colour, marker) for outcome, colour, marker in _styled(outcomes)]
    if all(len(tested) < 2 for tested, *_ in curves):
        path.unlink(missing_ok=True)
        return
    last = max((epoch for tested, *_ in curves for epoch in tested), default=0)
    figure = Figure(figsize=(11, 5.2 + 0.12 * len(outcomes)), layout="constrained")
    whole, end = figure.subplots(1, 2)
    for axes, first in ((whole, 0), (end, 2 * last / 3)):
        for outcome, (tested, colour, marker) in zip(outcomes, curves, strict=True):
            shown = {epoch: seeds for epoch, seeds in tested.items() if epoch >= first}
            seeds = list(shown.values())
            axes.plot(
                list(shown), [fmean(each) for each in seeds], color=colour, marker=marker, markersize=5, linewidth=1.4,
                markevery=max(1, len(shown) // 8), label=shortened(outcome.label, 60), clip_on=False,
                in_layout=False,
            )  # fmt: skip
            low, high = [min(each) for each in seeds], [max(each) for each in seeds]
            axes.fill_between(list(shown), low, high, color=colour, alpha=0.1, linewidth=0)
        epoch_axis(axes, sorted({epoch for tested, *_ in curves for epoch in tested if epoch >= first}))
        percent_axis(axes)
        axes.spines[["top", "right"]].set_visible(False)
    whole.set(ylabel="test top-1, %", title="all epochs")
    end.set_title("the last third, enlarged")
    figure.legend(*whole.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    band = " (band: lowest to highest seed)" if any(len(outcome.curves) > 1 for outcome in outcomes) else ""
    figure.suptitle(f"Learning curves, {_seeds(outcomes)}{band}\n{title}")
    save_figure(figure, path, dpi=_DPI)


def plot_differences(
    outcomes: Sequence[Outcome],
    title: str,
    path: Path,
    *,
    reference: str | None = None,
    question: Question = USUAL,
    order: Sequence[str] | None = None,
) -> None:
    """Paired differences to a network as PNG: a dot for each seed, mean and 95 % interval for each network.

    Grey is what the margin of the equivalence tests counts as no difference.

    Args:
        outcomes: networks with at least one finished run.
        title: second line of the plot's title.
        path: file to write.
        reference: label of the network that the others are compared with; the first one if left out.
        question: its primary comparison is marked, and its p not adjusted.
        order: labels of all networks of the comparison, which give each its colour; of ``outcomes`` if left out.

    Raises:
        KeyError: no network has that label.
    """
    base = outcomes[0] if reference is None else {outcome.label: outcome for outcome in outcomes}[reference]
    rows = [styled for styled in _styled(outcomes, order) if styled[0] is not base]
    differences = paired_differences(outcomes, base, question)
    figure, axes = _panel((8.5, 0.5 * max(len(rows), 1) + 1.9))
    axes.axvline(0, color="#999999", linewidth=1)
    dots: list[float] = []
    for row, (outcome, colour, marker) in enumerate(rows):
        if outcome.label not in differences:
            _say(axes, row, "no shared seed")
            continue
        compared = differences[outcome.label]
        difference, primary = compared.difference, " (primary)" if compared.primary else ""
        own = [outcome.seeds[seed] - base.seeds[seed] for seed in sorted(outcome.seeds.keys() & base.seeds.keys())]
        dots += own
        axes.scatter(own, np.full(len(own), row + 0.24), s=24, color=colour, alpha=0.7, linewidths=0, marker=marker)
        if not math.isnan(difference.low):
            axes.hlines(row, difference.low, difference.high, color=colour, linewidth=3)
        axes.plot(difference.mean, row, marker="|", color=colour, markersize=13, markeredgewidth=3)
        p = "" if math.isnan(compared.p) else f"   p {p_value(compared.p)}"
        _say(axes, row, f"{difference.mean:+.2f}{p}{primary}")
    axes.set_yticks(range(len(rows)), [outcome.label for outcome, *_ in rows], fontsize=9)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    if not rows:
        axes.text(0.5, 0.5, "nothing to compare with", transform=axes.transAxes, ha="center")
    limits, cut = _cut(axes.get_xlim(), [0.0, *dots])
    axes.set_xlim(limits)
    axes.axvspan(-question.margin, question.margin, color="#eeeeee", linewidth=0, zorder=-1)
    axes.set_xlabel("difference in points of test top-1")
    figure.suptitle(f"Difference to {shortened(base.label, 60)}, seed by seed{cut}\n{title}")
    adjusted = "by Holm but for the primary" if any(each.primary for each in differences.values()) else "by Holm"
    _explain(
        figure,
        f"small: a seed; bar: mean with its 95 % interval; p: paired t-test of a difference, {adjusted}; grey: within "
        f"{in_points(question.margin)}",
    )
    save_figure(figure, path, dpi=_DPI, tight=True)


def _panel(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _styled(outcomes: Sequence[Outcome], order: Sequence[str] | None = None) -> Iterator[tuple[Outcome, str, str]]:
    """Each network with its colour and marker, which are the same in all plots."""
    labels = [outcome.label for outcome in outcomes] if order is None else order
    styles = dict(zip(labels, zip(cycle(_COLOURS), cycle(_MARKERS), strict=False), strict=False))
    return ((outcome, *styles[outcome.label]) for outcome in outcomes)


def _half(summary: Summary) -> float | None:
    """Half of the interval; None for a single seed."""
    return None if math.isnan(summary.low) else summary.high - summary.mean


def _cut(shown: tuple[float, float], seeds: Sequence[float]) -> tuple[tuple[float, float], str]:
    """Limits of an axis that keep seeds apart where intervals are far wider, as those of two seeds; words for that."""
    low, high = min(seeds), max(seeds)
    margin = max(high - low, 0.5)
    kept = max(shown[0], low - margin), min(shown[1], high + margin)
    return kept, "" if kept == shown else ", wide intervals cut"


def _seeds(outcomes: Sequence[Outcome]) -> str:
    counts = sorted({len(outcome.seeds) for outcome in outcomes})
    said = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{said} seed" if said == "1" else f"mean of {said} seeds"


def _pareto_front(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places (cost, accuracy), by cost, each of which is more accurate than all that cost as much or less."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(places, key=lambda place: (place[0], -place[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def _tested_curves(outcome: Outcome) -> dict[int, list[float]]:
    """The seeds' accuracies for each epoch that was tested with all of them."""
    tested = [
        {record["epoch"]: record["test_top1"] for record in curve if record["test_top1"] is not None}
        for curve in outcome.curves.values()
    ]
    epochs = sorted(set(tested[0]).intersection(*tested[1:])) if tested else []
    return {epoch: [curve[epoch] for curve in tested] for epoch in epochs}


def _name_beside(axes: Axes, outcomes: Sequence[Outcome], places: Sequence[tuple[float, float]]) -> None:
    """Names in a column on the right, as high as their places where there is room, with a line to each.

    Next to the places they would lie on each other: competing networks cost nearly the same.
    """
    order = sorted(range(len(places)), key=lambda index: places[index][1])
    low, high = axes.get_ylim()
    wanted = [(places[index][1] - low) / (high - low) for index in order]
    gap = min(0.075, 1 / max(len(order) - 1, 1))
    heights: list[float] = []
    for place in wanted:  # from below, each at least a gap above the one before
        heights.append(max(place, heights[-1] + gap) if heights else place)
    ceiling = 1.0
    for index in reversed(range(len(heights))):  # and pushed down again where that went out at the top
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    styles = list(_styled(outcomes))
    for index, height in zip(order, heights, strict=True):
        outcome, colour, marker = styles[index]
        axes.annotate(
            "", places[index], (1.02, height), textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "linestyle": ":", "alpha": 0.7},
        )  # fmt: skip
        axes.plot(1.035, height, marker, color=colour, markersize=6, transform=axes.transAxes, clip_on=False)
        axes.text(1.055, height, shortened(outcome.label, 60), transform=axes.transAxes, va="center", fontsize=8)


def _explain(figure: Figure, text: str) -> None:
    """A line below a figure."""
    figure.text(0.5, -0.01, text, ha="center", va="top", fontsize=8, color="#444444")


def _say(axes: Axes, row: int, text: str) -> None:
    axes.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
