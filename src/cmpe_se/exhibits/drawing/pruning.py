"""Plots of a pruned network: its widths over depth, what went, and accuracy against multiply-adds."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from cmpe_se.exhibits.drawing.depth import over_depth, titled
from cmpe_se.utils.plots import BLUE, GREY, ORANGE, percent_axis


def draw_widths(title: str, names: Sequence[str], before: np.ndarray, after: np.ndarray) -> Figure:
    """Channels of each layer before and after: (L,) each; 0 after of a block that went as a whole."""
    figure, axes = over_depth(names)
    places = np.arange(len(names))
    axes.bar(places, before, color=GREY, alpha=0.35, width=0.75, label="before")
    axes.bar(places, after, color=BLUE, width=0.75, label="after")
    gone = places[after == 0]
    axes.plot(gone, np.zeros(len(gone)), "x", color=ORANGE, label="gone as a whole", clip_on=False)
    axes.set(ylabel="channels", xlabel="layer", ylim=(0, 1.1 * before.max()))
    axes.legend(*axes.get_legend_handles_labels(), frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return titled(figure, title)


def draw_worth(title: str, names: Sequence[str], kept: np.ndarray, lost: np.ndarray) -> Figure:
    """What the gates say of the channels that stayed and went, relative to the layer's mean: (L,), NaN for none."""
    figure, axes = over_depth(names)
    places = np.arange(len(names))
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":", label="mean of the layer")
    axes.plot(places, kept, "o", color=BLUE, label="channels that stayed")
    axes.plot(places, lost, "x", color=ORANGE, label="channels that went")
    highest = max(1.0, float(np.nanmax(np.concatenate([kept, lost]))))
    axes.set(ylabel="worth by weights,\nnorms and mean gates", xlabel="layer", ylim=(0, 1.1 * highest))
    axes.legend(*axes.get_legend_handles_labels(), frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return titled(figure, title)


def draw_along_the_way(title: str, millions: np.ndarray, top1: np.ndarray, trained: float | None) -> Figure:
    """Accuracy against multiply-adds before and after each step (S + 1,), and after the training."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(millions, top1, "o-", color=ORANGE, label="pruned, not trained on")
    axes.annotate("before", (millions[0], top1[0]), xytext=(-6, 4), textcoords="offset points", ha="right", fontsize=9)
    if trained is not None:
        axes.plot([millions[-1]], [trained], "s", color=BLUE, label="trained on")
    axes.set(xlabel="multiply-adds of an image, millions", ylabel="test top-1, %")
    axes.margins(y=0.15)
    percent_axis(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return titled(figure, title)
