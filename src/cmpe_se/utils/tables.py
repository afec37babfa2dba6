"""Tables for the screen, and for spreadsheets."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from rich import box
from rich.table import Table

from cmpe_se.utils.escaping import csv_cell
from cmpe_se.utils.files import replaced


def number_table(*columns: str, **settings: Any) -> Table:
    """A table of names, in a first column without a head, and of numbers, to the right; it has no rows yet.

    Args:
        columns: heads of the numbers.
        settings: of rich's ``Table``, such as ``title``.
    """
    table = Table(box=box.SIMPLE_HEAD, **settings)
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def write_csv(file: IO[str], columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table of comma-separated values; None is an empty cell, and no text is a spreadsheet's formula.

    Args:
        file: to write to, opened with ``newline=""`` in UTF-8.
        columns: heads.
        rows: as many cells each.
    """
    writer = csv.writer(file)
    for row in (columns, *rows):
        writer.writerow([csv_cell(cell) for cell in row])


def write_csv_file(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Replace a file by a table, as :func:`write_csv` writes it.

    Raises:
        UserError: it cannot be written.
    """
    with replaced(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        write_csv(file, columns, rows)
