"""Plots of single images: squeezes, gates and attributions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmpe_se.exhibits.drawing.depth import NARROW, WIDTH, highest, titled
from cmpe_se.utils.plots import BLUE, GREY, ORANGE

_HEAT = "PuOr"  # orange below zero, purple above it


class Depth(NamedTuple):
    """One block's part of the paper's figure.

    Args:
        name: of the block.
        before, after: the picture and that after gating, (rows, columns); residual and identity rows take turns.
        gate: (C,).
        usual: mean gate over the test images, (C,); None where there are none.
        neutral: gate that neither opens nor closes.
        gain: the largest gate.
        closed: the gate below which a channel is closed.
    """

    name: str
    before: np.ndarray
    after: np.ndarray
    gate: np.ndarray
    usual: np.ndarray | None
    neutral: float
    gain: float
    closed: float


def draw_inside(title: str, pixels: np.ndarray, caption: str, depths: Sequence[Depth], drawn: str) -> Figure:
    """The paper's figure for one image: at each depth the picture, the picture after gating, and the gates.

    Args:
        title: of the plot.
        pixels: the image, (H, W) or (H, W, 3) in [0, 1].
        caption: below the image.
        depths: blocks from the input on.
        drawn: what the first row shows: "picture" or, for views that read none, "squeezes".
    """
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    widths, heights = [1.15, *[1.4] * len(depths)], [1, 1, 0.9]
    grid = figure.subplots(3, 1 + len(depths), squeeze=False, width_ratios=widths, height_ratios=heights)
    show_image(grid[0, 0], pixels)
    grid[0, 0].set_xlabel(caption, fontsize=9.5)
    for empty in grid[1:, 0]:
        empty.axis("off")
    grid = grid[:, 1:]
    for depth, axes in zip(depths, grid.T, strict=True):
        _draw_depth(axes, depth)
    for row, name in enumerate((drawn, "after gating", "gate")):
        grid[row, 0].set_ylabel(name, fontsize=9.5)
    return titled(figure, title)


def draw_block(depth: Depth, drawn: str) -> Figure:
    """One depth of :func:`draw_inside` by itself, for narrow pages."""
    figure = Figure(figsize=NARROW, layout="constrained")
    grid = figure.subplots(3, 1, height_ratios=[1, 1, 1.1])
    _draw_depth(grid, depth)
    for axes, name in zip(grid, (drawn, "after gating", "gate"), strict=True):
        axes.set_ylabel(name)
    return figure


def _draw_depth(axes: Sequence[Axes], depth: Depth) -> None:
    before, after, gate = axes
    limit = max(1e-6, np.abs(depth.before).max())
    for part, picture in ((before, depth.before), (after, depth.after)):
        part.imshow(picture, cmap=_HEAT, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        _name_rows(part, len(picture))
    before.set_title(depth.name, fontsize=10)
    _draw_gates(gate, depth)


def _draw_gates(axes: Axes, depth: Depth) -> None:
    # Sorted, the usual gates are a smooth line, and what is special to the image stands out from it.
    order = (depth.gate if depth.usual is None else depth.usual).argsort(kind="stable")
    gate, channels = depth.gate[order], np.arange(len(order))
    axes.axhline(depth.neutral, color=GREY, linewidth=0.7, linestyle=":")
    axes.plot(channels, gate, ".", color=BLUE, markersize=3, label="this image")
    if depth.usual is not None:
        axes.vlines(channels, depth.usual[order], gate, color=BLUE, linewidth=0.6, alpha=0.6)
        axes.plot(channels, depth.usual[order], color="black", linewidth=1, label="test mean")
    shut = channels[gate < depth.closed]
    if len(shut):
        axes.plot(shut, gate[shut], "x", color=ORANGE, markersize=4.5, label="closed")
    drawn = gate if depth.usual is None else np.concatenate((gate, depth.usual))
    top = highest(drawn, depth.neutral, depth.gain)
    axes.set(ylim=(-0.02 * top, 1.02 * top), xlim=(-0.5, len(channels) - 0.5))
    axes.set_xlabel(f"{len(channels)} channels, sorted", fontsize=8.5)
    axes.set_xticks([])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(
        frameon=False, fontsize=7.5, loc="upper left", handlelength=1.2, handletextpad=0.4, borderaxespad=0.1
    )
    legend.set_in_layout(False)


def _name_rows(axes: Axes, count: int) -> None:
    shown = range(count if count <= 16 else 2)
    axes.set_yticks(list(shown), ["r" if row % 2 == 0 else "i" for row in shown], fontsize=8)
    for label in axes.get_yticklabels():
        label.set_color(BLUE if label.get_text() == "r" else ORANGE)
    axes.set_xticks([])
    axes.tick_params(length=0)


def show_image(axes: Axes, pixels: np.ndarray) -> None:
    """An image without ticks, its frame thin."""
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)


class Explained(NamedTuple):
    """A row of the attributions' plot: those of one class in one image, (h, w) each at its own resolution."""

    pixels: np.ndarray
    caption: str
    maps: Sequence[np.ndarray]


