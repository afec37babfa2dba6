"""A benchmark's rows as a table and as a bar chart."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TypedDict

from matplotlib.figure import Figure
from rich.console import Group
from rich.text import Text

from cmpe_se.commands.benchmark.contenders import NAIVE, PLAIN
from cmpe_se.layers.views import TABLE
from cmpe_se.utils.figures import save_figure
from cmpe_se.utils.plots import BLUE, GREY, ORANGE
from cmpe_se.utils.tables import number_table


class Row(TypedDict):
    """A line of the CSV; :func:`cmpe_se.commands.benchmark.benchmark` says what its numbers are."""

    mode: str
    dtype: str
    engine: str
    merged: bool
    batch_size: int
    contender: str
    images_per_second: float
    milliseconds: float
    ratio: float | None
    low: float
    high: float
    steps: int
    p50: float | None
    p90: float | None
    p99: float | None
    peak_mib: float | None
    memory_ratio: float | None


Rows = Sequence[Row]


def tables_of(rows: Rows, setup: str) -> Group:
    """Rows for the screen: a table for each group of contenders."""
    tables = []
    for name, group in _grouped(rows):
        latency = group[0]["p99"] is not None
        columns = ("images/s", "time", "95 % interval", *(("p50", "p90", "p99") if latency else ()), "MiB", "memory")
        title = f"{name} ({group[0]['steps']} steps each)"
        table = number_table(*columns, title=Text(title, style="bold"), title_justify="left")
        table.columns[0].min_width = 18
        for row in group:
            plain = row["contender"] == PLAIN
            ratio = "" if plain else "none shown" if row["ratio"] is None else f"{row['ratio']:.3f}"
            spread = "" if plain else f"{row['low']:.3f}-{row['high']:.3f}"
            memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
            more = "" if plain or row["memory_ratio"] is None else f"{row['memory_ratio']:.3f}"
            times = [f"{value:.2f}" for value in (row["p50"], row["p90"], row["p99"]) if value is not None]
            table.add_row(row["contender"], f"{row['images_per_second']:,.1f}", ratio, spread, *times, memory, more)
        tables.append(table)
    remarks = "time, memory: ratios to plain. 'none shown': the 95 % interval contains 1."
    if any(row["p99"] is not None for row in rows):
        remarks += " p50, p90, p99: percentiles of a step, in milliseconds."
    return Group(setup + "\n", *tables, remarks)


def plot_ratios(rows: Rows, setup: str, path: Path) -> None:
    """Overheads over the plain network as bars with their intervals, a panel for each group, as PNG."""
    groups = [(name, [row for row in group if row["contender"] != PLAIN]) for name, group in _grouped(rows)]
    groups = [(name, group) for name, group in groups if group]
    if not groups:
        return
    heights = [len(group) + 0.8 for _, group in groups]
    figure = Figure(figsize=(8, 0.42 * sum(heights) + 1.2), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})
    for axes, (name, group) in zip(panels[:, 0], groups, strict=True):
        for place, row in enumerate(reversed(group)):
            middle = 100 * ((row["ratio"] or (row["low"] + row["high"]) / 2) - 1)
            low, high = 100 * (row["low"] - 1), 100 * (row["high"] - 1)
            axes.barh(place, middle, color=_colour(row), alpha=0.9 if row["ratio"] else 0.3)
            axes.plot((low, high), (place, place), color="black", linewidth=1.5)
            said = f"{middle:+.1f} %" if row["ratio"] else "none shown"
            axes.annotate(said, (max(high, 0), place), (6, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(group)), [row["contender"] for row in reversed(group)])
        axes.set_title(name, loc="left", fontsize=10)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("time over the plain network, %  (line: 95 % confidence interval of the median)")
    figure.suptitle(f"Cost of attention: {setup}", fontsize=11)
    save_figure(figure, path, dpi=150)


def _colour(row: Row) -> str:
    kind = TABLE.get(row["contender"])
    if kind and kind.reads == ("residual",):
        return GREY
    return ORANGE if row["contender"].endswith(NAIVE) else BLUE


def _grouped(rows: Rows) -> list[tuple[str, list[Row]]]:
    def key(row: Row) -> str:
        merged = ", merged" if row["merged"] else ""
        return f"{row['mode']}, {row['dtype']}, {row['engine']}{merged}, batch {row['batch_size']}"

    return [(name, list(group)) for name, group in groupby(rows, key)]
