"""Plots over the depth of a network: one place on the x axis for each block."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmpe_se.utils.escaping import visible
from cmpe_se.utils.plots import BLUE, GREY, ORANGE

WIDTH = 10.0  # inches, of every plot of a report
NARROW = (3.8, 4.4)  # inches, of a plot that is to be read on a phone: letters there are as large as text
_LABELS = 28  # block names that fit below an axis of that width


def short_name(name: str) -> str:
    """A block's name as it fits below an axis: ``stages.0.blocks.1`` is 0.1, ``layer1.0`` stays."""
    words = [word for word in name.split(".") if word not in ("stages", "blocks", "features", "backbone", "body")]
    return ".".join(words) or name


def titled(figure: Figure, title: str) -> Figure:
    """The figure with a title, broken into lines that fit."""
    width = round(figure.get_figwidth() * 10.5)
    lines = textwrap.wrap(visible(title), width, max_lines=4, placeholder=" …")
    figure.suptitle("\n".join(lines), fontsize=11.5, x=0.01, ha="left", fontweight="bold")
    return figure


def highest(gates: np.ndarray, neutral: float, gain: float) -> float:
    """Upper end of an axis of gates: their largest value, or less where products of gates hardly ever get there."""
    return min(gain, max(2 * neutral, 1.1 * float(gates.max())))


def draw_gates_over_depth(
    title: str, names: Sequence[str], quantiles: np.ndarray, *, neutral: float, gain: float
) -> Figure:
    """The middle half and the middle 90 % of each block's gates, and their median.

    Args:
        title: of the plot.
        names: of the B blocks.
        quantiles: (B, 5): at 5, 25, 50, 75 and 95 %.
        neutral: gate that neither opens nor closes.
        gain: the largest gate.
    """
    figure, axes = over_depth(names)
    places, thick = np.arange(len(names)), _thickness(len(names))
    label = "neutral" if gain == 1 else "as without a gate"
    axes.axhline(neutral, color=GREY, linewidth=0.8, linestyle=":", label=label)
    axes.vlines(places, quantiles[:, 0], quantiles[:, 4], color=BLUE, alpha=0.35, linewidth=thick, label="middle 90 %")
    axes.vlines(places, quantiles[:, 1], quantiles[:, 3], color=BLUE, linewidth=thick, label="middle half")
    _draw_medians(axes, places, quantiles[:, 2], thick)
    axes.set(ylabel="gate", ylim=(0, highest(quantiles, neutral, gain)))
    _legend(axes)
    return titled(figure, title)


def draw_shares(title: str, names: Sequence[str], quantiles: np.ndarray) -> Figure:
    """Shares of identity and residual in each block's sum.

    Args:
        title: of the plot.
        names: of the B blocks.
        quantiles: residual share at 10, 50 and 90 % of the images, (B, 3).
    """
    figure, axes = over_depth(names)
    places, low, median, high = np.arange(len(names)), *(100 * quantiles.T)
    axes.bar(places, median, color=BLUE, width=0.75, label="gated residual")
    axes.bar(places, 100 - median, bottom=median, color=ORANGE, alpha=0.35, width=0.75, label="identity")
    axes.vlines(places, low, high, color="black", linewidth=1.3, label="8 images of 10 lie within")
    axes.set(ylabel="% of the energy", ylim=(0, 100))
    _legend(axes)
    return titled(figure, title)


def draw_closing(title: str, names: Sequence[str], closed: np.ndarray, opened: np.ndarray) -> Figure:
    """How often the gates of each block close and open their channels altogether, in percent: (B,) each."""
    figure, axes = over_depth(names)
    places = np.arange(len(names))
    axes.bar(places, closed, color=ORANGE, width=0.75, label="closed")
    axes.bar(places, -opened, color=BLUE, width=0.75, label="saturated (fully open)")
    limit = max(1.0, 1.15 * max(closed.max(), opened.max()))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylabel="% of channels and images", ylim=(-limit if opened.max() > 0.05 else -0.08 * limit, limit))
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    _legend(axes)
    return titled(figure, title)


def draw_effects(title: str, names: Sequence[str], effects: np.ndarray) -> Figure:
    """What freezing each block's gate does to the output, percent of its variance: (B,), NaN where it cannot be."""
    figure, axes = over_depth(names)
    axes.bar(np.arange(len(names)), effects, color=BLUE, width=0.75)
    axes.set(ylabel="change of the output, %\n(of its variance)", ylim=(0, 1.1 * max(np.nanmax(effects), 1e-3)))
    return titled(figure, title)


