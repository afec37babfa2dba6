"""One plot of a report, with a sentence on what it shows and the numbers behind it."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cmpe_se.utils.files import replaced
from cmpe_se.utils.plots import save_figure

_DPI = 130


@dataclass(frozen=True, eq=False)
class Exhibit:
    """A plot.

    Args:
        name: of its files, without an ending.
        title: what the plot shows, in a sentence.
        text: how it is to be read.
        figure: matplotlib's figure, with that title.
        columns: of the table of its numbers.
        rows: of that table.
    """

    name: str
    title: str
    text: str
    figure: Figure
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def picture(self) -> str:
        """Name of the PNG."""
        return f"{self.name}.png"

    @property
    def table(self) -> str:
        """Name of the CSV."""
        return f"{self.name}.csv"

    def save(self, folder: Path) -> None:
        """Write both into a folder."""
        save_figure(self.figure, folder / self.picture, dpi=_DPI)
        write_csv(folder / self.table, self.columns, self.rows)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table; floats with six digits, None as an empty cell."""
    with replaced(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
