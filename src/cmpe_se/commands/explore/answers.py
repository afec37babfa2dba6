"""A network's prediction for an image as a piece of the page: a sentence, bars and plots, in one piece of HTML."""

import base64
import hashlib
import io
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
from jinja2 import Template
from matplotlib.figure import Figure

from cmpe_se.commands.explore.network import Answer, Force, Network
from cmpe_se.exhibits.choosing import Photo
from cmpe_se.exhibits.drawing import draw_block, draw_differences, draw_one_image, draw_overlay
from cmpe_se.exhibits.photos import depth_of
from cmpe_se.inspecting import BlockView
from cmpe_se.inspecting.statistics import MOVED
from cmpe_se.utils.figures import save_figure
from cmpe_se.utils.html import html_environment
from cmpe_se.utils.text import counted

ATTRIBUTIONS = ("Grad-CAM at this block", "Integrated gradients")
"""Methods of attribution."""
_KEPT = 32  # plots
_drawn: dict[tuple[int, bytes], list["Picture"]] = {}
_POINTS = 0.1  # of a probability in percent: a smaller change is none
_ROWS = 5  # classes with a bar
_DPI = 170  # of plots of four inches: sharp on a phone, small enough to send at every step of a slider


class Row(NamedTuple):
    """A class and its probability, also as trained where gates are held."""

    name: str
    now: float
    before: float | None


class Picture(NamedTuple):
    """A plot, and what it shows."""

    title: str
    text: str
    picture: str


def render(
    heading: str, network: Network, photo: Photo, *, block: str | None, force: Force | None, attribution: str
) -> str:
    """The answer as HTML that needs nothing else; what comes from runs and files is escaped.

    Args:
        heading: the network's name.
        network: asked.
        photo: about this image.
        block: shown; None for a network without gates.
        force: on which gates are held, if any are; where they cannot be, the prediction is as trained.
        attribution: one of :data:`ATTRIBUTIONS`.
    """
    unheld = network.unheld(force.block) if force else ""
    force = None if unheld else force
    trained = network.ask(photo)
    held = network.ask(photo, force) if force else trained
    plots = []
    if block is not None:
        plots = [_inside(network, held, block), _over_depth(held, block), *_worth(network, photo, trained)]
    plots.append(_attribution(network, photo, held, None if attribution == ATTRIBUTIONS[1] else block, force))
    return _template().render(
        heading=heading,
        missing=network.missing,
        said=f"{_said(network, photo, trained, held, force)} {unheld}".rstrip(),
        rows=_rows(network, trained, held),
        plots=plots,
    )


def _said(network: Network, photo: Photo, trained: Answer, held: Answer, force: Force | None) -> str:
    truth = "" if photo.label is None else f" (true class {network.classes[photo.label]})"
    said = _says(network, photo, trained)
    if force:
        to = "held at their mean" if force.to == "mean" else f"held {force.to}"
        said = f"with the gates of {force.block} {to}: {_says(network, photo, held)}; as trained: {said}"
    return f"{photo.name}{truth}: {said}." + ("" if network.blocks else " This network has no gates.")


def _says(network: Network, photo: Photo, said: Answer) -> str:
    best = int(said.probabilities.argmax())
    judged = "" if photo.label is None else ", correct" if best == photo.label else ", wrong"
    return f"prediction {network.classes[best]} ({100 * said.probabilities[best].item():.1f} %){judged}"


def _rows(network: Network, trained: Answer, held: Answer) -> list[Row]:
    highest = torch.maximum(trained.probabilities, held.probabilities)
    likely = highest.topk(min(_ROWS, len(highest))).indices
    shown = likely[held.probabilities[likely].argsort(descending=True, stable=True)].tolist()
    now, before = held.probabilities.tolist(), trained.probabilities.tolist()
    return [Row(network.classes[i], now[i], None if held is trained else before[i]) for i in shown]