def draw_differences(names: Sequence[str], differences: np.ndarray) -> Figure:
    """Differences of a probability, in points, one for each block: (B,), NaN where unknown."""
    figure = Figure(figsize=(NARROW[0], 2.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(len(names)), differences, color=BLUE, width=0.75)
    axes.axhline(0, color="black", linewidth=0.8)
    limit = 1.1 * max(float(np.nanmax(np.abs(differences))), 0.1)
    axes.set(ylabel="points", ylim=(-limit, limit), xlim=(-0.6, len(names) - 0.4))
    axes.spines[["top", "right"]].set_visible(False)
    _name_blocks(axes, names, NARROW[0])
    return figure


def draw_one_image(
    names: Sequence[str],
    quantiles: np.ndarray,
    shares: Sequence[float | None],
    shown: str,
    *,
    neutral: float,
    gain: float,
) -> Figure:
    """One image's gates and residual shares over depth, with one block marked.

    Args:
        names: of the B blocks.
        quantiles: of each block's gates for the image, at 5, 25, 50, 75 and 95 % of the channels, (B, 5).
        shares: residual share of each block, None where it was not recorded.
        shown: name of the marked block.
        neutral: gate that neither opens nor closes.
        gain: the largest gate.
    """
    figure = Figure(figsize=(NARROW[0], 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    places, thick = np.arange(len(names)), _thickness(2 * len(names))
    above.axhline(neutral, color=GREY, linewidth=0.7, linestyle=":")
    above.vlines(places, quantiles[:, 0], quantiles[:, 4], color=BLUE, alpha=0.35, linewidth=thick)
    above.vlines(places, quantiles[:, 1], quantiles[:, 3], color=BLUE, linewidth=thick)
    _draw_medians(above, places, quantiles[:, 2], thick)
    above.set(ylabel="gates", ylim=(0, highest(quantiles, neutral, gain)))
    percent = np.array([np.nan if share is None else 100 * share for share in shares])
    below.bar(places, percent, color=BLUE, width=0.75)
    below.bar(places, 100 - percent, bottom=percent, color=ORANGE, alpha=0.35, width=0.75)
    below.set(ylabel="% residual", ylim=(0, 100), xlim=(-0.6, len(names) - 0.4))
    for axes in (above, below):
        axes.axvspan(names.index(shown) - 0.5, names.index(shown) + 0.5, color="black", alpha=0.12, linewidth=0)
        axes.spines[["top", "right"]].set_visible(False)
    _name_blocks(below, names, NARROW[0])
    return figure


def draw_class_differences(
    title: str, names: Sequence[str], classes: Sequence[str], differences: np.ndarray, explained: np.ndarray
) -> Figure:
    """What the class explains of each block's gates, and each class's mean gate against the mean of all.

    Args:
        title: of the plot.
        names: of the B blocks.
        classes: names of the K classes.
        differences: mean gate of the class less that of all images, (K, B).
        explained: part of the gates' variance that the class explains, (B,).
    """
    height = 2.4 + min(9, max(2.2, 0.27 * len(classes) + 1))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[1.3, height - 2.4], sharex=True)
    above.bar(range(len(names)), 100 * explained, color=BLUE, width=0.75)
    above.set(ylabel="% of variance\nby class", ylim=(0, max(5.0, 110 * explained.max())))
    above.spines[["top", "right"]].set_visible(False)
    above.tick_params(labelbottom=False)
    limit = max(1e-4, np.abs(differences).max())
    image = below.imshow(differences, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=below, label="mean gate less\nthat of all images", pad=0.01, fraction=0.03)
    below.set_yticks(range(len(classes)), classes, fontsize=9)
    _name_blocks(below, names)
    return titled(figure, title)


def draw_channels(title: str, channels: Sequence[int], classes: Sequence[str], means: np.ndarray) -> Figure:
    """Mean gate of each class (row) in those channels of one block (columns) that distinguish classes best: (K, n)."""
    height = min(10, max(2.6, 0.27 * len(classes) + 1.5))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(means, cmap="cividis", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="mean gate", pad=0.01, fraction=0.03)
    axes.set_yticks(range(len(classes)), classes, fontsize=9)
    axes.set_xticks(
        range(len(channels)),
        [str(channel) for channel in channels],
        fontsize=8,
        rotation=90 if len(channels) > 20 else 0,
    )
    axes.set_xlabel("channel, those that distinguish classes best first")
    return titled(figure, title)


def over_depth(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with one place on its axis for each of some names."""
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(-0.6, len(names) - 0.4)
    _name_blocks(axes, names)
    return figure, axes


def _name_blocks(axes: Axes, names: Sequence[str], width: float = WIDTH) -> None:
    """Names below an axis; ``width`` is that of the figure in inches."""
    step = -(-len(names) // round(_LABELS * width / WIDTH))
    places = range(0, len(names), step)
    labels = [short_name(names[place]) for place in places]
    steep = len(labels) * max(map(len, labels)) > 10 * width
    axes.set_xticks(places, labels, fontsize=9, rotation=60 if steep else 0, ha="right" if steep else "center")
    ours = all(name.startswith("stages.") for name in names)
    axes.set_xlabel("block (stage.block, from the input on)" if ours else "block, from the input on")


def _draw_medians(axes: Axes, places: np.ndarray, medians: np.ndarray, size: float) -> None:
    axes.plot(places, medians, "_", color="white", markersize=size, markeredgewidth=2)
    axes.plot(places, medians, "_", color="black", markersize=size * 0.9, markeredgewidth=1, label="median")


def _thickness(count: int) -> float:
    return max(3.0, min(26.0, 330 / count))  # points, of a bar that one of ``count`` blocks has room for


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9, borderaxespad=0.2)
