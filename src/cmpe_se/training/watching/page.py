"""``progress.html``: a run as it goes on, in one file that a browser needs nothing else for."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from cmpe_se.training.summary import EpochRecord
from cmpe_se.training.watching.gates import GatesRecord
from cmpe_se.utils.html import html_environment
from cmpe_se.utils.line_charts import Band, Line, line_chart
from cmpe_se.utils.plots import BLUE, GREY, ORANGE

REFRESH = 10.0  # seconds between two looks of a browser
_PARTS = (("train", GREY), ("validation", ORANGE), ("test", BLUE))
_RED = "#B00020"
_SMALL = (250, 120)


@dataclass(frozen=True)
class Status:
    """Where a run is.

    Args:
        state: running, finished, stopped or failed.
        facts: names and values, such as of the step.
        patience: seconds without a new page after which a run that has not said that it ended may have been killed.
        reason: why it failed.
    """

    state: str
    facts: Sequence[tuple[str, str]]
    patience: float
    reason: str = ""


def render_page(
    title: str,
    status: Status,
    epochs: int,
    history: Sequence[EpochRecord],
    gates: Sequence[GatesRecord],
    ranges: Mapping[str, tuple[float, float]],
    loss: str = "cross-entropy",
) -> str:
    """The page.

    Args:
        title: of it.
        status: first on it.
        epochs: that the run is to have.
        history: records of its finished epochs.
        gates: of the gates after them.
        ranges: block to where its gate began, and the largest value that it can have.
        loss: what the losses are.
    """
    last = max(epochs, 1)
    charts = [(name, legend, chart) for name, legend, chart in _charts(history, last, loss) if chart]
    panels = [_panel(block, gates, ranges[block], last) for block in ranges] if gates else []
    return _template().render(
        title=title,
        status=status,
        refresh=REFRESH,
        written=time.time(),
        clock=time.strftime("%Y-%m-%d %H:%M:%S"),
        charts=charts,
        panels=panels,
        dead=sum(1 for panel in panels if panel["dead"]),
        images=gates[-1]["images"] if gates else 0,
        colours={"mean": BLUE, "band": _DARK, "wide": _LIGHT, "start": GREY},
    )


_DARK, _LIGHT = "#7fb5d8", "#dcebf5"


@cache
def _template() -> Any:
    text = (files("cmpe_se.training.watching") / "progress.html.j2").read_text(encoding="utf-8")
    return html_environment().from_string(text)


def _charts(history: Sequence[EpochRecord], last: int, loss: str) -> list[tuple[str, list[tuple[str, str]], str]]:
    """Heading, legend (name and colour) and drawing of loss, accuracy and learning rate."""
    found = []
    for heading, kind in ((f"Loss ({loss})", "loss"), ("Top-1 accuracy, %", "top1")):
        lines = {name: Line(colour, _values(history, f"{name}_{kind}")) for name, colour in _PARTS}
        lines = {name: line for name, line in lines.items() if line.points}
        drawn = line_chart(list(lines.values()), title=heading, x_range=(1, last)) if lines else ""
        found.append((heading, [(name, line.colour) for name, line in lines.items()], drawn))
    rate = _values(history, "lr")
    highest = max((value for _, value in rate), default=0.0) or 1.0
    limits = {"x_range": (1, last), "y_range": (0.0, 1.05 * highest)}
    drawn = line_chart([Line(BLUE, rate)], title="Learning rate", **limits) if rate else ""  # type: ignore[arg-type]
    found.append(("Learning rate, of an epoch's last step", [], drawn))
    return found


def _values(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["epoch"], value) for record in history if (value := record.get(key)) is not None]


def _panel(block: str, gates: Sequence[GatesRecord], limits: tuple[float, float], last: int) -> dict[str, Any]:
    """One gate: its mean over the epochs, with both spreads around it."""
    start, gain = limits
    known = [(record["epoch"], record["gates"][block]) for record in gates if block in record["gates"]]
    drawn: list[tuple[int, Mapping[str, Any]]] = [each for each in known if each[1]["mean"] is not None]
    means = [(epoch, values["mean"]) for epoch, values in drawn]

    def band(colour: str, spread: str) -> Band:
        around = [(epoch, values["mean"], values[spread]) for epoch, values in drawn]
        return Band(colour, [(epoch, mean - deviation, mean + deviation) for epoch, mean, deviation in around])

    now = known[-1][1] if known else None
    chart = line_chart(
        [Line(GREY, [(1, start), (last, start)], dashed=True), Line(BLUE, means)],
        title=f"gate of {block}",
        bands=[band(_LIGHT, "channel_spread"), band(_DARK, "spread")],
        x_range=(1, last),
        y_range=(0.0, gain),
        size=_SMALL,
    )
    return {"block": block, "chart": chart, "now": now, "dead": now["dead"] if now else None}