def _inside(network: Network, said: Answer, block: str) -> Picture:
    view = _view(said, block)
    depth = depth_of(view, 0, network.usual.get(block))
    closed = int((depth.gate < depth.closed).sum())
    sample = counted(network.sample, "test image")
    mean = f"; the black line is the mean over {sample}" if block in network.usual else ""
    drawn = "picture" if view.picture is not None else "squeezes"
    title = f"{block} closes {closed} of {counted(len(depth.gate), 'channel')}"
    if np.abs(depth.gate - depth.neutral).max() < MOVED * depth.gain:
        title = f"The gates of {block} have not moved from their start, {depth.neutral:g}"
    return Picture(
        title,
        f"Top: {drawn} of residual (r) and identity (i); purple is above zero, orange below. Middle: the same after "
        f"gating. Bottom: the gate of each channel{mean}.",
        _embedded(draw_block(depth, drawn)),
    )


def _over_depth(said: Answer, block: str) -> Picture:
    parts = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    quantiles = np.stack([view.gate[0].float().cpu().quantile(parts).numpy() for view in said.views])
    shares = [None if view.residual_share is None else view.residual_share[0].item() for view in said.views]
    names, most = [view.name for view in said.views], max(said.views, key=lambda view: view.gain)
    known = [share for share in shares if share is not None]
    title = "Competition over depth"
    if known:
        low, high = f"{100 * min(known):.0f}", f"{100 * max(known):.0f}"
        title = f"The residual has {low if low == high else f'{low} to {high}'} % of the energy of a block's sum"
    return Picture(
        title,
        "Top: the gates of each block; dark is the middle half of the channels, light the middle 90 %, the line the "
        "median. Bottom: shares of the gated residual (blue) and the identity (orange) in each block's sum, by energy. "
        "Grey: the block shown.",
        _embedded(draw_one_image(names, quantiles, shares, block, neutral=most.neutral, gain=most.gain)),
    )


def _worth(network: Network, photo: Photo, trained: Answer) -> list[Picture]:
    """The same at each step of the slider: drawn once for an image."""
    key = network.number, hashlib.sha256(photo.tensor.numpy().tobytes()).digest()  # a visitor's image is not kept
    if key not in _drawn:
        while len(_drawn) >= _KEPT:
            _drawn.pop(next(iter(_drawn)), None)
        _drawn[key] = _draw_worth(network, photo, trained)
    return _drawn[key]


def _draw_worth(network: Network, photo: Photo, trained: Answer) -> list[Picture]:
    target = int(trained.probabilities.argmax())
    worth = network.worth(photo, target)
    if not worth:
        return []
    most = max(worth, key=lambda name: abs(worth[name]))
    names = [view.name for view in trained.views]
    changes = np.array([worth.get(name, np.nan) for name in names])
    title = f"For this image the gate of {most} is worth most: at its mean, {worth[most]:+.1f} points"
    if abs(worth[most]) < _POINTS:
        title = f"No gate is worth {_POINTS:g} points for this image: each could be at its mean"
    return [
        Picture(
            title,
            f"By how much the probability of {network.classes[target]} changes where the gates of one block are at "
            f"their means over {counted(network.sample, 'test image')}, and all others as trained.",
            _embedded(draw_differences(names, changes)),
        )
    ]


def _attribution(network: Network, photo: Photo, said: Answer, block: str | None, force: Force | None) -> Picture:
    target = int(said.probabilities.argmax())
    heat = network.attribute(photo, target, block, force)
    way = f"Grad-CAM at {block}" if block else "Integrated gradients on the input"
    return Picture(
        f"Attribution of the prediction {network.classes[target]}",
        f"{way} (captum). Purple: evidence for it; orange: against it.",
        _embedded(draw_overlay(photo.pixels, heat.numpy())),
    )


def _view(said: Answer, block: str) -> BlockView:
    return next(view for view in said.views if view.name == block)


def _embedded(figure: Figure) -> str:
    file = io.BytesIO()
    save_figure(figure, file, dpi=_DPI)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@cache
def _template() -> Template:
    environment = html_environment()
    return environment.from_string((files("cmpe_se.commands.explore") / "answer.html.j2").read_text(encoding="utf-8"))