def draw_attributions(title: str, columns: Sequence[str], rows: Sequence[Explained]) -> Figure:
    """Images and their attributions: purple is evidence for the class, orange against it.

    Args:
        title: of the plot.
        columns: names of the maps.
        rows: with as many maps each.
    """
    side = WIDTH / (len(columns) + 2.1)
    figure = Figure(figsize=(WIDTH, (side + 0.08) * len(rows) + 0.9), layout="constrained")
    grid = figure.subplots(len(rows), 1 + len(columns), squeeze=False)
    for row, (first, *others) in zip(rows, grid, strict=True):
        show_image(first, row.pixels)
        first.set_ylabel(row.caption, fontsize=9, rotation=0, ha="right", va="center")
        for axes, heat in zip(others, row.maps, strict=True):
            _lay_over(axes, row.pixels, heat)
    for axes, name in zip(grid[0], ["image", *columns], strict=True):
        axes.set_title(name, fontsize=9)
    return titled(figure, title)


def draw_overlay(pixels: np.ndarray, heat: np.ndarray) -> Figure:
    """An image beside one attribution laid over it; ``pixels`` (H, W) or (H, W, 3), ``heat`` (h, w)."""
    figure = Figure(figsize=(NARROW[0], NARROW[0] / 2), layout="constrained")
    image, overlay = figure.subplots(1, 2)
    show_image(image, pixels)
    _lay_over(overlay, pixels, heat)
    return figure


def _lay_over(axes: Axes, pixels: np.ndarray, heat: np.ndarray) -> None:
    """An attribution over the grey image, each on a scale of its own: strong where it is opaque."""
    grey = pixels if pixels.ndim == 2 else pixels @ np.array([0.299, 0.587, 0.114], pixels.dtype)
    height, width = grey.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(0.35 + 0.65 * grey, cmap="gray", vmin=0, vmax=1, extent=extent)
    limit = max(1e-12, np.quantile(np.abs(heat), 0.995))
    strength = np.clip(np.abs(heat) / limit, 0, 1) ** 0.7
    axes.imshow(heat, cmap=_HEAT, vmin=-limit, vmax=limit, extent=extent, alpha=0.85 * strength)
    axes.set(xticks=[], yticks=[])


def draw_pairs(title: str, captions: Sequence[str], images: Sequence[Sequence[np.ndarray]]) -> Figure:
    """Confused pairs, one a row, with some of their images."""
    columns = max(7, *map(len, images))
    side = min(1.15, WIDTH / (columns + 2.5))
    figure = Figure(figsize=(WIDTH, (side + 0.06) * len(images) + 0.7), layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False)
    for caption, own, row in zip(captions, images, grid, strict=True):
        for axes, pixels in zip(row, own, strict=False):
            show_image(axes, pixels)
        for axes in row[len(own) :]:
            axes.axis("off")
        row[0].set_ylabel(caption, fontsize=9.5, rotation=0, ha="right", va="center")
    return titled(figure, title)
