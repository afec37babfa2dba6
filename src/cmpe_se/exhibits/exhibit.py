"""One plot of a report, with a sentence on what it shows and the numbers behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cmpe_se.utils import tables
from cmpe_se.utils.figures import save_figure

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
    six_digits = ([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)
    tables.write_csv_file(path, columns, six_digits)
